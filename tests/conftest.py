"""What holds for every test."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_network() -> Iterator[None]:
    """A launcher may move its process into a network namespace: never the one that the tests run in."""
    before = os.readlink("/proc/self/ns/net")
    yield
    assert os.readlink("/proc/self/ns/net") == before
