"""fallocate(2), linux/falloc.h."""

import ctypes

from lguestlib.abi.libc import check, fitting, large_file_function

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Change how *length* bytes at *offset* of file *fd* are allocated.

    Raises OSError: EOPNOTSUPP where the file system cannot do it, EINTR when a
    signal comes first.  Raises OverflowError for an offset or length over 63 bits.
    """
    call = large_file_function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    fitting(offset, ctypes.c_int64, "fallocate offset")
    fitting(length, ctypes.c_int64, "fallocate length")
    check(call(fd, mode, offset, length), "fallocate", fd)
