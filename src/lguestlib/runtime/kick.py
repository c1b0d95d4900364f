"""How a queue's thread is woken by the driver's notification."""

import os
from typing import Protocol

from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd
from lguestlib.runtime.trace import Tracer


class Kick(Protocol):
    """Wakes one sleeping thread."""

    def wait(self) -> int:
        """Sleep until kicked; return how many kicks came together, at least one."""

    def signal(self) -> None:
        """Kick: the thread's present `wait`, or its next one, returns."""


class EventfdKick:
    """A kick through an eventfd: KVM's ioeventfd, vhost-user's kick fd, LHREQ_EVENTFD.

    It owns the descriptor *fd*, or makes one.
    """

    def __init__(self, fd: int | None = None, tracer: Tracer | None = None) -> None:
        self.fd = eventfd() if fd is None else fd
        self.tracer = tracer

    def wait(self) -> int:
        if self.tracer is None:
            return int.from_bytes(os.read(self.fd, BYTES), "little")
        return int.from_bytes(self.tracer.traced("read", "kick", os.read, self.fd, BYTES), "little")

    def signal(self) -> None:
        os.write(self.fd, SIGNAL)

    def close(self) -> None:
        """Close the descriptor; no thread may be waiting."""
        os.close(self.fd)
