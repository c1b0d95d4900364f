"""virtio over MMIO, version 2, as a register model (virtio 1.3, 4.2).

`read` and `write` are what the driver's accesses do; a write returns the effect
it asks of the device's owner, if any.  A reset, and a queue's stop, read back
as done only after the owner has said that they are (T3, T7).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from lguestlib.abi import virtio_mmio as abi
from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.device import Device
from lguestlib.virtio.effects import DriverReady, Effect, Notify, QueueReady, QueueStop, Reset
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout, size_possible
from lguestlib.virtio.status import Status, advance

MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR = int.from_bytes(b"lgst", "little")
REGION_SIZE = 0x1000
"""Bytes of guest-physical address space a device takes."""


@dataclass
class _QueueRegisters:
    size: int
    ready: bool = False
    addresses: dict[int, int] = field(default_factory=dict)


class MmioTransport:
    """The registers of *device*.

    Where those who return used buffers *note* them by `used_buffer`, InterruptStatus
    tells which interrupts are for that.  Where another process serves the queues
    nobody does: then it tells of used buffers as long as the driver is live, and
    some notifications are spurious, which drivers handle (virtio 1.3, 2.7.7.1).
    """

    def __init__(self, device: Device, note: bool = True) -> None:
        self.device = device
        self._noted = note
        # Another process's queues begin anew with the device alone.
        self.offered = device.offered | (int(Feature.RING_RESET) if note else 0)
        self.refused = 0
        """Accesses the specification does not allow, all of them ignored."""
        self._maxima = [queue.size for queue in device.queues()]
        self._generation = 0
        self._config = device.config()
        self._clear()
        self._readers = self._make_readers()
        self._writers = self._make_writers()

    def _clear(self) -> None:
        self._status = Status(0)
        # Flags, not bits of one word: queue threads set them while the driver writes the word.
        self._failed = self._used_pending = self._config_pending = False
        self._resetting = False
        self.accepted = 0
        self._queues = [_QueueRegisters(size) for size in self._maxima]
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
        """Queue *index* no longer touches its ring: QueueReady reads 0 (virtio 1.3, 4.2.2.2)."""
        self._queues[index].ready = False

    def used_buffer(self) -> None:
        """Some queue is about to interrupt for used buffers."""
        self._used_pending = True

    def config_changed(self) -> None:
        """The config space has changed and the driver is about to be interrupted."""
        self._generation = self._generation + 1 & 0xFFFF_FFFF
        self._config_pending = True

    def fail(self) -> None:
        """The device has failed: only a reset helps it (virtio 1.3, 2.1.2)."""
        self._failed = True
        if self._status & Status.DRIVER_OK:
            self._config_pending = True

    def _current_config(self) -> bytes:
        """The config space; what has changed since it was last looked at is a new generation (4.2.2.1, T5)."""
        config = self.device.config()
        if config != self._config:
            self._config = config
            self._generation = self._generation + 1 & 0xFFFF_FFFF
        return config

    def _config_generation(self) -> int:
        self._current_config()
        return self._generation

    def read(self, offset: int, size: int) -> bytes:
        """*size* bytes the driver reads at *offset*; zeros where it may not."""
        if offset >= abi.VIRTIO_MMIO_CONFIG:
            start = offset - abi.VIRTIO_MMIO_CONFIG
            return self._current_config()[start : start + size].ljust(size, b"\0")
        reader = self._readers.get(offset)
        if reader is None or size != 4:
            self.refused += 1
            return bytes(size)
        return (reader() & 0xFFFF_FFFF).to_bytes(4, "little")

    def write(self, offset: int, data: bytes) -> Effect | None:
        """The driver writes *data* at *offset*: the effect its owner has to see to, if any.

        From a reset's write until it is done, nothing else is taken (T3).
        """
        if self._resetting and offset != abi.VIRTIO_MMIO_STATUS:
            self.refused += 1
            return None
        if offset >= abi.VIRTIO_MMIO_CONFIG:
            self.device.write_config(offset - abi.VIRTIO_MMIO_CONFIG, data)
            return None
        writer = self._writers.get(offset)
        if writer is None or len(data) != 4:
            self.refused += 1
            return None
        return writer(int.from_bytes(data, "little"))

    def _make_readers(self) -> dict[int, Callable[[], int]]:
        return {
            abi.VIRTIO_MMIO_MAGIC_VALUE: lambda: MAGIC,
            abi.VIRTIO_MMIO_VERSION: lambda: VERSION,
            abi.VIRTIO_MMIO_DEVICE_ID: lambda: self.device.device_type,
            abi.VIRTIO_MMIO_VENDOR_ID: lambda: VENDOR,
            abi.VIRTIO_MMIO_DEVICE_FEATURES: self._device_features,
            abi.VIRTIO_MMIO_QUEUE_NUM_MAX: self._queue_num_max,
            abi.VIRTIO_MMIO_QUEUE_READY: self._queue_ready,
            abi.VIRTIO_MMIO_INTERRUPT_STATUS: self._interrupt_status,
            abi.VIRTIO_MMIO_STATUS: lambda: int(self.status),
            # No shared memory region exists: a length of all ones says so (4.2.2.1).
            abi.VIRTIO_MMIO_SHM_LEN_LOW: lambda: 0xFFFF_FFFF,
            abi.VIRTIO_MMIO_SHM_LEN_HIGH: lambda: 0xFFFF_FFFF,
            abi.VIRTIO_MMIO_SHM_BASE_LOW: lambda: 0xFFFF_FFFF,
            abi.VIRTIO_MMIO_SHM_BASE_HIGH: lambda: 0xFFFF_FFFF,
            abi.VIRTIO_MMIO_QUEUE_RESET: self._queue_reset,
            abi.VIRTIO_MMIO_CONFIG_GENERATION: self._config_generation,
        }

    def _make_writers(self) -> dict[int, Callable[[int], Effect | None]]:
        writers: dict[int, Callable[[int], Effect | None]] = {
            abi.VIRTIO_MMIO_DEVICE_FEATURES_SEL: self._select_device_page,
            abi.VIRTIO_MMIO_DRIVER_FEATURES: self._driver_features,
            abi.VIRTIO_MMIO_DRIVER_FEATURES_SEL: self._select_driver_page,
            abi.VIRTIO_MMIO_QUEUE_SEL: self._select_queue,
            abi.VIRTIO_MMIO_QUEUE_NUM: self._queue_num,
            abi.VIRTIO_MMIO_QUEUE_READY: self._set_queue_ready,
            abi.VIRTIO_MMIO_QUEUE_NOTIFY: self._notify,
            abi.VIRTIO_MMIO_INTERRUPT_ACK: self._acknowledge,
            abi.VIRTIO_MMIO_STATUS: self._set_status,
            abi.VIRTIO_MMIO_SHM_SEL: lambda value: None,
            abi.VIRTIO_MMIO_QUEUE_RESET: self._reset_queue,
        }
        for low in (
            abi.VIRTIO_MMIO_QUEUE_DESC_LOW, abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW, abi.VIRTIO_MMIO_QUEUE_USED_LOW,
        ):  # fmt: skip
            for register in (low, low + 4):
                writers[register] = partial(self._set_address, register)
        return writers

    def _device_features(self) -> int:
        return self.offered >> 32 * self._device_page if self._device_page < 2 else 0

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

    def _queue(self) -> _QueueRegisters | None:
        if self._selected < len(self._queues):
            return self._queues[self._selected]
        return None

    def _settable(self) -> _QueueRegisters | None:
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

    def _set_address(self, register: int, value: int) -> None:
        queue = self._settable()
        if queue is not None:
            queue.addresses[register] = value

    def _queue_ready(self) -> int:
        queue = self._queue()
        return int(queue is not None and queue.ready)

    def _set_queue_ready(self, value: int) -> Effect | None:
        queue = self._queue()
        if queue is not None and queue.ready and value == 0:
            return QueueStop(self._selected)
        if value != 1:
            self.refused += value != 0
            return None
        if self._settable() is None:
            return None
        self._queues[self._selected].ready = True
        return QueueReady(self._layout(self._selected))

    def _queue_reset(self) -> int:
        # It is over when the write that begins it is.
        self.refused += not self.features & Feature.RING_RESET
        return 0

    def _reset_queue(self, value: int) -> Effect | None:
        """Stop the queue, which may be set up anew then (virtio 1.3, 2.6.1; T4)."""
        queue = self._queue()
        if value != 1 or queue is None or not queue.ready or not self.features & Feature.RING_RESET:
            self.refused += 1
            return None
        return QueueStop(self._selected)

    def _layout(self, index: int) -> QueueLayout:
        queue = self._queues[index]

        def address(low: int) -> GuestAddress:
            return GuestAddress(queue.addresses.get(low, 0) | queue.addresses.get(low + 4, 0) << 32)

        return QueueLayout(
            index,
            queue.size,
            address(abi.VIRTIO_MMIO_QUEUE_DESC_LOW),
            address(abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW),
            address(abi.VIRTIO_MMIO_QUEUE_USED_LOW),
        )

    def _notify(self, value: int) -> Effect | None:
        if value < len(self._queues):
            return Notify(value)
        self.refused += 1
        return None

    def _interrupt_status(self) -> int:
        pending = self._used_pending or (not self._noted and bool(self._status & Status.DRIVER_OK))
        used = abi.VIRTIO_MMIO_INT_VRING if pending else 0
        return used | (abi.VIRTIO_MMIO_INT_CONFIG if self._config_pending else 0)

    def _acknowledge(self, value: int) -> None:
        if value & abi.VIRTIO_MMIO_INT_VRING:
            self._used_pending = False
        if value & abi.VIRTIO_MMIO_INT_CONFIG:
            self._config_pending = False

    def _set_status(self, value: int) -> Effect | None:
        if value == 0:
            self._resetting = True
            return Reset()
        if self._resetting:
            self.refused += 1
            return None
        before = self.status
        self._status = advance(before, value, self._acceptable) & ~Status.NEEDS_RESET
        if self._status & ~before & Status.DRIVER_OK:
            return DriverReady(self.features)
        return None
