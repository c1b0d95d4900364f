"""readv(2) and its family with EINTR visible, linux/uio.h.

For the reads and writes that may block for ever and must be interruptible (a
network's next packet, a terminal); everything else is better served by
`os.readv` and `os.preadv`, which are twice as fast and retry EINTR.
"""

import ctypes
from collections.abc import Callable, Sequence

from lguestlib.abi.layout import Structure, pointer, size_t
from lguestlib.abi.libc import check, function
from lguestlib.abi.mmap import address_of

UIO_MAXIOV = 1024
"""The most buffers one call takes."""


class iovec(Structure):
    """linux/uio.h: one buffer of a vector."""

    iov_base: pointer
    iov_len: size_t


_VECTOR = (ctypes.c_int, ctypes.POINTER(iovec), ctypes.c_int)


def _vector(buffers: Sequence[memoryview]) -> "ctypes.Array[iovec]":
    return (iovec * len(buffers))(*[iovec(address_of(buffer), len(buffer)) for buffer in buffers])


def _call(name: str, fd: int, buffers: Sequence[memoryview]) -> int:
    call: Callable[..., int] = function(name, *_VECTOR, result=ctypes.c_ssize_t)
    return check(call(fd, _vector(buffers), len(buffers)), name, fd)


def _call_at(name: str, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    call: Callable[..., int] = function(name, *_VECTOR, ctypes.c_int64, result=ctypes.c_ssize_t)
    return check(call(fd, _vector(buffers), len(buffers), offset), name, fd)


def readv(fd: int, buffers: Sequence[memoryview]) -> int:
    """Read into *buffers*, in order, and return the bytes read; 0 at end of file.

    Raises InterruptedError when a signal arrives first, other OSErrors as readv(2).
    """
    return _call("readv", fd, buffers)


def writev(fd: int, buffers: Sequence[memoryview]) -> int:
    """Write *buffers*, in order, and return the bytes written, which may be fewer.

    Raises InterruptedError when a signal arrives first, other OSErrors as writev(2).
    """
    return _call("writev", fd, buffers)


def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """`readv` at byte *offset* of the file, whose position does not move."""
    return _call_at("preadv64", fd, buffers, offset)


def pwritev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """`writev` at byte *offset* of the file, whose position does not move."""
    return _call_at("pwritev64", fd, buffers, offset)
