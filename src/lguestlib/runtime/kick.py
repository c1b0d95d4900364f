"""How a queue's thread is woken by the driver's notification."""

import os
import select
from typing import Protocol

from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd
from lguestlib.runtime.trace import Tracer


class Kick(Protocol):
    """Wakes one sleeping thread."""

    @property
    def fd(self) -> int:
        """The eventfd that `wait` reads."""

    @property
    def tracer(self) -> Tracer | None:
        """Who records that call, or one that does as much."""

    def wait(self) -> int:
        """Sleep until kicked; return how many kicks came together, at least one."""

    def signal(self) -> None:
        """Kick: the thread's present `wait`, or its next one, returns."""


class EventfdKick:
    """A kick through an eventfd: KVM's ioeventfd, vhost-user's kick fd, LHREQ_EVENTFD.

    It owns the descriptor *fd*, or makes one.  One that does not block (QEMU's)
    is slept on in poll(2) ahead of its read: whether it blocks is also the other
    side's, which may read it itself.
    """

    def __init__(self, fd: int | None = None, tracer: Tracer | None = None) -> None:
        self.fd = eventfd() if fd is None else fd
        self.tracer = tracer
        self._poll: select.poll | None = None

    def wait(self) -> int:
        while True:
            try:
                if self._poll:
                    self._poll.poll()
                if self.tracer is None:
                    return int.from_bytes(os.read(self.fd, BYTES), "little")
                return int.from_bytes(self.tracer.traced("read", "kick", os.read, self.fd, BYTES), "little")
            except BlockingIOError:
                self._poll = select.poll()
                self._poll.register(self.fd, select.POLLIN)

    def signal(self) -> None:
        os.write(self.fd, SIGNAL)

    def clear(self) -> None:
        """Forget what has come; no thread may be waiting."""
        come = select.poll()
        come.register(self.fd, select.POLLIN)
        if come.poll(0):
            os.read(self.fd, BYTES)

    def close(self) -> None:
        """Close the descriptor; no thread may be waiting."""
        os.close(self.fd)
