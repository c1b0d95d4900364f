"""poll(2) with EINTR visible, asm-generic/poll.h: for a wait that must be interruptible and may have an end."""

import ctypes

from lguestlib.abi.layout import NativeStructure, i32, u16
from lguestlib.abi.libc import check, fitting, function

POLLIN = 0x0001
POLLOUT = 0x0004
POLLERR = 0x0008
POLLHUP = 0x0010


class pollfd(NativeStructure):
    """asm-generic/poll.h: a descriptor, what is asked for, and what has come, each a ``short`` there."""

    fd: i32
    events: u16
    revents: u16


def poll(fd: int, events: int, milliseconds: int = -1) -> int:
    """Wait until *fd* has some of *events*, POLLERR or POLLHUP, and return which; 0 after *milliseconds*.

    Without end where they are negative.  Raises InterruptedError when a signal
    arrives first, unlike `select.poll`, and OverflowError for what no C int holds.
    """
    one = pollfd(fd=fitting(fd, ctypes.c_int, "poll descriptor"), events=events)
    fitting(milliseconds, ctypes.c_int, "poll milliseconds")
    call = function("poll", ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int)
    check(call(ctypes.addressof(one), 1, milliseconds), "poll", fd)
    return one.revents
