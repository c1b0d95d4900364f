"""The machine whose guest is a Python function: kicks and interrupts are eventfds."""

import os
import select
from collections.abc import Callable

from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.machine import Outcome, Stopped
from lguestlib.runtime.mmio_machine import MmioMachine
from lguestlib.runtime.runner import MmioRunner
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.features import Feature

Program = Callable[["InprocessMachine"], Outcome]
"""What the guest does: drives the machine's devices and returns how it ended."""


class _Leave(Exception):
    """Unwinds the guest's program when the machine is to stop."""


class InprocessMachine(MmioMachine):
    """Runs *program* as its guest, on a thread of its own.

    The guest's processor has one interrupt pin: `wait_for_interrupt` is its HLT.
    """

    transport_features = int(Feature.NOTIFICATION_DATA)

    def __init__(
        self,
        memory: GuestMemory,
        program: Program,
        report: Callable[[str], None],
        tracer: Tracer | None = None,
    ) -> None:
        super().__init__(memory, report, tracer)
        self._program = program
        self._pin = eventfd()

    def wait_for_interrupt(self, seconds: float | None = None) -> bool:
        """Sleep until some device interrupts, or for so many *seconds*: then False.

        For the program alone.  It does not return once the machine is to stop.
        """
        if seconds is not None:
            waiting = select.poll()
            waiting.register(self._pin, select.POLLIN)
            # A thread that is to stop finds the pin signalled.
            if not waiting.poll(max(0.0, seconds) * 1000):
                return False
        self._take_interrupt()
        self.checkpoint()
        return True

    def _take_interrupt(self) -> None:
        while True:
            try:
                os.read(self._pin, BYTES)
                return
            except BlockingIOError:
                # A vhost-user back-end, which has it too, has made it non-blocking for all.
                os.set_blocking(self._pin, True)

    def checkpoint(self) -> None:
        """For the program's loops that do not sleep: does not return once the machine is to stop."""
        if self._stopping:
            raise _Leave

    def _interrupt_fd(self) -> int | None:
        return os.dup(self._pin)

    def _attach(self, runner: MmioRunner, slot: int) -> None:
        """Nothing to connect: the program signals the kicks itself."""

    def _enter(self) -> Outcome:
        try:
            return self._program(self)
        except _Leave:
            return Stopped()

    def _leave(self) -> None:
        os.write(self._pin, SIGNAL)

    def _detach(self) -> None:
        os.close(self._pin)
