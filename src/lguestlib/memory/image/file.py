"""A file's bytes, mapped."""

import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from lguestlib.memory.image.image import ImageError


@contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[memoryview]:
    """The bytes of the regular file at *path*, read-only and not copied, inside the ``with`` block.

    The file must not be cut short meanwhile.  Raises ImageError for a file that
    is missing, unreadable, empty, or of another kind.
    """
    name = os.fspath(path)
    try:
        # A FIFO without a writer would otherwise keep us here.
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror}") from None
    try:
        mapping = _map(fd, name)
    finally:
        os.close(fd)
    view = memoryview(mapping)
    try:
        yield view
    finally:
        view.release()
        try:
            mapping.close()
        except BufferError:
            pass  # A slice is still held, by a traceback perhaps: the mapping goes when it goes.


def _map(fd: int, name: str) -> mmap.mmap:
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name}: is a directory, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name}: is not a regular file: copy it to one")
    if not status.st_size:
        raise ImageError(f"{name}: is empty")
    try:
        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: cannot be mapped: {error}") from None
