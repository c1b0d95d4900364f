"""A back-end that is started by a command, and started again when it has died."""

import os
import signal
import subprocess
import time
from typing import Self

from lguestlib.runtime.errors import LaunchError

START_SECONDS = 20.0
"""How long a back-end may take until it listens."""

_LOOK_SECONDS = 0.01
_LISTEN_SECONDS = 0.05


class StartedBackEnd:
    """What *command*, a shell's, starts to listen at *path*; it and its children end with this."""

    def __init__(self, command: str, path: str) -> None:
        self._command = command
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, having ended the one before.  Raises LaunchError where it does not listen in time."""
        self.close()
        if os.path.exists(self._path):
            os.unlink(self._path)
        self._process = subprocess.Popen(
            ["sh", "-c", self._command], start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + START_SECONDS
        while not os.path.exists(self._path):
            if self._process.poll() is not None or time.monotonic() >= deadline:
                raise LaunchError(f"--start {self._command}: it does not listen at {self._path}")
            time.sleep(_LOOK_SECONDS)
        # From bind(2) to listen(2).
        time.sleep(_LISTEN_SECONDS)

    def close(self) -> None:
        """End it."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(START_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            self._process.kill()
        try:
            # What would not end by itself, or what the shell has left.
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
