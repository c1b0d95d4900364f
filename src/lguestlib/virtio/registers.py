"""What the registers of a device hold, wherever a transport has put them.

The part that virtio over MMIO and virtio over PCI have in common: status, features,
the set-up of queues, the config space and its generation (virtio 1.3, 2.1 to 2.5 and
3.1.1).  A reset, and a queue's stop, read back as done only after the device's owner
has said that they are (T3, T7).
"""

from dataclasses import dataclass, field

from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.device import Device
from lguestlib.virtio.effects import DriverReady, Notify, QueueReady, Reset
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout, size_possible
from lguestlib.virtio.status import Status, advance

DESCRIPTORS, AVAILABLE, USED = range(3)
"""The parts of a queue whose addresses a driver writes, half by half."""


@dataclass
class QueueRegisters:
    """What the driver has said of a queue."""

    size: int
    ready: bool = False
    addresses: dict[tuple[int, bool], int] = field(default_factory=dict)
    """32 bits each, by part and whether they are the high half."""

    def address(self, part: int) -> GuestAddress:
        """Where *part* is, as far as it has been written."""
        low, high = self.addresses.get((part, False), 0), self.addresses.get((part, True), 0)
        return GuestAddress(low | high << 32)


class RegisterTransport:
    """Base of `MmioTransport` and `PciTransport`: the state of *device*, and what driver and owner do to it.

    Beside the device's it offers *own* features: the transport's, which are no matter of who serves the queues.
    """

    GENERATION_MASK = 0xFFFF_FFFF
    """The bits of the config space's generation that the driver sees."""

    def __init__(self, device: Device, own: int = 0) -> None:
        self.device = device
        self.offered = device.offered | own & ~device.withheld
        self.refused = 0
        """Accesses the specification does not allow, all of them ignored."""
        self._maxima = [queue.size for queue in device.queues()]
        self._generation = 0
        self._config = device.config()
        self._clear()

    def _clear(self) -> None:
        self._status = Status(0)
        # Flags, not bits of one word: queue threads set them while the driver writes the word.
        self._failed = self._used_pending = self._config_pending = False
        self._resetting = False
        self.accepted = 0
        self._queues = [QueueRegisters(size) for size in self._maxima]
        self._device_page = self._driver_page = self._selected = 0

    @property
    def status(self) -> Status:
        """The device status field."""
        return self._status | Status.NEEDS_RESET if self._failed else self._status

    @property
    def features(self) -> int:
        """The features negotiated, once FEATURES_OK is set."""
        return self.accepted & self.offered

    @property
    def layouts(self) -> list[QueueLayout]:
        """The layouts of the ready queues."""
        return [self._layout(index) for index, queue in enumerate(self._queues) if queue.ready]

    def reset_done(self) -> None:
        """Every queue has stopped: the status reads 0 from now on (virtio 1.3, 2.4.1)."""
        self._clear()

    def queue_stopped(self, index: int) -> None:
        """Queue *index* no longer touches its ring, and reads back as not enabled."""
        self._queues[index].ready = False

    def used_buffer(self) -> None:
        """Some queue is about to interrupt for used buffers."""
        self._used_pending = True

    def config_changed(self) -> None:
        """The config space has changed and the driver is about to be interrupted."""
        self._next_generation()
        self._config_pending = True

    def fail(self) -> None:
        """The device has failed: only a reset helps it (virtio 1.3, 2.1.2)."""
        self._failed = True
        if self._status & Status.DRIVER_OK:
            self._config_pending = True

    def _next_generation(self) -> None:
        self._generation = self._generation + 1 & self.GENERATION_MASK

    def _current_config(self) -> bytes:
        """The config space; what has changed since it was last looked at is a new generation (2.5.3, T5)."""
        config = self.device.config()
        if config != self._config:
            self._config = config
            self._next_generation()
        return config

    def _config_generation(self) -> int:
        self._current_config()
        return self._generation

    def _read_config(self, offset: int, size: int) -> bytes:
        return self._current_config()[offset : offset + size].ljust(size, b"\0")

    def _device_features(self) -> int:
        return self.offered >> 32 * self._device_page & 0xFFFF_FFFF

    def _select_device_page(self, value: int) -> None:
        self._device_page = value

    def _select_driver_page(self, value: int) -> None:
        self._driver_page = value

    def _driver_features(self, value: int) -> None:
        # Frozen once FEATURES_OK is set (virtio 1.3, 2.2.1 and 3.1.1).
        if self.status & Status.FEATURES_OK or not self.status & Status.DRIVER:
            self.refused += 1
        elif self._driver_page < 2:
            shift = 32 * self._driver_page
            self.accepted = self.accepted & ~(0xFFFF_FFFF << shift) | value << shift
        elif value:
            self.refused += 1

    def _acceptable(self) -> bool:
        return not self.accepted & ~self.offered and bool(self.accepted & Feature.VERSION_1)

    def _select_queue(self, value: int) -> None:
        self._selected = value

    def _queue(self) -> QueueRegisters | None:
        if self._selected < len(self._queues):
            return self._queues[self._selected]
        return None

    def _settable(self) -> QueueRegisters | None:
        queue = self._queue()
        if queue is None or queue.ready or not self.status & Status.FEATURES_OK:
            self.refused += 1
            return None
        return queue

    def _queue_num_max(self) -> int:
        return self._maxima[self._selected] if self._selected < len(self._maxima) else 0

    def _queue_num(self, value: int) -> None:
        queue = self._settable()
        if queue is None:
            return
        if value <= self._queue_num_max() and size_possible(value, self.features):
            queue.size = value
        else:
            self.refused += 1

    def _set_address(self, part: int, high: bool, value: int) -> None:
        queue = self._settable()
        if queue is not None:
            queue.addresses[part, high] = value

    def _queue_ready(self) -> int:
        queue = self._queue()
        return int(queue is not None and queue.ready)

    def _enable_queue(self) -> QueueReady | None:
        queue = self._settable()
        if queue is None:
            return None
        queue.ready = True
        return QueueReady(self._layout(self._selected))

    def _layout(self, index: int) -> QueueLayout:
        queue = self._queues[index]
        parts = (queue.address(part) for part in (DESCRIPTORS, AVAILABLE, USED))
        return QueueLayout(index, queue.size, *parts)

    def _notify(self, value: int) -> Notify | None:
        if value < len(self._queues):
            return Notify(value)
        self.refused += 1
        return None

    def _set_status(self, value: int) -> DriverReady | Reset | None:
        if value == 0:
            self._resetting = True
            return Reset()
        if self._resetting:
            self.refused += 1
            return None
        before = self.status
        self._status = advance(before, value, self._acceptable)
        if self._status & ~before & Status.DRIVER_OK:
            return DriverReady(self.features)
        return None
