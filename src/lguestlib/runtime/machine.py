"""A machine: guest memory, devices at work on it, and one thread that is the guest.

What runs the guest, how it finds its devices, and how its notifications and
interrupts travel, is the subclass's: `lguestlib.runtime.mmio_machine`,
`lguestlib.runtime.lguest.machine`.
"""

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd
from lguestlib.abi.signals import install_interrupt_handler
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.ending import end_thread
from lguestlib.runtime.naming import name_this_thread
from lguestlib.runtime.runner import Runner
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.device import Device

RunnerType = TypeVar("RunnerType", bound=Runner)


@dataclass(frozen=True)
class PowerOff:
    """The guest has switched the machine off, with its verdict as exit status."""

    verdict: int = 0


@dataclass(frozen=True)
class Reboot:
    """The guest wants to start over."""


@dataclass(frozen=True)
class Stopped:
    """The machine was stopped from outside."""


@dataclass(frozen=True)
class Crash:
    """The guest cannot go on; *reason* is one line."""

    reason: str


Outcome = PowerOff | Reboot | Stopped | Crash


class Machine(ABC, Generic[RunnerType]):
    """Owns *memory*, the devices' threads and the guest's thread; `close` ends them all.

    *report* is given lines for people: a device that failed, the guest's last
    words.  With *tracer* the queue threads' system calls are recorded.
    """

    def __init__(
        self, memory: GuestMemory, report: Callable[[str], None], tracer: Tracer | None = None
    ) -> None:
        self.memory = memory
        self.report = report
        self.tracer = tracer
        self.runners: list[RunnerType] = []
        """Its devices at work, in bus order."""
        self._outcome: Outcome | None = None
        self._ended = eventfd()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="guest", daemon=True)

    @abstractmethod
    def add(self, device: Device) -> RunnerType:
        """Put *device* on the bus, behind those before it.  Raises ValueError if it has no room."""

    @abstractmethod
    def _enter(self) -> Outcome:
        """Be the guest, on the guest's thread, until it ends or `_leave` is called."""

    @abstractmethod
    def _leave(self) -> None:
        """Make `_enter` return soon; called on another thread, perhaps several times."""

    def start(self) -> None:
        """Start the guest's thread."""
        install_interrupt_handler()
        self._thread.start()

    def _run(self) -> None:
        name_this_thread("guest")
        try:
            self._outcome = self._enter()
        except Exception as error:
            self._outcome = Crash(f"{type(error).__name__}: {error}")
        os.write(self._ended, SIGNAL)

    def wait(self) -> Outcome:
        """Sleep until the guest ends; Python signal handlers run meanwhile on the main thread."""
        os.read(self._ended, BYTES)
        os.write(self._ended, SIGNAL)
        return self._outcome or Stopped()

    def finish(self) -> None:
        """The guest has ended by itself: see its last requests through, until `request_stop`."""
        for runner in self.runners:
            runner.finish(lambda: self._stopping)

    def request_stop(self) -> None:
        """Ask the guest's thread to end with `Stopped`, and return at once."""
        self._stopping = True
        os.write(self._ended, SIGNAL)

    def stop(self) -> None:
        """End the guest's thread, then the devices'; return when they are gone."""
        self._stopping = True
        end_thread(self._thread, self._leave)
        for runner in self.runners:
            runner.stop()

    def close(self) -> None:
        """Stop everything and give back every descriptor and mapping."""
        self.stop()
        self._abandon()
        for runner in self.runners:
            runner.close()
        self.runners.clear()
        self.memory.close()

    def _abandon(self) -> None:
        """Give back the machine's own descriptors."""
        self._detach()
        os.close(self._ended)

    def _detach(self) -> None:
        """Give back what the hypervisor holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
