"""A driver in this process for devices in another, or behind a socket in this one."""

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import interpreters
import pytest
from runtime.rigs import eventually, nothing_left
from runtime.scripted_back_end import ScriptedBackEnd
from storage_daemon import StorageDaemon

from lguestlib.abi import uio
from lguestlib.abi import virtio_blk as blk
from lguestlib.abi import virtio_net as net
from lguestlib.memory.address import GuestAddress
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.backend.random import KernelRandom
from lguestlib.runtime.backend.responder import MAC, Responder
from lguestlib.runtime.packets import Station, arp_reply, arp_request
from lguestlib.runtime.vhost_user.driver import Done, VhostUserDevice
from lguestlib.runtime.vhost_user.frontend import BackEndError, FrontEnd
from lguestlib.runtime.vhost_user.server import Server
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import RING_FEATURES, Device, Queue
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.net import HEADER_SIZE, Net
from lguestlib.virtio.errors import UsedIndexError
from lguestlib.virtio.features import Feature
from lguestlib.virtio.split_driver import QueueFull
from lguestlib.virtio.vhost_user.frontend import PROTOCOL_FEATURES

EXAMPLE = Path(__file__).parents[2] / "examples/read_disk.py"
OUR_MAC = bytes.fromhex("020000000002")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@contextmanager
def behind(device: Device, queues: int = 1, wanted: int = 0) -> Iterator[VhostUserDevice]:
    """The driver's end of *device*, which a server of ours has on the other end of a socket pair."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    said: list[str] = []
    server = Server(device, theirs, said.append)
    server.start()
    try:
        with VhostUserDevice(FrontEnd(ours, "pair"), queues, wanted) as driven:
            yield driven
    finally:
        server.close()
    assert said == []


class Terminal:
    """Where a console's output goes, and keys come from."""

    def __init__(self) -> None:
        self.shown = bytearray()
        self.keys, self.keyboard = os.pipe()

    def read(self, buffers: Sequence[memoryview]) -> int:
        return uio.readv(self.keys, buffers)

    def write(self, buffers: Sequence[memoryview]) -> int:
        for part in buffers:
            self.shown += part
        return sum(map(len, buffers))

    def size(self) -> tuple[int, int]:
        return 80, 25

    def close(self) -> None:
        os.close(self.keys)
        os.close(self.keyboard)


def test_random_numbers() -> None:
    with behind(Entropy(KernelRandom())) as rng:
        assert rng.features == int(RING_FEATURES)
        room = rng.buffer(32)
        seen = set()
        for _ in range(100):
            assert rng.queues[0].request([], [room]) == 32
            seen.add(rng.read(room))
        assert len(seen) == 100


def test_a_console() -> None:
    terminal = Terminal()
    with behind(Console(terminal), queues=2) as console:
        receive, transmit = console.queues
        keys = console.buffer(64)
        receive.submit([], [keys])
        assert transmit.request([console.buffer(6, b"hello ")], []) == 0
        assert transmit.request([console.buffer(5, b"world")], []) == 0
        assert terminal.shown == b"hello world"
        os.write(terminal.keyboard, b"typed")
        assert receive.wait() == [Done(0, 5)]
        assert console.read(keys, 5) == b"typed"
        receive.submit([], [keys])
    terminal.close()


def test_a_network_card() -> None:
    network = Responder("192.168.19.1")
    card = Net(network, OUR_MAC)
    with behind(card, queues=2, wanted=1 << net.VIRTIO_NET_F_MAC) as driven:
        assert driven.features == int(RING_FEATURES) | 1 << net.VIRTIO_NET_F_MAC
        assert driven.config(0, 6) == OUR_MAC
        receive, transmit = driven.queues
        room = [driven.buffer(2048) for _ in range(4)]
        for buffer in room:
            receive.submit([], [buffer])
        frame = arp_request(Station(OUR_MAC, bytes([192, 168, 19, 2])), bytes([192, 168, 19, 1]))
        transmit.request([driven.buffer(HEADER_SIZE, b""), driven.buffer(len(frame), frame)], [])
        ((number, written),) = receive.wait()
        answer = driven.read(room[number], written)[HEADER_SIZE:]
        assert arp_reply(answer) == Station(MAC, bytes([192, 168, 19, 1]))
    network.close()


def header(kind: int, sector: int) -> bytes:
    return bytes(blk.virtio_blk_outhdr(kind, 0, sector))


def test_a_disk() -> None:
    disk = FileDisk.scratch(1 << 20)
    with behind(Block(disk), wanted=1 << blk.VIRTIO_BLK_F_FLUSH) as driven:
        assert int.from_bytes(driven.config(0, 8), "little") == 2048
        queue, status = driven.queues[0], driven.buffer(1)
        data = random.Random(1).randbytes(8192)
        written = driven.buffer(8192, data)
        assert queue.request([driven.buffer(16, header(blk.VIRTIO_BLK_T_OUT, 8)), written], [status]) == 1
        room = driven.buffer(8192)
        assert queue.request([driven.buffer(16, header(blk.VIRTIO_BLK_T_IN, 8))], [room, status]) == 8193
        assert driven.read(room) == data
        assert queue.request([driven.buffer(16, header(blk.VIRTIO_BLK_T_FLUSH, 0))], [status]) == 1
        assert driven.read(status) == b"\0"
    disk.close()


class Slow(Device):
    """Answers each request with its own bytes, when it is told to."""

    device_type = 63

    def __init__(self) -> None:
        super().__init__("slow")
        self.go = threading.Event()

    def queues(self) -> tuple[Queue, ...]:
        return (Queue("requests", self.serve), Queue("others", self.serve))

    def serve(self, chain: Chain) -> int:
        assert self.go.wait(10)
        return chain.write(chain.read())


@pytest.mark.parametrize(
    "withheld",
    [0, int(Feature.IN_ORDER), int(Feature.RING_EVENT_IDX), int(RING_FEATURES & ~Feature.VERSION_1)],
)
def test_many_requests_in_flight_come_back_by_their_numbers(withheld: int) -> None:
    slow = Slow()
    slow.withheld = withheld
    slow.go.set()
    with behind(slow, queues=2) as driven:
        assert driven.features == int(RING_FEATURES | Feature.IN_ORDER) & ~withheld
        rooms = {}
        for turn in range(40):
            for queue in driven.queues:
                for _ in range(8):
                    text = b"%d %d" % (queue.layout.index, turn)
                    room = driven.buffer(16)
                    number = queue.submit([driven.buffer(len(text), text)], [room])
                    rooms[queue.layout.index, number] = room, text
            for queue in driven.queues:
                left = 8
                while left:
                    for number, written in queue.wait():
                        room, text = rooms.pop((queue.layout.index, number))
                        assert driven.read(room, written) == text
                        left -= 1
        assert rooms == {}


def test_an_indirect_table_takes_one_descriptor() -> None:
    slow = Slow()
    slow.go.set()
    with behind(slow) as driven:
        queue = driven.queues[0]
        parts = [driven.buffer(1, bytes([letter])) for letter in b"chain"]
        room, table = driven.buffer(16), driven.buffer(16 * 6)
        queue.submit(parts, [room], table.address)
        assert queue.ring.free >= queue.layout.size - 1
        assert queue.wait() == [Done(0, 5)]
        assert driven.read(room, 5) == b"chain"


def test_a_device_that_does_not_answer_in_time_is_an_error() -> None:
    slow = Slow()
    with behind(slow) as driven:
        queue = driven.queues[0]
        start = time.monotonic()
        with pytest.raises(BackEndError, match="^pair: ring 0: the device has not answered in time$"):
            queue.request([driven.buffer(1)], [driven.buffer(1)], seconds=0.1)
        assert 0.09 < time.monotonic() - start < 1.0
        with pytest.raises(BackEndError, match="not answered in time$"):
            queue.wait(0)
        slow.go.set()
        assert queue.wait() == [Done(0, 1)]


def test_an_answer_to_another_request_is_not_taken_for_this_ones() -> None:
    slow = Slow()
    slow.go.set()
    with behind(slow) as driven:
        queue = driven.queues[0]
        queue.submit([driven.buffer(1)], [driven.buffer(1)])
        eventually(lambda: queue.ring.enable_interrupts(), "the answer to the first")
        with pytest.raises(ValueError):
            queue.request([driven.buffer(1)], [driven.buffer(1)])


def test_a_device_that_fails_is_an_error_at_once() -> None:
    class Broken(Slow):
        def serve(self, chain: Chain) -> int:
            raise OSError(5, "worn out")

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    said: list[str] = []
    server = Server(Broken(), theirs, said.append)
    server.start()
    with VhostUserDevice(FrontEnd(ours, "pair")) as driven:
        with pytest.raises(BackEndError, match=r"^pair: the device has failed \(it may have said why\)$"):
            driven.queues[0].request([driven.buffer(1)], [driven.buffer(1)])
    server.close()
    assert len(said) == 1 and "worn out" in said[0]


def test_a_back_end_that_goes_while_it_is_waited_for_is_an_error_at_once() -> None:
    with ScriptedBackEnd() as backend, VhostUserDevice(FrontEnd(backend.connection, "there")) as driven:
        threading.Timer(0.05, backend.end).start()
        start = time.monotonic()
        with pytest.raises(BackEndError, match="^there: the back-end has closed the connection"):
            driven.queues[0].request([driven.buffer(1)], [driven.buffer(1)], seconds=10)
        assert time.monotonic() - start < 1.0


def test_queues_are_stopped_once_at_the_end() -> None:
    with ScriptedBackEnd() as backend:
        with VhostUserDevice(FrontEnd(backend.connection, "there"), queues=2) as driven:
            driven.queues[1].stop()
            driven.queues[1].stop()
        assert backend.names[-3:] == ["GET_FEATURES", "GET_VRING_BASE", "GET_VRING_BASE"]


def test_a_back_end_that_returns_what_it_was_not_given_is_an_error() -> None:
    with ScriptedBackEnd() as backend, VhostUserDevice(FrontEnd(backend.connection, "there")) as driven:
        queue = driven.queues[0]
        driven.memory.write(GuestAddress(queue.layout.used + 2), (5).to_bytes(2, "little"))
        with pytest.raises(UsedIndexError):
            queue.wait()
        driven.memory.write(GuestAddress(queue.layout.used + 2), bytes(2))


@pytest.mark.parametrize(
    ("features", "queues", "reason"),
    [
        (PROTOCOL_FEATURES, 1, "it does not offer VERSION_1, and is too old for this"),
        (int(RING_FEATURES) | PROTOCOL_FEATURES, 3, "it has 2 queues, not 3"),
    ],
)
def test_a_back_end_that_is_not_enough_is_refused(features: int, queues: int, reason: str) -> None:
    with ScriptedBackEnd(features) as backend:
        with pytest.raises(BackEndError, match=f"^there: {reason}$"):
            VhostUserDevice(FrontEnd(backend.connection, "there"), queues)


def test_what_does_not_fit_is_refused_and_given_back() -> None:
    with ScriptedBackEnd() as backend:
        with pytest.raises(ValueError, match="^no buffer of "):
            VhostUserDevice(FrontEnd(backend.connection, "there"), queues=2, queue_size=256, memory=8192)
    with ScriptedBackEnd() as backend:
        front_end = FrontEnd(backend.connection, "there")
        with VhostUserDevice(front_end, queue_size=2, memory=8192) as driven:
            for size in (0, -1, 8192, 1 << 64):
                with pytest.raises(ValueError, match="^no buffer of "):
                    driven.buffer(size)
            with pytest.raises(ValueError, match="^no buffer of 2 bytes for 3: "):
                driven.buffer(2, b"abc")
            buffers = []
            with pytest.raises(ValueError):
                while True:
                    buffers.append(driven.buffer(100))
            assert 50 < len(buffers) < 64
            assert all(one.address + one.length <= two.address for one, two in zip(buffers, buffers[1:]))
            queue = driven.queues[0]
            queue.submit([buffers[0], buffers[1]], [])
            with pytest.raises(QueueFull):
                queue.submit([buffers[2]], [])


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(2).randbytes(1 << 20))
    return path


def run_example(*words: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-X", "dev", "-W", "error", str(EXAMPLE), *words]
    environment = os.environ | {"PYTHONPATH": str(interpreters.SOURCE)}
    return subprocess.run(command, env=environment, capture_output=True, timeout=60)


@pytest.mark.parametrize("export", ["writable=off", "writable=on,num-queues=4"])
def test_the_example_reads_a_disk_of_somebody_elses(disk: Path, tmp_path: Path, export: str) -> None:
    path, content = tmp_path / "disk.sock", disk.read_bytes()
    with StorageDaemon(disk, path, export):
        for words, expected in {
            (): content,
            ("512", "512"): content[512:1024],
            ("1000", "200000"): content[1000:201000],
            ("1048575",): content[-1:],
            ("1048576",): b"",
            ("5000000", "1"): b"",
            ("7", "0"): b"",
        }.items():
            done = run_example(str(path), *words)
            assert (done.returncode, done.stderr) == (0, b"")
            assert done.stdout == expected


def test_the_example_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    done = run_example(str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == (
        f"{tmp_path}/nowhere: No such file or directory (start the back-end before, or name its socket)\n"
    )
    assert run_example().returncode == 2


def test_the_example_type_checks_and_is_short(tmp_path: Path) -> None:
    code = EXAMPLE.read_text().partition('"""\n\nimport')[2]
    assert len([line for line in code.splitlines() if line]) <= 40
    if subprocess.run([sys.executable, "-m", "mypy", "--version"], capture_output=True).returncode:
        pytest.skip("mypy does not run under this interpreter: pip install mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}"]
    environment = os.environ | {"MYPYPATH": str(interpreters.SOURCE)}
    done = subprocess.run([*command, str(EXAMPLE)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_t9_a_stop_waits_for_what_is_in_flight_there(disk: Path, tmp_path: Path) -> None:
    for attempt in range(5):
        try:
            stop_with_requests_in_flight(disk, tmp_path / f"{attempt}.sock")
            break
        except BackEndError as error:
            # libvhost-user (QEMU 7.2) closes the call descriptor at a stop, and gives up where a request ends then.
            assert "stopped, and requests not finished" in str(error)
    else:
        raise AssertionError("the other side never stops cleanly")


def stop_with_requests_in_flight(disk: Path, path: Path) -> None:
    content = disk.read_bytes()
    with StorageDaemon(disk, path, rate=20):
        with VhostUserDevice.connect(str(path)) as driven:
            queue = driven.queues[0]
            rooms = [driven.buffer(512) for _ in range(6)]
            for sector, room in enumerate(rooms):
                head = driven.buffer(16, header(blk.VIRTIO_BLK_T_IN, sector))
                queue.submit([head], [room, driven.buffer(1)])
            queue.stop()
            # Nothing lands in memory any more: all that was taken has.
            assert len(queue.reap()) == len(rooms) - queue.ring.in_flight
            done = len(rooms) - queue.ring.in_flight
            assert b"".join(map(driven.read, rooms[:done])) == content[: 512 * done]
            assert not any(any(driven.read(room)) for room in rooms[done:])
            time.sleep(0.2)
            assert not any(any(driven.read(room)) for room in rooms[done:])
