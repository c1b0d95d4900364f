"""A descriptor chain as a device sees it, and the walk that makes one (virtio 1.3, 2.7.5).

`walk` is the readable statement of every rule.  The queues take short cuts for
chains that are plainly good; whatever a short cut does not take, `walk` judges.
"""

from collections.abc import Iterable, Iterator
from struct import Struct

from lguestlib.abi.virtio_ring import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import AddressError, MemoryViews
from lguestlib.virtio import errors
from lguestlib.virtio.layout import DescriptorIndex

DESCRIPTOR = Struct("<QIHH")
"""`vring_desc`: addr, len, flags, next.  For copies only: live fields are read whole."""

INDIRECT_MAX = 4096
"""The most descriptors taken in one indirect table; drivers have been seen with 515 (S12)."""

LENGTH_MAX = 0xFFFF_FFFF

Buffers = tuple[memoryview, ...]


class Chain:
    """One request: buffers the device reads, then buffers it writes, as views of guest memory.

    Valid from the queue's pop to its push; the queue uses the object again after.
    """

    __slots__ = (
        "head", "readable", "writable", "readable_length", "writable_length", "written", "in_flight",
        "offset", "row", "one", "three", "slots",
    )  # fmt: skip

    def __init__(self, head: DescriptorIndex) -> None:
        self.head = head
        """Its first descriptor's index; in a packed ring, its buffer ID."""
        self.readable: Buffers = ()
        """Device-readable buffers, in order, none of them empty."""
        self.writable: Buffers = ()
        """Device-writable buffers, in order, none of them empty."""
        self.readable_length = 0
        """Bytes in `readable`."""
        self.writable_length = 0
        """Bytes in `writable`."""
        self.in_flight = False
        """Whether the device has it: popped, and not yet pushed or put back."""
        self.written = 0
        """For `push_many`: bytes the device has written, from the start of the writable ones."""
        self.one: tuple[int, ...] = ()
        """The descriptor, as unpacked, of a chain that was one; else empty."""
        self.three: tuple[int, ...] = ()
        """The descriptors, as unpacked, of a chain that was three in a row; else empty."""
        self.offset = 16 * head
        """Bytes from the descriptor table's start to the first descriptor."""
        self.row = VRING_DESC_F_NEXT | head + 1 << 16
        """Flags and next, as one word, of a readable first descriptor that its neighbour follows."""
        self.slots = 1
        """Descriptors of a packed ring that it took, and that its return passes over."""

    def read(self, limit: int = 65536) -> bytes:
        """A copy of the readable bytes, or of their first *limit*."""
        if len(self.readable) == 1:
            return bytes(self.readable[0][:limit])
        return b"".join(part(self.readable, 0, limit))

    def write(self, data: bytes) -> int:
        """Copy *data* to the start of the writable bytes; return how many fitted."""
        done = 0
        for buffer in part(self.writable, 0, len(data)):
            buffer[:] = data[done : done + len(buffer)]
            done += len(buffer)
        return done


def part(buffers: Buffers, start: int, length: int) -> Buffers:
    """The *length* bytes at byte *start* of what *buffers* hold together, as views.

    Fewer where they hold fewer.
    """
    pieces = []
    for buffer in buffers:
        if start >= len(buffer):
            start -= len(buffer)
            continue
        piece = buffer[start : start + length]
        start = 0
        length -= len(piece)
        pieces.append(piece)
        if length <= 0:
            break
    return tuple(piece for piece in pieces if piece)


def walk(
    queue: int, head: DescriptorIndex, table: bytes | memoryview, size: int, memory: MemoryViews, indirect: bool
) -> tuple[list[memoryview], list[memoryview], int, int]:
    """The readable and writable buffers of the chain at *head*, and the bytes in each.

    Each descriptor in *table* is read once, so that what is checked is what is
    used (S18).  *indirect* tells whether VIRTIO_F_INDIRECT_DESC was negotiated.
    Raises the ChainErrors of virtio 1.3, 2.7.4.2 and 2.7.5.
    """
    return gather(queue, head, _descriptors(queue, head, table, size, memory, indirect), memory)


def gather(
    queue: int, head: DescriptorIndex, segments: Iterable[tuple[int, int, int]], memory: MemoryViews
) -> tuple[list[memoryview], list[memoryview], int, int]:
    """As `walk`, of buffers that are told one after another: address, length and flags (S13 to S17).

    virtio 1.3, 2.7.4.2 and 2.7.5.2; what holds of them holds in both kinds of ring.
    """
    readable: list[memoryview] = []
    writable: list[memoryview] = []
    lengths = [0, 0]
    writing = False
    for address, length, flags in segments:
        write = bool(flags & VRING_DESC_F_WRITE)
        if writing and not write:
            raise errors.ReadableAfterWritable(queue, head)
        writing = write
        lengths[write] += length
        if lengths[0] + lengths[1] > LENGTH_MAX:
            raise errors.ChainTooLong(queue, head, lengths[0] + lengths[1])
        try:
            (writable if write else readable).extend(memory.slices(GuestAddress(address), length))
        except AddressError:
            raise errors.BadAddress(queue, head, address, length) from None
    return readable, writable, lengths[0], lengths[1]


def indirect_table(
    queue: int, head: DescriptorIndex, address: int, length: int, memory: MemoryViews
) -> bytes:
    """A copy of the indirect table there.  Raises IndirectLength, BadAddress (S9, S11, S12)."""
    if not length or length % DESCRIPTOR.size or length // DESCRIPTOR.size > INDIRECT_MAX:
        raise errors.IndirectLength(queue, head, length)
    try:
        return b"".join(memory.slices(GuestAddress(address), length))
    except AddressError:
        raise errors.BadAddress(queue, head, address, length) from None


def _descriptors(
    queue: int, head: DescriptorIndex, table: bytes | memoryview, size: int, memory: MemoryViews, indirect: bool
) -> Iterator[tuple[int, int, int]]:
    """Address, length and flags of each buffer descriptor, through an indirect table too (S8)."""
    index, seen, inside = int(head), 0, False
    if index >= size:
        raise errors.HeadOutOfRange(queue, head, size)
    while True:
        seen += 1
        if seen > size:
            raise errors.DescriptorLoop(queue, head, seen)
        address, length, flags, following = DESCRIPTOR.unpack_from(table, 16 * index)
        if flags & VRING_DESC_F_INDIRECT:
            if not indirect:
                raise errors.IndirectNotNegotiated(queue, head)
            if inside:
                raise errors.NestedIndirect(queue, head)
            if flags & VRING_DESC_F_NEXT:
                raise errors.IndirectWithNext(queue, head)
            table = indirect_table(queue, head, address, length, memory)
            index, seen, size, inside = 0, 0, length // DESCRIPTOR.size, True
            continue
        yield address, length, flags
        if not flags & VRING_DESC_F_NEXT:
            return
        if following >= size:
            raise errors.NextOutOfRange(queue, head, following, size)
        index = following
