"""A network behind a file descriptor that reads and writes whole frames."""

import errno
import os
from collections.abc import Sequence

from lguestlib.abi import uio
from lguestlib.runtime.trace import Tracer


class PacketNetwork:
    """Frames, each behind a header as `NetBackend` has it, through the descriptor *fd*, owned by this.

    *role* names the descriptor in traces.
    """

    offloads = 0

    def __init__(self, fd: int, role: str, tracer: Tracer | None = None) -> None:
        self.fd = fd
        self.tracer = tracer
        self._role = role

    @property
    def mtu(self) -> int | None:
        """What a frame holds behind its Ethernet header; None where the network does not say."""
        return None

    def activate(self, features: int) -> None:
        """Nothing to choose: no offloads."""

    def send(self, buffers: Sequence[memoryview]) -> int:
        """Send one frame straight from guest memory, cut to what one call takes.  Raises OSError."""
        buffers = buffers[: uio.UIO_MAXIOV]
        if self.tracer is None:
            return os.writev(self.fd, buffers)
        return self.tracer.traced("writev", self._role, os.writev, self.fd, buffers)

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Sleep until a frame comes, straight into guest memory.  Raises OSError, InterruptedError."""
        buffers = buffers[: uio.UIO_MAXIOV]
        try:
            if self.tracer is None:
                return uio.readv(self.fd, buffers) or self._gone()
            return self.tracer.traced("readv", self._role, uio.readv, self.fd, buffers) or self._gone()
        except OSError as error:
            if error.errno == errno.EFAULT:
                self._check_there()
            raise

    def _check_there(self) -> None:
        """Raise OSError where it is the network that has gone, and not the memory for its frames."""

    def _gone(self) -> int:
        """There is nobody any more at the other end, and nothing to wait for.  Raises OSError."""
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)
