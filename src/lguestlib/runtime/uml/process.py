"""A process that ends with this one, with all the processes it has started."""

import os
import select
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from lguestlib.runtime.errors import LaunchError

TAIL = 16384
"""Bytes of its output that are kept, the last ones."""


class GuestProcess:
    """Runs *words* in a session of its own, until `kill`, or until the thread that makes this ends.

    It leads a process group; what is left of that when it ends is killed.  Raises
    LaunchError.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        # No code of ours runs between fork and exec, which threads would not bear: so setpriv(1) asks for the
        # signal, and every signal that this process has blocked gets through.
        guard = shutil.which("setpriv")
        if guard is None:
            raise LaunchError("setpriv: not found, and the guest would outlive us (apt-get install util-linux)")
        self._lock = threading.Lock()
        self._tail = b""
        self._output, output = os.pipe()
        null = os.open(os.devnull, os.O_RDONLY)
        try:
            self._pid = os.posix_spawn(
                guard, [guard, "--pdeathsig", "TERM", *words], environment,
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in ((null, 0), (output, 1), (output, 2))],
                setsid=True, setsigmask=(), setsigdef=(signal.SIGTERM, signal.SIGPIPE),
            )  # fmt: skip
        except BaseException:
            os.close(self._output)
            raise
        finally:
            os.close(null)
            os.close(output)

    def wait(self) -> int:
        """Sleep until it ends; its exit status, or the negative number of the signal that killed it.  Once."""
        ended = os.pidfd_open(self._pid)
        try:
            poller = select.poll()
            poller.register(ended, select.POLLIN)
            poller.register(self._output, select.POLLIN)
            while (ready := {fd for fd, _ in poller.poll()}) != {ended}:
                piece = os.read(self._output, TAIL)
                if piece:
                    self._tail = (self._tail + piece)[-TAIL:]
                else:
                    poller.unregister(self._output)
        finally:
            os.close(ended)
            os.close(self._output)
        with self._lock:
            self._kill()
            _, status = os.waitpid(self._pid, 0)
            self._pid = 0
        return os.waitstatus_to_exitcode(status)

    @property
    def last_lines(self) -> list[str]:
        """The last of what it has said."""
        return [line.strip() for line in self._tail.decode(errors="replace").splitlines() if line.strip()]

    def kill(self) -> None:
        """Kill it; any thread may call this."""
        with self._lock:
            self._kill()

    def _kill(self) -> None:
        if self._pid:
            with suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
