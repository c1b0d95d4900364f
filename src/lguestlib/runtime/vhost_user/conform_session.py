"""What a conformance case needs of one connection: negotiation, memory, rings by hand or by a driver."""

import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

from lguestlib.abi import vhost_user as abi
from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd
from lguestlib.abi.memfd import memfd
from lguestlib.abi.virtio_blk import VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, virtio_blk_outhdr
from lguestlib.memory.address import GuestAddress, UserAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.region import Region
from lguestlib.runtime.interrupt import has_room
from lguestlib.runtime.vhost_user.frontend import ring_index
from lguestlib.runtime.vhost_user.line import Gone, Hang, Line
from lguestlib.runtime.vhost_user.stream import close_all
from lguestlib.virtio.conformance.case import Fd
from lguestlib.virtio.conformance.place import PLAIN, RING_ROOM, START, USER, new_memory
from lguestlib.virtio.conformance.ring import DISK_SECTORS, attacked_queue
from lguestlib.virtio.devices.block import SECTOR
from lguestlib.virtio.errors import QueueError, VirtioError
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue
from lguestlib.virtio.vhost_user.frontend import PROTOCOL_FEATURES, RequestRefused, Requests
from lguestlib.virtio.vhost_user.memory_table import MemoryRegion, RingAddresses
from lguestlib.virtio.vhost_user.message import Message, ProtocolError, u64

KINDS = ("blk", "net", "console", "rng")

_TAKEN = (
    abi.VHOST_USER_PROTOCOL_F_MQ, abi.VHOST_USER_PROTOCOL_F_REPLY_ACK, abi.VHOST_USER_PROTOCOL_F_CONFIG,
)  # fmt: skip
_PLACE_SIZE = 0x1000
_LOOK_SECONDS = 0.0005
_FULL = (1 << 64) - 2
_LOG_SIZE = 0x1_0000
_CAPACITY = struct.Struct("<Q")
_RECORD = struct.Struct("=QHHHH")
_IN_FLIGHT = struct.Struct("=B5xHQ")
_PAGE_SHIFT = 12


class Skip(Exception):
    """The case asks for what the back-end does not have; the text says what."""


class Wrong(VirtioError):
    """The back-end has done what no device may."""


@dataclass
class Wishes:
    """What is to be negotiated: *ring* features that there have to be, others that are *welcome*, and the rest."""

    ring: int = 0
    welcome: int = 0
    device: int = 0
    vhost: int = 0
    needs: tuple[int, ...] = ()
    without: tuple[int, ...] = ()
    queues: int = 1


@dataclass
class Disk:
    """What plain requests have found in the disk's first sectors, to hold others against."""

    sectors: dict[int, bytes] = field(default_factory=dict)

    def sector(self, number: int) -> bytes:
        """What is in a sector."""
        return self.sectors[number]


@dataclass
class Ends:
    """The descriptors of one ring."""

    kick: int
    call: int
    error: int


class Session:
    """One connection to the back-end at *path*, a device of *kind*; each answer may take so many *seconds*.

    Raises Gone, Hang, ProtocolError.
    """

    def __init__(self, path: str, kind: str, seconds: float, wishes: Wishes, disk: Disk) -> None:
        self.kind = kind
        self.seconds = seconds
        self.wishes = wishes
        self.disk = disk
        self.requests = Requests()
        self.offered = 0
        self.features = 0
        self.queue = attacked_queue(kind)
        self.ends: dict[int, Ends] = {}
        self.drivers: dict[int, "Driver"] = {}
        self.looks = False
        """Whether the driver has to look for used entries, since nobody tells it."""
        self.inflight: Message | None = None
        self._log = self._shrinkable = -1
        self._given: list[int] = []
        self._opened = ExitStack()
        with ExitStack() as opened:
            self.line = Line(path, seconds)
            opened.callback(self.line.close)
            self.memory: GuestMemory = new_memory(Region.memfd)
            opened.callback(self.memory.close)
            self._opened = opened.pop_all()

    # Negotiation.

    def negotiate(self) -> None:
        """Agree on what is wished for.  Raises Skip where that is not offered."""
        wishes, requests, line = self.wishes, self.requests, self.line
        self.offered = line.ask(requests.get_features())
        self._own = self.offered & PROTOCOL_FEATURES
        for bit in (f for f in Feature if f & wishes.ring):
            if not self.offered & bit:
                raise Skip(f"the feature {bit.name} is not offered")
        if wishes.device & ~self.offered:
            raise Skip(f"the device feature {wishes.device & ~self.offered:#x} is not offered")
        if wishes.vhost & ~self.offered:
            raise Skip(f"vhost's feature {wishes.vhost & ~self.offered:#x} is not offered")
        protocol = 0
        if self._own:
            protocol = line.ask(requests.get_protocol_features())
        for number in wishes.needs:
            if not protocol >> number & 1:
                raise Skip(f"the protocol feature {protocol_feature(number)} is not offered")
        if self._own:
            taken = sum(1 << number for number in {*_TAKEN, *wishes.needs} - {*wishes.without})
            line.ask(requests.set_protocol_features(protocol & taken))
        line.ask(requests.set_owner())
        if self.queue + wishes.queues > 1 and self._own and requests.has(abi.VHOST_USER_PROTOCOL_F_MQ):
            most = line.ask(requests.get_queue_num())
            if most < self.queue + wishes.queues:
                raise Skip(f"it has {most} queues, and {self.queue + wishes.queues} are wanted")
        elif wishes.queues > 1:
            raise Skip("it does not tell how many queues it has")
        self.agree()

    def agree(self) -> None:
        """SET_FEATURES."""
        wishes = self.wishes
        wanted = Feature.VERSION_1 | wishes.ring | wishes.welcome | wishes.device
        self.features = self.offered & wanted
        self.line.ask(self.requests.set_features(self.offered & (wanted | wishes.vhost) | self._own))

    def share(self) -> None:
        """SET_MEM_TABLE."""
        regions = self.memory.regions
        table = [MemoryRegion(each.base, each.size, UserAddress(each.base + USER), 0) for each in regions]
        self.line.ask(self.requests.set_mem_table(table, [each.fd for each in regions]))

    def capacity(self) -> int | None:
        """The disk's size in sectors, where the back-end tells."""
        if self.kind != "blk" or not self.requests.has(abi.VHOST_USER_PROTOCOL_F_CONFIG):
            return None
        size: int = _CAPACITY.unpack(self.line.ask(self.requests.get_config(0, 8)))[0]
        return size

    # Rings.

    def descriptors(self, index: int) -> Ends:
        """Kick, call and error of a ring, made when first asked for."""
        if index not in self.ends:
            self.ends[index] = Ends(eventfd(), eventfd(), eventfd())
        return self.ends[index]

    def set_up(self, layout: QueueLayout, base: int = 0) -> None:
        """Tell of a ring, all but that it is enabled."""
        requests, ask, index = self.requests, self.line.ask, layout.index
        ends = self.descriptors(index)
        ask(requests.set_vring_num(index, layout.size))
        ask(requests.set_vring_base(index, QueueState.from_base(base)))
        ask(requests.set_vring_addr(index, RingAddresses(
            *(UserAddress(part + USER) for part in (layout.descriptors, layout.available, layout.used))
        )))  # fmt: skip
        ask(requests.set_vring_err(index, ends.error))
        if self.looks:
            self.no_call(index)
        else:
            ask(requests.set_vring_call(index, ends.call))
        ask(requests.set_vring_kick(index, ends.kick))

    def enable(self, index: int, enabled: bool = True) -> None:
        """SET_VRING_ENABLE; then what was said about the ring has been heard."""
        if self._own:
            self.line.ask(self.requests.set_vring_enable(index, enabled))
        self.line.ask(self.requests.get_features())
        for ends in self.ends.values():
            # A back-end may have made them non-blocking, for both ends.
            os.set_blocking(ends.kick, True)

    def stop(self, index: int) -> int:
        """GET_VRING_BASE."""
        return self.line.ask(self.requests.get_vring_base(index)).base

    def no_call(self, index: int) -> None:
        """SET_VRING_CALL without a descriptor: the driver looks from now on."""
        self.say(abi.VHOST_USER_SET_VRING_CALL, u64(index | abi.VHOST_USER_VRING_NOFD_MASK))
        self.looks = True

    def new_kick(self, index: int) -> None:
        """Another kick from now on."""
        ends = self.descriptors(index)
        self._given.append(ends.kick)
        ends.kick = eventfd()
        self.line.ask(self.requests.set_vring_kick(index, ends.kick))

    def new_call(self, index: int) -> None:
        """Another call from now on; what the old one has had is forgotten."""
        ends = self.descriptors(index)
        self._given.append(ends.call)
        ends.call = eventfd()
        self.line.ask(self.requests.set_vring_call(index, ends.call))

    def kick(self, index: int) -> None:
        """Notify, unless the counter is full: then the back-end has been."""
        kick = self.descriptors(index).kick
        if has_room(kick):
            os.write(kick, SIGNAL)

    def fill(self, fd: int) -> None:
        """Leave no room in an eventfd's counter."""
        self.take(fd)
        os.write(fd, _FULL.to_bytes(BYTES, "little"))

    def take(self, fd: int) -> bool:
        """Empty an eventfd; whether there was anything in it."""
        if not readable(fd):
            return False
        try:
            os.read(fd, BYTES)
        except BlockingIOError:
            return False
        return True

    def failed(self, index: int) -> bool:
        """Whether the ring has failed, as its error descriptor says."""
        return readable(self.descriptors(index).error)

    def until(self, happened: Callable[[], bool], seconds: float, index: int) -> bool:
        """Wait until something has *happened* in memory; False if the ring fails, all ends, or the time is over."""
        deadline = time.monotonic() + seconds
        while not happened():
            if self.failed(index) or self.line.has_ended or time.monotonic() >= deadline:
                # It may have happened just before.
                return happened()
            time.sleep(_LOOK_SECONDS)
        return True

    # Messages.

    def say(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        flags: int | None = None,
        size: int | None = None,
    ) -> Message | None:
        """Send a request as it is told, and return its reply, if it has one.

        None, too, where a reply is due and does not come.  Raises RequestRefused, Gone,
        Hang, ProtocolError.
        """
        acknowledged = self.requests.has(abi.VHOST_USER_PROTOCOL_F_REPLY_ACK)
        if flags is None:
            own_reply = request in _ANSWERED or not acknowledged
            flags = abi.VHOST_USER_VERSION | (0 if own_reply else abi.VHOST_USER_NEED_REPLY_MASK)
        announced = len(payload) if size is None else size
        self.line.put(bytes(abi.vhost_user_header(request, flags, announced)) + payload, fds)
        if announced > len(payload):
            return None
        wants = bool(flags & abi.VHOST_USER_NEED_REPLY_MASK) and acknowledged
        if not (request in _ANSWERED or wants):
            return None
        try:
            reply = self.line.get()
        except Hang:
            return None
        if request not in _ANSWERED and len(reply.payload) == 8 and reply.number():
            close_all(reply.fds)
            raise RequestRefused(f"{reply.name}: refused")
        if reply.request == abi.VHOST_USER_GET_INFLIGHT_FD and reply.fds:
            self.inflight = reply
            self._given += reply.fds
        else:
            close_all(reply.fds)
        return reply

    def settled(self) -> int:
        """Ask for the features, and take replies until that one: how many came before.

        Raises Gone, Hang.
        """
        self.line.put(bytes(abi.vhost_user_header(abi.VHOST_USER_GET_FEATURES, abi.VHOST_USER_VERSION, 0)))
        before = 0
        while True:
            reply = self.line.get()
            close_all(reply.fds)
            if reply.request == abi.VHOST_USER_GET_FEATURES:
                return before
            before += 1

    def descriptor(self, kind: Fd) -> int:
        """A descriptor to send; it is closed with the session."""
        match kind:
            case Fd.MEMORY:
                return self.memory.regions[0].fd
            case Fd.INFLIGHT:
                if self.inflight is None:
                    raise Skip("it has given no record of requests in flight")
                return self.inflight.fds[0]
            case Fd.SMALL:
                fd = memfd("small", 4096)
            case Fd.SHRINKABLE:
                fd = self._shrinkable = os.memfd_create("shrinkable", os.MFD_CLOEXEC)
                os.ftruncate(fd, self.memory.regions[0].size)
            case Fd.EVENT:
                fd = eventfd()
            case Fd.NULL:
                fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            case Fd.SOCKET:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                self._given.append(ours.detach())
                fd = theirs.detach()
            case Fd.LOG:
                fd = self._log = memfd("log", _LOG_SIZE)
        self._given.append(fd)
        return fd

    def shrink(self) -> None:
        """What was handed over is not there any more."""
        os.ftruncate(self._shrinkable, 0)

    def unmarked(self, ranges: Sequence[Buffer]) -> str | None:
        """The first page of these that is not marked in the dirty log."""
        with mmap.mmap(self._log, _LOG_SIZE) as log:
            for buffer in ranges:
                last = buffer.address + buffer.length - 1 >> _PAGE_SHIFT
                for page in range(buffer.address >> _PAGE_SHIFT, last + 1):
                    if not log[page >> 3] >> (page & 7) & 1:
                        return f"the page at {page << _PAGE_SHIFT:#x} was written and is not marked"
        return None

    def resume(self, driver: "Driver") -> None:
        """Hand over a record with the driver's request in flight, and start its ring."""
        rings, size = driver.layout.index + 1, driver.layout.size
        self.say(abi.VHOST_USER_GET_INFLIGHT_FD, struct.pack("=QQHH", 0, 0, rings, size))
        if self.inflight is None:
            raise Wrong("no record of requests in flight is given")
        (given,) = self.inflight.fds
        length, offset = struct.unpack_from("=QQ", self.inflight.payload)
        head = driver.begin()
        with mmap.mmap(given, length + offset) as record:
            at = offset + _align(_RECORD.size + _IN_FLIGHT.size * size, 64) * driver.layout.index
            features, _, _, _, _ = _RECORD.unpack_from(record, at)
            record[at : at + _RECORD.size] = _RECORD.pack(features, 1, size, 0, 0)
            at += _RECORD.size + _IN_FLIGHT.size * head
            record[at : at + _IN_FLIGHT.size] = _IN_FLIGHT.pack(1, 0, 1)
        payload = struct.pack("=QQHH", length, offset, rings, size)
        self.say(abi.VHOST_USER_SET_INFLIGHT_FD, payload, (given,))
        self.set_up(driver.layout)
        self.enable(driver.layout.index)
        driver.notify()

    def close(self) -> None:
        """End the connection and give everything back."""
        for driver in self.drivers.values():
            driver.release()
        self._opened.close()
        close_all(self._given)
        for ends in self.ends.values():
            close_all((ends.kick, ends.call, ends.error))
        self._given, self.ends, self.drivers = [], {}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


@dataclass
class _Plain:
    """A request that any device of the kind answers, and where its answer is."""

    sector: int
    data: Buffer | None
    status: Buffer | None


class Driver:
    """A driver that keeps to every rule, on a ring of *session*: plain requests, and what they come back with."""

    def __init__(self, session: Session, index: int, size: int = 32) -> None:
        self.layout = QueueLayout.contiguous(index, size, ring_at(index))
        self.ring: SplitDriverQueue[_Plain] = SplitDriverQueue(self.layout, session.memory, session.features)
        self.written: list[Buffer] = []
        """Where the last request's answer has been written to."""
        self._session = session
        self._made = 0
        self.returned = 0
        self.added = 0

    def start(self, base: int = 0) -> None:
        """Have the ring served."""
        self._session.set_up(self.layout, base)
        self._session.enable(self.layout.index)

    @property
    def used_index(self) -> int:
        """used.idx as it is in memory."""
        with self._session.memory.views() as views:
            return int(ring_index(views, self.layout.used))

    def begin(self) -> int:
        """Make one plain request available, without a notification; its head."""
        session, number = self._session, self._made % 32
        self._made += 1
        self.added += 1
        # Two queues have half of the room each.
        at = PLAIN + _PLACE_SIZE * (number + 32 * (self.layout.index - session.queue & 1))
        readable, writable, plain = _request(session, at, self._made)
        return self.ring.add(readable, writable, plain)

    def notify(self) -> None:
        """Kick, whether the device wants that or not."""
        self._session.kick(self.layout.index)

    def kick(self) -> None:
        """Kick if the device wants it."""
        if self.ring.kick_needed():
            self.notify()

    def reap(self) -> int:
        """Take what has come back, look at it, and tell how many.  Raises Wrong."""
        try:
            done = self.ring.reap()
        except QueueError as error:
            raise Wrong(str(error)) from None
        for plain, written in done:
            self._check(plain, written)
        self.returned += len(done)
        return len(done)

    def _check(self, plain: _Plain, written: int) -> None:
        session = self._session
        self.written = [buffer for buffer in (plain.data, plain.status) if buffer]
        match session.kind:
            case "blk":
                assert plain.data and plain.status
                status = session.memory.read(plain.status.address, 1)[0]
                if status != VIRTIO_BLK_S_OK:
                    raise Wrong(f"a plain read of sector {plain.sector} has status {status}")
                data = session.memory.read(plain.data.address, SECTOR)
                if session.disk.sectors.setdefault(plain.sector, data) != data:
                    raise Wrong(f"a plain read of sector {plain.sector} has other data than before")
            case "rng":
                if not written:
                    raise Wrong("a request for random bytes came back empty")
            case _:
                if written:
                    raise Wrong(f"{written} bytes written to what was to be read only")

    def finish(self, strict: bool = False, what: str = "a request") -> None:
        """Wait until all is back; *strict*: asleep on the interrupt.  Raises Wrong, Hang, Gone."""
        deadline = time.monotonic() + self._session.seconds
        while self.ring.in_flight:
            if not self.reap():
                self._wait(deadline, strict, what)

    def _wait(self, deadline: float, strict: bool, what: str) -> None:
        session, index = self._session, self.layout.index
        if self.ring.enable_interrupts():
            return
        ends = session.descriptors(index)
        waiting = select.poll()
        waiting.register(session.line.fd, select.POLLRDHUP)
        waiting.register(ends.error, select.POLLIN)
        if not session.looks:
            waiting.register(ends.call, select.POLLIN)
        left = max(0.0, deadline - time.monotonic())
        ready = {fd for fd, _ in waiting.poll(left * 1000 if strict else min(left * 1000, 1.0))}
        if ends.call in ready:
            session.take(ends.call)
        elif session.line.fd in ready:
            raise Gone("the connection has ended")
        elif ends.error in ready:
            raise Wrong("the ring has failed")
        elif time.monotonic() >= deadline:
            if self.reap():
                raise Wrong("an interrupt was lost")
            raise Hang(f"{what} is not served")

    def request(self) -> None:
        """One plain request from start to end, by a kick that does not ask.  Raises as `finish`."""
        self.begin()
        self.ring.kick_needed()
        self.notify()
        self.finish()

    def load(self, requests: int, depth: int) -> None:
        """So many plain requests, *depth* at a time, by kicks and interrupts that are asked for."""
        left, strict = requests, not self._session.looks
        while left or self.ring.in_flight:
            while left and self.ring.in_flight < depth:
                self.begin()
                left -= 1
            self.kick()
            deadline = time.monotonic() + self._session.seconds
            while not self.reap():
                self._wait(deadline, strict, "a request, or its kick,")

    def release(self) -> None:
        """Let go of memory."""
        self.ring.release()


def flood(session: Session, busy: Driver, other: Driver) -> None:
    """Have *busy* never run dry until a request of *other* is back.  Raises Hang, Wrong."""
    deadline = time.monotonic() + session.seconds
    while busy.ring.free >= 3:
        busy.begin()
    busy.notify()
    other.begin()
    other.ring.kick_needed()
    other.notify()
    while other.ring.in_flight:
        for _ in range(busy.reap()):
            busy.begin()
        busy.kick()
        other.reap()
        if time.monotonic() >= deadline:
            raise Hang("the neighbour of a busy queue is not served")
        if session.line.has_ended:
            raise Gone("the connection has ended")
    busy.finish()


def _request(session: Session, at: int, number: int) -> tuple[list[Buffer], list[Buffer], _Plain]:
    memory = session.memory
    first, data, status = (
        Buffer(GuestAddress(at + offset), size) for offset, size in ((0, 16), (0x100, SECTOR), (0x400, 1))
    )
    match session.kind:
        case "blk":
            sector = number % DISK_SECTORS
            memory.write(first.address, bytes(virtio_blk_outhdr(VIRTIO_BLK_T_IN, 0, sector)))
            memory.write(status.address, b"\xff")
            return [first], [data, status], _Plain(sector, data, status)
        case "rng":
            return [], [data], _Plain(0, data, None)
        case "net":
            frame = bytes(12) + b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x88\xb5" + bytes(46)
            memory.write(data.address, frame)
            return [Buffer(data.address, len(frame))], [], _Plain(0, None, None)
        case _:
            memory.write(data.address, b"\0")
            return [Buffer(data.address, 1)], [], _Plain(0, None, None)


def ring_at(index: int) -> GuestAddress:
    """Where the ring of a queue is, unless a case says otherwise."""
    return GuestAddress(START + RING_ROOM * index)


def _align(size: int, to: int) -> int:
    return -(-size // to) * to


def readable(fd: int) -> bool:
    """Whether there is anything in *fd* to read."""
    there = select.poll()
    there.register(fd, select.POLLIN)
    return bool(there.poll(0))


def protocol_feature(number: int) -> str:
    """The name of a protocol feature."""
    prefix = "VHOST_USER_PROTOCOL_F_"
    names = {value: name.removeprefix(prefix) for name, value in vars(abi).items() if name.startswith(prefix)}
    return names.get(number, str(number))


_ANSWERED = {
    abi.VHOST_USER_GET_FEATURES, abi.VHOST_USER_GET_PROTOCOL_FEATURES, abi.VHOST_USER_GET_QUEUE_NUM,
    abi.VHOST_USER_GET_VRING_BASE, abi.VHOST_USER_GET_CONFIG, abi.VHOST_USER_GET_INFLIGHT_FD,
    abi.VHOST_USER_GET_MAX_MEM_SLOTS, abi.VHOST_USER_GET_STATUS, abi.VHOST_USER_SET_LOG_BASE,
}  # fmt: skip
"""Requests with a reply of their own."""
