"""lguest's bus as a model: a page of device descriptors behind the guest's memory, and notifications.

Linux, drivers/lguest/lguest_device.c and linux/lguest_launcher.h.  A driver has no
registers: it finds its device's descriptor in the page, and writes the status and
the features it accepts there, in memory of its own, which is read once for each use.
That it has, and that there is work in a queue, it tells by notifying a guest-physical
address; `LguestBus.notify` says what of.

A device is started when its driver says so, or by a first kick.  Kernels from 3.1
on notify the status once their driver has accepted features, as ACKNOWLEDGE and
DRIVER, and use the device at once; those before notify every change of it,
ACKNOWLEDGE first, and features are accepted only after that to DRIVER (T21).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lguestlib.abi.layout import offset_of, size_of
from lguestlib.abi.lguest import LGUEST_IRQS, LGUEST_VRING_ALIGN, lguest_device_desc, lguest_vqconfig
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import AddressError, GuestMemory
from lguestlib.virtio.device import Device
from lguestlib.virtio.effects import DriverFailed, DriverNear, DriverReady, Effect, Notify, Reset
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.status import Status

PAGE = 4096

DEVICE_PAGES = 256
"""Pages behind the guest's memory: the descriptors', and the rings'."""

EARLY_TEXT_MAX = 4096
"""Bytes of early console text taken at once; Linux sends 16."""

FIRST_IRQ = 1

_LENGTH_MAX = 0xFF
"""What a descriptor's u8 can count: a configuration that is longer is cut."""

_LEGACY_FEATURES = 0xFFFF_FFFF
"""The drivers are all legacy ones: VERSION_1 and what is above it are not for them."""


class BusFull(ValueError):
    """There is no place for another device; the message is one line with what is short."""


@dataclass(frozen=True)
class EarlyText:
    """What the guest has to say before it has a console."""

    text: bytes


@dataclass(frozen=True)
class Told:
    """The device in *slot* is to see to *effect*."""

    slot: int
    effect: Effect


@dataclass(frozen=True)
class Stray:
    """There is nothing to be notified at *address*."""

    address: int


def legacy_features(device: Device) -> int:
    """What *device* offers to a legacy driver, 32 bits (virtio 1.3, 7.4).

    EVENT_IDX among them: a driver that knows it, Linux from 3.0 on, saves
    interrupts and notifications by it, and one that does not leaves it.
    """
    offered = device.offered | device.legacy_features | int(Feature.NOTIFY_ON_EMPTY)
    return offered & ~device.withheld & _LEGACY_FEATURES


class LguestTransport:
    """*device*'s descriptor, at *address* in guest memory, and its rings, interrupted by *irqs*.

    Made by `LguestBus.add`.
    """

    def __init__(
        self,
        device: Device,
        memory: GuestMemory,
        address: GuestAddress,
        layouts: Sequence[QueueLayout],
        irqs: Sequence[int],
    ) -> None:
        self.device = device
        self.address = address
        self.layouts = tuple(layouts)
        """Of all its queues: the launcher has placed them."""
        self.irqs = tuple(irqs)
        """Each queue's interrupt."""
        self.offered = legacy_features(device)
        self.features = 0
        """The features negotiated, as they were when the device started."""
        self.started = False
        """Whether it has been, since its last reset."""
        self._memory = memory
        # A kernel before 3.1, which will notify DRIVER_OK too.
        self._tells_all = False
        self._feature_size = -(-self.offered.bit_length() // 8)
        self._config_size = min(len(device.config()), _LENGTH_MAX)
        self._features_at = address + size_of(lguest_device_desc) + size_of(lguest_vqconfig) * len(layouts)
        self._config_at = GuestAddress(self._features_at + 2 * self._feature_size)
        self.size = self._config_at + self._config_size - address
        """Bytes of the descriptor and of what belongs to it."""

    def place(self) -> None:
        """Write the descriptor, with status and accepted features 0."""
        descriptor = lguest_device_desc(
            type=self.device.device_type,
            num_vq=len(self.layouts),
            feature_len=self._feature_size,
            config_len=self._config_size,
        )
        queues = b"".join(
            bytes(lguest_vqconfig(num=layout.size, irq=irq, pfn=layout.descriptors // PAGE))
            for layout, irq in zip(self.layouts, self.irqs)
        )
        offered = self.offered.to_bytes(self._feature_size, "little")
        self._memory.write(self.address, bytes(descriptor) + queues + offered + bytes(self._feature_size))
        self.config_changed()

    @property
    def status(self) -> Status:
        """The device status, as the driver has left it in memory."""
        at = GuestAddress(self.address + offset_of(lguest_device_desc, "status"))
        return Status(self._memory.read(at, 1)[0])

    def status_changed(self) -> Effect | None:
        """The driver notifies the descriptor: it has written the status."""
        status = self.status
        if status == 0:
            return Reset()
        if status & Status.FAILED:
            return DriverFailed()
        if status == Status.ACKNOWLEDGE:
            self._tells_all = True
        if self.started or not status & Status.DRIVER:
            return None
        if self._tells_all and not status & Status.DRIVER_OK:
            return DriverNear()
        return self._start()

    def kicked(self, index: int) -> Effect | None:
        """The driver notifies queue *index*: no eventfd took it, or one whose reader has not been started."""
        if self.started:
            return Notify(index)
        status = self.status
        return self._start() if status & Status.DRIVER and not status & Status.FAILED else None

    def _start(self) -> Effect:
        self.started = True
        accepted = self._memory.read(GuestAddress(self._features_at + self._feature_size), self._feature_size)
        self.features = int.from_bytes(accepted, "little") & self.offered
        return DriverReady(self.features)

    def reset_done(self) -> None:
        """Every queue has stopped: rings and accepted features are zero from now on."""
        for layout in self.layouts:
            self._memory.zero(layout.descriptors, layout.end - layout.descriptors)
        self._memory.zero(GuestAddress(self._features_at + self._feature_size), self._feature_size)
        self.started = self._tells_all = False
        self.features = 0

    def queue_stopped(self, index: int) -> None:
        """Nothing to tell: no queue of a legacy device stops alone."""

    def fail(self) -> None:
        """Nothing to tell: a legacy driver does not know that a device can need a reset."""

    def config_changed(self) -> None:
        """Put the configuration as it is now into memory, cut to what the descriptor counts."""
        self._memory.write(self._config_at, self.device.config()[: self._config_size].ljust(self._config_size, b"\0"))


class LguestBus:
    """The device page of a guest with *size* bytes of RAM from 0, in *memory*, which goes on behind them.

    *memory* has to hold `DEVICE_PAGES` pages there.
    """

    def __init__(self, memory: GuestMemory, size: int) -> None:
        self.size = size
        self.transports: list[LguestTransport] = []
        """In the order of the page."""
        self._memory = memory
        self._descriptor_end = GuestAddress(size)
        self._rings_end = GuestAddress(size + PAGE)
        self._next_irq = FIRST_IRQ
        self._notified: dict[int, partial[Told | None]] = {}

    @property
    def end(self) -> GuestAddress:
        """The first address the guest may not touch: behind the last ring, on a page."""
        return self._rings_end

    def add(self, device: Device) -> LguestTransport:
        """Put *device* into the page, behind those before it, its rings behind theirs.

        Raises BusFull, and leaves everything as it was.
        """
        layouts: list[QueueLayout] = []
        at = self._rings_end
        for index, queue in enumerate(device.queues()):
            layout = QueueLayout.contiguous(index, queue.size, at, LGUEST_VRING_ALIGN)
            layouts.append(layout)
            at = GuestAddress(-(-layout.end // PAGE) * PAGE)
        irqs = range(self._next_irq, self._next_irq + len(layouts))
        transport = LguestTransport(device, self._memory, self._descriptor_end, layouts, irqs)
        self._check_room(transport, at)
        slot = len(self.transports)
        self.transports.append(transport)
        self._notified[transport.address] = partial(self._told, slot, None)
        for layout in layouts:
            self._notified[layout.descriptors] = partial(self._told, slot, layout.index)
        self._descriptor_end = GuestAddress(self._descriptor_end + transport.size)
        self._rings_end = at
        self._next_irq = irqs.stop
        transport.place()
        return transport

    def _check_room(self, transport: LguestTransport, rings_end: int) -> None:
        name, irqs = transport.device.name, len(transport.irqs)
        left = LGUEST_IRQS - self._next_irq
        if irqs > left:
            raise BusFull(f"{name}: {irqs} interrupts, of {LGUEST_IRQS - FIRST_IRQ} on the bus {left} are left")
        pages, top = (rings_end - self._rings_end) // PAGE, self.size + DEVICE_PAGES * PAGE
        if rings_end > top:
            left = (top - self._rings_end) // PAGE
            raise BusFull(f"{name}: {pages} pages of rings, of {DEVICE_PAGES} device pages {left} are left")
        # A type of 0 ends the page.
        left = self.size + PAGE - self._descriptor_end - 1
        if transport.size > left:
            raise BusFull(f"{name}: a descriptor of {transport.size} bytes, of the page {left} are left")

    def notify(self, address: int) -> EarlyText | Told | Stray | None:
        """The guest notifies guest-physical *address*, and no eventfd took it; None for nothing to see to."""
        told = self._notified.get(address)
        if told is not None:
            return told()
        try:
            return EarlyText(self._text_at(address))
        except AddressError:
            return Stray(address)

    def _told(self, slot: int, queue: int | None) -> Told | None:
        transport = self.transports[slot]
        effect = transport.status_changed() if queue is None else transport.kicked(queue)
        return None if effect is None else Told(slot, effect)

    def _text_at(self, address: int) -> bytes:
        """The bytes at *address* up to a zero, or to the end of RAM.  Raises AddressError."""
        length = min(self.size - address, EARLY_TEXT_MAX)
        if length <= 0:
            raise AddressError(address, 1)
        return self._memory.read(GuestAddress(address), length).partition(b"\0")[0]
