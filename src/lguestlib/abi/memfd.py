"""memfd_create(2), linux/memfd.h: memory as a file descriptor that can be handed over."""

import os

F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SHRINK = 0x0002


def memfd(name: str, size: int) -> int:
    """A new close-on-exec memfd of *size* bytes, all zero, that can be sealed.

    Raises OSError (EMFILE, ENFILE, ENOMEM, EFBIG).
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, f"ftruncate: {error.strerror}", name) from None
    return fd
