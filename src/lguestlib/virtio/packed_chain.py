"""A chain of a packed ring as the device reads it: the readable statement of its rules (virtio 1.3, 2.8).

A chain is consecutive descriptors while NEXT is set, the last of which has the
buffer ID; or one descriptor that names an indirect table, whose entries follow
each other by position (P4, P7).
"""

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from lguestlib.abi.virtio_ring import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lguestlib.memory.guest import MemoryViews
from lguestlib.virtio import errors
from lguestlib.virtio.chain import DESCRIPTOR, gather, indirect_table
from lguestlib.virtio.layout import DescriptorIndex

FIRST = Struct("<QIH")
"""`vring_packed_desc` but for the flags, which were read before as one: addr, len, id (P3)."""


class PackedDescriptor(NamedTuple):
    """A copy of `vring_packed_desc`."""

    address: int
    length: int
    id: int
    flags: int


def read_row(table: memoryview, size: int, first: int, flags: int) -> list[PackedDescriptor]:
    """The descriptors, each read once, from index *first* on while NEXT is set, round the ring's end (P2).

    *flags* are the first one's.  No more than *size*, the last of which has NEXT
    where there is no end.
    """
    address, length, number = FIRST.unpack_from(table, 16 * first)
    row = [PackedDescriptor(address, length, number, flags)]
    while row[-1].flags & VRING_DESC_F_NEXT and len(row) < size:
        index = (first + len(row)) % size
        row.append(PackedDescriptor(*DESCRIPTOR.unpack_from(table, 16 * index)))
    return row


def buffer_id(queue: int, first: DescriptorIndex, row: list[PackedDescriptor], size: int, free: int) -> int:
    """The buffer ID of the chain in *row*, of whose ring's descriptors so many are *free*: not in flight.

    Raises DescriptorLoop, RingOverrun, BufferIdOutOfRange (S4, S28, P4).
    """
    if row[-1].flags & VRING_DESC_F_NEXT:
        raise errors.DescriptorLoop(queue, first, len(row) + 1)
    if len(row) > free:
        raise errors.RingOverrun(queue, first, len(row), free)
    if row[-1].id >= size:
        raise errors.BufferIdOutOfRange(queue, first, row[-1].id, size)
    return row[-1].id


def walk_row(
    queue: int, first: DescriptorIndex, row: list[PackedDescriptor], memory: MemoryViews, indirect: bool
) -> tuple[list[memoryview], list[memoryview], int, int]:
    """The readable and writable buffers of the chain in *row*, and the bytes in each; as `chain.walk`."""
    return gather(queue, first, _segments(queue, first, row, memory, indirect), memory)


def _segments(
    queue: int, first: DescriptorIndex, row: list[PackedDescriptor], memory: MemoryViews, indirect: bool
) -> Iterator[tuple[int, int, int]]:
    for address, length, _, flags in row:
        if not flags & VRING_DESC_F_INDIRECT:
            yield address, length, flags
            continue
        if not indirect:
            raise errors.IndirectNotNegotiated(queue, first)
        # Unlike in a split ring, not even behind direct ones (2.8.19; S7, S8).
        if len(row) > 1:
            raise errors.IndirectWithNext(queue, first)
        table = indirect_table(queue, first, address, length, memory)
        for address, length, _, flags in DESCRIPTOR.iter_unpack(table):
            # The other flags are reserved here, and the device ignores them (2.8.7; S6).
            yield address, length, flags & VRING_DESC_F_WRITE
