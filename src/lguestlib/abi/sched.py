"""Namespaces, linux/sched.h."""

import ctypes

from lguestlib.abi.libc import check, function

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000


def unshare(flags: int) -> None:
    """Move the calling thread (the process, for CLONE_NEWUSER) into new namespaces.

    Raises OSError: EPERM or ENOSPC where the host does not allow it, EINVAL for
    CLONE_NEWUSER in a process with several threads.
    """
    check(function("unshare", ctypes.c_int)(flags), "unshare", hex(flags))
