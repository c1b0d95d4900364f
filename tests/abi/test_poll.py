"""poll(2) on one descriptor: what it tells, its end, and its interruption."""

import errno
import os
import time
from collections.abc import Iterator

import pytest

from abi.interruption import interrupted
from lguestlib.abi.poll import POLLHUP, POLLIN, POLLOUT, poll


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        try:
            os.close(fd)
        except OSError:
            continue


def test_it_tells_what_has_come_of_what_was_asked_for(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    assert poll(writing, POLLIN | POLLOUT) == POLLOUT
    os.write(writing, b"mail")
    assert poll(reading, POLLIN | POLLOUT) == POLLIN
    os.close(writing)
    assert poll(reading, 0) == POLLHUP


def test_it_ends_in_time_with_nothing(pipe: tuple[int, int]) -> None:
    start = time.monotonic()
    assert poll(pipe[0], POLLIN, 0) == 0
    assert poll(pipe[0], POLLIN, 30) == 0
    assert 0.03 <= time.monotonic() - start < 1


@pytest.mark.parametrize("milliseconds", [-1, 100_000])
def test_a_signal_ends_it(pipe: tuple[int, int], milliseconds: int) -> None:
    assert isinstance(interrupted(lambda: poll(pipe[0], POLLIN, milliseconds)), InterruptedError)


def test_what_no_c_int_holds_is_refused() -> None:
    for fd, milliseconds in ((1 << 31, 0), (0, 1 << 31)):
        with pytest.raises(OverflowError):
            poll(fd, POLLIN, milliseconds)


def test_a_descriptor_that_is_not_open_is_told_of(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    assert poll(pipe[0], POLLIN) == 0x20  # POLLNVAL
