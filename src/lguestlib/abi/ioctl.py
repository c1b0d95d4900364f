"""ioctl(2): its requests, asm-generic/ioctl.h in the encoding x86 and ARM share, and the call."""

import ctypes
from typing import TYPE_CHECKING

from lguestlib.abi.libc import check, fitting, function

if TYPE_CHECKING:
    from ctypes import _CData

_NONE, _WRITE, _READ = 0, 1, 2
_SIZE_LIMIT = 1 << 14


def _encode(direction: int, type: int | str, nr: int, size: int) -> int:
    letter = ord(type) if isinstance(type, str) else type
    if not (0 <= letter < 256 and 0 <= nr < 256 and 0 <= size < _SIZE_LIMIT):
        raise ValueError(f"ioctl request: type {letter}, number {nr}, {size} bytes cannot be encoded")
    return direction << 30 | size << 16 | letter << 8 | nr


def IO(type: int | str, nr: int) -> int:
    """The request *nr* of the driver *type* (a number or its character) without an argument in memory.

    This and the next three raise ValueError for what has no room in a request's 32 bits.
    """
    return _encode(_NONE, type, nr, 0)


def IOR(type: int | str, nr: int, size: int) -> int:
    """The request whose argument of *size* bytes the kernel fills in for the caller."""
    return _encode(_READ, type, nr, size)


def IOW(type: int | str, nr: int, size: int) -> int:
    """The request whose argument of *size* bytes the kernel reads."""
    return _encode(_WRITE, type, nr, size)


def IOWR(type: int | str, nr: int, size: int) -> int:
    """The request whose argument of *size* bytes the kernel reads and fills in."""
    return _encode(_READ | _WRITE, type, nr, size)


def ioctl(
    fd: int,
    request: int,
    argument: "int | _CData",
    call: str,
    about: object = None,
) -> int:
    """ioctl(2) with an integer, or with the address of a ctypes object the kernel reads or fills in.

    *call* names the request and *about* what it concerns, for the OSError raised
    where the kernel refuses.  Returns the kernel's result; raises
    InterruptedError when a signal comes first: nothing is retried, unlike in
    `fcntl.ioctl`, which also cuts integers to a C int (Y2).  Raises
    OverflowError for an integer that is not an unsigned word.
    """
    bound = function("ioctl", ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
    fitting(request, ctypes.c_uint32, "ioctl request")
    if isinstance(argument, int):
        word = fitting(argument, ctypes.c_size_t, call)
    else:
        word = ctypes.addressof(argument)
    return check(bound(fd, request, word), call, about)
