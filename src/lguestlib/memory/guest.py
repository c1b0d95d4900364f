"""The guest's physical memory as a whole."""

from bisect import bisect_right
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from lguestlib.abi.mmap import address_of
from lguestlib.memory.address import GuestAddress, HostAddress
from lguestlib.memory.region import Region

_ZEROS = bytes(1 << 16)


class AddressError(ValueError):
    """A range of guest-physical addresses that guest memory does not hold."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(f"no guest memory at {address:#x}, {length:#x} bytes")
        self.address = address
        self.length = length


class GuestMemory:
    """Regions of guest-physical memory that do not overlap; immutable once made.

    It owns the regions: `close`, or leaving its ``with`` block, unmaps them.
    Raises ValueError for overlapping regions or none (T13); they are the
    caller's to close then.
    """

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = tuple(sorted(regions, key=lambda region: region.base))
        """In the order of their addresses."""
        if not self.regions:
            raise ValueError("guest memory: no region")
        for low, high in zip(self.regions, self.regions[1:]):
            if low.end > high.base:
                raise ValueError(f"guest memory: regions at {low.base:#x} and {high.base:#x} overlap")
        self._bases = [region.base for region in self.regions]

    @classmethod
    def anonymous(cls, size: int, base: GuestAddress = GuestAddress(0)) -> Self:
        """One private region of *size* bytes at guest-physical *base*.  Raises as `Region.anonymous`."""
        return cls([Region.anonymous(base, size)])

    def views(self) -> "MemoryViews":
        """A new set of views for the use of one thread."""
        return MemoryViews(self.regions, self._bases)

    def contains(self, address: GuestAddress, length: int) -> bool:
        """Whether all of *length* bytes at *address* are guest memory, across adjacent regions too.

        As in `MemoryViews.slices`, a length of zero has an address that must be inside.
        """
        try:
            _locate(self.regions, self._bases, address, length)
        except AddressError:
            return False
        return True

    def read(self, address: GuestAddress, length: int) -> bytes:
        """A copy of *length* bytes at *address*.  Raises AddressError."""
        with self.views() as views:
            return b"".join(views.slices(address, length))

    def write(self, address: GuestAddress, data: bytes | bytearray | memoryview) -> None:
        """Copy the bytes of *data* to *address*.  Raises AddressError, and writes nothing then."""
        done = 0
        with self.views() as views, memoryview(data) as items, items.cast("B") as source:
            for piece in views.slices(address, len(source)):
                piece[:] = source[done : done + len(piece)]
                done += len(piece)

    def zero(self, address: GuestAddress, length: int) -> None:
        """Write *length* zero bytes to *address*.  Raises AddressError, and writes nothing then."""
        with self.views() as views:
            for piece in views.slices(address, length):
                for start in range(0, len(piece), len(_ZEROS)):
                    part = piece[start : start + len(_ZEROS)]
                    part[:] = _ZEROS[: len(part)]

    def host_address(self, address: GuestAddress, length: int = 1) -> HostAddress:
        """Where *length* bytes at *address*, in one region, are in this process.

        Raises AddressError, also where they cross regions: in this process those
        are not adjacent.
        """
        index, start, room = _locate(self.regions, self._bases, address, length)[0]
        if room != length:
            raise AddressError(address, length)
        return HostAddress(self.regions[index].host_address + start)

    def close(self) -> None:
        """Unmap every region.

        Raises BufferError while a view lives (Y4): regions without one are
        unmapped, and closing again when it is gone unmaps the rest.
        """
        in_use: BufferError | None = None
        for region in self.regions:
            try:
                region.close()
            except BufferError as error:
                in_use = in_use or error
        if in_use:
            raise in_use

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BufferError:
            # The traceback of an error on its way out may hold views; the mapping goes when they go.
            if error is None:
                raise


class MemoryViews:
    """One thread's views of all regions, and the look-up of guest-physical ranges in them."""

    def __init__(self, regions: tuple[Region, ...], bases: list[GuestAddress]) -> None:
        self.regions = regions
        self.roots = [region.view() for region in regions]
        """A view of each region, in the order of `regions`."""
        self._bases = bases

    @property
    def largest(self) -> int:
        """The index of the largest region, where most buffers are."""
        return max(range(len(self.regions)), key=lambda index: self.regions[index].size)

    def slice(self, address: GuestAddress, length: int) -> memoryview:
        """*length* bytes at *address* inside one region, not copied.  Raises AddressError."""
        index = bisect_right(self._bases, address) - 1 if len(self._bases) > 1 else 0
        region = self.regions[index]
        start = address - region.base
        if index < 0 or start < 0 or length < 0 or length > region.size - start:
            raise AddressError(address, length)
        return self.roots[index][start : start + length]

    def slices(self, address: GuestAddress, length: int) -> list[memoryview]:
        """*length* bytes at *address* as one view, or one for each adjacent region they cross (S17).

        No views for a length of zero, whose address must be inside memory, or at
        the end of a region, all the same (S14).  Raises AddressError for a hole.
        """
        index = bisect_right(self._bases, address) - 1
        start = address - self.regions[index].base
        if index >= 0 and 0 < length <= self.regions[index].size - start:
            return [self.roots[index][start : start + length]]  # as nearly all are
        pieces = _locate(self.regions, self._bases, address, length)
        return [self.roots[index][start : start + room] for index, start, room in pieces if room]

    def guest_address(self, view: memoryview) -> GuestAddress:
        """Where the first byte of *view*, a slice that is not empty, is in guest memory.

        Raises ValueError for a view of something else.
        """
        host = address_of(view)
        for region in self.regions:
            if 0 <= host - region.host_address < region.size:
                return GuestAddress(region.base + host - region.host_address)
        raise ValueError(f"no guest memory is mapped at {host:#x}")

    def release(self) -> None:
        """Give up the views; slices handed out keep the mapping until they go."""
        for root in self.roots:
            root.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _locate(
    regions: tuple[Region, ...], bases: list[GuestAddress], address: GuestAddress, length: int
) -> list[tuple[int, int, int]]:
    """Where *length* bytes at *address* are: a region's index, the offset into it, the bytes there.

    One piece at least; only a length of zero has an empty one.  Plain numbers, so
    that the AddressError raised for a hole keeps no view alive.  Compared as
    lengths, because the sum could wrap where addresses do (S16).
    """
    index = bisect_right(bases, address) - 1
    start = address - regions[index].base
    if index < 0 or length < 0 or start > regions[index].size:
        raise AddressError(address, length)
    pieces, left, room = [], length, regions[index].size - start
    while left > room:
        pieces.append((index, start, room))
        left -= room
        index += 1
        if index == len(regions) or regions[index].base != regions[index - 1].end:
            raise AddressError(address, length)
        start, room = 0, regions[index].size
    pieces.append((index, start, left))
    return pieces
