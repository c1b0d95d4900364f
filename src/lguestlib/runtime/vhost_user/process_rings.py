"""Rings served by processes, one for each queue, each with the queue's thread in it.

What they are told they are told in vhost-user, as any back-end is, and the memory,
the kicks and the interrupts are handed over: nothing of the data comes this way.
"""

import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from lguestlib.memory.mapping import check_held
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.naming import name_this_thread
from lguestlib.runtime.vhost_user.queue_process import COUNTERS, Order, QueueOfDisk, Told
from lguestlib.runtime.vhost_user.rings import OnFailure, RingsLost
from lguestlib.runtime.vhost_user.stream import MessageStream, close_all
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.vhost_user.backend import OFFERED, MapInflight, MapLog, MapMemory, QueueSetup
from lguestlib.virtio.vhost_user.frontend import Request, RequestRefused, Requests
from lguestlib.virtio.vhost_user.message import Message, ProtocolError

_PACKET = 65536
_ANSWER_SECONDS = 30.0
"""How long a process may take to do what it is told, its start included, before it is killed."""

_END_SECONDS = 1.0
"""How long it may take to end by itself."""

Answer = TypeVar("Answer", covariant=True)


class QueueProcess:
    """The process of *queue*, called *name*, from its start to its end.

    *report* is given lines for people.  Raises OSError where it cannot be started.
    """

    def __init__(self, queue: QueueOfDisk, name: str, report: Callable[[str], None]) -> None:
        self.name = name
        self.on_failure: OnFailure = _nobody
        """Told of the queue's failure in the conversation there is."""
        self.on_over: Callable[[], None] = _nothing
        """Called when that conversation is over, or the process has ended, whatever the reason."""
        self.ended = False
        self._report = report
        self._stopping = False
        self._over = threading.Event()
        # Held from an order to its answer.
        self._asking = threading.Lock()
        self._answers: SimpleQueue[bytes | None] = SimpleQueue()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        started: SimpleQueue[subprocess.Popen[bytes] | Exception] = SimpleQueue()
        with theirs:
            self._thread = threading.Thread(
                target=self._run, args=[queue, theirs.fileno(), started], name=f"{name} process", daemon=True
            )
            self._thread.start()
            process = started.get()
        if isinstance(process, Exception):
            self._control.close()
            raise process
        self._process = process

    def ask(self, order: Order, fds: Sequence[int] = ()) -> bytes | None:
        """Have *order* followed; its answer, or None where the process has ended.

        Any thread may, but the one that tells of a failure.
        """
        with self._asking:
            try:
                socket.send_fds(self._control, [order.value], fds)
            except OSError:
                return None
            try:
                return self._answers.get(timeout=_ANSWER_SECONDS)
            except Empty:
                self._process.kill()
                return self._answers.get()

    def converse(self, connection: socket.socket) -> bool:
        """Have it talk on *connection*, which stays the caller's; False where it has ended."""
        self._over.clear()
        return self.ask(Order.CONVERSE, [connection.fileno()]) is not None

    def rest(self) -> None:
        """Return when it has let go of all that the last conversation has brought."""
        if not self._over.wait(_ANSWER_SECONDS):
            self._process.kill()
            self._over.wait()
        self.on_failure, self.on_over = _nobody, _nothing

    def _run(
        self, queue: QueueOfDisk, control: int, started: "SimpleQueue[subprocess.Popen[bytes] | Exception]"
    ) -> None:
        """Start it and see it to its end: it would be killed when the thread that has started it ends."""
        name_this_thread(self._thread.name)
        try:
            process = subprocess.Popen(
                queue.words(control), pass_fds=[control, queue.fd], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
        except Exception as error:
            started.put(error)
            return
        started.put(process)
        self._listen()
        status = process.wait()
        self.ended = True
        self._answers.put(None)
        if not self._stopping:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            self._report(f"{self.name}: its process has ended ({how}); the next front-end gets another")
        self._end_conversation()

    def _listen(self) -> None:
        """Take what it tells until there is no more."""
        while packet := self._receive():
            text = packet[1:]
            match Told(packet[:1]):
                case Told.ANSWER:
                    self._answers.put(text)
                case Told.FAILED:
                    self.on_failure(text.decode())
                case Told.SAID:
                    self._report(text.decode())
                case Told.OVER:
                    self._end_conversation()

    def _end_conversation(self) -> None:
        self.on_over()
        self._over.set()

    def _receive(self) -> bytes:
        try:
            return self._control.recv(_PACKET)
        except ConnectionResetError:
            # It has ended with an order not read, which comes before what it has told.
            return self._control.recv(_PACKET)

    def request_stop(self) -> None:
        """Have it end, and return at once."""
        self._stopping = True
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """`request_stop`, and return when it has ended."""
        self.request_stop()
        self._thread.join(_END_SECONDS)
        self.bury()

    def bury(self) -> None:
        """Return when it has ended, as it is about to, or has to now."""
        self._process.kill()
        self._thread.join()
        self._control.close()


def _nobody(reason: str) -> None:
    """There is no conversation."""


def _nothing() -> None:
    """There is no conversation."""


class QueueProcesses:
    """A process for each of *queues*, with its name for people, all of one device.

    *report* is given lines for people.  Raises OSError where one cannot be started.
    """

    def __init__(self, queues: Sequence[tuple[QueueOfDisk, str]], report: Callable[[str], None]) -> None:
        self._queues = queues
        self._report = report
        self._processes: list[QueueProcess] = []
        try:
            for _ in queues:
                self._processes.append(self._started(len(self._processes)))
        except BaseException:
            self.close()
            raise

    def _started(self, index: int) -> QueueProcess:
        queue, name = self._queues[index]
        return QueueProcess(queue, name, self._report)

    def __len__(self) -> int:
        return len(self._queues)

    def converse(self, index: int, connection: socket.socket) -> QueueProcess:
        """Have queue *index*'s process, a new one if the old has ended, talk on *connection*.

        Raises OSError, RingsLost.
        """
        process = self._processes[index]
        if process.ended or not process.converse(connection):
            process.bury()
            self._processes[index] = process = self._started(index)
            if not process.converse(connection):
                raise RingsLost
        return process

    def resized(self) -> None:
        """Have all of them see how long the disk is now."""
        for process in self._processes:
            process.ask(Order.RESIZED)

    def count(self, counters: Sequence[QueueCounters]) -> None:
        """Add to *counters*, one for each queue, what the queues have done since the last time."""
        for process, counter in zip(self._processes, counters):
            if answer := process.ask(Order.COUNT):
                for field, more in zip(fields(counter), COUNTERS.unpack(answer)):
                    setattr(counter, field.name, getattr(counter, field.name) + more)

    def close(self) -> None:
        """End all of them."""
        for process in self._processes:
            process.request_stop()
        for process in self._processes:
            process.close()


class _Asked(Generic[Answer]):
    """A request that has been sent, and its reply when it has come."""

    def __init__(self, request: Request[Answer]) -> None:
        self.request = request
        self.reply: Message | None = None


class _Link:
    """The conversation with the process of queue *index*; *requests* makes what is asked there.

    Any thread may send; the conversation's waits for replies, which come in turn.
    """

    def __init__(self, processes: QueueProcesses, index: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stream = MessageStream(ours)
        # Held while something is sent: what was sent first is answered first.
        self._sending = threading.Lock()
        self._asked: deque[_Asked[object]] = deque()
        self.requests = Requests()
        try:
            with theirs:
                self.process = processes.converse(index, theirs)
            self.send(self.requests.set_protocol_features(OFFERED))
        except BaseException:
            ours.close()
            raise

    def send(self, request: Request[Answer]) -> _Asked[Answer]:
        """Ask without waiting.  Raises RingsLost."""
        asked = _Asked(request)
        with self._sending:
            try:
                self._stream.send(request.message)
            except OSError:
                raise RingsLost from None
            if request.answered:
                self._asked.append(asked)
        return asked

    def wait(self, asked: _Asked[Answer]) -> Answer:
        """The answer.  Raises RequestRefused, RingsLost, ProtocolError."""
        while asked.reply is None:
            try:
                reply = self._stream.receive()
            except ConnectionError:
                reply = None
            if reply is None:
                raise RingsLost
            close_all(reply.fds)
            self._asked.popleft().reply = reply
        return asked.request.answer(asked.reply)

    def ask(self, requests: Iterator[Request[None]]) -> None:
        """Ask all of *requests*, and wait for the last answer.  Raises as `wait`."""
        for asked in [self.send(request) for request in requests]:
            self.wait(asked)

    def end(self) -> None:
        """Have the process let go of everything."""
        self._stream.end()

    def close(self) -> None:
        """Return when it has."""
        self.process.rest()
        self._stream.close()


class _ProcessRing:
    """Ring *index*, which is served at the other end of *link*."""

    def __init__(self, link: _Link, index: int) -> None:
        self._link = link
        self._index = index
        # Held while it is told something: nothing comes behind the request that stops it.
        self._lock = threading.Lock()
        self._stopping: _Asked[QueueState] | None = None

    def exchange(self, before: QueueSetup, setup: QueueSetup) -> None:
        with self._lock:
            if self._stopping:
                return
            asked = [self._link.send(request) for request in self._changes(before, setup)]
        for each in asked:
            self._link.wait(each)

    def _changes(self, before: QueueSetup, setup: QueueSetup) -> Iterator[Request[None]]:
        requests, index = self._link.requests, self._index
        if setup.features != before.features:
            yield requests.set_features(setup.features)
        if setup.log_used != before.log_used:
            yield requests.set_vring_addr(index, setup.addresses, setup.log_used)
        if setup.call != before.call:
            yield requests.set_vring_call(index, setup.call)
        if setup.kick != before.kick:
            yield requests.set_vring_kick(index, setup.kick)

    def request_stop(self) -> None:
        with self._lock:
            if self._stopping is None:
                try:
                    self._stopping = self._link.send(self._link.requests.get_vring_base(self._index))
                except RingsLost:
                    # `stop` will find out.
                    return

    def stop(self) -> QueueState:
        self.request_stop()
        if self._stopping is None:
            raise RingsLost
        base = self._link.wait(self._stopping)
        # Should it have failed before, that has been told when this is answered.
        self._link.process.ask(Order.SETTLE)
        return base


def _check(effect: MapMemory | MapLog | MapInflight) -> None:
    """Raise ValueError for what no process could map: here it is told once, and why."""
    match effect:
        case MapMemory(_, files):
            for region, fd in files.items():
                check_held(fd, region.size, region.offset, "memory region: ")
        case MapLog(area):
            check_held(area.fd, area.size, area.offset, "dirty log: ")
        case MapInflight(area):
            check_held(area.fd, area.size, area.offset)


class ProcessRings:
    """Has *processes* serve the rings of one conversation."""

    def __init__(self, processes: QueueProcesses) -> None:
        self._processes = processes
        self._links: list[_Link] = []

    @property
    def loss(self) -> None:
        """The processes find that out, and tell of it as of a failure."""

    def open(self, on_lost: Callable[[], None]) -> None:
        for index in range(len(self._processes)):
            link = _Link(self._processes, index)
            self._links.append(link)
            link.process.on_over = on_lost
            if link.process.ended:
                raise RingsLost

    def take(self, effect: MapMemory | MapLog | MapInflight, message: Message) -> None:
        _check(effect)
        if isinstance(effect, MapInflight) and effect.features:
            # A process is told of them when its ring starts, and has to know of which kind the record is.
            for link in self._links:
                link.ask(iter([link.requests.set_features(effect.features)]))
        asked = [(link, link.send(link.requests.passed_on(message))) for link in self._links]
        refused = 0
        for link, each in asked:
            try:
                link.wait(each)
            except RequestRefused:
                refused += 1
        if refused == len(asked):
            raise ValueError("the queues' processes have refused it")
        if refused:
            raise ProtocolError(f"{message.name}: one of the queues' processes has refused it")

    def let_go(self) -> None:
        """They have, before they answered."""

    def forget_inflight(self) -> None:
        for link, asked in [(link, link.send(link.requests.reset_device())) for link in self._links]:
            link.wait(asked)

    def start(self, index: int, setup: QueueSetup, on_failure: OnFailure) -> _ProcessRing:
        link = self._links[index]
        link.process.on_failure = on_failure
        link.ask(self._beginning(link.requests, setup))
        return _ProcessRing(link, index)

    @staticmethod
    def _beginning(requests: Requests, setup: QueueSetup) -> Iterator[Request[None]]:
        """All that a ring is told before it is served, which it is from the last on."""
        index = setup.layout.index
        yield requests.set_features(setup.features)
        yield requests.set_vring_num(index, setup.layout.size)
        yield requests.set_vring_base(index, setup.base)
        yield requests.set_vring_addr(index, setup.addresses, setup.log_used)
        yield requests.set_vring_call(index, setup.call)
        yield requests.set_vring_enable(index, True)
        yield requests.set_vring_kick(index, setup.kick)

    def close(self) -> None:
        for link in self._links:
            link.end()
        for link in self._links:
            link.close()
