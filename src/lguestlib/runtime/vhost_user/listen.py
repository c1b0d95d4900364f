"""The socket that a front-end finds a device behind."""

import errno
import os
import socket
import stat
from typing import Self

from lguestlib.runtime.errors import LaunchError


class Listener:
    """A listening Unix socket at *path*, which goes when this is closed.

    A socket that nobody listens on any more, left by a process that was killed,
    is replaced.  Raises LaunchError.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            try:
                self.socket.bind(path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not _is_abandoned(path):
                    raise
                os.unlink(path)
                self.socket.bind(path)
            self.socket.listen()
            self._identity = _identity(path)
        except OSError as error:
            self.socket.close()
            remedies = {
                errno.EADDRINUSE: "something is there already: name another path, or end who listens there",
                errno.ENOENT: f"mkdir -p {os.path.dirname(path) or '.'}",
                errno.EACCES: "name a path in a directory of your own",
            }
            # The standard library has its own words for a path that is too long, and no number.
            reason = error.strerror or f"{error} (107 bytes are the most)"
            remedy = remedies.get(error.errno or 0)
            raise LaunchError(f"--socket-path {path}: {reason}" + (f" ({remedy})" if remedy else "")) from None

    def close(self) -> None:
        """Close the socket and take its name away, unless somebody else has put another there."""
        self.socket.close()
        try:
            if _identity(self.path) == self._identity:
                os.unlink(self.path)
        except OSError:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def inherited(fd: int) -> socket.socket:
    """The Unix socket that this process was started with as descriptor *fd*.  Raises LaunchError."""
    try:
        given = socket.socket(fileno=fd)
    except OSError as error:
        remedy = "the parent has to hand over a Unix socket under this number"
        raise LaunchError(f"--fd {fd}: {error.strerror} ({remedy})") from None
    if given.family != socket.AF_UNIX or given.type != socket.SOCK_STREAM:
        given.close()
        raise LaunchError(f"--fd {fd}: not a Unix stream socket")
    given.set_inheritable(False)
    given.setblocking(True)
    return given


def _is_abandoned(path: str) -> bool:
    """Whether *path* is a socket that nobody listens on."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
        knock.setblocking(False)
        try:
            knock.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
