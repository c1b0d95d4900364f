"""One range of guest-physical memory, mapped into this process."""

import mmap
import os
import sys
from typing import Self

from lguestlib.abi import memfd as abi_memfd
from lguestlib.abi.mmap import MAP_32BIT, MAP_ANONYMOUS, MAP_PRIVATE, PROT_NONE, address_of, mprotect
from lguestlib.memory.address import GuestAddress, HostAddress
from lguestlib.memory.mapping import OnLost, map_shared, nobody

_TOP = 1 << 64


class Region:
    """*size* bytes of guest memory at guest-physical *base*, owned by this object.

    Made by `anonymous`, `guarded`, `memfd` or `from_fd`; released by `close`, and not before.
    """

    def __init__(
        self, base: GuestAddress, size: int, mapping: mmap.mmap, skip: int = 0, fd: int = -1
    ) -> None:
        self.base = base
        self.size = size
        self.fd = fd
        """The memfd behind this region, owned by it; -1 where there is none to hand over."""
        self._mapping = mapping
        self._skip = skip
        with memoryview(mapping) as view:
            self.host_address = HostAddress(address_of(view) + skip)
            """Where *base* is mapped in this process, until `close`."""

    @classmethod
    def anonymous(cls, base: GuestAddress, size: int) -> Self:
        """Private zeroed memory.  Raises ValueError for a bad range, OSError (ENOMEM)."""
        _check_range(base, size)
        return cls(base, size, mmap.mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS))

    @classmethod
    def guarded(cls, base: GuestAddress, size: int) -> Self:
        """Private zeroed memory between two pages that nobody may touch, at a host address of 32 bits.

        For lguest, which maps it for its guest by such addresses.  Whole pages: raises
        ValueError for a *size* that is none, or a bad range; OSError (ENOMEM).
        """
        _check_range(base, size)
        if size % mmap.PAGESIZE:
            raise ValueError(f"memory region: {size:#x} bytes are not whole pages of {mmap.PAGESIZE:#x}")
        mapping = mmap.mmap(-1, size + 2 * mmap.PAGESIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT)
        region = cls(base, size, mapping, mmap.PAGESIZE)
        mprotect(region.host_address - mmap.PAGESIZE, mmap.PAGESIZE, PROT_NONE)
        mprotect(region.host_address + size, mmap.PAGESIZE, PROT_NONE)
        return region

    @classmethod
    def memfd(cls, base: GuestAddress, size: int, name: str = "guest-memory") -> Self:
        """Shared zeroed memory behind a new memfd (`fd`), for handing to another process.

        Sealed against shrinking: who is handed it cannot take pages away from
        under this process.  Raises ValueError for a bad range, OSError (ENOMEM, EMFILE).
        """
        _check_range(base, size)
        fd = abi_memfd.memfd(name, size)
        try:
            abi_memfd.add_seals(fd, abi_memfd.F_SEAL_SHRINK)
            return cls(base, size, mmap.mmap(fd, size), fd=fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def from_fd(
        cls, base: GuestAddress, size: int, fd: int, offset: int = 0, on_lost: OnLost = nobody
    ) -> Self:
        """Shared memory that is *size* bytes at byte *offset* of the file *fd*, page-aligned or not.

        The descriptor stays the caller's.  Whoever makes the file shorter afterwards, where
        it cannot be sealed against that, is found out when what has gone is touched: zeros
        are there then, and *on_lost* is told, once.  Raises ValueError where the file does
        not hold the range (T13); OSError where it cannot be mapped for reading and writing
        (EACCES).
        """
        _check_range(base, size)
        return cls(base, size, *map_shared(fd, size, offset, "memory region: ", on_lost))

    @property
    def end(self) -> GuestAddress:
        """The first guest-physical address past the region."""
        return GuestAddress(self.base + self.size)

    def view(self) -> memoryview:
        """A new view of the whole region, sharing no state with any other (Y6).

        Each thread slices a view of its own: on a free-threaded interpreter,
        slicing one memoryview from several threads is not safe.  Raises
        ValueError when the region is closed.
        """
        whole = memoryview(self._mapping)
        return whole[self._skip : self._skip + self.size] if self._skip else whole

    def close(self) -> None:
        """Give back the memfd and unmap; closing again is no error.

        Raises BufferError, and unmaps nothing, while a view of it lives (Y4): close
        again when it is gone.
        """
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        try:
            self._mapping.close()
        except BufferError:
            raise BufferError(f"memory region at {self.base:#x}: a view of it is still in use") from None


def _check_range(base: int, size: int) -> None:
    if size <= 0 or size > sys.maxsize or base < 0 or size > _TOP - base:
        raise ValueError(f"memory region: no range of {size:#x} bytes at guest-physical {base:#x}")
