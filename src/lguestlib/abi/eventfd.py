"""eventfd(2): a counter in a file descriptor, the kick and the interrupt of this library.

The calls themselves are the standard library's (`os.eventfd`, `os.read`,
`os.write`): they cost half of what ctypes does.
"""

import ctypes
import os
import sys

from lguestlib.abi.libc import failure, fitting, missing

SIGNAL = (1).to_bytes(8, sys.byteorder)
"""The eight bytes that add one to an eventfd: ``os.write(fd, SIGNAL)``."""

BYTES = 8
"""What a read of an eventfd returns: its counter, a native 64-bit integer."""


def eventfd(initial: int = 0) -> int:
    """A new blocking, close-on-exec eventfd whose counter is *initial*, of 32 bits.

    Raises OSError (EMFILE, ENFILE, ENOMEM), OverflowError.
    """
    if not hasattr(os, "eventfd"):
        raise missing("eventfd")
    fitting(initial, ctypes.c_uint, "eventfd counter")
    try:
        return os.eventfd(initial, os.EFD_CLOEXEC)
    except OSError as error:
        raise failure(error.errno or 0, "eventfd") from None


def is_eventfd(fd: int) -> bool:
    """Whether the descriptor *fd* is an eventfd; where that cannot be seen (no /proc), it is taken for one.

    Raises OSError for no descriptor at all (EBADF).
    """
    os.fstat(fd)
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    except OSError:
        return True
