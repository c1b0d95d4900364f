"""A file without a name, for what lasts as long as its descriptor."""

import errno
import os

from lguestlib.abi.memfd import memfd


def unnamed_file(about: str, size: int) -> int:
    """A new close-on-exec file of *size* bytes, all zero; *about* is for whoever looks at descriptors.

    It is in memory, or, before Linux 3.17, where temporary files are.  Raises OSError.
    """
    try:
        return memfd(about, size)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    import tempfile

    fd, path = tempfile.mkstemp(prefix=f"{about}-")
    try:
        os.unlink(path)
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd
