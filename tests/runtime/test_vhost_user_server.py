"""A server and its front-ends: hostile ones, one after another, and the end at any moment (T14, T17)."""

import os
import random
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from runtime.rigs import PATIENCE, eventually, nothing_left, open_descriptors
from runtime.test_vhost_user_conversation import DiskLoad, Load
from runtime.vhost_user_rig import (
    REPLY,
    VERSION,
    Echo,
    FrontEnd,
    Served,
    fill,
    mappings,
    message,
    region,
    state,
    table,
    u64,
    within,
)
from uring import uring_or_skip

from lguestlib.abi import vhost_user as abi
from lguestlib.abi.eventfd import eventfd
from lguestlib.abi.memfd import memfd
from lguestlib.runtime.vhost_user.server import Server
from lguestlib.virtio.chain import Chain

STOP_SECONDS = 0.1
"""The longest that stopping a server may take, whatever it does."""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def served(source: tuple[int, int], tmp_path: Path) -> Iterator[Served]:
    with Served(Echo(source[0]), tmp_path) as made:
        yield made


def works(served: Served) -> None:
    """The next front-end is served."""
    with served.front() as front:
        assert front.start().ask(0, b"hello") == b"hello"
    served.rest()


# Hostile front-ends.


class Hostile(NamedTuple):
    """What a front-end that has negotiated, and has ring 0 served, does then, and what is said of it."""

    does: Callable[[FrontEnd], None]
    said: str


def some_fds(count: int) -> list[int]:
    return [memfd(f"descriptor {number}", 0x1000) for number in range(count)]


def sends(data: bytes, fds: int = 0, end: bool = False) -> Callable[[FrontEnd], None]:
    """Send *data* with so many descriptors, and with *end* nothing more."""

    def send(front: FrontEnd) -> None:
        made = some_fds(fds)
        front.send_bytes(data, made)
        for fd in made:
            os.close(fd)
        if end:
            front.socket.shutdown(socket.SHUT_WR)

    return send


def in_pieces(*pieces: tuple[bytes, int]) -> Callable[[FrontEnd], None]:
    def send(front: FrontEnd) -> None:
        for data, fds in pieces:
            sends(data, fds)(front)

    return send


def gives(request: int, make: Callable[[], int], payload: bytes = u64(0)) -> Callable[[FrontEnd], None]:
    """Send the descriptor that *make* makes."""

    def send(front: FrontEnd) -> None:
        fd = make()
        front.send(request, payload, [fd])
        os.close(fd)

    return send


def a_pipes_end() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def a_socket() -> int:
    return socket.socket(socket.AF_UNIX).detach()


def a_file() -> int:
    return os.open(__file__, os.O_RDONLY)


def no_room(front: FrontEnd) -> None:
    """Three descriptors, while this process may open one more only."""
    fds = some_fds(3)
    with descriptors_left(1):
        front.send_bytes(message(abi.VHOST_USER_SET_MEM_TABLE, table(region(), region(), region())), fds)
        assert front.closed()
    for fd in fds:
        os.close(fd)


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """So many more may be opened while this lasts."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(fd) for fd in open_descriptors()}
    free = [number for number in range(len(taken) + count + 1) if number not in taken]
    # It is a limit of their numbers.
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


MEM_TABLE = message(
    abi.VHOST_USER_SET_MEM_TABLE, table(*[region(0x1000 * n, 0x1000, n << 32) for n in range(8)])
)
HOSTILE = {
    "half a header": Hostile(sends(MEM_TABLE[:5], end=True), "ends inside a message, after 5 bytes"),
    "half a header and descriptors": Hostile(sends(MEM_TABLE[:5], 3, end=True), "after 5 bytes"),
    "a header and no payload": Hostile(sends(MEM_TABLE[:12], end=True), "after 12 bytes"),
    "half a payload and descriptors": Hostile(sends(MEM_TABLE[:100], 8, end=True), "after 100 bytes"),
    "a message in halves and its end": Hostile(
        in_pieces((MEM_TABLE[:3], 1), (MEM_TABLE[3:50], 2), (MEM_TABLE[50:], 0)), "8 regions, 3 descriptors"
    ),
    "an announced payload too long": Hostile(
        sends(struct.pack("=III", 2, VERSION, 4097)), "4097 bytes announced"
    ),
    "an endless payload": Hostile(sends(struct.pack("=III", 2, VERSION, 0xFFFF_FFFF), 2), "4294967295 bytes"),
    "a payload too short": Hostile(
        sends(message(abi.VHOST_USER_SET_FEATURES, bytes(7))), "7 bytes of payload"
    ),
    "a payload of 4096 bytes": Hostile(
        sends(message(abi.VHOST_USER_SET_FEATURES, bytes(4096))), "4096 bytes"
    ),
    "version 0": Hostile(sends(message(1, flags=0)), "flags 0x0 are not of version 1"),
    "version 2": Hostile(sends(message(1, flags=2), 1), "flags 0x2 are not of version 1"),
    "a reply": Hostile(sends(message(1, flags=VERSION | REPLY), 1), "GET_FEATURES: marked as a reply"),
    "no request": Hostile(sends(message(0)), "request 0: not known here"),
    "a request nobody knows": Hostile(sends(message(0xFFFF_FFFF, bytes(100)), 4), "not known here"),
    "nine descriptors": Hostile(sends(MEM_TABLE, 9), "more than 8 descriptors"),
    "nine in two pieces": Hostile(
        in_pieces((MEM_TABLE[:12], 5), (MEM_TABLE[12:], 4)), "more than 8 descriptors"
    ),
    "eleven": Hostile(sends(MEM_TABLE, 11), "were cut off: too many"),
    "two hundred": Hostile(sends(MEM_TABLE, 200), "were cut off: too many"),
    "two hundred after one": Hostile(in_pieces((MEM_TABLE[:12], 1), (MEM_TABLE[12:], 200)), "were cut off"),
    "more than there is room for": Hostile(no_room, "were cut off: too many, or no room for them here"),
    "descriptors where there are none": Hostile(sends(message(1), 3), "GET_FEATURES: 3 descriptors"),
    "no descriptor where there is one": Hostile(
        sends(message(abi.VHOST_USER_SET_LOG_BASE, bytes(16))), "SET_LOG_BASE: 0 descriptors"
    ),
    "fewer descriptors than regions": Hostile(sends(MEM_TABLE, 7), "8 regions, 7 descriptors"),
    "memory that is not there": Hostile(
        sends(message(abi.VHOST_USER_SET_MEM_TABLE, table(region())), 1),
        "SET_MEM_TABLE: memory region: 0x400000 bytes at offset 0x0 of a file of 0x1000",
    ),
    "a log that is not there": Hostile(
        sends(message(abi.VHOST_USER_SET_LOG_BASE, u64(0x1001) + u64(0)), 1),
        "SET_LOG_BASE: dirty log: 0x1001",
    ),
    "a record that is not there": Hostile(
        in_pieces(
            (message(abi.VHOST_USER_RESET_DEVICE), 0),
            (message(abi.VHOST_USER_SET_INFLIGHT_FD, struct.pack("=QQHH", 0x1001, 0, 1, 8)), 1),
        ),
        "SET_INFLIGHT_FD: 0x1001 bytes at offset 0x0 of a file of 0x1000",
    ),
    "a kick that is a file": Hostile(
        gives(abi.VHOST_USER_SET_VRING_KICK, a_file), "KICK: the descriptor is not"
    ),
    "a kick that is a pipe": Hostile(gives(abi.VHOST_USER_SET_VRING_KICK, a_pipes_end), "is not an eventfd"),
    "a kick that is a socket": Hostile(gives(abi.VHOST_USER_SET_VRING_KICK, a_socket), "is not an eventfd"),
    "a call that is a file": Hostile(
        gives(abi.VHOST_USER_SET_VRING_CALL, a_file), "is not an eventfd, a pipe"
    ),
    "an error that is a file": Hostile(
        gives(abi.VHOST_USER_SET_VRING_ERR, a_file), "is not an eventfd, a pipe"
    ),
    "a kick for no ring": Hostile(
        gives(abi.VHOST_USER_SET_VRING_KICK, eventfd, u64(3)), "SET_VRING_KICK: ring 3 of 3"
    ),
    "a channel that is a file": Hostile(
        gives(abi.VHOST_USER_SET_BACKEND_REQ_FD, a_file, b""),
        "BACKEND_REQ_FD: the descriptor is not a socket",
    ),
    "no kick at all": Hostile(
        sends(message(abi.VHOST_USER_SET_VRING_KICK, u64(0x100))), "would have to be polled (T11)"
    ),
    "a size while served": Hostile(
        sends(message(abi.VHOST_USER_SET_VRING_NUM, state(0, 8))), "SET_VRING_NUM: ring 0 is served"
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_t14_a_front_end_that_breaks_the_protocol_is_cut_off_with_one_line_and_nothing_of_it_stays(
    served: Served, name: str
) -> None:
    hostile = HOSTILE[name]
    works(served)
    descriptors, threads = len(open_descriptors()), threading.active_count()
    with served.front(name="hostile") as front:
        ring = front.start()
        assert ring.ask(0, b"hello") == b"hello"
        hostile.does(front)
        assert front.closed()
        line = served.report()
        assert line.startswith("echo: the front-end is cut off: ") and hostile.said in line
        # Before the front-end has let go of anything.
        eventually(lambda: served.threads() == [], "the end of its threads")
        eventually(lambda: mappings("hostile") == 1, "the end of its mappings")
        front.disconnect()
    eventually(lambda: threading.active_count() == threads, "the end of its threads")
    works(served)
    eventually(lambda: len(open_descriptors()) == descriptors, "the end of its descriptors")


def test_t14_random_messages_and_descriptors_leave_nothing_and_the_next_is_served(served: Served) -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    kinds = [
        value for name, value in vars(abi).items() if name.startswith(("VHOST_USER_GET_", "VHOST_USER_SET_"))
    ]
    works(served)
    descriptors, threads = len(open_descriptors()), threading.active_count()
    for _ in range(150):
        with FrontEnd(served.path, size=1 << 16) as front:
            front.send(abi.VHOST_USER_SET_PROTOCOL_FEATURES, u64(rng.choice((0, 0x1B22B))))
            for _ in range(rng.randrange(1, 8)):
                fds = some_fds(rng.choice((0, 0, 0, 1, 1, 2, 8, 9)))
                payload = rng.randbytes(rng.choice((0, 8, 8, 20, 40, 12, 100)))
                data = message(rng.choice(kinds), payload, rng.choice((1, 1, 1, 9, 5, 2)))
                try:
                    front.send_bytes(data[: rng.choice((len(data), len(data), 9))], fds)
                except ConnectionError:
                    break
                finally:
                    for fd in fds:
                        os.close(fd)
    works(served)
    assert (len(open_descriptors()), threading.active_count()) == (descriptors, threads), seed
    said = "echo: the front-end is cut off: "
    assert all(line.startswith(said) and "\n" not in line for line in served.reports), (seed, served.reports)
    assert len(served.reports) <= 150
    served.reports.clear()


def test_a_front_end_that_goes_without_its_answer_is_no_news(served: Served) -> None:
    for _ in range(20):
        front = FrontEnd(served.path, size=1 << 16)
        for _ in range(10):
            front.send(abi.VHOST_USER_GET_FEATURES)
        front.close()
    works(served)


# One after another.


def test_a_hundred_connections_leave_nothing(served: Served, source: tuple[int, int]) -> None:
    works(served)
    descriptors, threads = len(open_descriptors()), threading.active_count()
    for turn in range(100):
        with served.front() as front:
            rings = [front.start(index) for index in range(turn % 4)]
            if turn % 4 > 1:
                rings[1].submit(0, room=64)
            if turn % 5 == 0:
                for ring in rings[::2]:
                    assert ring.ask(0, b"hello") == b"hello"
            else:
                for ring in rings[::2]:
                    ring.submit(1, b"unseen", 6)
            if turn % 3 == 0:
                for ring in rings:
                    front.stop(ring)
    works(served)
    assert (len(open_descriptors()), threading.active_count()) == (descriptors, threads)
    assert mappings("front-end") == 0


def test_reconnected_under_load_a_ring_loses_nothing(served: Served) -> None:
    with served.front() as front:
        ring = front.start()
        load = Load(ring)
        for _ in range(30):
            load.reach(2)
            front.disconnect()
            front.connect()
            # Served only when the conversation before has come to its end: all it has taken is returned.
            front.negotiate()
            front.tell(ring, ring.used)
        assert load.finish()


def test_another_front_end_has_to_wait_for_the_one_there_is(served: Served) -> None:
    first = served.front()
    second = FrontEnd(served.path)
    second.send(abi.VHOST_USER_GET_FEATURES)
    assert first.start().ask(0, b"first") == b"first"
    assert not select.select([second.socket], [], [], 0.02)[0]
    first.close()
    second.receive()
    second.negotiate()
    assert second.start().ask(0, b"second") == b"second"
    second.close()


def test_servers_of_one_process_are_apart(served: Served, tmp_path: Path) -> None:
    with Served(Echo(name="other"), tmp_path) as other, served.front() as front, other.front() as beside:
        ring, neighbour = front.start(), beside.start()
        assert neighbour.ask(0, b"x") == b"x"
        sends(message(99))(front)
        assert front.closed() and "request 99" in served.report()
        assert neighbour.ask(1, b"x") == b"x"
        other.server.stop()
        assert beside.closed()
        works(served)
        assert ring.used == 0


def test_a_connected_socket_is_one_conversation_and_the_end(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    ended = threading.Event()
    reports: list[str] = []
    server = Server(Echo(), theirs, reports.append, on_end=ended.set)
    server.start()
    ours.settimeout(PATIENCE)
    ours.sendall(message(abi.VHOST_USER_GET_QUEUE_NUM))
    assert ours.recv(100) == b""
    assert ended.wait(PATIENCE)
    assert reports == [
        "echo: the front-end is cut off: GET_QUEUE_NUM: its protocol feature was not negotiated"
    ]
    server.close()
    ours.close()


@contextmanager
def out_of_descriptors(served: Served) -> Iterator[None]:
    """No more can be opened, and the server has said so."""
    works(served)
    with socket.socket(socket.AF_UNIX) as first, descriptors_left(0):
        # accept(2) has its descriptor before it sleeps: this one may be served yet.
        first.connect(served.path)
        first.shutdown(socket.SHUT_RDWR)
        assert served.report() == "echo: a connection has to wait: Too many open files"
        yield


def test_out_of_descriptors_a_connection_waits_and_is_served_when_there_are_some(served: Served) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        with out_of_descriptors(served):
            client.connect(served.path)
            client.sendall(message(abi.VHOST_USER_GET_FEATURES))
            # It looks again now and then, and says no more.
            assert not select.select([client], [], [], 0.12)[0]
        assert len(client.recv(100)) == 20
    works(served)


# The end.


def idle(served: Served, front: FrontEnd) -> None:
    """Nothing but a connection."""


def disconnected(served: Served, front: FrontEnd) -> None:
    front.disconnect()


def inside_a_header(served: Served, front: FrontEnd) -> None:
    front.send_bytes(b"\1\0")


def inside_a_payload(served: Served, front: FrontEnd) -> None:
    front.send_bytes(MEM_TABLE[:30])


def asleep(served: Served, front: FrontEnd) -> None:
    assert front.start().ask(0, b"x") == b"x"


def asleep_outside(served: Served, front: FrontEnd) -> None:
    front.start(1).submit(0, room=64)


def busy(served: Served, front: FrontEnd) -> None:
    entered = threading.Event()

    def nap(chain: Chain) -> int:
        entered.set()
        time.sleep(0.02)
        return 0

    assert isinstance(served.device, Echo)
    served.device.serve = nap
    ring = front.start()
    for token in range(40):
        ring.submit(token, b"x")
    assert entered.wait(PATIENCE)


def not_heard(served: Served, front: FrontEnd) -> None:
    """Its thread sleeps in an interrupt that nobody takes."""
    ring = front.start()
    assert ring.ask(0, b"x") == b"x"
    ring.driver.enable_interrupts()
    fill(ring.call)
    ring.submit(1, b"x", 1)
    eventually(lambda: ring.used == 2, "the answer")


def kicked_for_ever(served: Served, front: FrontEnd) -> None:
    ring = front.start(1)
    ring.submit(0, room=64)
    fill(ring.kick)
    time.sleep(0.01)
    fill(ring.kick)


def answers_not_read(served: Served, front: FrontEnd) -> None:
    """The server sleeps in sending an answer."""
    front.socket.setblocking(False)
    request = message(abi.VHOST_USER_GET_CONFIG, struct.pack("=III", 0, 256, 0) + bytes(256))
    quiet = 0
    while quiet < 10:
        try:
            front.socket.send(request)
            quiet = 0
        except BlockingIOError:
            quiet += 1
            time.sleep(0.002)


def failed(served: Served, front: FrontEnd) -> None:
    ring = front.start()
    front.start(1).submit(0, room=64)
    front.memory.write(ring.layout.available, struct.pack("<HH", 0, 1000))
    ring.notify()
    assert "avail index runs ahead" in served.report()


STATES = [
    idle,
    disconnected,
    inside_a_header,
    inside_a_payload,
    asleep,
    asleep_outside,
    busy,
    not_heard,
    kicked_for_ever,
    answers_not_read,
    failed,
]


@pytest.mark.parametrize("state_", STATES, ids=lambda state: state.__name__)
def test_a_server_stops_within_100_ms_whatever_it_does_and_leaves_nothing(
    served: Served, state_: Callable[[Served, FrontEnd], None]
) -> None:
    with served.front() as front:
        state_(served, front)
        within(STOP_SECONDS, served.server.stop)
        assert served.threads() == [] and served.ended.is_set()
        assert mappings("front-end") == 1


def test_a_server_that_waits_for_a_front_end_stops_and_so_does_one_that_never_began(tmp_path: Path) -> None:
    with Served(Echo(), tmp_path) as served:
        within(STOP_SECONDS, served.server.stop)
        within(STOP_SECONDS, served.server.stop)
        served.server.close()
    ours, theirs = socket.socketpair()
    server = Server(Echo(), theirs, print)
    within(STOP_SECONDS, server.close)
    ours.close()


def test_a_server_that_has_no_descriptors_for_a_connection_stops(served: Served) -> None:
    with out_of_descriptors(served):
        within(STOP_SECONDS, served.server.stop)


def test_a_stop_and_a_front_end_that_comes_at_the_same_time_leave_nothing(tmp_path: Path) -> None:
    for turn in range(60):
        with Served(Echo(), tmp_path) as served:
            client = socket.socket(socket.AF_UNIX)
            client.connect(served.path)
            client.sendall(message(abi.VHOST_USER_GET_FEATURES) * (turn % 3))
            if turn % 2:
                time.sleep(turn * 5e-6)
            within(STOP_SECONDS, served.server.stop)
            client.close()
        os.unlink(served.path)


# A server that is killed.


class Killed:
    """Servers in processes of their own, one at a time, on one socket."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.path = str(folder / "killed.sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        program = Path(__file__).with_name("vhost_user_program.py")
        number = self._listener.fileno()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self._program = subprocess.Popen(
            [sys.executable, str(program), str(number), *arguments], env=environment, pass_fds=[number],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._process = 0

    def begin(self) -> None:
        assert self._program.stdin and self._program.stdout
        self._program.stdin.write("\n")
        self._program.stdin.flush()
        self._process = int(self._program.stdout.readline())

    def kill(self) -> None:
        if self._process:
            os.kill(self._process, signal.SIGKILL)
            self._process = 0

    def close(self) -> None:
        """Kill the last one; nobody has complained."""
        self.kill()
        _, said = self._program.communicate()
        self._listener.close()
        assert (self._program.returncode, said) == (0, "")


@pytest.mark.parametrize("device", ["echo", "disk"])
def test_t17_a_server_killed_under_load_again_and_again_loses_no_request_and_returns_none_twice(
    tmp_path: Path, device: str
) -> None:
    if device == "disk":
        uring_or_skip()
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    killed = Killed(tmp_path, *([str(image)] if device == "disk" else []))
    front = FrontEnd(killed.path)
    record = -1
    loads: list[Load] = []
    try:
        for _ in range(25):
            killed.begin()
            front.negotiate()
            if record < 0:
                shape, (record,) = front.get_fds(
                    abi.VHOST_USER_GET_INFLIGHT_FD, struct.pack("=QQHHI", 0, 0, 3, 64, 0)
                )
            front.set(abi.VHOST_USER_SET_INFLIGHT_FD, shape, [record])
            if not loads:
                if device == "disk":
                    loads = [DiskLoad(front.start(0), 16)]
                else:
                    loads = [Load(front.start(0)), Load(front.start(2), 3)]
            else:
                for load in loads:
                    # What the front-end says is of no account: all of this is in flight.
                    front.tell(load.ring, load.ring.available)
            for load in loads:
                load.reach(rng.randrange(1, 20))
            time.sleep(rng.random() / 500)
            killed.kill()
            front.disconnect()
            front.connect()
        killed.begin()
        front.negotiate()
        front.set(abi.VHOST_USER_SET_INFLIGHT_FD, shape, [record])
        for load in loads:
            front.tell(load.ring, load.ring.available)
        for load in loads:
            # The echo's stay in order, too: what was in hand comes first.
            assert load.finish() > 25, seed
    finally:
        front.close()
        os.close(record)
        killed.close()
