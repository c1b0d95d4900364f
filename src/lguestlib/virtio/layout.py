"""Where the three parts of a virtqueue are (virtio 1.3, 2.7 and 2.8).

A split ring has its descriptor table, available ring and used ring there; a packed
one its descriptor ring, the driver's and the device's event suppression structure.
"""

from dataclasses import dataclass
from typing import NewType, Self

from lguestlib.abi import virtio_ring as abi
from lguestlib.abi.layout import size_of
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import AddressError, MemoryViews
from lguestlib.virtio.errors import QueueLayoutError
from lguestlib.virtio.features import Feature

DescriptorIndex = NewType("DescriptorIndex", int)
"""An index into a descriptor table; a chain is known by its first, the head."""

RingIndex = NewType("RingIndex", int)
"""A free-running 16-bit index of the avail or used ring; compare modulo 2^16 (S1)."""

QUEUE_SIZE_MAX = 32768

_Part = tuple[str, GuestAddress, int, int]


@dataclass(frozen=True)
class QueueLayout:
    """A virtqueue's size, in descriptors, and its parts' guest-physical addresses.

    *index* is the queue's number in its device.  `check` says whether it can be.
    """

    index: int
    size: int
    descriptors: GuestAddress
    available: GuestAddress
    used: GuestAddress

    @classmethod
    def contiguous(cls, index: int, size: int, base: GuestAddress, align: int = 4) -> Self:
        """The parts one after another from *base*, 16-byte aligned, the used ring at *align*.

        A packed ring of the same size has room there, too.
        """
        available = base + 16 * size
        used = -(-(available + 6 + 2 * size) // align) * align
        return cls(index, size, base, GuestAddress(available), GuestAddress(used))

    @property
    def end(self) -> GuestAddress:
        """The first byte after the used ring."""
        return GuestAddress(self.used + 6 + 8 * self.size)

    def check(self, memory: MemoryViews, features: int = 0) -> None:
        """Raise QueueLayoutError for a size, alignment or extent that cannot be (S1, S32).

        virtio 1.3, 2.7, or with RING_PACKED among *features* 2.8 and 2.8.10.1: any size then.
        """
        size = self.size
        packed = bool(features & Feature.RING_PACKED)
        if not size_possible(size, features):
            raise QueueLayoutError(self.index, size, 0, "size")
        for part, address, align, length in self._packed_parts() if packed else self._split_parts():
            if address % align:
                raise QueueLayoutError(self.index, size, address, part)
            try:
                memory.slice(address, length)
            except AddressError:
                raise QueueLayoutError(self.index, size, address, part) from None

    def _split_parts(self) -> tuple[_Part, ...]:
        size = self.size
        return (
            ("descriptor table", self.descriptors, abi.VRING_DESC_ALIGN_SIZE, 16 * size),
            ("available ring", self.available, abi.VRING_AVAIL_ALIGN_SIZE, 6 + 2 * size),
            ("used ring", self.used, abi.VRING_USED_ALIGN_SIZE, 6 + 8 * size),
        )

    def _packed_parts(self) -> tuple[_Part, ...]:
        event = size_of(abi.vring_packed_desc_event)
        return (
            ("descriptor ring", self.descriptors, abi.VRING_DESC_ALIGN_SIZE, 16 * self.size),
            ("driver event structure", self.available, event, event),
            ("device event structure", self.used, event, event),
        )


def size_possible(size: int, features: int) -> bool:
    """Whether a ring may have *size* descriptors: only packed ones need no power of two (S1, P2)."""
    return 0 < size <= QUEUE_SIZE_MAX and (bool(features & Feature.RING_PACKED) or not size & size - 1)
