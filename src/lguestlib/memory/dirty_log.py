"""The log of guest pages that were written, shared with the process that copies them elsewhere.

One bit for each page of `PAGE` bytes of guest-physical addresses from 0 on: page
p is bit p % 8 of byte p // 8 (vhost-user specification, "Migration").
"""

from collections.abc import Iterable

from lguestlib.abi.futex import set_all_bits, set_bit
from lguestlib.abi.mmap import address_of
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.fence import new_fence
from lguestlib.memory.mapping import OnLost, map_shared, nobody

PAGE = 4096
"""Bytes a bit stands for (VHOST_LOG_PAGE)."""

_SHIFT = 12


class DirtyLogError(ValueError):
    """Pages that the log has no bits for."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(f"dirty log: no bits for {length:#x} bytes at {address:#x}")
        self.address = address
        self.length = length


class DirtyLog:
    """The log of *size* bytes at byte *offset* of the file *fd*, which stays the caller's.

    Any thread may mark, and so may other processes that share the log: no mark is
    lost.  *on_lost* is told, once, when the file is found to have become shorter.
    Raises ValueError for an offset that is no multiple of 4, and where the file does
    not hold the log (T13, T16); OSError where it cannot be mapped for writing (EACCES).
    """

    def __init__(self, fd: int, size: int, offset: int = 0, on_lost: OnLost = nobody) -> None:
        if size <= 0 or offset % 4:
            raise ValueError(f"dirty log: {size:#x} bytes at offset {offset:#x}")
        self.size = size
        self._mapping, skip = map_shared(fd, size, offset, "dirty log: ", on_lost)
        with memoryview(self._mapping) as whole:
            self._bytes = whole[skip:]
        self._address = address_of(self._bytes)

    def covers(self, end: int) -> bool:
        """Whether there is a bit for every guest-physical address below *end*."""
        return end <= 8 * self.size * PAGE

    def mark(self, address: GuestAddress, length: int) -> None:
        """Mark the pages of *length* bytes at *address*, which have been written, as dirty.

        A length of 0 marks nothing (CVE-2019-14835).  Raises DirtyLogError, with
        nothing marked, where the log does not reach; OSError (ENOSYS) where there
        is no futex(2), EFAULT where the log has gone; ValueError once closed.
        """
        self.mark_all([(address, length)])

    def mark_all(self, ranges: Iterable[tuple[int, int]]) -> None:
        """`mark` each of *ranges*, an address and a length: all are checked before any is marked."""
        runs = []
        for address, length in ranges:
            if address < 0 or length < 0 or not self.covers(address + length):
                raise DirtyLogError(address, length)
            if length:
                runs.append((address >> _SHIFT, (address + length - 1 >> _SHIFT) + 1))
        if runs:
            # A bit that is set is left alone.  The other side clears it and then copies the page: had
            # the bit been read before the writes to the page were seen, its copy could be without them.
            new_fence()()
            for page, end in runs:
                self._set(page, end)

    def _set(self, page: int, end: int) -> None:
        """Set the bits from *page* up to *end* that are not."""
        bits = self._bytes
        while page < end:
            byte = bits[page >> 3]
            if byte == 0xFF:
                page = (page | 7) + 1
            elif not page & 31 and end - page >= 32:
                set_all_bits(self._address + (page >> 3))
                page += 32
            else:
                if not byte >> (page & 7) & 1:
                    set_bit(self._address + (page >> 5 << 2), page & 31)
                page += 1

    def close(self) -> None:
        """Unmap the log; closing again is no error.  No thread may be marking."""
        self._bytes.release()
        self._mapping.close()
