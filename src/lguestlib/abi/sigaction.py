"""sigaction(2) through the C library, signal.h: a handler that is told where a fault was.

The interpreter's own handlers run later, in the main thread.  What is given here
runs at once, on the thread that has got the signal.
"""

import ctypes
import platform
import sys
from collections.abc import Callable
from functools import cache
from typing import Annotated

from lguestlib.abi.layout import NativeStructure, i32, pointer
from lguestlib.abi.libc import check, function, missing

SIG_DFL = 0
SA_SIGINFO = 4
SA_NODEFER = 0x40000000

_MASK = ctypes.c_ulong * (128 // ctypes.sizeof(ctypes.c_ulong))


class sigaction(NativeStructure):
    """What a signal does; the C library's, not the kernel's."""

    sa_handler: pointer
    sa_mask: Annotated[ctypes.Array[ctypes.c_ulong], _MASK]
    sa_flags: i32
    sa_restorer: pointer


class siginfo_fault(NativeStructure):
    """The beginning of a ``siginfo_t`` that tells of a fault."""

    si_signo: i32
    si_errno: i32
    si_code: i32
    """Above zero where the kernel has found the fault; else somebody has sent the signal."""
    si_addr: pointer


Handler = Callable[[int, int, int], None]
"""Given the signal's number, the address of its ``siginfo_t`` and that of the context."""

_handler_function = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, use_errno=True)
_kept: list[object] = []


@cache
def fault_action(handler: Handler) -> sigaction:
    """The action that calls *handler*, from then on for good, on the thread whose fault it is.

    For faults of the interpreter's own accesses: it waits for the GIL where the
    thread does not have it.
    """
    entry = _handler_function(handler)
    _kept.append(entry)
    address = ctypes.cast(entry, ctypes.c_void_p).value or 0
    return sigaction(sa_handler=address, sa_flags=SA_SIGINFO | SA_NODEFER)


def get_action(number: int) -> sigaction:
    """What signal *number* does now.  Raises OSError (EINVAL)."""
    action = sigaction()
    check(_sigaction()(number, 0, ctypes.addressof(action)), "sigaction", number)
    return action


def set_action(number: int, action: sigaction) -> None:
    """Have signal *number* do that from now on.  Raises OSError (EINVAL)."""
    check(_sigaction()(number, ctypes.addressof(action), 0), "sigaction", number)


def _sigaction() -> Callable[..., int]:
    if sys.platform != "linux" or platform.machine().startswith("mips"):
        # Their structures are others.
        raise missing("sigaction")
    return function("sigaction", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
