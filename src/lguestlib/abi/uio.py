"""readv(2) and its family, and write(2), with EINTR visible, linux/uio.h.

For the reads and writes that may block for ever and must be interruptible (a
network's next packet, a terminal); everything else is better served by
`os.readv` and `os.preadv`, which are twice as fast and retry EINTR.

Buffers are writable memoryviews, also those that are only written from: a
read-only one is a TypeError.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import cache

from lguestlib.abi.layout import NativeStructure, pointer, size_t
from lguestlib.abi.libc import check, fitting, function, large_file_function

UIO_MAXIOV = 1024
"""The most buffers one call takes."""


class iovec(NativeStructure):
    """linux/uio.h: one buffer of a vector; *iov_len* in bytes."""

    iov_base: pointer
    iov_len: size_t


_VECTOR = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)

# Per buffer, a bare array of words costs a third of what an array of iovec does.
_at, _first = ctypes.addressof, ctypes.c_char.from_buffer


def vector(buffers: Sequence[memoryview]) -> "array[int]":
    """The iovecs of *buffers*, each as its two words; a call takes their `buffer_info`'s address."""
    words = array("L")
    append = words.append
    for buffer in buffers:
        size = buffer.nbytes
        append(_at(_first(buffer)) if size else 0)
        append(size)
    return words


@cache
def _bound(name: str) -> Callable[..., int]:
    return function(name, *_VECTOR, result=ctypes.c_ssize_t)


@cache
def _bound_write() -> Callable[..., int]:
    return function("write", ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, result=ctypes.c_ssize_t)


@cache
def _bound_at(name: str) -> Callable[..., int]:
    return large_file_function(name, *_VECTOR, ctypes.c_int64, result=ctypes.c_ssize_t)


def readv(fd: int, buffers: Sequence[memoryview]) -> int:
    """Read into *buffers*, in order, and return the bytes read; 0 at end of file.

    Raises InterruptedError when a signal arrives first, other OSErrors as readv(2).
    """
    words = vector(buffers)
    return check(_bound("readv")(fd, words.buffer_info()[0], len(buffers)), "readv", fd)


def writev(fd: int, buffers: Sequence[memoryview]) -> int:
    """Write *buffers*, in order, and return the bytes written, which may be fewer.

    Raises InterruptedError when a signal arrives first, other OSErrors as writev(2).
    """
    words = vector(buffers)
    return check(_bound("writev")(fd, words.buffer_info()[0], len(buffers)), "writev", fd)


def write(fd: int, data: bytes) -> int:
    """Write *data*, and return the bytes written, which may be fewer.

    Raises InterruptedError when a signal arrives first, other OSErrors as write(2).
    """
    return check(_bound_write()(fd, data, len(data)), "write", fd)


def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """`readv` at byte *offset* of the file, whose position does not move.

    Raises OverflowError for an offset over 63 bits.
    """
    words = vector(buffers)
    fitting(offset, ctypes.c_int64, "preadv offset")
    return check(_bound_at("preadv")(fd, words.buffer_info()[0], len(buffers), offset), "preadv", fd)


def pwritev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """`writev` at byte *offset* of the file, whose position does not move.

    Raises OverflowError for an offset over 63 bits.
    """
    words = vector(buffers)
    fitting(offset, ctypes.c_int64, "pwritev offset")
    return check(_bound_at("pwritev")(fd, words.buffer_info()[0], len(buffers), offset), "pwritev", fd)
