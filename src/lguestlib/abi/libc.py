"""The C library, bound on first use, for what the standard library has not.

Calls go through ctypes with ``use_errno``: unlike the standard library's own
wrappers (PEP 475) they return to the caller when a signal interrupts them, as
InterruptedError.
"""

import ctypes
import errno
import os
import platform
from collections.abc import Callable
from functools import cache

SyscallNumbers = tuple[int, int, int]
"""A system call's number on x86-64, i386 and in the generic table (aarch64)."""


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@cache
def function(name: str, *arguments: type, result: type = ctypes.c_int) -> Callable[..., int]:
    """The C function *name* with these argument types and an integer result.

    Raises OSError (ENOSYS) where the C library does not have it.
    """
    try:
        prototype = ctypes.CFUNCTYPE(result, *arguments, use_errno=True)
        bound: Callable[..., int] = prototype((name, _library()))
    except (AttributeError, OSError) as error:
        raise OSError(errno.ENOSYS, f"{name}: not in this C library") from error
    return bound


def check(result: int, call: str, about: object = None) -> int:
    """Return *result* unless it is negative: then raise OSError from this thread's errno.

    *call* names what was called, *about* the file, address or device it concerned.
    """
    if result < 0:
        number = ctypes.get_errno()
        message = f"{call}: {os.strerror(number)}"
        raise OSError(number, message) if about is None else OSError(number, message, about)
    return result


def syscall(numbers: SyscallNumbers, *arguments: int) -> int:
    """The result of a system call the C library may not wrap, or -1 with errno set."""
    if platform.machine() not in ("x86_64", "i386", "i486", "i586", "i686"):
        number = numbers[2]
    else:
        number = numbers[0 if ctypes.sizeof(ctypes.c_void_p) == 8 else 1]
    words = (ctypes.c_long,) * (1 + len(arguments))
    return function("syscall", *words, result=ctypes.c_long)(number, *arguments)
