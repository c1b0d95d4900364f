"""Reads and writes at any place of a file that takes them in whole blocks only, opened with O_DIRECT."""

import errno
import mmap
import os
import threading
from collections.abc import Sequence

BLOCK_SIZE_MAX = 1 << 16
_PIECE = 1 << 18
"""Bytes that go through the buffer at a time."""


class Bounce:
    """A buffer for what cannot be read or written in place, shared by all threads.

    Whatever shares a block with what is written is read and written with it: that
    is only right while nobody else writes there.
    """

    def __init__(self, fd: int, block_size: int) -> None:
        self._fd = fd
        self._block_size = block_size
        self._lock = threading.Lock()
        self._mapping = mmap.mmap(-1, _PIECE)
        self._buffer = memoryview(self._mapping)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read into *buffers* from byte *offset*; may be short.  Raises OSError."""
        with self._lock:
            area, skip, length = self._area(buffers, offset)
            got = os.preadv(self._fd, [area], offset - skip)
            length = max(0, min(length, got - skip))
            for piece, begin in _pieces(buffers, length):
                piece[:] = area[skip + begin : skip + begin + len(piece)]
            return length

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write *buffers* at byte *offset*; may be short.  Raises OSError."""
        with self._lock:
            area, skip, length = self._area(buffers, offset)
            # Less than that would be a file that has become shorter, and would grow again.
            if length < len(area) and os.preadv(self._fd, [area], offset - skip) < len(area):
                return 0
            for piece, begin in _pieces(buffers, length):
                area[skip + begin : skip + begin + len(piece)] = piece
            return max(0, min(length, os.pwritev(self._fd, [area], offset - skip) - skip))

    def _area(self, buffers: Sequence[memoryview], offset: int) -> tuple[memoryview, int, int]:
        """The buffer for the blocks at *offset*, the bytes in it before that, and those that are meant."""
        skip = offset % self._block_size
        length = min(sum(map(len, buffers)), _PIECE - skip)
        blocks = -(-(skip + length) // self._block_size)
        return self._buffer[: blocks * self._block_size], skip, length

    def close(self) -> None:
        """Give the buffer back."""
        self._buffer.release()
        self._mapping.close()


def _pieces(buffers: Sequence[memoryview], length: int) -> list[tuple[memoryview, int]]:
    """The first *length* bytes of *buffers*, as views, each with the number of bytes before it."""
    pieces, done = [], 0
    for buffer in buffers:
        piece = buffer[: length - done]
        pieces.append((piece, done))
        done += len(piece)
    return pieces


def block_size_of(fd: int) -> int:
    """The fewest bytes that can be read at once from *fd*, opened with O_DIRECT: found by trying.

    What kernels and file systems say of it is newer than O_DIRECT, and less sure.
    Raises OSError where nothing can be read.
    """
    with mmap.mmap(-1, BLOCK_SIZE_MAX) as mapping, memoryview(mapping) as buffer:
        size = 512
        while True:
            with buffer[:size] as block:
                try:
                    os.preadv(fd, [block], 0)
                    return size
                except OSError as error:
                    if error.errno != errno.EINVAL or size == BLOCK_SIZE_MAX:
                        raise
            size *= 2
