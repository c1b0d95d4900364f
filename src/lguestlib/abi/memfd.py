"""memfd_create(2) and its seals, linux/memfd.h and linux/fcntl.h: memory as a descriptor to hand over."""

import os

from lguestlib.abi.libc import failure, missing

F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SEAL = 0x0001
F_SEAL_SHRINK = 0x0002
F_SEAL_GROW = 0x0004
F_SEAL_WRITE = 0x0008
F_SEAL_FUTURE_WRITE = 0x0010


def memfd(name: str, size: int) -> int:
    """A new close-on-exec memfd of *size* bytes, all zero, that can be sealed.

    Raises OSError (EMFILE, ENFILE, ENOMEM, EFBIG, EINVAL for a negative size),
    OverflowError for a size over 63 bits.
    """
    if not hasattr(os, "memfd_create"):
        raise missing("memfd_create")
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise failure(error.errno or 0, "memfd_create", name) from None
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise failure(error.errno or 0, "ftruncate", name) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def add_seals(fd: int, seals: int) -> None:
    """Forbid, for good, what the F_SEAL bits in *seals* name.

    Raises OSError: EBUSY for F_SEAL_WRITE while a writable mapping exists, EPERM
    once F_SEAL_SEAL is set, EINVAL for a file that has no seals.
    """
    _fcntl(fd, F_ADD_SEALS, seals, "F_ADD_SEALS")


def get_seals(fd: int) -> int:
    """The F_SEAL bits set on *fd*.  Raises OSError: EINVAL for a file that has no seals."""
    return _fcntl(fd, F_GET_SEALS, 0, "F_GET_SEALS")


def _fcntl(fd: int, command: int, argument: int, call: str) -> int:
    try:
        from fcntl import fcntl
    except ImportError:
        raise missing(call) from None
    try:
        return fcntl(fd, command, argument)
    except OSError as error:
        raise failure(error.errno or 0, call, fd) from None
