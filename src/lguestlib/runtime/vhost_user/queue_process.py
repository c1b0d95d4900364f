"""A process that serves one queue of a disk, in an interpreter of its own.

Whoever starts it, ``python -m`` and this module's name, is its front-end: each
conversation comes as a connected socket over another one, the control socket, and
in it this process serves the ring whose kick it is given, as any back-end does.

On the control socket, of packets, the first byte tells what it is.  Each order is
answered, and the end of the orders is the end of the process.
"""

import json
import signal
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, fields
from enum import Enum

from lguestlib.abi.prctl import signal_at_parents_end
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.gil import SWITCH_INTERVAL
from lguestlib.runtime.naming import name_this_thread
from lguestlib.runtime.vhost_user.conversation import Conversation
from lguestlib.runtime.vhost_user.stream import MessageStream
from lguestlib.runtime.vhost_user.thread_rings import ThreadRings
from lguestlib.virtio.devices.block import Block


class Order(bytes, Enum):
    """What a parent has a process do."""

    CONVERSE = b"c"
    """Comes with the socket of the next conversation; the one before is over."""
    RESIZED = b"r"
    """See how long the disk is now."""
    COUNT = b"n"
    """Answer what the queue has done since the last time, as `COUNTERS` has it."""
    SETTLE = b"t"
    """Answer: that comes behind all that was told before."""


class Told(bytes, Enum):
    """What a process tells its parent."""

    ANSWER = b"a"
    """An order has been followed."""
    FAILED = b"f"
    """The queue has failed; with the reason."""
    SAID = b"s"
    """With a line for people."""
    OVER = b"o"
    """The conversation is over."""


COUNTERS = struct.Struct(f"={len(fields(QueueCounters))}q")

_PACKET = 16
_LEFT_TO_THE_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1}


@dataclass(frozen=True)
class QueueOfDisk:
    """Queue number *index* of so many *queues* of the disk called *name*, which is open as *fd*.

    *path*, *read_only* and *direct* are those of a `FileDisk`, *withheld* is the
    device's.  With *transfers* many requests are in hand at a time; without, its thread
    looks for work for up to *poll* nanoseconds before it sleeps.
    """

    name: str
    index: int
    fd: int
    path: str
    read_only: bool
    direct: bool
    queues: int
    transfers: bool
    poll: int
    withheld: int

    def words(self, control: int) -> Sequence[str]:
        """The command line of its process, to which the socket *control* and the disk are handed down."""
        return [sys.executable, "-m", __name__, str(control), json.dumps(asdict(self))]


class _Service:
    """Follows the orders that come on *control*."""

    def __init__(self, control: socket.socket, device: Block, index: int, poll: int) -> None:
        self._control = control
        self._device = device
        self._poll = poll
        self._queues = device.queues()
        self._counters = [QueueCounters() for _ in self._queues]
        self._counted = self._counters[index]
        self._told: tuple[int, ...] = astuple(self._counted)
        self._conversation: Conversation | None = None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Until there are no more."""
        while True:
            order, fds, _, _ = socket.recv_fds(self._control, _PACKET, 1, socket.MSG_CMSG_CLOEXEC)
            answer = b""
            if not order:
                break
            match Order(order):
                case Order.CONVERSE:
                    self._converse(socket.socket(fileno=fds[0]))
                case Order.RESIZED:
                    self._device.resized()
                case Order.COUNT:
                    answer = self._count()
            tell(self._control, Told.ANSWER, answer)
        self._end()

    def _converse(self, connection: socket.socket) -> None:
        self._end()
        rings = ThreadRings(self._device.name, self._queues, self._counters, poll=self._poll)
        self._conversation = Conversation(
            self._device, self._queues, rings, MessageStream(connection), self._say, self._failed
        )
        self._thread = threading.Thread(
            target=self._run, args=[self._conversation], name="conversation", daemon=True
        )
        self._thread.start()

    def _run(self, conversation: Conversation) -> None:
        name_this_thread("conversation")
        try:
            conversation.run()
        finally:
            tell(self._control, Told.OVER)

    def _end(self) -> None:
        if self._conversation and self._thread:
            self._conversation.end()
            self._thread.join()

    def _count(self) -> bytes:
        before, self._told = self._told, astuple(self._counted)
        return COUNTERS.pack(*(now - then for now, then in zip(self._told, before)))

    def _failed(self, reason: str) -> None:
        tell(self._control, Told.FAILED, _encoded(reason))

    def _say(self, line: str) -> None:
        tell(self._control, Told.SAID, _encoded(line))


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


def tell(control: socket.socket, what: Told, more: bytes = b"") -> None:
    """Tell the parent, which may have gone."""
    with suppress(ConnectionError):
        control.send(what.value + more)


def main(words: Sequence[str]) -> int:
    """Serve until the parent wants no more, or has gone; the exit status."""
    signal_at_parents_end(signal.SIGKILL)
    # A terminal sends its signals to the whole group, and so do others.
    signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_PARENT)
    sys.setswitchinterval(SWITCH_INTERVAL)
    queue = QueueOfDisk(**json.loads(words[1]))
    with socket.socket(fileno=int(words[0])) as control:
        try:
            disk = FileDisk(queue.fd, queue.path, queue.read_only, None, queue.direct)
            device = Block(disk, queue.name, queue.queues, disk.fd if queue.transfers else None)
        except (OSError, ValueError) as error:
            tell(control, Told.SAID, _encoded(f"{queue.name}: {error}"))
            return 1
        device.withheld = queue.withheld
        name_this_thread(f"{queue.name} {device.queues()[queue.index].name}")
        _Service(control, device, queue.index, queue.poll).run()
        disk.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
