"""The guest's console on a new pseudo-terminal, for whoever opens its other end."""

import os
import termios
import tty
from collections.abc import Callable, Sequence

from lguestlib.abi import uio
from lguestlib.abi.poll import POLLIN, POLLOUT, poll
from lguestlib.runtime.trace import Tracer

PATIENCE = 250
"""Milliseconds that a full pseudo-terminal's reader has to take something.

With nobody there that is some 60 KB/s of output, a few times what a serial line takes.
"""


class Pty:
    """A pseudo-terminal whose other end is the device *name*: raw, and open to one after another.

    When nobody is there, input is waited for, and output kept as far as the
    kernel's buffer goes, some 16 KB.  When that is full, and nothing of it is read
    within `PATIENCE`, it is emptied: as on a serial line what nobody takes is lost,
    and who comes late sees the end of it.  Raises OSError where none may be had.
    """

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.tracer = tracer
        # As long as we have the other end open, nobody's closing it ends anything here.
        self._fd, self._end = os.openpty()
        try:
            os.set_blocking(self._fd, False)
            self.name = os.ttyname(self._end)
            tty.setraw(self._end, termios.TCSANOW)
        except BaseException:
            self.close()
            raise

    def read(self, buffers: Sequence[memoryview]) -> int:
        """Sleep until there is input.  Raises InterruptedError."""
        buffers = buffers[: uio.UIO_MAXIOV]
        while True:
            self._traced("poll", "input", poll, self._fd, POLLIN)
            try:
                return self._traced("readv", "input", uio.readv, self._fd, buffers)
            except BlockingIOError:
                continue

    def write(self, buffers: Sequence[memoryview]) -> int:
        """Write from the start of *buffers*, in the place of what nobody reads if need be.

        Returns the bytes written.  Raises InterruptedError.
        """
        while True:
            try:
                return self._traced("writev", "output", uio.writev, self._fd, buffers[: uio.UIO_MAXIOV])
            except BlockingIOError:
                if not self._traced("poll", "output", poll, self._fd, POLLOUT, PATIENCE):
                    self._empty()

    def _empty(self) -> None:
        """Throw away what was written and not read."""
        # Not by our own open end: a hang-up, a getty's way to be alone, leaves that of no use.
        end = os.open(self.name, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            termios.tcflush(end, termios.TCIFLUSH)
        finally:
            os.close(end)

    def _traced(self, call: str, role: str, function: Callable[..., int], *arguments: object) -> int:
        if self.tracer is None:
            return function(*arguments)
        return self.tracer.traced(call, role, function, *arguments)

    def size(self) -> tuple[int, int]:
        """Columns and rows that whoever is at the other end has set; zeros until then."""
        size = os.get_terminal_size(self._fd)
        return size.columns, size.lines

    def close(self) -> None:
        """Close both ends; no thread may be in a call."""
        os.close(self._fd)
        os.close(self._end)
