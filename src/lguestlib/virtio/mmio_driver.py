"""The driver's side of virtio over MMIO, version 2 (virtio 1.3, 3.1.1 and 4.2)."""

from typing import Protocol

from lguestlib.abi import virtio_mmio as abi
from lguestlib.virtio.errors import VirtioError
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.mmio import MAGIC, VERSION
from lguestlib.virtio.status import Status

READS_MAX = 1_000_000
"""Reads until a device that does not finish its reset, or whose config space never rests, is given up."""


class Registers(Protocol):
    """A device's register page, as the driver's loads and stores reach it; offsets in bytes."""

    def read(self, offset: int, size: int) -> bytes:
        """Load *size* bytes."""

    def write(self, offset: int, data: bytes) -> None:
        """Store *data*."""


class DeviceRefused(VirtioError):
    """The device is no virtio-mmio device of version 2, or does not do what the driver needs."""


class MmioDriver:
    """Brings up, drives and resets the device behind *registers*.

    In order: `negotiate`, `enable_queue` for each, `ready`.  Raises DeviceRefused.
    """

    def __init__(self, registers: Registers) -> None:
        self._registers = registers
        self._features = 0
        magic, version = self._get(abi.VIRTIO_MMIO_MAGIC_VALUE), self._get(abi.VIRTIO_MMIO_VERSION)
        if (magic, version) != (MAGIC, VERSION):
            raise DeviceRefused(f"virtio-mmio: magic {magic:#x}, version {version}: not a device of version 2")
        self.device_type = self._get(abi.VIRTIO_MMIO_DEVICE_ID)
        """The virtio device ID; 0 where the slot is empty."""

    @property
    def status(self) -> Status:
        """The device status as it reads now."""
        return Status(self._get(abi.VIRTIO_MMIO_STATUS))

    def negotiate(self, wanted: int) -> int:
        """Reset the device, accept of its features those *wanted*, and return them (virtio 1.3, 3.1.1)."""
        self.reset()
        status = Status.ACKNOWLEDGE
        self._set_status(status)
        status |= Status.DRIVER
        self._set_status(status)
        features = self.offered() & wanted
        for page in (0, 1):
            self._put(abi.VIRTIO_MMIO_DRIVER_FEATURES_SEL, page)
            self._put(abi.VIRTIO_MMIO_DRIVER_FEATURES, features >> 32 * page & 0xFFFF_FFFF)
        self._set_status(status | Status.FEATURES_OK)
        if not self.status & Status.FEATURES_OK:
            self._set_status(status | Status.FAILED)
            raise DeviceRefused(f"virtio-mmio: the device does not accept the features {features:#x}")
        self._features = features
        return features

    def offered(self) -> int:
        """The feature bits the device offers."""
        features = 0
        for page in (0, 1):
            self._put(abi.VIRTIO_MMIO_DEVICE_FEATURES_SEL, page)
            features |= self._get(abi.VIRTIO_MMIO_DEVICE_FEATURES) << 32 * page
        return features

    def queue_size_max(self, index: int) -> int:
        """The most descriptors queue *index* may have; 0 where there is no such queue."""
        self._put(abi.VIRTIO_MMIO_QUEUE_SEL, index)
        return self._get(abi.VIRTIO_MMIO_QUEUE_NUM_MAX)

    def enable_queue(self, layout: QueueLayout) -> None:
        """Tell the device where the queue is, and enable it (virtio 1.3, 4.2.3.2)."""
        room = self.queue_size_max(layout.index)
        if layout.size > room:
            raise DeviceRefused(f"virtio-mmio: queue {layout.index} has room for {room}, not {layout.size}")
        self._put(abi.VIRTIO_MMIO_QUEUE_NUM, layout.size)
        for register, address in (
            (abi.VIRTIO_MMIO_QUEUE_DESC_LOW, layout.descriptors),
            (abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW, layout.available),
            (abi.VIRTIO_MMIO_QUEUE_USED_LOW, layout.used),
        ):
            self._put(register, address & 0xFFFF_FFFF)
            self._put(register + 4, address >> 32)
        self._put(abi.VIRTIO_MMIO_QUEUE_READY, 1)
        if not self._get(abi.VIRTIO_MMIO_QUEUE_READY):
            raise DeviceRefused(f"virtio-mmio: the device does not enable queue {layout.index}")

    def reset_queue(self, index: int) -> None:
        """Have the device stop using queue *index*, which may be enabled anew (virtio 1.3, 2.6.1; RING_RESET)."""
        self._put(abi.VIRTIO_MMIO_QUEUE_SEL, index)
        self._put(abi.VIRTIO_MMIO_QUEUE_RESET, 1)
        for _ in range(READS_MAX):
            if not self._get(abi.VIRTIO_MMIO_QUEUE_RESET):
                return
        raise DeviceRefused(f"virtio-mmio: the device does not finish the reset of queue {index}")

    def ready(self) -> None:
        """DRIVER_OK: the device is live from here."""
        self._set_status(self.status | Status.DRIVER_OK)

    def notify(self, index: int, next_available: int = 0) -> None:
        """Notify the device of new chains in queue *index* (virtio 1.3, 4.2.3.3).

        With NOTIFICATION_DATA it is told of the ring's *next_available*, too.
        """
        data = next_available << 16 if self._features & Feature.NOTIFICATION_DATA else 0
        self._put(abi.VIRTIO_MMIO_QUEUE_NOTIFY, index | data)

    def take_interrupt(self) -> int:
        """What the device interrupts for, VIRTIO_MMIO_INT_*, acknowledged; 0 for nothing (4.2.3.4.1)."""
        reasons = self._get(abi.VIRTIO_MMIO_INTERRUPT_STATUS)
        if reasons:
            self._put(abi.VIRTIO_MMIO_INTERRUPT_ACK, reasons)
        return reasons

    def config(self, offset: int, size: int) -> bytes:
        """*size* bytes of the config space at *offset*, all of one state (virtio 1.3, 2.5.1)."""
        for _ in range(READS_MAX):
            before = self._get(abi.VIRTIO_MMIO_CONFIG_GENERATION)
            data = self._registers.read(abi.VIRTIO_MMIO_CONFIG + offset, size)
            if self._get(abi.VIRTIO_MMIO_CONFIG_GENERATION) == before:
                return data
        raise DeviceRefused("virtio-mmio: the config space is never the same twice")

    def reset(self) -> None:
        """Reset the device; it has stopped using the driver's memory when this returns (4.2.3.1, T3)."""
        self._set_status(Status(0))
        for _ in range(READS_MAX):
            if not self._get(abi.VIRTIO_MMIO_STATUS):
                return
        raise DeviceRefused("virtio-mmio: the device does not finish its reset")

    def _set_status(self, status: Status) -> None:
        self._put(abi.VIRTIO_MMIO_STATUS, int(status))

    def _get(self, register: int) -> int:
        return int.from_bytes(self._registers.read(register, 4), "little")

    def _put(self, register: int, value: int) -> None:
        self._registers.write(register, value.to_bytes(4, "little"))
