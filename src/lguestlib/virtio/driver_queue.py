"""A virtqueue's driver side, whichever kind of ring it has."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import DescriptorIndex, QueueLayout
from lguestlib.virtio.packed_driver import PackedDriverQueue
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue

Token = TypeVar("Token")


class DriverQueue(Protocol[Token]):
    """What drives a queue needs of it: see `SplitDriverQueue` and `PackedDriverQueue`."""

    layout: QueueLayout
    index: int
    size: int

    @property
    def free(self) -> int:
        """Descriptors that are in no chain."""

    @property
    def in_flight(self) -> int:
        """Chains the device has."""

    @property
    def next_available(self) -> int:
        """Where the next chain will be made available, as a notification tells it, 16 bits (virtio 1.3, 2.9)."""

    def add(
        self,
        readable: Sequence[Buffer],
        writable: Sequence[Buffer],
        token: Token,
        table: GuestAddress | None = None,
    ) -> DescriptorIndex:
        """Make a chain of buffers available, in an indirect *table* if there is one.

        Raises QueueFull, ValueError, AddressError, struct.error.
        """

    def kick_needed(self) -> bool:
        """Whether the device is to be notified of what was added since the last call."""

    def reap(self) -> list[tuple[Token, int]]:
        """The tokens of the chains used since the last call, each with the bytes written.  Raises QueueError."""

    def disable_interrupts(self) -> None:
        """Tell the device that it need not interrupt."""

    def enable_interrupts(self) -> bool:
        """Ask to be interrupted at the next used chain; True if one came meanwhile."""

    def release(self) -> None:
        """Let go of guest memory; the queue is of no use after."""


def new_driver_queue(layout: QueueLayout, memory: GuestMemory, features: int) -> DriverQueue[Token]:
    """The driver's end of the ring at *layout*, of the kind that the negotiated *features* say.

    Raises QueueLayoutError.
    """
    if features & Feature.RING_PACKED:
        return PackedDriverQueue(layout, memory, features)
    return SplitDriverQueue(layout, memory, features)
