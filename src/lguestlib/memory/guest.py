"""The guest's physical memory as a whole."""

from bisect import bisect_right
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from lguestlib.memory.address import GuestAddress, HostAddress
from lguestlib.memory.region import Region


class AddressError(ValueError):
    """A range of guest-physical addresses that guest memory does not hold."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(f"no guest memory at {address:#x}, {length:#x} bytes")
        self.address = address
        self.length = length


class GuestMemory:
    """Regions of guest-physical memory that do not overlap; immutable once made.

    It owns the regions: `close`, or leaving its ``with`` block, unmaps them.
    Raises ValueError for overlapping regions or none.
    """

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = tuple(sorted(regions, key=lambda region: region.base))
        if not self.regions:
            raise ValueError("guest memory: no region")
        for low, high in zip(self.regions, self.regions[1:]):
            if low.end > high.base:
                raise ValueError(f"guest memory: regions at {low.base:#x} and {high.base:#x} overlap")
        self._bases = [region.base for region in self.regions]

    @classmethod
    def anonymous(cls, size: int, base: GuestAddress = GuestAddress(0)) -> Self:
        """One private region of *size* bytes at guest-physical *base*."""
        return cls([Region.anonymous(base, size)])

    def views(self) -> "MemoryViews":
        """A new set of views for the use of one thread."""
        return MemoryViews(self.regions, self._bases)

    def contains(self, address: GuestAddress, length: int) -> bool:
        """Whether all of *length* bytes at *address* are guest memory, across adjacent regions too."""
        if address < 0 or length < 0:
            return False
        while True:
            index = bisect_right(self._bases, address) - 1
            if index < 0:
                return False
            left = self.regions[index].end - address
            if left < 0 or (left == 0 and length):
                return False
            if length <= left:
                return True
            address, length = self.regions[index].end, length - left

    def read(self, address: GuestAddress, length: int) -> bytes:
        """A copy of *length* bytes at *address*.  Raises AddressError."""
        with self.views() as views:
            return b"".join(views.slices(address, length))

    def write(self, address: GuestAddress, data: bytes | memoryview) -> None:
        """Copy *data* to *address*.  Raises AddressError, and writes nothing then."""
        done = 0
        with self.views() as views:
            for piece in views.slices(address, len(data)):
                piece[:] = data[done : done + len(piece)]
                done += len(piece)

    def host_address(self, address: GuestAddress, length: int = 1) -> HostAddress:
        """Where *length* contiguous bytes at *address* are in this process.  Raises AddressError."""
        region = self.regions[max(bisect_right(self._bases, address) - 1, 0)]
        if not region.base <= address <= region.end or length > region.end - address:
            raise AddressError(address, length)
        return HostAddress(region.host_address + (address - region.base))

    def close(self) -> None:
        """Unmap every region.  Raises BufferError while a view of one lives."""
        for region in self.regions:
            region.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
        """*length* bytes at *address* as one view, or one for each adjacent region they cross.

        No views for a length of zero, whose address must be inside memory, or at
        the end of a region, all the same.  Raises AddressError for a hole.
        """
        pieces = []
        position, left = address, length
        while True:
            index = bisect_right(self._bases, position) - 1 if len(self._bases) > 1 else 0
            start = position - self.regions[index].base
            room = self.regions[index].size - start
            if index < 0 or start < 0 or length < 0 or room < 0 or (room == 0 and left):
                raise AddressError(address, length)
            if left <= room:
                if left:
                    pieces.append(self.roots[index][start : start + left])
                return pieces
            pieces.append(self.roots[index][start:])
            position, left = self.regions[index].end, left - room

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
