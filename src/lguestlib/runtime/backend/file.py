"""A disk in a file: raw, read and written in place, never grown (T22, T24)."""

import errno
import os
import stat
from collections.abc import Sequence
from typing import Self

from lguestlib.abi.fallocate import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
)
from lguestlib.abi.uio import UIO_MAXIOV
from lguestlib.abi.virtio_blk import VIRTIO_BLK_ID_BYTES
from lguestlib.runtime.backend.bounce import Bounce, block_size_of
from lguestlib.runtime.backend.unnamed import unnamed_file
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.devices.block import SECTOR

_ZEROES = memoryview(bytes(65536))


class FileDisk:
    """The raw image, or block device, open as *fd*, which this owns; *name* identifies it to the guest.

    *direct*: it was opened with O_DIRECT, which wants whole blocks in aligned
    memory; what is neither goes through a buffer.  Bytes past the last whole sector,
    or block, are out of the guest's sight.  Raises ValueError for what cannot be a
    disk, OSError for one that cannot be read.
    """

    def __init__(
        self,
        fd: int,
        name: str,
        read_only: bool = False,
        tracer: Tracer | None = None,
        direct: bool = False,
    ) -> None:
        self.fd = fd
        self.name = name
        self.read_only = read_only
        self.tracer = tracer
        self.block_size = SECTOR
        self._bounce: Bounce | None = None
        try:
            kind = os.fstat(fd).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise ValueError(f"{name}: neither a regular file nor a block device (name a raw disk image)")
            if direct:
                self.block_size = block_size_of(fd)
            if not self.size:
                remedy = f"truncate -s 1M {name} makes it longer"
                raise ValueError(f"{name}: shorter than one sector of {self.block_size} bytes ({remedy})")
            if direct:
                self._bounce = Bounce(fd, self.block_size)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(
        cls, path: str, read_only: bool = False, tracer: Tracer | None = None, direct: bool = False
    ) -> Self:
        """The disk at *path*, with *direct* past the page cache.

        Raises OSError for what cannot be opened (EINVAL where the file system has no
        O_DIRECT), and as the constructor.
        """
        mode = os.O_RDONLY if read_only else os.O_RDWR
        if direct:
            mode |= os.O_DIRECT
        # O_NONBLOCK: opening a FIFO by mistake must not wait for its other end.
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(fd, True)
        return cls(fd, path, read_only, tracer, direct)

    @classmethod
    def scratch(cls, size: int, tracer: Tracer | None = None) -> Self:
        """An empty disk of *size* bytes in an `unnamed_file`, gone when it is closed."""
        return cls(unnamed_file("scratch", size), "scratch", False, tracer)

    @property
    def size(self) -> int:
        """Bytes in whole sectors, as the file is now.  Raises OSError."""
        return os.lseek(self.fd, 0, os.SEEK_END) // self.block_size * self.block_size

    @property
    def identity(self) -> bytes:
        """The last bytes of the file's name."""
        return os.fsencode(os.path.basename(self.name))[-VIRTIO_BLK_ID_BYTES:]

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read into *buffers* from byte *offset*; may be short."""
        try:
            if self.tracer is None:
                return os.preadv(self.fd, buffers[:UIO_MAXIOV], offset)
            return self.tracer.traced("preadv", "disk", os.preadv, self.fd, buffers[:UIO_MAXIOV], offset)
        except OSError as error:
            if self._bounce is None or error.errno != errno.EINVAL:
                raise
            return self._bounce.read(buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write *buffers* at byte *offset*; may be short."""
        try:
            if self.tracer is None:
                return os.pwritev(self.fd, buffers[:UIO_MAXIOV], offset)
            return self.tracer.traced("pwritev", "disk", os.pwritev, self.fd, buffers[:UIO_MAXIOV], offset)
        except OSError as error:
            if self._bounce is None or error.errno != errno.EINVAL:
                raise
            return self._bounce.write(buffers, offset)

    def flush(self) -> None:
        """fdatasync(2): what was written is on stable storage."""
        if self.tracer is None:
            os.fdatasync(self.fd)
        else:
            self.tracer.traced("fdatasync", "disk", os.fdatasync, self.fd)

    def discard(self, offset: int, length: int) -> None:
        """Give the range's blocks back.  Raises OSError (EOPNOTSUPP) where the file system cannot."""
        fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Zero the range: by the file system where it can, else by writing."""
        mode = FALLOC_FL_PUNCH_HOLE if unmap else FALLOC_FL_ZERO_RANGE
        try:
            fallocate(self.fd, mode | FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            end = offset + length
            while offset < end:
                done = self.write([_ZEROES[: end - offset]], offset)
                if not done:
                    raise OSError(errno.EIO, "write_zeroes") from None
                offset += done

    def close(self) -> None:
        """Close the file."""
        if self._bounce:
            self._bounce.close()
        os.close(self.fd)
