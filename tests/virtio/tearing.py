"""Store to one live field of a ring for ever, from a process of its own.

    python tearing.py FD FIELD HOW

FD is a file of `SIZE` bytes that holds the ring at `LAYOUT`, a packed one where
FIELD is one of `PACKED_FIELDS` and not one of `FIELDS`.  FIELD gets the values of
`VALUES` in turn, through the queue's own view of it, or, if HOW is `pack_into`, as
`struct.pack_into` would.
"""

import struct
import sys
from collections.abc import Iterator
from itertools import cycle

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.region import Region
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.packed_driver import PackedDriverQueue
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.split_driver import SplitDriverQueue

SIZE = 4096
LAYOUT = QueueLayout.contiguous(0, 8, GuestAddress(0))

DEVICE_FIELDS = ("used_flags", "used_idx", "used_ring", "avail_event")
DRIVER_FIELDS = ("avail_flags", "avail_idx", "avail_ring", "used_event")
FIELDS = DEVICE_FIELDS + DRIVER_FIELDS

PACKED_DEVICE_FIELDS = ("flags", "ids", "lengths", "device_event")
PACKED_DRIVER_FIELDS = ("driver_event",)
PACKED_FIELDS = PACKED_DEVICE_FIELDS + PACKED_DRIVER_FIELDS

VALUES = [0x11111111 * digit for digit in range(1, 16)]
"""Of those, cut to 16 bits or not, no part of one and part of another make a third."""


Queue = SplitDeviceQueue | SplitDriverQueue[None] | PackedDeviceQueue | PackedDriverQueue[None]


def queue_of(memory: GuestMemory, field: str, other: bool = False) -> Queue:
    """The side that writes *field*, or the *other* one."""
    if field in PACKED_FIELDS:
        if (field in PACKED_DEVICE_FIELDS) is not other:
            return PackedDeviceQueue(LAYOUT, memory, 0)
        return PackedDriverQueue(LAYOUT, memory, 0)
    if (field in DEVICE_FIELDS) is not other:
        return SplitDeviceQueue(LAYOUT, memory, 0)
    return SplitDriverQueue(LAYOUT, memory, 0)


def view_of(queue: Queue, field: str) -> memoryview:
    """The queue's view of *field*; of a ring, of its second entry."""
    view = getattr(queue, f"_{field}")
    assert isinstance(view, memoryview)
    return view[1:2] if len(view) > 1 else view


def stores(view: memoryview, how: str) -> Iterator[None]:
    """Store the values in turn, one for each step."""
    mask = (1 << 8 * view.itemsize) - 1
    values = cycle([value & mask for value in VALUES])
    if how == "pack_into":
        store, target = struct.Struct(f"<{view.format}").pack_into, view.cast("B")
        for value in values:
            store(target, 0, value)
            yield
    for value in values:
        view[0] = value
        yield


def main(fd: int, field: str, how: str) -> None:
    """Store until killed."""
    memory = GuestMemory([Region.from_fd(GuestAddress(0), SIZE, fd)])
    for _ in stores(view_of(queue_of(memory, field), field), how):
        pass


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
