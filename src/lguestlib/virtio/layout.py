"""Where the three parts of a split virtqueue are (virtio 1.3, 2.7)."""

from dataclasses import dataclass
from typing import NewType, Self

from lguestlib.abi import virtio_ring as abi
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import AddressError, MemoryViews
from lguestlib.virtio.errors import QueueLayoutError

DescriptorIndex = NewType("DescriptorIndex", int)
"""An index into a descriptor table; a chain is known by its first, the head."""

RingIndex = NewType("RingIndex", int)
"""A free-running 16-bit index of the avail or used ring; compare modulo 2^16 (S1)."""

QUEUE_SIZE_MAX = 32768


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
        """The parts one after another from *base*, 16-byte aligned, the used ring at *align*."""
        available = base + 16 * size
        used = -(-(available + 6 + 2 * size) // align) * align
        return cls(index, size, base, GuestAddress(available), GuestAddress(used))

    @property
    def end(self) -> GuestAddress:
        """The first byte after the used ring."""
        return GuestAddress(self.used + 6 + 8 * self.size)

    def check(self, memory: MemoryViews) -> None:
        """Raise QueueLayoutError for a bad size, alignment or extent (virtio 1.3, 2.7; S1, S32)."""
        size = self.size
        if not 0 < size <= QUEUE_SIZE_MAX or size & (size - 1):
            raise QueueLayoutError(self.index, size, 0, "size")
        for part, address, align, length in (
            ("descriptor table", self.descriptors, abi.VRING_DESC_ALIGN_SIZE, 16 * size),
            ("available ring", self.available, abi.VRING_AVAIL_ALIGN_SIZE, 6 + 2 * size),
            ("used ring", self.used, abi.VRING_USED_ALIGN_SIZE, 6 + 8 * size),
        ):
            if address % align:
                raise QueueLayoutError(self.index, size, address, part)
            try:
                memory.slice(address, length)
            except AddressError:
                raise QueueLayoutError(self.index, size, address, part) from None
