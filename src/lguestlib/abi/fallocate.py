"""fallocate(2), linux/falloc.h."""

import ctypes

from lguestlib.abi.libc import check, function

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Change how *length* bytes at *offset* of file *fd* are allocated.

    Raises OSError: EOPNOTSUPP where the file system cannot do it.
    """
    call = function("fallocate64", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    check(call(fd, mode, offset, length), "fallocate", fd)
