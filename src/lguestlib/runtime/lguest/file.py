"""/dev/lguest as a file: what is written to it, and what a read of it says.

`LguestMachine` does with it what `LguestFile` has, and no more.
"""

import ctypes
import errno
import os
from typing import Protocol

from lguestlib.abi.libc import check, failure, large_file_function

DEVICE = "/dev/lguest"


class LguestUnusable(Exception):
    """lguest cannot be used here; the message is one line with *what* is wrong and the *remedy*."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what} ({remedy})")
        self.what = what
        self.remedy = remedy


class LguestFile(Protocol):
    """An open /dev/lguest: one guest (Linux, drivers/lguest/lguest_user.c)."""

    def write(self, request: bytes, /) -> int:
        """Make *request* (`lguestlib.abi.lguest`), and return what the driver does: 12, or 0.

        Raises OSError: EINVAL for all but INITIALIZE at first, EBUSY for a second
        one, ENOENT for an interrupt to a dead guest, EBADF or EINVAL for a bad eventfd.
        """

    def pread(self, size: int, /) -> bytes:
        """Run the guest, on the thread that initialized it: the four bytes of the address it has notified.

        Raises OSError: ENOENT when the guest is dead, whose reason, ended by a zero, is what
        the next call returns, as far as *size* bytes hold it; ERESTART when it wants to start
        anew; EPERM on another thread; InterruptedError when a signal comes first.
        """

    def close(self) -> None:
        """Let go of the guest, which is gone then."""


class DevLguest:
    """/dev/lguest itself.  Raises LguestUnusable where it cannot be opened."""

    def __init__(self, path: str = DEVICE) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise LguestUnusable(f"{path}: {error.strerror}", _remedy(error)) from None
        # Bound here: no first use may fail while the guest runs.
        self._pread = large_file_function(
            "pread", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, result=ctypes.c_ssize_t
        )
        self._path = path

    def write(self, request: bytes, /) -> int:
        return os.write(self._fd, request)

    def pread(self, size: int, /) -> bytes:
        # Offset 0 is the guest's only processor.  `os.pread` would hide EINTR (Y3).
        buffer = ctypes.create_string_buffer(size)
        length = check(self._pread(self._fd, buffer, size, 0), "pread", self._path)
        return buffer.raw[:length]

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd < 0:
            raise failure(errno.EBADF, "close", self._path)
        os.close(fd)


def _remedy(error: OSError) -> str:
    """What to do about *error*, with which the device could not be opened."""
    machine = os.uname().machine
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO) and machine not in _MACHINES:
        return f"this host's kernel is for {machine}: lguest was in Linux 2.6.30 to 3.19 for 32-bit x86"
    return {
        errno.EACCES: "run as root, or chmod it",
        errno.EPERM: "run as root, or chmod it",
        errno.EBUSY: "end whoever has it first",
    }.get(error.errno or 0, "modprobe lg, on a 32-bit x86 Linux 2.6.30 to 3.19 with CONFIG_LGUEST")


_MACHINES = ("i386", "i486", "i586", "i686")
"""What uname(2) says of a kernel that could have lguest."""
