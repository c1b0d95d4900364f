"""What both sides of a packed virtqueue share: flags, positions and event structures (virtio 1.3, 2.8).

A position is a descriptor's place in a cycle of two laps of the ring, 0 to
2 * size - 1: the wrap counter is 1 in the first lap and 0 in the second.
"""

from lguestlib.abi.virtio_ring import (
    VRING_PACKED_DESC_F_AVAIL,
    VRING_PACKED_DESC_F_USED,
    VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE,
)
from lguestlib.memory.fence import Fence
from lguestlib.virtio.queue_state import WRAP

AVAIL = 1 << VRING_PACKED_DESC_F_AVAIL
USED = 1 << VRING_PACKED_DESC_F_USED
BOTH = AVAIL | USED
"""Equal to the wrap counter both: used.  The first equal, the second not: available (P1)."""

# Indices into a view of an event structure.
OFF_WRAP, FLAGS = 0, 1


def off_wrap(position: int, size: int) -> int:
    """*position* as an event structure and `QueueState` have it: an index, and the wrap counter above it."""
    return position | WRAP if position < size else position - size


def position_of(off_wrap: int, size: int) -> int:
    """The position that is written so.  Raises ValueError for an index past the ring."""
    index = off_wrap & WRAP - 1
    if index >= size:
        raise ValueError(f"descriptor {index} of a packed ring of {size}")
    return index if off_wrap & WRAP else index + size


def wants_to_know(
    event: memoryview, event_idx: bool, order: Fence | None, size: int, old: int, moved: int
) -> bool:
    """Whether who writes *event* wants to be told of *moved* descriptors from position *old*, modulo two laps, on.

    With *event_idx* it may name the one it waits for.  What makes no sense is
    taken for ENABLE: to be told once too often is safe (virtio 1.3, 2.8.10; P6).
    """
    flags = event[FLAGS]
    if flags == VRING_PACKED_EVENT_FLAG_DISABLE:
        return False
    if flags != VRING_PACKED_EVENT_FLAG_DESC or not event_idx:
        return True
    if order:
        order()
    awaited = event[OFF_WRAP]
    index = awaited & WRAP - 1
    if index >= size:
        return True
    return ((index if awaited & WRAP else index + size) - old) % (2 * size) < moved
