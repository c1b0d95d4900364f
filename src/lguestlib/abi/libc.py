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
from functools import cache, partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctypes import _SimpleCData

SyscallNumbers = tuple[int, int, int]
"""A system call's number on x86-64, i386 and in the generic table (aarch64)."""


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@cache
def function(name: str, *arguments: type, result: type = ctypes.c_int) -> Callable[..., int]:
    """The C function *name* with these argument types and an integer result.

    ctypes cuts an integer to its argument's width without a word: `fitting`
    stands before every address, length and offset.  Raises OSError (ENOSYS)
    where the C library does not have the function.
    """
    try:
        prototype = ctypes.CFUNCTYPE(result, *arguments, use_errno=True)
        bound: Callable[..., int] = prototype((name, _library()))
    except (AttributeError, OSError, TypeError) as error:
        raise missing(name) from error
    return bound


@cache
def large_file_function(name: str, *arguments: type, result: type = ctypes.c_int) -> Callable[..., int]:
    """The variant of *name* whose offsets have 64 bits: ``name64`` in glibc, ``name`` itself in musl.

    Raises OSError (ENOSYS) where the C library has neither.
    """
    try:
        return function(f"{name}64", *arguments, result=result)
    except OSError:
        return function(name, *arguments, result=result)


def missing(name: str) -> OSError:
    """The error for the call *name* on a system that does not have it."""
    return OSError(errno.ENOSYS, f"{name}: {os.strerror(errno.ENOSYS)}")


def fitting(value: int, kind: "type[_SimpleCData[int]]", what: str) -> int:
    """*value*, if *kind* holds it.  Raises OverflowError, which names it *what* (S16)."""
    if kind(value).value != value:
        raise OverflowError(f"{what}: {value:#x} does not fit in {8 * ctypes.sizeof(kind)} bits")
    return value


def check(result: int, call: str, about: object = None) -> int:
    """Return *result* unless it is negative: then raise OSError from this thread's errno.

    *call* names what was called, *about* the file, address or device it concerned.
    """
    if result < 0:
        raise failure(ctypes.get_errno(), call, about)
    return result


def failure(number: int, call: str, about: object = None) -> OSError:
    """The OSError, of the subclass *number* has, that says what failed with what."""
    message = f"{call}: {os.strerror(number)}"
    return OSError(number, message) if about is None else OSError(number, message, about)


def syscall(numbers: SyscallNumbers, *arguments: int) -> int:
    """The result of a system call the C library may not wrap, or -1 with errno set.

    Raises OSError (ENOSYS) on an architecture whose numbers are not known here.
    """
    return _syscall(len(arguments))(numbers[_table()], *arguments)


def system_call(numbers: SyscallNumbers, count: int) -> Callable[..., int]:
    """`syscall` of *numbers* with *count* arguments as a function, for a call that is made often.

    Raises OSError as `syscall`.
    """
    return partial(_syscall(count), numbers[_table()])


@cache
def _syscall(count: int) -> Callable[..., int]:
    words = (ctypes.c_long,) * (1 + count)
    return function("syscall", *words, result=ctypes.c_long)


@cache
def _table() -> int:
    """Which of `SyscallNumbers` holds for this interpreter (not for its kernel: it may be a 32-bit one)."""
    machine, wide = platform.machine(), ctypes.sizeof(ctypes.c_void_p) == 8
    if machine in ("x86_64", "i386", "i486", "i586", "i686"):
        return 0 if wide else 1
    if machine in ("aarch64", "riscv64", "loongarch64") and wide:
        return 2
    raise missing(f"syscall on {machine}")
