"""eventfd(2): a counter that a read takes and resets."""

import errno
import os
import resource

import pytest

from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd


def test_signals_add_up_and_one_read_takes_them_all() -> None:
    fd = eventfd()
    try:
        os.write(fd, SIGNAL)
        os.write(fd, SIGNAL)
        assert os.eventfd_read(fd) == 2
        os.write(fd, SIGNAL)
        assert os.read(fd, BYTES) == SIGNAL
    finally:
        os.close(fd)


def test_it_starts_at_its_initial_value_blocks_and_is_not_inherited() -> None:
    fd = eventfd((1 << 32) - 1)
    try:
        assert os.eventfd_read(fd) == (1 << 32) - 1
        assert os.get_blocking(fd)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("initial", [-1, 1 << 32, 1 << 64])
def test_s16_an_initial_value_that_does_not_fit_is_refused(initial: int) -> None:
    with pytest.raises(OverflowError, match="eventfd"):
        eventfd(initial)


def test_no_descriptor_left_is_emfile_and_names_the_call() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match=r"^\[Errno 24\] eventfd: Too many open files$") as caught:
            eventfd()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE


def test_a_system_without_it_is_enosys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "eventfd")
    with pytest.raises(OSError, match="eventfd") as caught:
        eventfd()
    assert caught.value.errno == errno.ENOSYS
