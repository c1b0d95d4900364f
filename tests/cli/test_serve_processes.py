"""`serve blk --processes`: a process for each queue, none of which outlives the one that has started it."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import interpreters
import pytest
from cli.test_serve import request, written
from runtime.rigs import eventually
from sessions import COMMAND, Session, one_line, run, tick_seconds

from lguestlib.abi import virtio_blk as blk
from lguestlib.runtime.vhost_user.driver import VhostUserDevice
from lguestlib.runtime.vhost_user.frontend import BackEndError, FrontEnd

MQ = 1 << blk.VIRTIO_BLK_F_MQ


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where the device is found."""
    return str(tmp_path / "device.sock")


@contextmanager
def serving(path: str, image: Path, *words: str, clean: bool = True) -> Iterator[Session]:
    """Two queues in two processes, ended by SIGTERM; *clean*: with nothing to complain of."""
    with Session(*disk(path, image), *words) as session:
        session.expect("listening on", messages=True)
        session.expect("\n", messages=True)
        yield session
        children = processes(session.pid)
        session.signal(signal.SIGTERM)
        started = time.monotonic()
        result = session.end()
        # The interpreters' own end included.
        assert time.monotonic() - started < 1.0
        assert result.status == 0
        assert not clean or result.errors == ""
        assert not any(alive(pid) for pid in children)


def disk(path: str, image: Path) -> list[str]:
    return ["serve", "blk", "--socket-path", path, "--blk-file", str(image), "--num-queues=2", "--processes"]


def processes(pid: int) -> list[int]:
    """What the process *pid* has started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return sorted(found)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def connected(path: str) -> VhostUserDevice:
    return VhostUserDevice.connect(path, queues=2, wanted=MQ)


def works(device: VhostUserDevice) -> None:
    """Both queues carry data."""
    for queue in range(2):
        data = bytes([queue, 1]) * 256
        header = device.buffer(16, bytes(blk.virtio_blk_outhdr(blk.VIRTIO_BLK_T_OUT, 0, queue)))
        status = device.buffer(1, b"\xff")
        device.queues[queue].request([header, device.buffer(512, data)], [status])
        assert device.read(status) == b"\0"
        room = device.buffer(512)
        assert request(device, blk.VIRTIO_BLK_T_IN, queue, [room], queue) == blk.VIRTIO_BLK_S_OK
        assert device.read(room) == data


def test_front_ends_come_and_go_and_leave_nothing_in_any_process(path: str, image: Path) -> None:
    with serving(path, image) as session:
        with connected(path) as device:
            works(device)
        pids = [session.pid, *processes(session.pid)]
        assert len(pids) == 3

        def held() -> list[tuple[int, int, int]]:
            proc = [Path(f"/proc/{pid}") for pid in pids]
            return [
                (len(os.listdir(each / "fd")), len(os.listdir(each / "task")),
                 (each / "maps").read_text().count("memfd:"))
                for each in proc
            ]  # fmt: skip

        # The processes have their main thread; the server one, and one to watch each process.
        eventually(lambda: [threads for _, threads, _ in held()] == [4, 1, 1], "the end of the conversation")
        before = held()
        assert [mapped for _, _, mapped in before] == [0, 0, 0]
        for _ in range(50):
            with connected(path) as device:
                works(device)
        eventually(lambda: held() == before, f"as many descriptors, threads and mappings as before: {before}")


def test_idle_processes_use_no_processor_time(path: str, image: Path) -> None:
    with serving(path, image) as session, connected(path) as device:
        works(device)
        pids = [session.pid, *processes(session.pid)]
        before = [tick_seconds(pid) for pid in pids]
        time.sleep(1.0)
        assert [tick_seconds(pid) - then <= 0.02 for pid, then in zip(pids, before)] == [True] * 3


def test_a_read_only_disk_and_features_withheld_are_so_in_the_processes(path: str, image: Path) -> None:
    image.chmod(0o444)
    with serving(path, image, "--read-only", "--without", "event_idx"), connected(path) as device:
        assert device.front_end.features & 1 << blk.VIRTIO_BLK_F_RO
        assert not device.front_end.features & 1 << 29
        assert written(device, 5, bytes(512)) == blk.VIRTIO_BLK_S_IOERR


def test_a_disk_that_grows_tells_its_driver_and_has_grown_for_every_queue(path: str, image: Path) -> None:
    with serving(path, image) as session, connected(path) as device:
        os.truncate(image, 1 << 20)
        session.signal(signal.SIGUSR1)
        eventually(lambda: int.from_bytes(device.config(0, 8), "little") == 2048, "the new capacity is told")
        for queue in range(2):
            room = device.buffer(512)
            assert request(device, blk.VIRTIO_BLK_T_IN, 2047, [room], queue) == blk.VIRTIO_BLK_S_OK


def test_a_line_for_each_queue_now_and_then(path: str, image: Path) -> None:
    with serving(path, image, "--stats", "0.1") as session, connected(path) as device:
        for name in ("block0 queue0", "block0 queue1"):
            works(device)
            line = ""
            while name not in line or " 0 chains/s" in line:
                works(device)
                line = session.expect("errors\n")
            assert "MB/s" in line and "kicks/s" in line


def test_a_process_that_is_killed_is_told_of_and_replaced(path: str, image: Path) -> None:
    with serving(path, image, clean=False) as session:
        with connected(path) as device:
            works(device)
            first, second = processes(session.pid)
            os.kill(second, signal.SIGKILL)
            said = session.expect("another\n", messages=True)
            assert one_line(said).startswith("block0 queue")
            assert "its process has ended (signal 9); the next front-end gets another" in said
            with pytest.raises(BackEndError):
                while True:
                    device.front_end.config(0, 8)
        with connected(path) as device:
            works(device)
        assert first in processes(session.pid) and second not in processes(session.pid)


@pytest.mark.parametrize("busy", [False, True])
def test_no_process_outlives_the_one_that_has_started_it(path: str, image: Path, busy: bool) -> None:
    with Session(*disk(path, image)) as session:
        session.expect("listening on", messages=True)
        pids = processes(session.pid)
        if busy:
            with connected(path) as device:
                works(device)
                session.process.kill()
                eventually(lambda: not any(map(alive, pids)), "their end")
        else:
            # They have hardly begun.
            session.process.kill()
            eventually(lambda: not any(map(alive, pids)), "their end")
        assert len(pids) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_is_its_leaders_to_follow(
    path: str, image: Path, number: signal.Signals
) -> None:
    with Session(*disk(path, image)) as session:
        session.expect("listening on", messages=True)
        session.expect("\n", messages=True)
        with connected(path) as device:
            works(device)
            pids = processes(session.pid)
            os.killpg(session.pid, number)
            result = session.end()
        assert (result.status, result.errors) == (0 if number == signal.SIGTERM else 128 + number, "")
        assert not any(map(alive, pids))


def test_it_ends_with_the_socket_it_was_started_on(image: Path) -> None:
    ours, theirs = socket.socketpair()
    words = ["serve", "blk", f"--fd={theirs.fileno()}", f"--blk-file={image}", "--num-queues=2", "--processes"]
    environment = os.environ | {"PYTHONPATH": str(interpreters.SOURCE)}
    process = subprocess.Popen(
        [*COMMAND, *words], pass_fds=[theirs.fileno()], env=environment, stderr=subprocess.PIPE
    )
    theirs.close()
    with VhostUserDevice(FrontEnd(ours, "the socket pair"), queues=2, wanted=MQ) as device:
        works(device)
        pids = processes(process.pid)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, b"")
    assert len(pids) == 2 and not any(map(alive, pids))


def test_calls_of_other_processes_are_not_recorded(path: str, image: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    result = run(*disk(path, image), "--trace", str(trace))
    assert result.status == 2
    assert one_line(result.errors) == (
        f"--trace {trace}: it does not reach other processes (leave --processes away)"
    )
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["net", "console", "rng"])
def test_it_is_for_disks(path: str, kind: str) -> None:
    result = run("serve", kind, "--socket-path", path, "--processes")
    assert result.status == 2
    assert "unrecognized arguments: --processes" in one_line(result.errors)


def test_it_is_in_the_help_with_what_it_is_good_for() -> None:
    shown = run("serve", "--help").output
    assert "--processes" in shown and "small blocks on several busy queues" in " ".join(shown.split())
