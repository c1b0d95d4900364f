"""Where a device goes on in a ring: what is kept of a queue that is stopped, saved or moved."""

from dataclasses import dataclass
from typing import Self

from lguestlib.abi.virtio_ring import VRING_PACKED_EVENT_F_WRAP_CTR
from lguestlib.virtio.features import Feature

WRAP = 1 << VRING_PACKED_EVENT_F_WRAP_CTR
"""The wrap counter's bit in a packed ring's position."""


@dataclass(frozen=True)
class QueueState:
    """The next chain to take, and the next place to return one to, each in 16 bits.

    Of a split ring: the avail index; where to return chains to stands in the ring
    itself, and *used* is 0.  Of a packed one: a descriptor's index in bits 0 to 14
    and the wrap counter in bit 15 (virtio 1.3, 2.8.1; P8).
    """

    available: int
    used: int = 0

    @classmethod
    def start(cls, features: int) -> Self:
        """The state of a new ring, of the kind that *features* say."""
        return cls(WRAP, WRAP) if features & Feature.RING_PACKED else cls(0)

    @classmethod
    def from_base(cls, base: int) -> Self:
        """What `base` gave, a number of 32 bits."""
        return cls(base & 0xFFFF, base >> 16)

    @property
    def base(self) -> int:
        """As in SET_VRING_BASE and GET_VRING_BASE (vhost-user, "Vring state description"; P8)."""
        return self.available | self.used << 16
