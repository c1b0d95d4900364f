"""A signal that does nothing but interrupt one thread's system call.

The handler is a C function of the C library that is harmless as one
(``getpid``): nothing runs in the interpreter, the main thread is not disturbed,
and it can be installed from any thread.
"""

import ctypes
import errno
import os
import signal
from functools import cache

from lguestlib.abi.libc import check, function, syscall

INTERRUPT: int = getattr(signal, "SIGRTMIN", 34) + 5
"""The signal used: a real-time one, left alone by applications and by the C library."""

SYS_tgkill = (234, 270, 131)


@cache
def install_interrupt_handler() -> None:
    """Make `INTERRUPT` break system calls with EINTR instead of ending the process.  Raises OSError."""
    set_handler = function("signal", ctypes.c_int, ctypes.c_void_p, result=ctypes.c_ssize_t)
    handler = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value or 0
    check(-1 if set_handler(INTERRUPT, handler) == -1 else 0, "signal", INTERRUPT)
    check(function("siginterrupt", ctypes.c_int, ctypes.c_int)(INTERRUPT, 1), "siginterrupt", INTERRUPT)


def interrupt_thread(native_id: int) -> None:
    """Interrupt the system call that thread *native_id* (`threading.get_native_id`) is in.

    A call it has not entered yet is not interrupted: repeat until it confirms.
    A thread that has ended is no error.  Ends the process where
    `install_interrupt_handler` was not called.
    """
    if syscall(SYS_tgkill, os.getpid(), native_id, INTERRUPT) < 0 and ctypes.get_errno() != errno.ESRCH:
        check(-1, "tgkill", native_id)
