"""A device's PCI function, connected with KVM: its doorbells, its messages, its pin."""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from lguestlib.memory.address import GuestAddress
from lguestlib.runtime.interrupt import EventfdInterrupt
from lguestlib.runtime.kick import EventfdKick
from lguestlib.runtime.pc.vectors import Routes, Vectors, Wires
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.device import Device
from lguestlib.virtio.effects import DriverReady, Effect, Notify, QueueReady, QueueStop, Reset
from lguestlib.virtio.features import Feature
from lguestlib.virtio.pci.effects import (
    CONFIG,
    BarMoved,
    MsixEnabled,
    PciEffect,
    PinLevel,
    VectorAssigned,
    VectorChanged,
)
from lguestlib.virtio.pci.function import PciFunction
from lguestlib.virtio.status import Status

Result = TypeVar("Result")


class Doorbells(Wires, Protocol):
    """What is asked of the virtual machine, `Vm`, besides."""

    def add_doorbell(self, address: GuestAddress, length: int, fd: int, about: object) -> None:
        """A write of *length* bytes to *address*, of any length for 0, signals *fd*."""

    def remove_doorbell(self, address: GuestAddress, length: int, fd: int, about: object) -> None:
        """It does not any more."""


class PciInterrupt:
    """A source's interrupt: a message if *by_message*, and otherwise the function's pin, which *assert_pin* asserts."""

    def __init__(self, assert_pin: Callable[[], None], tracer: Tracer | None) -> None:
        self._message = EventfdInterrupt(lambda: None, None, tracer)
        self._assert_pin = assert_pin
        self.by_message = False

    @property
    def fd(self) -> int:
        """The eventfd of the message."""
        return self._message.fd

    def signal(self) -> None:
        """Interrupt the guest."""
        if self.by_message:
            self._message.signal()
        else:
            self._assert_pin()

    def unblock(self) -> None:
        """Let a thread go on that sleeps in `signal`."""
        self._message.unblock()

    def close(self) -> None:
        """Close the descriptor; no thread may still signal."""
        self._message.close()


class PciRegisters:
    """The registers of *device*, its interrupts, and what connects both with the virtual machine behind *wires*.

    Each queue has its notification address, an ioeventfd, and its interrupt, which is
    an irqfd as soon as the driver has given it a vector.  *set_pin* is told the level
    of the function's pin.  To be `connect`ed before the first access; then accesses by
    any number of threads.
    """

    def __init__(
        self,
        device: Device,
        wires: Doorbells,
        routes: Routes,
        set_pin: Callable[[bool], None],
        doorbell_length: int = 0,
        tracer: Tracer | None = None,
    ) -> None:
        # A doorbell of one length alone would be rung in vain: each notification would leave the guest.
        any_length = doorbell_length == 0
        self.function = PciFunction(device, own=int(Feature.NOTIFICATION_DATA) if any_length else 0)
        self.config_interrupt = PciInterrupt(self._update_pin, tracer)
        self.interrupts = [PciInterrupt(self._assert_pin, tracer) for _ in device.queues()]
        """Of each queue."""
        self._wires = wires
        self._set_pin = set_pin
        self._doorbell_length = doorbell_length
        fds = {source: interrupt.fd for source, interrupt in enumerate(self.interrupts)}
        self.vectors = Vectors(wires, routes, fds | {CONFIG: self.config_interrupt.fd}, device.name)
        self.function.msix.pending = self.vectors.pending
        self._about = device.name
        self._kicks: Sequence[EventfdKick] = ()
        self._apply: Callable[[Effect], None] = lambda effect: None
        self._bar: GuestAddress | None = None
        # One access at a time, with all that it asks for.
        self._accessing = threading.Lock()
        # Held by whoever looks at the model or changes it: queue threads too, where they assert the pin.
        self._model = threading.RLock()

    def connect(self, kicks: Sequence[EventfdKick], apply: Callable[[Effect], None]) -> None:
        """Notifications go to *kicks*, and what the driver asks for to *apply*."""
        self._kicks, self._apply = kicks, apply

    @property
    def bar(self) -> GuestAddress | None:
        """Where the registers are; None while the function does not decode memory."""
        return self.function.bar

    def read(self, offset: int, size: int) -> bytes:
        """*size* bytes the driver reads of the registers at *offset*."""
        return self._access(lambda: self.function.read(offset, size))

    def write(self, offset: int, data: bytes) -> None:
        """The driver writes *data* to the registers at *offset*; done when this returns."""
        self._access(lambda: self.function.write(offset, data))

    def read_config(self, offset: int, size: int) -> bytes:
        """*size* bytes of configuration space at *offset*."""
        return self._access(lambda: self.function.read_config(offset, size))

    def write_config(self, offset: int, data: bytes) -> None:
        """Write *data* to configuration space at *offset*; done when this returns."""
        self._access(lambda: self.function.write_config(offset, data))

    def _access(self, access: Callable[[], Result]) -> Result:
        with self._accessing:
            with self._model:
                result = access()
                effects = self._take_effects()
            for effect in effects:
                self._see_to(effect)
            return result

    def _take_effects(self) -> list[PciEffect]:
        """What is to be seen to, less the pin's level, which must not be overtaken by another."""
        effects = self.function.take_effects()
        for effect in effects:
            if isinstance(effect, PinLevel):
                self._set_pin(effect.asserted)
        return [effect for effect in effects if not isinstance(effect, PinLevel)]

    def _see_to(self, effect: PciEffect) -> None:
        match effect:
            case VectorChanged(vector, message):
                self.vectors.change(vector, message)
            case VectorAssigned(source, vector):
                self.vectors.assign(source, vector)
            case MsixEnabled(enabled):
                for interrupt in (self.config_interrupt, *self.interrupts):
                    interrupt.by_message = enabled
            case BarMoved(address):
                self._move_doorbells(address)
            case Reset():
                self._apply(effect)
                self._update_pin()
            case DriverReady() | Notify() | QueueReady() | QueueStop():
                self._apply(effect)

    def _move_doorbells(self, bar: GuestAddress | None) -> None:
        before, self._bar = self._bar, bar
        for queue, kick in enumerate(self._kicks):
            if before is not None:
                at = self.function.notify_address(before, queue)
                self._wires.remove_doorbell(at, self._doorbell_length, kick.fd, self._about)
            if bar is not None:
                at = self.function.notify_address(bar, queue)
                self._wires.add_doorbell(at, self._doorbell_length, kick.fd, self._about)

    def _assert_pin(self) -> None:
        """A queue has used buffers."""
        with self._model:
            self.function.transport.used_buffer()
            self._update_pin()

    def _update_pin(self) -> None:
        with self._model:
            self.function.update_pin()
            self._take_effects()

    def config_changed(self) -> None:
        """The device's config space has changed: tell a driver that is live."""
        if self.function.transport.status & Status.DRIVER_OK:
            with self._model:
                self.function.transport.config_changed()
            self.config_interrupt.signal()

    def close(self) -> None:
        """Close the interrupts' descriptors; no thread may still signal."""
        for interrupt in (self.config_interrupt, *self.interrupts):
            interrupt.close()
