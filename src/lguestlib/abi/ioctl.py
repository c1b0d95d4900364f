"""ioctl(2): its requests, asm-generic/ioctl.h in the encoding x86 and ARM share, and the call."""

import ctypes

from lguestlib.abi.libc import check, function

_NONE, _WRITE, _READ = 0, 1, 2


def _encode(direction: int, type: int | str, nr: int, size: int) -> int:
    letter = ord(type) if isinstance(type, str) else type
    return direction << 30 | size << 16 | letter << 8 | nr


def IO(type: int | str, nr: int) -> int:
    """The request *nr* of the driver *type* (a number or its character) without an argument in memory."""
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
    argument: "int | ctypes.Structure | ctypes._SimpleCData[int]",
    call: str,
    about: object = None,
) -> int:
    """ioctl(2) with an integer, or with the address of a structure the kernel reads or fills in.

    *call* names the request and *about* what it concerns, for the OSError raised
    where the kernel refuses.  Returns the kernel's result; raises
    InterruptedError when a signal comes first: nothing is retried, unlike in
    `fcntl.ioctl`, which also cuts integers to a C int (Y2).
    """
    bound = function("ioctl", ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
    word = argument if isinstance(argument, int) else ctypes.addressof(argument)
    return check(bound(fd, request, word), call, about)
