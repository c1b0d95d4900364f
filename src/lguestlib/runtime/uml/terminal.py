"""A terminal for a guest whose console driver is a module."""

import threading
import time
from collections.abc import Callable, Sequence

from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.trace import Tracer

SILENCE_SECONDS = 5.0
_LOOK_SECONDS = 0.02


class PatientTerminal(Terminal):
    """Reads nothing before the guest has shown something, or has been silent for `SILENCE_SECONDS`.

    Linux loses what comes while it starts its driver (6.1: from the first
    buffers it makes available until the port is known).
    """

    def __init__(
        self,
        input_fd: int,
        output_fd: int,
        on_escape: Callable[[], None],
        on_hangup: Callable[[OSError], None],
        tracer: Tracer | None = None,
    ) -> None:
        super().__init__(input_fd, output_fd, on_escape, on_hangup, tracer)
        self._shown = threading.Event()
        self._until = 0.0

    def read(self, buffers: Sequence[memoryview]) -> int:
        """As a terminal's.  Raises InterruptedError, also while it waits for the guest."""
        if not self._shown.is_set():
            now = time.monotonic()
            self._until = self._until or now + SILENCE_SECONDS
            if now < self._until:
                self._shown.wait(_LOOK_SECONDS)
                raise InterruptedError
            self._shown.set()
        return super().read(buffers)

    def write(self, buffers: Sequence[memoryview]) -> int:
        """As a terminal's."""
        self._shown.set()
        return super().write(buffers)
