"""prctl(2), linux/prctl.h."""

import ctypes

from lguestlib.abi.libc import check, function

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15

NAME_SIZE = 16
"""Bytes of a thread's name in the kernel, its NUL included."""


def name_thread(name: str) -> None:
    """Name the calling thread for ps, top and strace, which show the first 15 bytes.  Raises OSError."""
    text = ctypes.create_string_buffer(name.encode()[: NAME_SIZE - 1])
    call = function("prctl", ctypes.c_int, ctypes.c_void_p)
    check(call(PR_SET_NAME, ctypes.addressof(text)), "prctl", name)


def signal_at_parents_end(number: int) -> None:
    """Have the kernel send this process signal *number* when the thread that started it ends.

    It holds until the next exec of a set-user-ID program.  Raises OSError (EINVAL).
    """
    call = function("prctl", ctypes.c_int, ctypes.c_ulong)
    check(call(PR_SET_PDEATHSIG, number), "prctl", number)
