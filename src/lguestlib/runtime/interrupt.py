"""How a queue's thread interrupts the guest."""

import os
from collections.abc import Callable
from typing import Protocol

from lguestlib.abi.eventfd import SIGNAL, eventfd
from lguestlib.runtime.trace import Tracer


class Interrupt(Protocol):
    """Raises one of the guest's interrupts, by one system call of the calling thread."""

    def signal(self) -> None:
        """Interrupt the guest."""


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

    def close(self) -> None:
        """Close the descriptor; no thread may still signal."""
        os.close(self.fd)
