"""A machine that is a User-mode Linux process: its devices are vhost-user back-ends in this one."""

import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from lguestlib.memory.image.file import open_image
from lguestlib.memory.image.image import ImageError
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.machine import Crash, Outcome, PowerOff, Reboot, Stopped
from lguestlib.runtime.naming import name_this_thread
from lguestlib.runtime.options import MEBIBYTE
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.uml.kernel import UmlKernel
from lguestlib.runtime.uml.process import GuestProcess
from lguestlib.runtime.vhost_user.server import Server
from lguestlib.virtio.device import Device

MEMORY_PLACES = ("/dev/shm", "/tmp", "/var/tmp")
"""Where the file goes that is the guest's memory: the first place with room, and not mounted noexec."""

_RESTART = "reboot: Restarting system"
_PANIC = re.compile(r"Kernel panic - not syncing: (.*)")


class UmlMachine:
    """*kernel* with *memory* bytes, its devices' servers and threads; `close` ends them all.

    *report* is given lines for people.  With *tracer* the queue threads' system
    calls are recorded.  Raises LaunchError.
    """

    def __init__(
        self, kernel: UmlKernel, memory: int, report: Callable[[str], None], tracer: Tracer | None = None
    ) -> None:
        self.runners: list[Server] = []
        self._kernel = kernel
        self._memory = memory
        self._report = report
        self._tracer = tracer
        self._words: list[str] = []
        self._process: GuestProcess | None = None
        self._outcome: Outcome = Stopped()
        self._ended = threading.Event()
        self._stopping = False
        # Held by whoever starts the process, or asks whether there is one.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="guest", daemon=True)
        self._folder = tempfile.TemporaryDirectory(prefix="lguestlib-")

    def add(self, device: Device) -> Server:
        """Put *device* on the bus, behind those before it.  Raises LaunchError."""
        path = self._path(device.name)
        if re.search(r"[:\s]", path):
            # It goes into a word of the kernel's command line, between colons.
            raise LaunchError(f"{path}: a path with a space or a colon (TMPDIR=/tmp makes another)")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
            listener.listen()
        except OSError as error:
            listener.close()
            raise LaunchError(f"{path}: {error.strerror or error} (TMPDIR=/tmp makes another)") from None
        server = Server(device, listener, self._report, self._tracer)
        self.runners.append(server)
        self._words.append(f"virtio_uml.device={path}:{device.device_type}")
        return server

    def boot(self, initrd: str | bytes, words: Sequence[str]) -> None:
        """Say what to boot to: *initrd*, a path or the archive, and more *words* of the command line.

        Raises LaunchError for a path that is no file's.
        """
        if isinstance(initrd, bytes):
            path = self._path("initrd")
            Path(path).write_bytes(initrd)
        else:
            path = os.path.abspath(initrd)
            try:
                with open_image(path):
                    pass
            except ImageError as error:
                raise LaunchError(f"initrd {error}") from None
        self._words = [
            self._kernel.path, f"mem={self._memory // MEBIBYTE}M", f"initrd={path}",
            f"uml_dir={self._folder.name}",
            # Its own console takes what the kernel says before it has the virtio console, and after.
            "con=null", "con0=null,fd:1", "console=tty0", "console=hvc0", "loglevel=4",
            # Left to itself it runs the same program again, with signals blocked that it needs, and may hang.
            "noreboot",
            *self._words, *words,
        ]  # fmt: skip

    def start(self) -> None:
        """Start the guest; `boot` has been called."""
        for server in self.runners:
            server.start()
        self._thread.start()

    def _run(self) -> None:
        name_this_thread("guest")
        try:
            self._outcome = self._be_the_guest()
        except Exception as error:
            self._outcome = Crash(f"{type(error).__name__}: {error}")
        self._ended.set()

    def _be_the_guest(self) -> Outcome:
        environment = {name: value for name, value in os.environ.items() if name not in ("TMP", "TEMP")}
        environment["TMPDIR"] = _memory_place(self._memory)
        with self._lock:
            if self._stopping:
                return Stopped()
            self._process = GuestProcess(self._words, environment)
        status = self._process.wait()
        if self._stopping:
            return Stopped()
        lines = self._process.last_lines
        if status >= 0 and lines and _RESTART in lines[-1]:
            return Reboot()
        # A kernel that cannot start says why, and has not come to its drivers.
        came_up = any(queue.kicks for server in self.runners for queue in server.counters)
        if status < 0 or status and not came_up:
            return Crash(_last_words(lines, status))
        return PowerOff(status)

    def wait(self) -> Outcome:
        """Sleep until the guest ends; Python signal handlers run meanwhile on the main thread."""
        self._ended.wait()
        return self._outcome

    def finish(self) -> None:
        """Nothing: a guest that ends by itself has waited for what it had asked for."""

    def request_stop(self) -> None:
        """End the guest as one pulls a plug, and return at once; `wait` then returns `Stopped`."""
        with self._lock:
            self._stopping = True
            if self._process:
                self._process.kill()

    def stop(self) -> None:
        """End the guest, then the devices' threads; return when they are gone."""
        self.request_stop()
        if self._thread.ident is not None:
            self._thread.join()
        for server in self.runners:
            server.stop()

    def close(self) -> None:
        """Stop everything and give back every descriptor and file."""
        self.stop()
        for server in self.runners:
            server.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def _path(self, name: str) -> str:
        return os.path.join(self._folder.name, name)


def _memory_place(size: int) -> str:
    """Where a file of *size* bytes can be, and run code from; "/tmp" where there is no such place."""
    for place in MEMORY_PLACES:
        try:
            found = os.statvfs(place)
        except OSError:
            continue
        if not found.f_flag & os.ST_NOEXEC and found.f_bavail * found.f_frsize >= size:
            return place
    return "/tmp"


def _last_words(lines: Sequence[str], status: int) -> str:
    """Why a kernel has ended that has said *lines*."""
    for line in reversed(lines):
        if found := _PANIC.search(line):
            return f"panic: {found[1]}"
    ended = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"{ended}: {lines[-1]}" if lines else ended
