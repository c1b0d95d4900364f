"""How a queue's thread interrupts the guest."""

import errno
import os
import select
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from lguestlib.abi import uio
from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd, is_eventfd
from lguestlib.runtime.trace import Tracer


class Interrupt(Protocol):
    """Raises one of the guest's interrupts, by one system call of the calling thread."""

    def signal(self) -> None:
        """Interrupt the guest."""

    def unblock(self) -> None:
        """Let a thread go on that sleeps in `signal` because whoever is interrupted takes no notice."""


class EventfdInterrupt:
    """An interrupt through an eventfd: KVM's irqfd, vhost-user's call fd.

    *before* runs ahead of the write: a transport notes there what the interrupt
    is for.  It owns the descriptor *fd*, or makes one.
    """

    def __init__(
        self, before: Callable[[], None], fd: int | None = None, tracer: Tracer | None = None
    ) -> None:
        self.fd = eventfd() if fd is None else fd
        self.tracer = tracer
        self._before = before

    def signal(self) -> None:
        self._before()
        if self.tracer is None:
            os.write(self.fd, SIGNAL)
        else:
            self.tracer.traced("write", "interrupt", os.write, self.fd, SIGNAL)

    def signal_config(self) -> None:
        """Interrupt for another reason than used buffers, which its caller has noted."""
        os.write(self.fd, SIGNAL)

    def unblock(self) -> None:
        unblock_eventfd(self.fd)

    def close(self) -> None:
        """Close the descriptor; no thread may still signal."""
        os.close(self.fd)


class CallInterrupt:
    """An interrupt through vhost-user's call descriptor *fd*, an eventfd, pipe or socket, which stays its owner's."""

    def __init__(self, fd: int, tracer: Tracer | None = None) -> None:
        self.fd = fd
        self.tracer = tracer
        # A pipe or a socket that is full cannot be emptied from here: a signal has to end the call.
        self._write = os.write if is_eventfd(fd) else uio.write

    def signal(self) -> None:
        try:
            if self.tracer is None:
                self._write(self.fd, SIGNAL)
            else:
                self.tracer.traced("write", "interrupt", self._write, self.fd, SIGNAL)
        except (BlockingIOError, InterruptedError, ConnectionError):
            # As many interrupts as there is room for are pending; or the front-end has just gone.
            return

    def unblock(self) -> None:
        unblock_eventfd(self.fd)


class NoInterrupt:
    """For a driver that has said it will look by itself."""

    def signal(self) -> None:
        """Nothing to do."""

    def unblock(self) -> None:
        """Nothing sleeps."""


def has_room(fd: int) -> bool:
    """Whether a write of `SIGNAL` to *fd* would not sleep: an eventfd whose counter is full would make it."""
    room = select.poll()
    room.register(fd, select.POLLOUT)
    return bool(room.poll(0))


def unblock_eventfd(fd: int) -> None:
    """Make room in the eventfd *fd* if its counter is full: who sleeps in a write to it goes on.

    A signal there was stays one.
    """
    if has_room(fd):
        return
    # Not to sleep in turn if it has been read meanwhile (EAGAIN), or is a pipe (EBADF).
    with suppress(OSError):
        _read_now(fd)
        if has_room(fd):
            os.write(fd, SIGNAL)


def _read_now(fd: int) -> None:
    """Read the eventfd *fd* without sleeping.  Raises OSError: BlockingIOError if it is zero."""
    try:
        os.preadv(fd, [bytearray(BYTES)], -1, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # The kernel is older than 5.8.  Who sleeps in a read or a write of it goes on doing so.
        blocking = os.get_blocking(fd)
        os.set_blocking(fd, False)
        try:
            os.read(fd, BYTES)
        finally:
            os.set_blocking(fd, blocking)
