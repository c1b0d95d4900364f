"""What holds for every test."""

import gc
import os
from collections.abc import Iterator

import pytest


def pytest_collection_finish() -> None:
    """Thousands of tests are there to stay: no collection has to look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_network() -> Iterator[None]:
    """A launcher may move its process into a network namespace: never the one that the tests run in."""
    before = os.readlink("/proc/self/ns/net")
    yield
    assert os.readlink("/proc/self/ns/net") == before
