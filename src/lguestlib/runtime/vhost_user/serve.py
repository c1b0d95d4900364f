"""A process that serves devices to other people's virtual machines, until a signal ends it."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

from lguestlib.runtime.attachments import Attachment, ConsoleAttachment, DiskAttachment, attach
from lguestlib.runtime.backend.terminal import INPUT, OUTPUT, Terminal
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.gil import SWITCH_INTERVAL
from lguestlib.runtime.options import DeviceOption, DiskImage, TerminalConsole
from lguestlib.runtime.signals import ENDING
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.vhost_user.listen import Listener, inherited
from lguestlib.runtime.vhost_user.process_rings import QueueProcesses
from lguestlib.runtime.vhost_user.queue_process import QueueOfDisk
from lguestlib.runtime.vhost_user.server import Server
from lguestlib.virtio.device import Device
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.feature_names import feature_names
from lguestlib.virtio.features import Feature

DeviceType = TypeVar("DeviceType", bound=Device)


@dataclass(frozen=True)
class ServedDevice:
    """A *device* behind the socket at *path*, or behind the one inherited as *fd*.

    *without*: names of features that are not to be offered; *offered*: of those that are,
    beside what is by default.  *poll*: nanoseconds for which its queues' threads look for
    work before they sleep.  *processes*: each queue, of a disk, in a process of its own.
    """

    device: DeviceOption | TerminalConsole
    path: str = ""
    fd: int = -1
    without: tuple[str, ...] = ()
    offered: tuple[str, ...] = ()
    poll: int = 0
    processes: bool = False


@dataclass(frozen=True)
class QueueRate:
    """What one queue has done in the last *seconds*."""

    name: str
    seconds: float
    chains: int
    bytes: int
    kicks: int
    interrupts: int
    errors: int

    def __str__(self) -> str:
        per_second = 1 / self.seconds
        return (
            f"{self.name:<18}{self.chains * per_second:>12,.0f} chains/s {self.bytes * per_second / 1e6:>10,.1f} MB/s"
            f" {self.kicks * per_second:>10,.0f} kicks/s {self.interrupts * per_second:>10,.0f} interrupts/s"
            f" {self.errors:>4} errors"
        )


class Serving:
    """Serves *devices*; to be made while the process has one thread.

    *say* is given lines for people; *show*, every *stats* seconds unless that is
    0, what each queue has done since.
    """

    def __init__(
        self,
        devices: Sequence[ServedDevice],
        say: Callable[[str], None],
        stats: float,
        show: Callable[[Sequence[QueueRate]], None],
        tracer: Tracer | None = None,
    ) -> None:
        self._devices = devices
        self._say = say
        self._stats = stats
        self._show = show
        self._tracer = tracer
        self._servers: list[Server] = []
        self._lock = threading.Lock()
        self._running = 0
        self._ended_by = 0
        self._signals = {number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN}
        # Changed sizes, of the terminal and of disks; the first also wakes the main thread.
        self._signals |= {signal.SIGWINCH, signal.SIGUSR1, signal.SIGCONT}

    def run(self) -> int:
        """Serve until a signal comes, whose number is returned, or 0 where no front-end can come any more.

        Raises LaunchError.
        """
        interval = sys.getswitchinterval()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals | {signal.SIGTTIN})
        try:
            sys.setswitchinterval(SWITCH_INTERVAL)
            with ExitStack() as opened:
                terminal = Terminal(INPUT, OUTPUT, self._escaped, self._hung_up, self._tracer)
                self._open(opened, terminal)
                self._running = len(self._servers)
                for server in self._servers:
                    opened.callback(server.close)
                if any(isinstance(served.device, TerminalConsole) for served in self._devices):
                    opened.enter_context(terminal.raw())
                for server in self._servers:
                    server.start()
                for served in self._devices:
                    if served.path:
                        self._say(f"listening on {served.path}")
                number = self._wait(terminal)
                for server in self._servers:
                    server.request_stop()
                return number
        finally:
            sys.setswitchinterval(interval)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _open(self, opened: ExitStack, terminal: Terminal) -> None:
        counts: dict[str, int] = {}
        for served in self._devices:
            attachment: Attachment
            if isinstance(served.device, TerminalConsole):
                attachment = ConsoleAttachment(terminal)
            else:
                attachment = attach(served.device, self._say, self._tracer)
            opened.callback(attachment.close)
            if served.path:
                listener = opened.enter_context(Listener(served.path))
                connection = listener.socket
            else:
                connection = inherited(served.fd)
                opened.callback(connection.close)
            kind = attachment.kind
            counts[kind] = number = counts.get(kind, -1) + 1
            device = attachment.device(number)
            # The front-end chooses.  But QEMU 7.2 lets a guest have RING_RESET and tells nobody of
            # the reset: what is served then is a ring whose memory the guest uses for something else.
            device.withheld = int(Feature.RING_RESET)
            _offer(device, served.offered)
            _withhold(device, served.without)
            processes = None
            image = served.device
            if served.processes and isinstance(image, DiskImage) and isinstance(attachment, DiskAttachment):
                processes = _processes(device, image, attachment.disk.fd, served.poll, self._say)
                opened.callback(processes.close)
            server = Server(
                device, connection, self._say, self._tracer, self._server_ended, processes, served.poll
            )
            self._servers.append(server)

    def _server_ended(self) -> None:
        with self._lock:
            self._running -= 1
        os.kill(os.getpid(), signal.SIGWINCH)

    def _escaped(self) -> None:
        self._end(signal.SIGINT)

    def _hung_up(self, error: OSError) -> None:
        self._say(f"the console's output: {os.strerror(error.errno or 0)}")
        self._end(signal.SIGPIPE)

    def _end(self, number: int) -> None:
        self._ended_by = number
        os.kill(os.getpid(), signal.SIGWINCH)

    def _wait(self, terminal: Terminal) -> int:
        """Sleep, look at the queues now and then if that is wanted, and return what ended it."""
        looked = time.monotonic()
        before = self._totals()
        while True:
            if self._stats:
                taken = signal.sigtimedwait(self._signals, max(0.0, looked + self._stats - time.monotonic()))
                number = taken.si_signo if taken else 0
            else:
                number = signal.sigwait(self._signals)
            match number:
                case 0:
                    now, totals = time.monotonic(), self._totals()
                    self._show(list(self._rates(before, totals, now - looked)))
                    looked, before = now, totals
                case signal.SIGWINCH:
                    if self._ended_by or not self._running:
                        return self._ended_by
                    self._changed(Console, Console.resized)
                case signal.SIGUSR1:
                    # Before the driver is told, which may use the new room at once.
                    for server in self._servers:
                        if server.processes:
                            server.processes.resized()
                    self._changed(Block, Block.resized)
                case signal.SIGCONT:
                    terminal.resume()
                case _:
                    return number

    def _changed(
        self, kind: type[DeviceType], tell: Callable[[DeviceType], None]
    ) -> None:
        for server in self._servers:
            if isinstance(server.device, kind):
                tell(server.device)

    def _totals(self) -> list[tuple[int, ...]]:
        for server in self._servers:
            if server.processes:
                server.processes.count(server.counters)
        return [
            (counters.chains, counters.bytes, counters.kicks, counters.interrupts, counters.errors)
            for server in self._servers
            for counters in server.counters
        ]

    def _rates(
        self, before: list[tuple[int, ...]], now: list[tuple[int, ...]], seconds: float
    ) -> Iterator[QueueRate]:
        names = [f"{server.device.name} {queue.name}" for server in self._servers for queue in server.queues]
        for name, old, new in zip(names, before, now):
            chains, moved, kicks, interrupts, _ = (last - first for last, first in zip(new, old))
            yield QueueRate(name, seconds, chains, moved, kicks, interrupts, new[-1])


def _processes(device: Device, image: DiskImage, fd: int, poll: int, say: Callable[[str], None]) -> QueueProcesses:
    """A process for each queue of *device*, which is the disk *image*, open as *fd*.  Raises LaunchError."""
    names = [f"{device.name} {queue.name}" for queue in device.queues()]
    queues = [
        QueueOfDisk(
            device.name, index, fd, image.path, image.read_only, image.direct, image.queues,
            image.aio == "io_uring", poll, device.withheld,
        )
        for index in range(image.queues)
    ]  # fmt: skip
    try:
        return QueueProcesses(list(zip(queues, names)), say)
    except OSError as error:
        raise LaunchError(f"--processes: {error.strerror}") from None


def _offer(device: Device, names: Sequence[str]) -> None:
    known = feature_names(device.device_type, device.withheld)
    for name in names:
        if name not in known:
            raise LaunchError(f"--with {name}: {device.name} withholds no such feature (but {', '.join(known)})")
        device.withheld &= ~known[name]


def _withhold(device: Device, names: Sequence[str]) -> None:
    known = feature_names(device.device_type, device.offered)
    for name in names:
        if name not in known:
            raise LaunchError(f"--without {name}: {device.name} offers no such feature (it has {', '.join(known)})")
        device.withheld |= known[name]
