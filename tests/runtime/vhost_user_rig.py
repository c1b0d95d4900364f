"""A vhost-user front-end written by hand, to test servers with: it does what it is told, good or bad."""

import array
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from runtime.rigs import PATIENCE, eventually

from lguestlib.abi import uio
from lguestlib.abi import vhost_user as abi
from lguestlib.abi.eventfd import eventfd
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.region import Region
from lguestlib.runtime.vhost_user.process_rings import QueueProcesses
from lguestlib.runtime.vhost_user.server import Server
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue

VERSION, REPLY, NEED_REPLY = 1, 4, 8
LOG_ALL, PROTOCOL = 1 << 26, 1 << 30
FEATURES = int(Feature.VERSION_1 | Feature.RING_EVENT_IDX | Feature.RING_INDIRECT_DESC) | PROTOCOL

GUEST, USER, MEMORY = 0x4000_0000, 0x7000_0000_0000, 4 << 20
RINGS_AT, BUFFERS_AT = GUEST + 0x1000, GUEST + 0x10_0000
_RING_ROOM = 0x8000
_HEADER = struct.Struct("=III")
_FDS_MAX = 253


def u64(value: int) -> bytes:
    return value.to_bytes(8, sys.byteorder)


def state(index: int, number: int = 0) -> bytes:
    return struct.pack("=II", index, number)


def region(guest: int = GUEST, size: int = MEMORY, user: int = USER, offset: int = 0) -> bytes:
    return struct.pack("=QQQQ", guest, size, user, offset)


def table(*regions: bytes) -> bytes:
    return struct.pack("=II", len(regions), 0) + b"".join(regions)


def message(request: int, payload: bytes = b"", flags: int = VERSION) -> bytes:
    return _HEADER.pack(request, flags, len(payload)) + payload


def fill(fd: int) -> None:
    """Leave no room in an eventfd's counter: who adds one sleeps."""
    os.set_blocking(fd, False)
    for bit in reversed(range(64)):
        with suppress(BlockingIOError):
            os.eventfd_write(fd, 1 << bit)
    os.set_blocking(fd, True)


def mappings(name: str) -> int:
    """How often this process has the memfd of that *name* mapped."""
    return sum(f"memfd:{name} " in line for line in Path("/proc/self/maps").read_text().splitlines())


class Ring:
    """Queue *index* of a front-end, with its driver's end."""

    def __init__(self, front: "FrontEnd", index: int, size: int, features: int) -> None:
        self.index = index
        self.front = front
        base = GuestAddress(RINGS_AT + _RING_ROOM * index)
        self.layout = QueueLayout.contiguous(index, size, base)
        self.driver: SplitDriverQueue[int] = SplitDriverQueue(self.layout, front.memory, features)
        self.kick, self.call, self.error = eventfd(), eventfd(), eventfd()
        self._retired: list[int] = []

    @property
    def used(self) -> int:
        """used.idx."""
        return int.from_bytes(self.front.memory.read(GuestAddress(self.layout.used + 2), 2), "little")

    @property
    def available(self) -> int:
        """avail.idx."""
        return int.from_bytes(self.front.memory.read(GuestAddress(self.layout.available + 2), 2), "little")

    def new_kick(self) -> None:
        """Another kick from now on, which the server is to be told of."""
        self._retired.append(self.kick)
        self.kick = eventfd()

    def new_call(self) -> None:
        """Another call from now on; what the old one has had is forgotten."""
        self._retired.append(self.call)
        self.call = eventfd()

    def buffer(self, number: int, length: int) -> Buffer:
        """The buffer of that *number* of this ring, each in its own 4 KiB."""
        return Buffer(GuestAddress(BUFFERS_AT + 0x10_0000 * self.index + 4096 * (number % 256)), length)

    def add(self, token: int, data: bytes = b"", room: int = 0) -> None:
        """Make a request of *data* and *room* bytes for an answer available."""
        source, answer = self.buffer(2 * token, len(data)), self.buffer(2 * token + 1, room)
        if data:
            self.front.memory.write(source.address, data)
        self.driver.add([source] if data else [], [answer] if room else [], token)

    def submit(self, token: int, data: bytes = b"", room: int = 0) -> None:
        """`add`, and kick where the device asks for it."""
        self.add(token, data, room)
        if self.driver.kick_needed():
            self.notify()

    def notify(self) -> None:
        """Kick."""
        os.eventfd_write(self.kick, 1)

    def answer(self, token: int, written: int) -> bytes:
        """What the device has written for *token*."""
        return self.front.memory.read(self.buffer(2 * token + 1, written).address, written)

    def collect(self, count: int) -> list[tuple[int, int]]:
        """Sleep on the interrupt until *count* requests are back: each a token and the bytes written."""
        done: list[tuple[int, int]] = []
        while True:
            done += self.driver.reap()
            if len(done) >= count:
                return done
            if not self.driver.enable_interrupts():
                assert select.select([self.call], [], [], PATIENCE)[0], f"{len(done)} of {count} came back"
                os.eventfd_read(self.call)

    def ask(self, token: int, data: bytes) -> bytes:
        """One request and its answer."""
        self.submit(token, data, len(data))
        ((back, written),) = self.collect(1)
        assert back == token
        return self.answer(token, written)

    def close(self) -> None:
        self.driver.release()
        for fd in (self.kick, self.call, self.error, *self._retired):
            os.close(fd)


class FrontEnd:
    """A connection to the server at *path*, guest memory, and rings.

    Its memory outlives `disconnect`, for the next `connect`.
    """

    def __init__(
        self, path: str, size: int = MEMORY, name: str = "front-end", shared: Region | None = None
    ) -> None:
        self.path = path
        self.memory = GuestMemory([shared or Region.memfd(GuestAddress(GUEST), size, name)])
        self.memory_fd = self.memory.regions[0].fd
        self.rings: list[Ring] = []
        self.features = FEATURES
        self.protocol = 0
        self.socket = socket.socket()
        self.socket.close()
        self.connect()

    def connect(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(self.path)

    # Messages.

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = VERSION) -> None:
        self.send_bytes(message(request, payload, flags), fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.socket.sendmsg([data], control) == len(data)

    def receive(self) -> tuple[int, int, bytes, list[int]]:
        """Request, flags, payload and descriptors of a reply.  Raises EOFError where there is no more."""
        header, fds, _, _ = socket.recv_fds(self.socket, _HEADER.size, _FDS_MAX)
        if not header:
            raise EOFError
        request, flags, size = _HEADER.unpack(header)
        payload = b""
        while len(payload) < size:
            payload += self.socket.recv(size - len(payload))
        return request, flags, payload, list(fds)

    def get(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """The reply to a request that has one."""
        reply, received = self.get_fds(request, payload, fds)
        assert not received
        return reply

    def get_fds(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> tuple[bytes, list[int]]:
        self.send(request, payload, fds)
        answered, flags, reply, received = self.receive()
        assert (answered, flags) == (request, VERSION | REPLY)
        return reply, received

    def try_set(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """A request without a reply of its own; 0 if it went well, after it has."""
        self.send(request, payload, fds, VERSION | NEED_REPLY)
        answered, flags, reply, received = self.receive()
        assert (answered, flags, len(reply), received) == (request, VERSION | REPLY, 8, [])
        return int.from_bytes(reply, sys.byteorder)

    def set(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        assert self.try_set(request, payload, fds) == 0

    def settled(self) -> None:
        """Return when everything sent before has been seen to."""
        self.get(abi.VHOST_USER_GET_FEATURES)

    def closed(self) -> bool:
        """Whether the server has closed the connection, without another word."""
        try:
            self.receive()
        except (EOFError, ConnectionError):
            return True
        return False

    # What front-ends do.

    def negotiate(self, features: int = FEATURES) -> None:
        self.protocol = int.from_bytes(self.get(abi.VHOST_USER_GET_PROTOCOL_FEATURES), sys.byteorder)
        self.send(abi.VHOST_USER_SET_PROTOCOL_FEATURES, u64(self.protocol))
        offered = int.from_bytes(self.get(abi.VHOST_USER_GET_FEATURES), sys.byteorder)
        assert features & ~offered == 0
        self.features = features
        self.set(abi.VHOST_USER_SET_OWNER)
        self.set(abi.VHOST_USER_SET_FEATURES, u64(features))
        self.share()

    def share(self) -> None:
        """Tell of the memory."""
        self.set(abi.VHOST_USER_SET_MEM_TABLE, table(region()), [self.memory_fd])

    def ring(self, index: int = 0, size: int = 64) -> Ring:
        """A ring that the server does not know of yet."""
        made = Ring(self, index, size, self.features)
        self.rings.append(made)
        return made

    def set_address(self, ring: Ring, flags: int = 0, log: int = 0) -> None:
        parts = (ring.layout.descriptors, ring.layout.used, ring.layout.available)
        places = (part - GUEST + USER for part in parts)
        self.set(abi.VHOST_USER_SET_VRING_ADDR, struct.pack("=IIQQQQ", ring.index, flags, *places, log))

    def set_kick(self, ring: Ring) -> None:
        self.set(abi.VHOST_USER_SET_VRING_KICK, u64(ring.index), [ring.kick])

    def set_call(self, ring: Ring) -> None:
        self.set(abi.VHOST_USER_SET_VRING_CALL, u64(ring.index), [ring.call])

    def enable(self, ring: Ring, enabled: bool = True) -> None:
        self.set(abi.VHOST_USER_SET_VRING_ENABLE, state(ring.index, int(enabled)))

    def tell(self, ring: Ring, base: int = 0) -> None:
        """Everything about a ring, in the order of most front-ends."""
        self.set(abi.VHOST_USER_SET_VRING_NUM, state(ring.index, ring.layout.size))
        self.set(abi.VHOST_USER_SET_VRING_BASE, state(ring.index, base))
        self.set_address(ring)
        self.set(abi.VHOST_USER_SET_VRING_ERR, u64(ring.index), [ring.error])
        self.set_call(ring)
        self.set_kick(ring)
        self.enable(ring)

    def start(self, index: int = 0, size: int = 64) -> Ring:
        """A ring that is served."""
        ring = self.ring(index, size)
        self.tell(ring)
        return ring

    def stop(self, ring: Ring) -> int:
        """GET_VRING_BASE: the avail index to go on from."""
        reply = self.get(abi.VHOST_USER_GET_VRING_BASE, state(ring.index))
        index, base = struct.unpack("=II", reply)
        assert index == ring.index
        return int(base)

    def status(self) -> int:
        return int.from_bytes(self.get(abi.VHOST_USER_GET_STATUS), sys.byteorder)

    def disconnect(self) -> None:
        self.socket.close()

    def restart(self, ring: Ring, base: int) -> None:
        """Go on with a ring that was stopped."""
        self.set(abi.VHOST_USER_SET_VRING_BASE, state(ring.index, base))
        self.set_kick(ring)

    def forget_rings(self) -> None:
        for ring in self.rings:
            ring.close()
        self.rings.clear()

    def close(self) -> None:
        self.disconnect()
        self.forget_rings()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def within(seconds: float, action: Callable[[], object]) -> None:
    """Do *action*, in at most that time."""
    start = time.monotonic()
    action()
    assert time.monotonic() - start < seconds


class Echo(Device):
    """Answers what it is asked; queue 1 sleeps in a read of *source* for its work."""

    device_type = 42

    def __init__(self, source: int = -1, name: str = "echo") -> None:
        super().__init__(name)
        self.serve: Callable[[Chain], int] = lambda chain: chain.write(chain.read())
        self.space = bytes(range(1, 9))
        self.activated: list[int] = []
        self.deactivated = 0
        self._source = source

    def queues(self) -> Sequence[Queue]:
        return (
            Queue("work", lambda chain: self.serve(chain)),
            Queue("source", lambda chain: uio.readv(self._source, chain.writable), from_outside=True),
            Queue("more work", lambda chain: self.serve(chain)),
        )

    def config(self) -> bytes:
        return self.space

    def activate(self, features: int) -> None:
        self.activated.append(features)

    def deactivate(self) -> None:
        self.deactivated += 1


class Served:
    """A server of *device* at a socket in *folder*; `reports` is what it had to say.

    *processes*, where given, makes those of its queues of where they report.
    """

    def __init__(
        self,
        device: Device,
        folder: Path,
        processes: Callable[[Callable[[str], None]], QueueProcesses] | None = None,
    ) -> None:
        self.path = str(folder / f"{device.name}.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen()
        self.device = device
        self.reports: list[str] = []
        self.ended = threading.Event()
        self.processes = processes(self.reports.append) if processes else None
        self.server = Server(
            device, listener, self.reports.append, on_end=self.ended.set, processes=self.processes
        )
        self.server.start()

    def front(self, name: str = "front-end") -> FrontEnd:
        """A front-end that has negotiated everything."""
        made = FrontEnd(self.path, name=name)
        made.negotiate()
        return made

    def rest(self) -> None:
        """Wait until the server has done with the front-ends that have gone."""
        eventually(lambda: self.server._conversation is None, "the conversation's end")

    def threads(self) -> list[str]:
        """The threads of this device's queues."""
        prefix = f"{self.device.name} "
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith(prefix)]
        return sorted(name.removeprefix(prefix) for name in names if not name.endswith(" server"))

    def report(self) -> str:
        """The one line there is, once there is one."""
        eventually(lambda: bool(self.reports), "a report")
        (line,) = self.reports
        assert "\n" not in line
        self.reports.clear()
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.server.close()
        if self.processes:
            self.processes.close()
        if kind is None:
            assert self.reports == [], self.reports
