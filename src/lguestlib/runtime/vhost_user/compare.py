"""The same random requests, all of them legal, to two back-ends, and where their answers differ."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random
from typing import Self

from lguestlib.abi.virtio_blk import (
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    virtio_blk_outhdr,
)
from lguestlib.memory.address import GuestAddress
from lguestlib.runtime.vhost_user.conform_session import Disk, Session, Wishes, Wrong, ring_at
from lguestlib.runtime.vhost_user.line import Gone, Hang
from lguestlib.virtio.conformance.case import BOTH
from lguestlib.virtio.conformance.place import BUFFERS, SEAM, SECOND_SIZE, TABLES
from lguestlib.virtio.conformance.ring import DISK_SECTORS
from lguestlib.virtio.devices.block import SECTOR
from lguestlib.virtio.errors import QueueError
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue

_SECTORS_MAX = 16
_PIECES_MAX = 6
_RING_SIZE = 32
_FLUSH = 1 << VIRTIO_BLK_F_FLUSH


@dataclass(frozen=True)
class Operation:
    """One request: bytes it sends and room it offers, each cut into pieces; in an indirect table or not."""

    name: str
    sent: bytes
    cuts: tuple[int, ...]
    rooms: tuple[int, ...]
    indirect: bool
    gap: int
    """Bytes between its buffers in memory."""
    across: bool
    """Whether its room begins in one memory region and ends in the next, if it is long enough."""

    def __str__(self) -> str:
        form = "in an indirect table" if self.indirect else "direct"
        form += ", across two regions" if self.across else ""
        return f"{self.name}, sent {'+'.join(map(str, self.cuts))}, room {'+'.join(map(str, self.rooms))}, {form}"


@dataclass(frozen=True)
class Answer:
    """What a device did with an operation: bytes written, as used.len has them, and what is in the room.

    What an operation that has failed leaves in its room, but for the status, is anybody's guess.
    """

    written: int
    content: bytes
    failure: str = ""
    """Why there is none."""

    def __str__(self) -> str:
        if self.failure:
            return self.failure
        status = f", status {self.content[-1]}" if self.content else ""
        return f"used length {self.written}{status}"


@dataclass(frozen=True)
class Difference:
    """Operation *number* was answered in two ways."""

    number: int
    operation: Operation
    first: Answer
    second: Answer

    def __str__(self) -> str:
        same = " (the data differ)" if str(self.first) == str(self.second) else ""
        return f"request {self.number}, {self.operation}: {self.first}; and {self.second}{same}"


def workload(kind: str, seed: int, count: int, writes: bool, flushes: bool) -> Iterator[Operation]:
    """*count* operations for a device of *kind*, the same for the same *seed*."""
    random = Random(seed)
    for _ in range(count):
        yield _operation(random, kind, writes, flushes)


def _operation(random: Random, kind: str, writes: bool, flushes: bool) -> Operation:
    form = random.random() < 0.4, random.randrange(3) * 24, random.random() < 0.03
    if kind == "net":
        frame = bytes(12) + b"\xff" * 6 + random.randbytes(random.randrange(54, 1500))
        return Operation("a frame", frame, _cut(random, len(frame)), (), *form)
    if kind == "console":
        text = b"\0" * random.randrange(1, 200)
        return Operation("output", text, _cut(random, len(text)), (), *form)
    if kind == "rng":
        return Operation("random bytes", b"", (), _cut(random, random.randrange(1, 4096)), *form)
    choice = random.random()
    sectors = random.randrange(1, _SECTORS_MAX + 1)
    # Past the end, now and then: an error, and the same one.
    first = random.randrange(DISK_SECTORS - sectors) if choice > 0.05 else (1 << 40) + random.randrange(100)
    if flushes and random.random() < 0.05:
        header = bytes(virtio_blk_outhdr(VIRTIO_BLK_T_FLUSH, 0, 0))
        return Operation("a flush", header, _cut(random, 16, 3), (1,), *form)
    if writes and random.random() < 0.4:
        header = bytes(virtio_blk_outhdr(VIRTIO_BLK_T_OUT, 0, first))
        data = header + random.randbytes(SECTOR * sectors)
        name = f"a write of {sectors} sectors at {first}"
        return Operation(name, data, _cut(random, len(data)), (1,), *form)
    rooms = _cut(random, SECTOR * sectors)
    rooms = (*rooms[:-1], rooms[-1] + 1) if random.random() < 0.3 else (*rooms, 1)
    header = bytes(virtio_blk_outhdr(VIRTIO_BLK_T_IN, 0, first))
    return Operation(f"a read of {sectors} sectors at {first}", header, _cut(random, 16, 3), rooms, *form)


def _cut(random: Random, length: int, pieces: int = _PIECES_MAX) -> tuple[int, ...]:
    """*length* in up to so many pieces, none of them empty."""
    at = sorted({0, length, *(random.randrange(length + 1) for _ in range(random.randrange(pieces)))})
    return tuple(end - start for start, end in zip(at, at[1:]))


class _Subject:
    """One of the two back-ends, with a driver that makes operations one by one."""

    def __init__(self, path: str, kind: str, seconds: float) -> None:
        self.session = Session(path, kind, seconds, Wishes(), Disk())
        self._ring: SplitDriverQueue[int] | None = None

    def start(self, ring: int, device: int) -> None:
        """Agree on these features, and have the ring served."""
        session = self.session
        session.wishes = Wishes(ring, device=device)
        session.negotiate()
        session.share()
        layout = QueueLayout.contiguous(session.queue, _RING_SIZE, ring_at(session.queue))
        self._ring = SplitDriverQueue(layout, session.memory, session.features)
        session.set_up(layout)
        session.enable(session.queue)

    @property
    def offered(self) -> int:
        """The features it offers."""
        return self.session.line.ask(self.session.requests.get_features())

    def answer(self, operation: Operation) -> Answer:
        """Make *operation*, and see what comes of it."""
        try:
            written, content = self._answer(operation)
        except (Gone, Hang, Wrong) as error:
            return Answer(0, b"", str(error))
        if self.session.kind == "rng":
            return Answer(min(written, 1), b"")
        if content and content[-1] != VIRTIO_BLK_S_OK:
            return Answer(0, content[-1:])
        return Answer(written, content)

    def _answer(self, operation: Operation) -> tuple[int, bytes]:
        session, memory = self.session, self.session.memory
        readable, at, done = [], BUFFERS, 0
        for length in operation.cuts:
            memory.write(GuestAddress(at), operation.sent[done : done + length])
            readable.append(Buffer(GuestAddress(at), length))
            at, done = at + length + operation.gap, done + length
        writable, at = [], SEAM - (0x400 if operation.across else 0)
        for length in operation.rooms:
            memory.write(GuestAddress(at), b"\xa5" * length)
            writable.append(Buffer(GuestAddress(at), length))
            at += length + operation.gap
        assert at < SEAM + SECOND_SIZE
        ring = self._ring
        assert ring is not None
        ring.add(readable, writable, 0, GuestAddress(TABLES) if operation.indirect else None)
        ring.kick_needed()
        session.kick(session.queue)
        written = self._wait(ring)
        return written, b"".join(memory.read(buffer.address, buffer.length) for buffer in writable)

    def _wait(self, ring: SplitDriverQueue[int]) -> int:
        session = self.session
        deadline = time.monotonic() + session.seconds
        while True:
            try:
                done = ring.reap()
            except QueueError as error:
                raise Wrong(str(error)) from None
            if done:
                return done[0][1]
            if session.failed(session.queue):
                raise Wrong("the ring has failed")
            if session.line.has_ended:
                raise Gone("the connection has ended")
            if time.monotonic() >= deadline:
                raise Hang("a request is not served")
            time.sleep(0.0001)

    def close(self) -> None:
        """End the connection."""
        if self._ring is not None:
            self._ring.release()
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def compare(
    path: str, other: str, kind: str, seed: int, count: int, writes: bool, seconds: float
) -> Iterator[Difference | None]:
    """*count* operations to the back-ends at *path* and *other*: for each, where they differ, or None.

    Of random bytes only that there are any is compared.  Where one of the two has ended the
    connection both get another.  Raises Gone, Hang, Wrong, ProtocolError, RequestRefused where
    there is none to be had; Skip.
    """
    operations: Iterator[tuple[int, Operation]] | None = None
    left = count
    while left:
        with ExitStack() as opened:
            subjects = [opened.enter_context(_Subject(each, kind, seconds)) for each in (path, other)]
            offered = subjects[0].offered & subjects[1].offered
            flush = offered & _FLUSH if kind == "blk" else 0
            if operations is None:
                operations = enumerate(workload(kind, seed, count, writes, bool(flush)))
            for subject in subjects:
                subject.start(offered & BOTH, flush)
            for number, operation in operations:
                left -= 1
                first, second = (subject.answer(operation) for subject in subjects)
                yield None if first == second else Difference(number, operation, first, second)
                if first.failure or second.failure:
                    break
