"""An image, understood and checked: what goes where in guest memory, and where to enter it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lguestlib.abi.bootparam import setup_header
from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.guest import GuestMemory

Format = Literal["ELF32", "ELF64", "bzImage", "flat image"]


class ImageError(ValueError):
    """An image that cannot be loaded: one line with the thing, its value, and what would help."""


class Segment(NamedTuple):
    """*length* bytes at byte *offset* of the image, at *where* in guest memory; zeros fill the rest."""

    where: GuestRange
    offset: int
    length: int


@dataclass(frozen=True, eq=False)
class Image:
    """What a loader found in *data*, all of it consistent with itself.

    Only `place` can tell whether guest memory holds it.  *data* is looked at
    again by `place`, and has to live until then.
    """

    format: Format
    data: memoryview
    """The whole file's bytes."""
    segments: tuple[Segment, ...]
    """In the order of their addresses, apart from each other."""
    entry: GuestAddress
    """The first instruction's guest-physical address, in a segment."""
    bits: Literal[32, 64]
    """The processor mode that the entry expects: protected or long."""
    setup: setup_header | None = None
    """A bzImage's setup header, a copy; its fields past the header's own length are zero."""
    unpacked: GuestRange | None = None
    """Where a bzImage moves itself to: memory that it needs before it looks at the memory map."""
    long_entry: GuestAddress | None = None
    """The entry of the 64-bit boot protocol, where there is one: in long mode."""
    pvh_entry: GuestAddress | None = None
    """The entry of PVH, where there is one: in protected mode."""

    @property
    def occupied(self) -> tuple[GuestRange, ...]:
        """All that the image takes of guest memory, at first and when it has unpacked itself."""
        ranges = [segment.where for segment in self.segments]
        return (*ranges, self.unpacked) if self.unpacked else tuple(ranges)

    def place(self, memory: GuestMemory) -> None:
        """Copy the segments to *memory*, from *data* straight, and zero what follows them.

        Raises ImageError where *memory* does not hold all of `occupied`, and
        writes nothing then.
        """
        for index, segment in enumerate(self.segments):
            check_memory(memory, segment.where, f"{self.format}: segment {index}")
        if self.unpacked:
            check_memory(memory, self.unpacked, f"{self.format}: the unpacked kernel")
        for segment in self.segments:
            with self.data[segment.offset : segment.offset + segment.length] as content:
                memory.write(segment.where.start, content)
            rest = segment.where.size - segment.length
            memory.zero(GuestAddress(segment.where.end - rest), rest)


def check_file(data: memoryview, offset: int, length: int, what: str) -> None:
    """Raise ImageError unless *data* holds *what*: *length* bytes at byte *offset*."""
    if length > len(data) - offset:
        raise ImageError(
            f"{what}: {length:#x} bytes at offset {offset:#x} of a file of {len(data):#x}:"
            " it is cut short or damaged"
        )


def check_memory(memory: GuestMemory, where: GuestRange, what: str) -> None:
    """Raise ImageError unless guest memory holds *what*, at *where*."""
    if not memory.contains(where.start, where.size):
        raise not_in_memory(where, what, memory.regions[-1].end)


def not_in_memory(where: GuestRange, what: str, end: int) -> ImageError:
    """The error for *what*, at *where*, in a guest whose memory ends at *end*."""
    help = f": give the guest {-(-where.end // 2**20)} MiB" if where.end > end else ""
    return ImageError(f"{what}: {where} is not all in guest memory, which ends at {end:#x}{help}")


def check_apart(ranges: Iterable[tuple[str, GuestRange]]) -> None:
    """Raise ImageError for named *ranges* of which two overlap."""
    ordered = sorted(ranges, key=lambda named: named[1])
    for (low_name, low), (high_name, high) in zip(ordered, ordered[1:]):
        if low.overlaps(high):
            raise ImageError(f"{low_name} ({low}) and {high_name} ({high}) overlap")
