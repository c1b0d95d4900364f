"""A thread that sleeps in a write to a full eventfd goes on when it is told to."""

import errno
import os
import threading
import time
from collections.abc import Iterator

import pytest

from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd
from lguestlib.runtime.interrupt import EventfdInterrupt

FULL = (0xFFFF_FFFF_FFFF_FFFE).to_bytes(8, "little")


@pytest.fixture(params=["this kernel", "an old kernel"])
def counter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A full eventfd, here and where a read of it cannot be asked not to sleep (before Linux 5.8)."""
    if request.param == "an old kernel":

        def refused(*arguments: object) -> int:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "preadv", refused)
    fd = eventfd()
    os.write(fd, FULL)
    yield fd
    os.close(fd)


def test_a_write_that_sleeps_goes_on_and_its_signal_stays(counter: int) -> None:
    interrupt = EventfdInterrupt(lambda: None, counter)
    sleeper = threading.Thread(target=interrupt.signal)
    sleeper.start()
    time.sleep(0.02)
    assert sleeper.is_alive()
    give_up = time.monotonic() + 10
    while sleeper.is_alive() and time.monotonic() < give_up:
        interrupt.unblock()
        sleeper.join(0.01)
    assert not sleeper.is_alive()
    assert os.get_blocking(counter)
    assert 0 < int.from_bytes(os.read(counter, BYTES), "little") < 4


@pytest.mark.parametrize("blocking", [True, False])
def test_it_is_left_as_it_was_found(counter: int, blocking: bool) -> None:
    os.set_blocking(counter, blocking)
    interrupt = EventfdInterrupt(lambda: None, counter)
    interrupt.unblock()
    assert os.get_blocking(counter) is blocking
    assert os.read(counter, BYTES) == SIGNAL
