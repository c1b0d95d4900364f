"""A machine: guest memory, devices at work on it, and one thread that is the guest.

What runs the guest, and how its notifications and interrupts travel, is the
subclass's: `lguestlib.runtime.kvm`, `lguestlib.runtime.inprocess`.
"""

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd
from lguestlib.abi.prctl import name_thread
from lguestlib.abi.signals import install_interrupt_handler
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.device_runner import DeviceRunner
from lguestlib.runtime.ending import end_thread
from lguestlib.runtime.runner import Runner
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.vhost_user.external import ExternalDevice, ExternalDeviceRunner
from lguestlib.virtio.device import Device
from lguestlib.virtio.mmio import REGION_SIZE

DEVICES_AT = GuestAddress(0xD000_0000)
"""Guest-physical address of the first device's registers; the others follow."""

DEVICES_MAX = 64


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


class Machine(ABC):
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
        self.runners: list[Runner] = []
        self._outcome: Outcome | None = None
        self._ended = eventfd()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="guest", daemon=True)

    def add(self, device: Device) -> Runner:
        """Put *device* on the bus, behind those before it.

        Raises ValueError if the bus is full, or *memory* cannot be shared as the device needs.
        """
        if len(self.runners) == DEVICES_MAX:
            raise ValueError(f"{device.name}: the bus has no room for more than {DEVICES_MAX} devices")
        runner = self._runner(device)
        try:
            self._attach(runner, len(self.runners))
        except BaseException:
            runner.close()
            raise
        self.runners.append(runner)
        return runner

    def _runner(self, device: Device) -> Runner:
        if isinstance(device, ExternalDevice):
            return ExternalDeviceRunner(
                device, self.memory, self.report, lambda: self._stopping, self._interrupt_fd()
            )
        return DeviceRunner(device, self.memory, self.report, self.tracer, self._interrupt_fd())

    def address_of(self, slot: int) -> GuestAddress:
        """The guest-physical address of the registers of the device in *slot*."""
        return GuestAddress(DEVICES_AT + slot * REGION_SIZE)

    def access(self, address: int) -> tuple[Runner, int] | None:
        """The device whose registers hold guest-physical *address*, and the offset into them."""
        slot, offset = divmod(address - DEVICES_AT, REGION_SIZE)
        return (self.runners[slot], offset) if 0 <= slot < len(self.runners) else None

    def _interrupt_fd(self) -> int | None:
        """The eventfd that interrupts the guest for the next device; None for one of its own."""
        return None

    @abstractmethod
    def _attach(self, runner: Runner, slot: int) -> None:
        """Connect the device's kicks and interrupt with the guest."""

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
        name_thread("guest")
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
