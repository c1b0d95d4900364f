"""virtio over PCI as a register model: common configuration, notifications, ISR status (virtio 1.3, 4.1.4)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from lguestlib.abi import virtio_pci as abi
from lguestlib.abi.layout import offset_of, size_of
from lguestlib.virtio.device import Device
from lguestlib.virtio.effects import QueueStop, Reset
from lguestlib.virtio.features import Feature
from lguestlib.virtio.pci.effects import CONFIG, PciEffect, VectorAssigned
from lguestlib.virtio.registers import AVAILABLE, DESCRIPTORS, USED, QueueRegisters, RegisterTransport

ISR_QUEUE = 1
ISR_CONFIG = abi.VIRTIO_PCI_ISR_CONFIG

NOTIFY_OFF_MULTIPLIER = 4
"""Bytes between the notification addresses of two queues."""

COMMON_SIZE = size_of(abi.virtio_pci_common_cfg) + 8
"""Bytes of the common configuration: the structure, the queue's reset and what else version 1.3 has behind it."""


class _Register(NamedTuple):
    size: int
    read: Callable[[], int]
    write: Callable[[int], Sequence[PciEffect] | None] | None


class PciTransport(RegisterTransport):
    """The registers of *device*, which interrupts by one of *vectors* vectors for each source; *own* as in the base.

    A register of the common configuration is accessed as wide as it is, one of 64
    bits by halves; anything else reads as zeros or does nothing, and is *refused*
    (4.1.3.1, T5).
    """

    GENERATION_MASK = 0xFF

    def __init__(self, device: Device, vectors: int, own: int = 0) -> None:
        super().__init__(device, own)
        self._vectors = vectors
        self._common = self._make_common()

    def _clear(self) -> None:
        super()._clear()
        self.assigned: dict[int, int] = {}
        """The vector of each source that has one: of queues by index, and of `CONFIG`."""
        self._stopping: set[int] = set()

    def queue_stopped(self, index: int) -> None:
        """Queue *index* no longer touches its ring: it is as after a reset of the device (2.6.1, T4)."""
        self._stopping.discard(index)
        self._queues[index] = QueueRegisters(self._maxima[index])

    def read_common(self, offset: int, size: int) -> bytes:
        """*size* bytes of the common configuration that the driver reads at *offset*."""
        register = self._common.get(offset)
        if register is None or register.size != size:
            self.refused += 1
            return bytes(size)
        return register.read().to_bytes(size, "little")

    def write_common(self, offset: int, data: bytes) -> Sequence[PciEffect]:
        """The driver writes *data* to the common configuration at *offset*: what its owner has to see to.

        From a reset's write until it is done, nothing else is taken (T3).
        """
        register = self._common.get(offset)
        if register is None or register.write is None or register.size != len(data):
            self.refused += 1
            return ()
        if self._resetting and offset != _STATUS:
            self.refused += 1
            return ()
        return register.write(int.from_bytes(data, "little")) or ()

    def read_config(self, offset: int, size: int) -> bytes:
        """*size* bytes of the device's config space at *offset*, zeros past its end."""
        return self._read_config(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes *data* into the device's config space at *offset*."""
        if self._resetting:
            self.refused += 1
        else:
            self.device.write_config(offset, data)

    def notify(self, offset: int) -> Sequence[PciEffect]:
        """The driver writes to the notification region at *offset*; which queue, the address says (4.1.4.4).

        What it writes, of whatever width, says nothing that the address or the ring does not (4.1.5.2.1).
        """
        index, rest = divmod(offset, NOTIFY_OFF_MULTIPLIER)
        if rest or self._resetting:
            self.refused += 1
            return ()
        return _some(self._notify(index))

    @property
    def isr(self) -> int:
        """What the ISR status says, without the effect of reading it."""
        return ISR_QUEUE * self._used_pending | ISR_CONFIG * self._config_pending

    def take_isr(self) -> int:
        """The driver reads the ISR status, which is 0 then (4.1.4.5.1)."""
        isr = self.isr
        self._used_pending = self._config_pending = False
        return isr

    def _make_common(self) -> dict[int, _Register]:
        def at(field: str) -> int:
            return offset_of(abi.virtio_pci_common_cfg, field)

        registers = {
            at("device_feature_select"): _Register(4, lambda: self._device_page, self._select_device_page),
            at("device_feature"): _Register(4, self._device_features, None),
            at("guest_feature_select"): _Register(4, lambda: self._driver_page, self._select_driver_page),
            at("guest_feature"): _Register(4, self._accepted_features, self._driver_features),
            at("msix_config"): _Register(2, partial(self._vector, CONFIG), partial(self._assign, CONFIG)),
            at("num_queues"): _Register(2, lambda: len(self._queues), None),
            _STATUS: _Register(1, lambda: int(self.status), self._write_status),
            at("config_generation"): _Register(1, self._config_generation, None),
            at("queue_select"): _Register(2, lambda: self._selected, self._select_queue),
            at("queue_size"): _Register(2, self._queue_size, self._queue_num),
            at("queue_msix_vector"): _Register(2, self._queue_vector, self._assign_queue),
            at("queue_enable"): _Register(2, self._queue_ready, self._write_enable),
            at("queue_notify_off"): _Register(2, self._notify_off, None),
        }
        for name, part in (("desc", DESCRIPTORS), ("avail", AVAILABLE), ("used", USED)):
            for half, high in (("lo", False), ("hi", True)):
                registers[at(f"queue_{name}_{half}")] = _Register(
                    4, partial(self._address, part, high), partial(self._set_address, part, high)
                )
        if self.offered & Feature.RING_RESET:
            registers[abi.VIRTIO_PCI_COMMON_Q_RESET] = _Register(2, self._queue_resetting, self._reset_queue)
        return registers

    def _accepted_features(self) -> int:
        return self.accepted >> 32 * self._driver_page & 0xFFFF_FFFF

    def _write_status(self, value: int) -> Sequence[PciEffect]:
        assigned = list(self.assigned)
        effect = self._set_status(value)
        if isinstance(effect, Reset):
            return [effect, *(VectorAssigned(source, None) for source in assigned)]
        return _some(effect)

    def _vector(self, source: int) -> int:
        return self.assigned.get(source, abi.VIRTIO_MSI_NO_VECTOR)

    def _assign(self, source: int, value: int) -> Sequence[PciEffect]:
        """NO_VECTOR, and a vector that does not exist, are none: the latter reads back so (4.1.5.1.2)."""
        before = self.assigned.get(source)
        vector = value if value < self._vectors else None
        if vector is None:
            self.assigned.pop(source, None)
        else:
            self.assigned[source] = vector
        self.refused += vector is None and value != abi.VIRTIO_MSI_NO_VECTOR
        return [VectorAssigned(source, vector)] if vector != before else ()

    def _queue_vector(self) -> int:
        return abi.VIRTIO_MSI_NO_VECTOR if self._queue() is None else self._vector(self._selected)

    def _assign_queue(self, value: int) -> Sequence[PciEffect]:
        if self._queue() is None:
            self.refused += 1
            return ()
        return self._assign(self._selected, value)

    def _queue_size(self) -> int:
        queue = self._queue()
        return queue.size if queue else 0

    def _notify_off(self) -> int:
        return self._selected if self._queue() else 0

    def _address(self, part: int, high: bool) -> int:
        queue = self._queue()
        return queue.addresses.get((part, high), 0) if queue else 0

    def _write_enable(self, value: int) -> Sequence[PciEffect]:
        # There is no disabling but by a reset (4.1.4.3.2).
        if value != 1:
            self.refused += 1
            return ()
        return _some(self._enable_queue())

    def _queue_resetting(self) -> int:
        return int(self._selected in self._stopping)

    def _reset_queue(self, value: int) -> Sequence[PciEffect]:
        queue = self._queue()
        if value != 1 or queue is None or not queue.ready or not self.features & Feature.RING_RESET:
            self.refused += 1
            return ()
        index = self._selected
        self._stopping.add(index)
        # Its vector is the reset's too, once the queue has nothing more to tell.
        unassigned = self.assigned.pop(index, None) is not None
        return [QueueStop(index), *([VectorAssigned(index, None)] if unassigned else [])]


_STATUS = offset_of(abi.virtio_pci_common_cfg, "device_status")


def _some(effect: PciEffect | None) -> Sequence[PciEffect]:
    return () if effect is None else (effect,)
