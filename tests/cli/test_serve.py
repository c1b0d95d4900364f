"""`serve`: devices for other people's virtual machines, as a management tool and as a user start them."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import interpreters
import pytest
import sessions
from runtime.rigs import eventually
from sessions import Namespace, Session, one_line, run, tick_seconds

from lguestlib.abi import virtio_blk as blk
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.vhost_user.driver import VhostUserDevice
from lguestlib.runtime.vhost_user.frontend import BackEndError, FrontEnd
from lguestlib.virtio.split_driver import Buffer


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where the device is found."""
    return str(tmp_path / "device.sock")


@contextmanager
def serving(*words: str | bytes, sockets: int = 1, terminal: bool = False) -> Iterator[Session]:
    """`serve` with these *words*, listening on so many sockets; ended by SIGTERM, with nothing to complain of."""
    with Session("serve", *words, terminal=terminal) as session:
        for _ in range(sockets):
            session.expect("listening on", messages=True)
        yield session
        session.signal(signal.SIGTERM)
        assert session.end().status == 0


def request(disk: VhostUserDevice, kind: int, sector: int, data: list[Buffer], queue: int = 0) -> int:
    """One block request; its status."""
    header = disk.buffer(16, bytes(blk.virtio_blk_outhdr(kind, 0, sector)))
    status = disk.buffer(1, b"\xff")
    if kind == blk.VIRTIO_BLK_T_IN:
        disk.queues[queue].request([header], [*data, status])
    else:
        disk.queues[queue].request([header, *data], [status])
    return disk.read(status)[0]


def written(disk: VhostUserDevice, sector: int, data: bytes) -> int:
    return request(disk, blk.VIRTIO_BLK_T_OUT, sector, [disk.buffer(len(data), data)])


def test_a_disk_is_written_flushed_and_read(path: str, image: Path) -> None:
    with serving("blk", "--socket-path", path, "--blk-file", str(image)):
        with VhostUserDevice.connect(path) as disk:
            assert int.from_bytes(disk.config(0, 8), "little") == 128
            assert written(disk, 5, b"lguest!!" * 64) == blk.VIRTIO_BLK_S_OK
            assert request(disk, blk.VIRTIO_BLK_T_FLUSH, 0, []) == blk.VIRTIO_BLK_S_OK
            room = disk.buffer(1024)
            assert request(disk, blk.VIRTIO_BLK_T_IN, 4, [room]) == blk.VIRTIO_BLK_S_OK
            assert disk.read(room) == bytes(512) + b"lguest!!" * 64
    assert image.read_bytes()[5 * 512 : 6 * 512] == b"lguest!!" * 64
    assert not os.path.exists(path)


def test_a_read_only_disk_refuses_writing_and_may_be_a_read_only_file(path: str, image: Path) -> None:
    image.chmod(0o444)
    with serving("blk", f"--socket-path={path}", f"--blk-file={image}", "--read-only"):
        with VhostUserDevice.connect(path) as disk:
            assert disk.front_end.features & 1 << blk.VIRTIO_BLK_F_RO
            assert written(disk, 5, bytes(512)) == blk.VIRTIO_BLK_S_IOERR


def test_several_queues_are_served_by_as_many_threads(path: str, image: Path) -> None:
    with serving("blk", "--socket-path", path, "--blk-file", str(image), "--num-queues", "3") as session:
        with VhostUserDevice.connect(path, queues=3, wanted=1 << blk.VIRTIO_BLK_F_MQ) as disk:
            assert disk.config(34, 2) == b"\3\0"
            for queue in range(3):
                room = disk.buffer(512)
                assert request(disk, blk.VIRTIO_BLK_T_IN, queue, [room], queue) == blk.VIRTIO_BLK_S_OK
            names = [
                (task / "comm").read_text().strip() for task in Path(f"/proc/{session.pid}/task").iterdir()
            ]
            assert sum(name.startswith("block0 queue") for name in names) == 3


def test_several_devices_in_one_process_do_not_mind_each_other(tmp_path: Path, image: Path) -> None:
    first, second, third = (str(tmp_path / name) for name in ("a", "b", "c"))
    words = ["blk", "--socket-path", first, "--blk-file", str(image), "rng", "--socket-path", second]
    words += ["blk", "--blk-file", str(image), "--read-only", "--socket-path", third]
    with serving(*words, sockets=3):
        with (
            VhostUserDevice.connect(first) as disk,
            VhostUserDevice.connect(second) as rng,
            VhostUserDevice.connect(third) as same,
        ):
            assert written(disk, 0, b"x" * 512) == blk.VIRTIO_BLK_S_OK
            room = same.buffer(512)
            assert request(same, blk.VIRTIO_BLK_T_IN, 0, [room]) == blk.VIRTIO_BLK_S_OK
            assert same.read(room) == b"x" * 512
            random = rng.buffer(4096)
            assert rng.queues[0].request([], [random]) == 4096
            assert len(set(rng.read(random))) > 200


def test_front_ends_come_and_go_and_leave_nothing(path: str, image: Path) -> None:
    with serving("blk", "--socket-path", path, "--blk-file", str(image)) as session:

        def visit(number: int) -> None:
            with VhostUserDevice.connect(path) as disk:
                assert written(disk, number % 128, number.to_bytes(4, "big") * 128) == blk.VIRTIO_BLK_S_OK

        proc = Path(f"/proc/{session.pid}")

        def held() -> tuple[int, int, int]:
            maps = (proc / "maps").read_text().splitlines()
            return len(os.listdir(proc / "fd")), len(os.listdir(proc / "task")), sum("memfd" in m for m in maps)

        before = held()
        assert before[1:] == (2, 0)
        for number in range(100):
            visit(number)
        eventually(lambda: held() == before, f"as many descriptors, threads and mappings as before: {before}")


def test_an_idle_back_end_uses_no_processor_time(path: str, image: Path) -> None:
    with serving("blk", "--socket-path", path, "--blk-file", str(image)) as session:
        with VhostUserDevice.connect(path) as disk:
            assert written(disk, 0, bytes(512)) == blk.VIRTIO_BLK_S_OK
            before = tick_seconds(session.pid)
            time.sleep(1.5)
            assert tick_seconds(session.pid) - before <= 0.02


def test_it_is_started_on_a_socket_that_is_connected_already(image: Path) -> None:
    """The way of QEMU's `vhost-user` conventions for management tools: ``--fd``."""
    ours, theirs = socket.socketpair()
    words = [*sessions.COMMAND, "serve", "blk", f"--fd={theirs.fileno()}", "--blk-file", str(image)]
    environment = os.environ | {"PYTHONPATH": str(interpreters.SOURCE)}
    process = subprocess.Popen(words, pass_fds=[theirs.fileno()], env=environment, stderr=subprocess.PIPE)
    theirs.close()
    with VhostUserDevice(FrontEnd(ours, "the socket pair")) as disk:
        assert written(disk, 1, b"y" * 512) == blk.VIRTIO_BLK_S_OK
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, b"")
    assert image.read_bytes()[512:1024] == b"y" * 512


def test_it_is_started_on_a_socket_that_listens(path: str, image: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        words = [*sessions.COMMAND, "serve", "blk", "--fd", str(listener.fileno()), "--blk-file", str(image)]
        environment = os.environ | {"PYTHONPATH": str(interpreters.SOURCE)}
        process = subprocess.Popen(words, pass_fds=[listener.fileno()], env=environment)
        for _ in range(3):
            with VhostUserDevice.connect(path) as disk:
                assert written(disk, 1, b"z" * 512) == blk.VIRTIO_BLK_S_OK
        process.terminate()
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("blk", {"type": "block", "features": ["read-only", "blk-file"]}), ("net", {"type": "net", "features": []})],
)
def test_capabilities_are_told_without_anything_else(kind: str, wanted: object) -> None:
    status, output, errors = run("serve", kind, "--print-capabilities")
    assert (status, json.loads(output), errors) == (0, wanted, "")


def test_what_a_killed_process_left_is_replaced_and_what_is_alive_is_not(path: str, image: Path) -> None:
    words = ("blk", "--socket-path", path, "--blk-file", str(image))
    with Session("serve", *words) as killed:
        killed.expect("listening on", messages=True)
        killed.process.kill()
        killed.process.wait()
        assert os.path.exists(path)
    with serving(*words):
        status, _, errors = run("serve", *words)
        assert status == 1
        assert one_line(errors).startswith(f"--socket-path {path}: Address already in use (something is there")
        with VhostUserDevice.connect(path) as disk:
            assert written(disk, 0, bytes(512)) == blk.VIRTIO_BLK_S_OK


def test_a_file_in_the_sockets_place_stays(path: str, image: Path) -> None:
    Path(path).write_text("precious")
    status, _, errors = run("serve", "blk", "--socket-path", path, "--blk-file", str(image))
    assert status == 1 and "Address already in use" in one_line(errors)
    assert Path(path).read_text() == "precious"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_other_signals_end_it_too_with_their_number(path: str, number: signal.Signals) -> None:
    with Session("serve", "rng", "--socket-path", path) as session:
        session.expect("listening on", messages=True)
        with VhostUserDevice.connect(path):
            session.signal(number)
            assert session.end().status == 128 + number
    assert not os.path.exists(path)


def test_it_ends_within_a_moment_with_a_front_end_connected_and_busy(path: str, image: Path) -> None:
    with Session("serve", "blk", "--socket-path", path, "--blk-file", str(image)) as session:
        session.expect("listening on", messages=True)
        with VhostUserDevice.connect(path) as disk:
            header = disk.buffer(16, bytes(blk.virtio_blk_outhdr(blk.VIRTIO_BLK_T_IN, 0, 0)))
            room, status = disk.buffer(65536), disk.buffer(1)
            for _ in range(16):
                disk.queues[0].submit([header], [room, status])
            session.signal(signal.SIGTERM)
            started = time.monotonic()
            assert session.end().status == 0
            # The interpreter's own end included.
            assert time.monotonic() - started < 1.0
            with pytest.raises(BackEndError):
                while True:
                    disk.queues[0].wait(1.0)


def test_a_line_for_each_queue_now_and_then(path: str, image: Path) -> None:
    words = ("blk", "--socket-path", path, "--blk-file", str(image), "--num-queues", "2", "--stats", "0.1")
    with serving(*words) as session:
        with VhostUserDevice.connect(path) as disk:
            for _ in range(50):
                assert written(disk, 0, bytes(512)) == blk.VIRTIO_BLK_S_OK
            busy = ""
            while " 0 chains/s" in busy or not busy:
                busy = session.expect("errors\n")
            assert "block0 queue0" in busy and "MB/s" in busy and "kicks/s" in busy


def test_a_disk_that_grows_tells_its_driver(path: str, image: Path) -> None:
    with serving("blk", "--socket-path", path, "--blk-file", str(image)) as session:
        with VhostUserDevice.connect(path) as disk:
            assert int.from_bytes(disk.config(0, 8), "little") == 128
            os.truncate(image, 1 << 20)
            session.signal(signal.SIGUSR1)
            eventually(lambda: int.from_bytes(disk.config(0, 8), "little") == 2048, "the new capacity is told")
            assert written(disk, 2047, b"end!" * 128) == blk.VIRTIO_BLK_S_OK


def test_a_console_on_the_terminal(path: str) -> None:
    with serving("console", "--socket-path", path, terminal=True) as session:
        with VhostUserDevice.connect(path, queues=2) as console:
            receive, transmit = console.queues
            room = console.buffer(64)
            receive.submit([], [room])
            transmit.request([console.buffer(6, b"login:")], [])
            session.expect("login:")
            session.type("root\r")
            (done,) = receive.wait()
            assert console.read(room, done.written) == b"root\n"


def test_three_interrupts_at_the_terminal_end_it(path: str) -> None:
    with Session("serve", "console", "--socket-path", path, terminal=True) as session:
        session.expect("listening on")
        with VhostUserDevice.connect(path, queues=2) as console:
            room = [console.buffer(16) for _ in range(8)]
            for buffer in room:
                console.queues[0].submit([], [buffer])
            for _ in range(3):
                session.type("\x03")
                time.sleep(0.02)
            assert session.end().status == 130


def test_a_console_on_a_pseudo_terminal(path: str) -> None:
    with serving("console", "--pty", "--socket-path", path, sockets=0) as session:
        name = session.expect("\n", messages=True).split()[-1]
        session.expect("listening on", messages=True)
        with VhostUserDevice.connect(path, queues=2) as console:
            receive, transmit = console.queues
            room = console.buffer(64)
            receive.submit([], [room])
            end = os.open(name, os.O_RDWR | os.O_NOCTTY)
            try:
                transmit.request([console.buffer(5, b"hello")], [])
                assert select.select([end], [], [], sessions.PATIENCE)[0]
                assert os.read(end, 100) == b"hello"
                os.write(end, b"there")
                (done,) = receive.wait()
                assert console.read(room, done.written) == b"there"
            finally:
                os.close(end)


def test_a_card_on_a_tap_interface_that_is_there(path: str) -> None:
    sessions.root_or_skip()
    with Namespace() as namespace:
        namespace.call("ip", "tuntap", "add", "tap7", "mode", "tap")
        namespace.call("ip", "addr", "add", "192.168.77.1/24", "dev", "tap7")
        namespace.call("ip", "link", "set", "tap7", "up")
        words = ["serve", "net", "--socket-path", path, "--tap", "tap7", "--mac", "02:00:00:00:00:07"]
        with Session(*words, prefix=namespace.prefix) as session:
            session.expect("listening on", messages=True)
            with VhostUserDevice.connect(path, queues=2, wanted=1 << 5) as card:
                assert card.config(0, 6) == bytes.fromhex("020000000007")
                room = card.buffer(2048)
                card.queues[0].submit([], [room])
                request = bytes.fromhex(
                    "ffffffffffff 020000000007 0806 0001 0800 06 04 0001 020000000007"
                    " c0a84d02 000000000000 c0a84d01"
                )
                card.queues[1].request([card.buffer(12 + len(request), bytes(12) + request)], [])
                while True:
                    (done,) = card.queues[0].wait()
                    frame = card.read(room, done.written)[12:]
                    if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2":
                        break
                    card.queues[0].submit([], [room])
                assert frame[28:32] == bytes([192, 168, 77, 1])
            session.signal(signal.SIGTERM)
            assert session.end().status == 0
        assert namespace.interfaces() == ["tap7"]


def test_a_card_on_itself_receives_what_it_sends(path: str) -> None:
    with serving("net", "--socket-path", path, "--loopback", "--mac", "02:00:00:00:00:07"):
        with VhostUserDevice.connect(path, queues=2) as card:
            frame = bytes.fromhex("02000000000702000000000788b5") + bytes(range(100))
            for _ in range(3):
                room = card.buffer(2048)
                card.queues[0].submit([], [room])
                card.queues[1].request([card.buffer(12 + len(frame), bytes(12) + frame)], [])
                (done,) = card.queues[0].wait()
                assert card.read(room, done.written)[12:] == frame


def test_a_queue_that_is_polled_saves_its_driver_kicks(path: str, image: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    words = ("--socket-path", path, "--blk-file", str(image), "--poll", "100000", "--trace", str(trace))
    with serving("blk", *words):
        with VhostUserDevice.connect(path) as disk:
            for _ in range(300):
                assert written(disk, 0, bytes(512)) == blk.VIRTIO_BLK_S_OK
    calls = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert calls.count("pwritev(disk)") == 300
    assert calls.count("read(kick)") < 150


def test_features_can_be_withheld(path: str) -> None:
    with serving("rng", "--socket-path", path, "--without", "event_idx,indirect_desc"):
        with VhostUserDevice.connect(path) as rng:
            assert not rng.front_end.features & (1 << 28 | 1 << 29)
            random = rng.buffer(4096)
            assert rng.queues[0].request([], [random]) == 4096


@pytest.mark.parametrize(("words", "offered"), [((), False), (("--with", "ring_reset"), True)])
def test_ring_reset_is_offered_to_those_who_ask_for_it(path: str, words: tuple[str, ...], offered: bool) -> None:
    with serving("rng", "--socket-path", path, *words), VhostUserDevice.connect(path) as rng:
        assert bool(rng.front_end.features & 1 << 40) is offered


def test_calls_are_recorded(path: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    with serving("rng", "--socket-path", path, "--trace", str(trace)):
        with VhostUserDevice.connect(path) as rng:
            assert rng.queues[0].request([], [rng.buffer(64)]) == 64
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["name"] for event in events}
    assert {"read(kick)", "write(interrupt)"} <= names


USAGE = [
    (["serve", "disk"], "serve disk: no such device (one of blk, net, console, rng; "),
    (["serve", "blk"], "serve blk: give one of --socket-path PATH and --fd N"),
    (["serve", "blk", "--socket-path", "s"], "serve blk: --blk-file FILE is missing"),
    (["serve", "blk", "--socket-path", "s", "--fd", "3", "--blk-file", "f"], "serve blk: give one of --socket-p"),
    (["serve", "net", "--socket-path", "s"], "serve net: give one of --tap NAME, --tunnet IP and --loopback"),
    (["serve", "net", "--socket-path", "s", "--tap", "t", "--tunnet", "1.2.3.4"], "argument --tunnet: not allowed"),
    (["serve", "net", "--socket-path", "s", "--tap", "t", "--loopback"], "argument --loopback: not allowed with"),
    (["serve", "rng", "--poll", "-1"], "argument --poll: '-1' is not a number of microseconds up to 1000000, such"),
    (["serve", "blk", "--fd", "3", "--blk-file", "f", "--aio", "io_uring", "--poll", "9"], "serve blk: --poll 9 is"),
    (["serve", "blk", "--fd", "3", "--blk-file", "f", "--num-queues", "2", "--poll", "9"], "serve blk: --poll 9 with"),
    (["serve", "rng", "--fd", "x"], "argument --fd: 'x' is not a descriptor's number, such as 3 ("),
    (["serve", "blk", "--num-queues", "0"], "argument --num-queues: '0' is not a number of queues from 1 to 64"),
    (["serve", "rng", "--stats", "never"], "argument --stats: 'never' is not a number of seconds from 0.01 on"),
    (["serve", "console", "--socket-path", "a", "console", "--socket-path", "b"], "serve console: there is one te"),
]


@pytest.mark.parametrize(("words", "message"), USAGE, ids=[" ".join(words) for words, _ in USAGE])
def test_a_wrong_command_line_has_status_2(words: list[str], message: str) -> None:
    status, output, errors = run(*words)
    assert (status, output) == (2, "")
    assert one_line(errors).startswith(message)


FAILURES = [
    (["serve", "blk", "--socket-path", "s", "--blk-file", "nothing"], "--blk-file nothing: No such file or dire"),
    (["serve", "rng", "--socket-path", "no/s"], "--socket-path no/s: No such file or directory (mkdir -p no)"),
    (["serve", "rng", "--socket-path", "x" * 200], "--socket-path xxx"),
    (["serve", "rng", "--fd", "99"], "--fd 99: Bad file descriptor ("),
    (["serve", "rng", "--fd", "0"], "--fd 0: "),
    (["serve", "rng", "--socket-path", "s", "--without", "csum"], "--without csum: rng0 offers no such feature ("),
    (["serve", "rng", "--socket-path", "s", "--with", "csum"], "--with csum: rng0 withholds no such feature (but "),
]


@pytest.mark.parametrize(("words", "message"), FAILURES, ids=[" ".join(words)[:60] for words, _ in FAILURES])
def test_what_cannot_be_done_has_status_1(words: list[str], message: str, tmp_path: Path) -> None:
    status, output, errors = run(*words, directory=tmp_path)
    assert (status, output) == (1, "")
    assert one_line(errors).startswith(message)
    assert not list(tmp_path.iterdir())


def test_help_teaches_by_example() -> None:
    for words in (["serve", "--help"], ["serve", "blk", "--help"]):
        status, output, _ = run(*words)
        assert status == 0
        assert "serve blk --socket-path disk.sock --blk-file disk.img" in output
        assert "vhost-user-blk-pci" in output
