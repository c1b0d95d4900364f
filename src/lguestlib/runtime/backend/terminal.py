"""The guest's console on a terminal, or on any pair of descriptors."""

import errno
import os
import termios
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lguestlib.abi import uio
from lguestlib.runtime.trace import Tracer

INPUT, OUTPUT = 0, 1
"""This process's."""

INTERRUPT = 0x03
"""What ^C sends."""

ESCAPE_COUNT = 3
ESCAPE_SECONDS = 1.0
"""That many ^C within that time, each alone in its read, are for the launcher."""

AWAY_SECONDS = 0.05
"""How often a terminal that another job has is looked at."""

_JOINED = 65536
"""Bytes that are copied to be written together, at most."""

_Attributes = list[int | list[bytes | int]]


class Terminal:
    """Input from *input_fd*, output to *output_fd*; the descriptors stay the caller's.

    *on_escape* is called for the way out; *on_hangup*, with the error, when
    nobody takes the output any more, which is then dropped.  In the background of
    its shell's jobs the process goes on, and reads when it is in the foreground:
    its owner blocks SIGTTIN.
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
        self._in_raw = False
        self._found: _Attributes | None = None
        self._away = False
        self._escapes: deque[float] = deque(maxlen=ESCAPE_COUNT)

    def read(self, buffers: Sequence[memoryview]) -> int:
        """Sleep until there is input; 0 at its end.  Raises InterruptedError."""
        buffers = buffers[: uio.UIO_MAXIOV]
        while True:
            if self._away and not _in_background(self._input_fd):
                self._away = False
                self.resume()
            try:
                if self.tracer is None:
                    length = uio.readv(self._input_fd, buffers)
                else:
                    length = self.tracer.traced("readv", "input", uio.readv, self._input_fd, buffers)
            except InterruptedError:
                raise
            except BlockingIOError:
                # Another process has made the shared descriptor non-blocking.
                os.set_blocking(self._input_fd, True)
                continue
            except OSError as error:
                if error.errno == errno.EIO and _in_background(self._input_fd):
                    self._away = True
                    time.sleep(AWAY_SECONDS)
                    raise InterruptedError from None
                if error.errno == errno.EFAULT:
                    raise
                # A terminal whose other end is gone (EIO), what nohup puts in its place (EBADF).
                return 0
            self._watch_for_escape(length, buffers)
            return length

    def _watch_for_escape(self, length: int, buffers: Sequence[memoryview]) -> None:
        if length != 1 or buffers[0][0] != INTERRUPT:
            self._escapes.clear()
            return
        now = time.monotonic()
        self._escapes.append(now)
        if len(self._escapes) == ESCAPE_COUNT and now - self._escapes[0] <= ESCAPE_SECONDS:
            self._on_escape()

    def write(self, buffers: Sequence[memoryview]) -> int:
        """Write from the start of *buffers*, however slow the reader; return the bytes written, or dropped.

        Raises InterruptedError.
        """
        while not self._hung_up:
            try:
                return self._write_some(buffers[: uio.UIO_MAXIOV])
            except InterruptedError:
                raise
            except BlockingIOError:
                os.set_blocking(self._output_fd, True)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    raise
                self._hung_up = True
                self._on_hangup(error)
        return sum(map(len, buffers))

    def _write_some(self, buffers: Sequence[memoryview]) -> int:
        if len(buffers) > 1 and sum(map(len, buffers)) <= _JOINED:
            # A few words each: they are sooner put together than told one by one.
            buffers = [memoryview(bytearray().join(buffers))]
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

    @contextmanager
    def raw(self) -> Iterator[None]:
        """Inside the ``with`` block a terminal hands over each key as it is typed, ^C included.

        Output is still processed: a bare newline starts a new line.  In the end
        the terminal is put back as it was found.  Another job's is left alone.
        """
        self._in_raw = os.isatty(self._input_fd)
        self.resume()
        try:
            yield
        finally:
            self._in_raw = False
            if self._found is not None and not _in_background(self._input_fd):
                try:
                    termios.tcsetattr(self._input_fd, termios.TCSANOW, self._found)
                except termios.error:
                    pass

    def resume(self) -> None:
        """Inside `raw`, when the terminal may have come back from another job, or from the shell."""
        if not self._in_raw or _in_background(self._input_fd):
            return
        try:
            now: _Attributes = termios.tcgetattr(self._input_fd)
            if self._found is None:
                self._found = now
            termios.tcsetattr(self._input_fd, termios.TCSANOW, _raw(now))
        except termios.error:
            # The terminal is gone.
            return


def _raw(attributes: _Attributes) -> _Attributes:
    local, characters = attributes[3], attributes[6]
    assert isinstance(local, int) and isinstance(characters, list)
    raw, characters = list(attributes), list(characters)
    raw[3] = local & ~(termios.ISIG | termios.ICANON | termios.ECHO | termios.IEXTEN)
    characters[termios.VMIN], characters[termios.VTIME] = 1, 0
    raw[6] = characters
    return raw


def _in_background(fd: int) -> bool:
    """Whether this process's terminal is another job's now: changing it would stop this one (SIGTTOU)."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:
        return False
