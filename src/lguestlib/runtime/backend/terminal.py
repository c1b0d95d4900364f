"""The guest's console on a terminal, or on any pair of descriptors."""

import errno
import os
import termios
import time
from collections.abc import Callable, Sequence

from lguestlib.abi import uio
from lguestlib.runtime.trace import Tracer

INTERRUPT = 0x03
"""What ^C sends."""

ESCAPE_COUNT = 3
ESCAPE_SECONDS = 1.0
"""That many ^C within that time, each alone in its read, are for the launcher."""


_Attributes = list[int | list[bytes | int]]


class Terminal:
    """Input from *input_fd*, output to *output_fd*; the descriptors stay the caller's.

    *on_escape* is called for the way out; *on_hangup*, with the error, when
    nobody takes the output any more, which is then dropped.
    """

    def __init__(
        self,
        input_fd: int,
        output_fd: int,
        on_escape: Callable[[], None],
        on_hangup: Callable[[OSError], None],
        tracer: Tracer | None = None,
    ) -> None:
        self.tracer = tracer
        self._input_fd = input_fd
        self._output_fd = output_fd
        self._on_escape = on_escape
        self._on_hangup = on_hangup
        self._hung_up = False
        self._saved: _Attributes | None = None
        self._escapes = 0
        self._first_escape = 0.0

    def read(self, buffers: Sequence[memoryview]) -> int:
        """Sleep until there is input; 0 at its end.  Raises InterruptedError."""
        while True:
            try:
                if self.tracer is None:
                    length = uio.readv(self._input_fd, buffers)
                else:
                    length = self.tracer.traced("readv", "input", uio.readv, self._input_fd, buffers)
            except BlockingIOError:
                # Another process has made the shared descriptor non-blocking.
                os.set_blocking(self._input_fd, True)
                continue
            except OSError as error:
                # A terminal whose other end is gone, or that we are in the background of.
                if error.errno == errno.EIO:
                    return 0
                raise
            self._watch_for_escape(length, buffers)
            return length

    def _watch_for_escape(self, length: int, buffers: Sequence[memoryview]) -> None:
        if length != 1 or buffers[0][0] != INTERRUPT:
            self._escapes = 0
            return
        now = time.monotonic()
        if not self._escapes or now - self._first_escape > ESCAPE_SECONDS:
            self._escapes, self._first_escape = 0, now
        self._escapes += 1
        if self._escapes == ESCAPE_COUNT:
            self._on_escape()

    def write(self, buffers: Sequence[memoryview]) -> None:
        """Write all of *buffers*, however slow the reader.  Raises InterruptedError."""
        left = [buffer for buffer in buffers if buffer]
        while left and not self._hung_up:
            try:
                done = self._write_some(left[: uio.UIO_MAXIOV])
            except InterruptedError:
                raise
            except BlockingIOError:
                os.set_blocking(self._output_fd, True)
                continue
            except OSError as error:
                self._hung_up = True
                self._on_hangup(error)
                return
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            if done:
                left[0] = left[0][done:]

    def _write_some(self, buffers: Sequence[memoryview]) -> int:
        if self.tracer is None:
            return uio.writev(self._output_fd, buffers)
        return self.tracer.traced("writev", "output", uio.writev, self._output_fd, buffers)

    def size(self) -> tuple[int, int]:
        """Columns and rows of the terminal; zeros where output goes elsewhere."""
        try:
            size = os.get_terminal_size(self._output_fd)
        except OSError:
            return 0, 0
        return size.columns, size.lines

    def enter_raw(self) -> None:
        """If input is a terminal, hand over each key as it is typed, ^C included.

        Output is still processed: a bare newline starts a new line.
        """
        if self._saved is None and os.isatty(self._input_fd):
            self._saved = termios.tcgetattr(self._input_fd)
            raw = termios.tcgetattr(self._input_fd)
            raw[3] &= ~(termios.ISIG | termios.ICANON | termios.ECHO)
            termios.tcsetattr(self._input_fd, termios.TCSANOW, raw)

    def restore(self) -> None:
        """Put the terminal back as it was found; safe to call at any time, more than once."""
        if self._saved is not None:
            try:
                termios.tcsetattr(self._input_fd, termios.TCSANOW, self._saved)
            except termios.error:
                pass
            self._saved = None
