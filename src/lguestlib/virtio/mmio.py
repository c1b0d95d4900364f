"""virtio over MMIO, version 2, as a register model (virtio 1.3, 4.2).

`read` and `write` are what the driver's accesses do; a write returns the effect
it asks of the device's owner, if any.
"""

from collections.abc import Callable
from functools import partial

from lguestlib.abi import virtio_mmio as abi
from lguestlib.virtio.device import Device
from lguestlib.virtio.effects import Effect, QueueStop
from lguestlib.virtio.features import Feature
from lguestlib.virtio.registers import AVAILABLE, DESCRIPTORS, USED, RegisterTransport
from lguestlib.virtio.status import Status

MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR = int.from_bytes(b"lgst", "little")
REGION_SIZE = 0x1000
"""Bytes of guest-physical address space a device takes."""


class MmioTransport(RegisterTransport):
    """The registers of *device*.

    Where those who return used buffers *note* them by `used_buffer`, InterruptStatus
    tells which interrupts are for that.  Where another process serves the queues
    nobody does: then it tells of used buffers as long as the driver is live, and
    some notifications are spurious, which drivers handle (virtio 1.3, 2.7.7.1).
    """

    def __init__(self, device: Device, note: bool = True, own: int = 0) -> None:
        super().__init__(device, own)
        self._noted = note
        self._readers = self._make_readers()
        self._writers = self._make_writers()

    def read(self, offset: int, size: int) -> bytes:
        """*size* bytes the driver reads at *offset*; zeros where it may not."""
        if offset >= abi.VIRTIO_MMIO_CONFIG:
            return self._read_config(offset - abi.VIRTIO_MMIO_CONFIG, size)
        reader = self._readers.get(offset)
        if reader is None or size != 4:
            self.refused += 1
            return bytes(size)
        return reader().to_bytes(4, "little")

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
            abi.VIRTIO_MMIO_QUEUE_NOTIFY: self._notify_queue,
            abi.VIRTIO_MMIO_INTERRUPT_ACK: self._acknowledge,
            abi.VIRTIO_MMIO_STATUS: self._set_status,
            abi.VIRTIO_MMIO_SHM_SEL: lambda value: None,
            abi.VIRTIO_MMIO_QUEUE_RESET: self._reset_queue,
        }
        for part, low in (
            (DESCRIPTORS, abi.VIRTIO_MMIO_QUEUE_DESC_LOW),
            (AVAILABLE, abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW),
            (USED, abi.VIRTIO_MMIO_QUEUE_USED_LOW),
        ):
            for high in (False, True):
                writers[low + 4 * high] = partial(self._set_address, part, high)
        return writers

    def _set_queue_ready(self, value: int) -> Effect | None:
        queue = self._queue()
        if queue is not None and queue.ready and value == 0:
            return QueueStop(self._selected)
        if value != 1:
            self.refused += value != 0
            return None
        return self._enable_queue()

    def _notify_queue(self, value: int) -> Effect | None:
        # Where the driver will go on, in the high half, is what it says: the ring is looked at (2.9).
        return self._notify(value & 0xFFFF if self.features & Feature.NOTIFICATION_DATA else value)

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

    def _interrupt_status(self) -> int:
        pending = self._used_pending or (not self._noted and bool(self._status & Status.DRIVER_OK))
        used = abi.VIRTIO_MMIO_INT_VRING if pending else 0
        return used | (abi.VIRTIO_MMIO_INT_CONFIG if self._config_pending else 0)

    def _acknowledge(self, value: int) -> None:
        if value & abi.VIRTIO_MMIO_INT_VRING:
            self._used_pending = False
        if value & abi.VIRTIO_MMIO_INT_CONFIG:
            self._config_pending = False
