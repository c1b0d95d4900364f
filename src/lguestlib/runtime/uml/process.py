"""A process that ends with this one, with all the processes it has started."""

import os
import select
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

TAIL = 16384
"""Bytes of its output that are kept, the last ones."""

_GUARD = 'read group && { read _; kill -9 "-$group"; }'
_DEFAULT = (signal.SIGTERM, signal.SIGPIPE)
"""Signals that this process may ignore and another is not to."""


class Guard:
    """Kills a process group as soon as this process has ended, however it does.

    That takes a process that outlives this one: a shell, asleep until a pipe is
    closed.  (A signal to the group's leader at its parent's death would leave
    what the leader has started.)
    """

    def __init__(self) -> None:
        reader, self._pipe = os.pipe()
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            self._pid = os.posix_spawn(
                "/bin/sh", ["sh", "-c", _GUARD], {},
                file_actions=_as_standard(reader, null),
                setsid=True, setsigmask=(), setsigdef=_DEFAULT,
            )  # fmt: skip
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(reader)
            os.close(null)

    def watch(self, group: int) -> None:
        """Say which *group* that is."""
        os.write(self._pipe, b"%d\n" % group)

    def close(self) -> None:
        """Kill what is left of the group now; its number must not be another's yet."""
        os.close(self._pipe)
        os.waitpid(self._pid, 0)


class GuestProcess:
    """Runs *words* in a session and a process group of its own, until `kill`, or until this process ends.

    What is left of the group when its leader ends is killed.  Raises OSError.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._tail = b""
        self._guard = Guard()
        self._output, output = os.pipe()
        null = os.open(os.devnull, os.O_RDONLY)
        try:
            # No code of ours between fork and exec, which threads would not bear.
            self._pid = os.posix_spawn(
                words[0], list(words), environment,
                file_actions=_as_standard(null, output),
                setsid=True, setsigmask=(), setsigdef=_DEFAULT,
            )  # fmt: skip
        except BaseException:
            os.close(self._output)
            self._guard.close()
            raise
        finally:
            os.close(null)
            os.close(output)
        self._guard.watch(self._pid)

    def wait(self) -> int:
        """Sleep until it ends; its exit status, or a negative number, the signal's that killed it.  Once."""
        ended = os.pidfd_open(self._pid)
        try:
            poller = select.poll()
            poller.register(ended, select.POLLIN)
            poller.register(self._output, select.POLLIN)
            while (ready := {fd for fd, _ in poller.poll()}) != {ended}:
                if self._output in ready:
                    piece = os.read(self._output, TAIL)
                    self._tail = (self._tail + piece)[-TAIL:]
                    if not piece:
                        poller.unregister(self._output)
        finally:
            os.close(ended)
            os.close(self._output)
        with self._lock:
            self._guard.close()
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
            if self._pid:
                with suppress(ProcessLookupError):
                    os.killpg(self._pid, signal.SIGKILL)


def _as_standard(given: int, output: int) -> list[tuple[int, int, int]]:
    """What makes *given* the standard input of a process to be, and *output* the other two."""
    return [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((given, output, output))]
