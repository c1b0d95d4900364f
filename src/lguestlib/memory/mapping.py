"""A part of a file that another process has handed over, mapped shared."""

import mmap
import os


def check_held(fd: int, size: int, offset: int, about: str = "") -> None:
    """Raise ValueError, with *about* before its text, unless the file *fd* holds *size* bytes at byte *offset*.

    Touching a page past its end would be a SIGBUS (T13).  Raises OSError (EBADF).
    """
    held = os.fstat(fd).st_size
    if offset < 0 or offset > held or size > held - offset:
        raise ValueError(f"{about}{size:#x} bytes at offset {offset:#x} of a file of {held:#x}")


def map_shared(fd: int, size: int, offset: int, about: str = "") -> tuple[mmap.mmap, int]:
    """*size* bytes at byte *offset* of the file *fd*, page-aligned or not: the mapping, and where in it they begin.

    Raises as `check_held`; OSError where it cannot be mapped for reading and writing (EACCES).
    """
    check_held(fd, size, offset, about)
    skip = offset % mmap.ALLOCATIONGRANULARITY
    return mmap.mmap(fd, skip + size, offset=offset - skip), skip
