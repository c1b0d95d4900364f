"""What tests of threads and descriptors need."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture
def source() -> Iterator[tuple[int, int]]:
    """A pipe, its reader and its writer: where a device's work comes from outside."""
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)
