"""`serve blk --aio io_uring --direct`: a disk with many requests in hand, for the driver the same disk."""

import errno
import os
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from runtime.rigs import PATIENCE, eventually
from runtime.vhost_user_rig import MEMORY, FrontEnd, Ring, region, table, u64
from sessions import Session, one_line, run
from uring import uring_or_skip

from lguestlib.abi import vhost_user as abi
from lguestlib.abi import virtio_blk as blk

SECTOR = 512
DEPTH = 16
SECTORS = 128


@pytest.fixture(autouse=True)
def needed() -> None:
    uring_or_skip()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "disk.sock")


@contextmanager
def serving(path: str, image: Path, *words: str) -> Iterator[Session]:
    with Session("serve", "blk", "--socket-path", path, "--blk-file", str(image), *words) as session:
        session.expect("listening on", messages=True)
        yield session
        session.signal(signal.SIGTERM)
        assert session.end().status == 0


def has_direct(image: Path) -> bool:
    """Whether the file system of *image* has O_DIRECT."""
    try:
        os.close(os.open(image, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


@pytest.fixture
def slow(image: Path) -> tuple[str, ...]:
    """What has requests take their time, where that can be had."""
    return ("--aio=io_uring", *(("--direct",) if has_direct(image) else ()))


class Disk:
    """A driver with as many requests in flight as it likes, each with buffers of its own."""

    def __init__(self, front: FrontEnd, ring: Ring) -> None:
        self.front = front
        self.ring = ring

    def ask(self, number: int, kind: int, sector: int, data: bytes = b"", room: int = 0) -> None:
        head, body, status = (self.ring.buffer(3 * number + part, 16) for part in range(3))
        self.front.memory.write(head.address, struct.pack("<IIQ", kind, 0, sector))
        self.front.memory.write(status.address, b"\xee")
        if data:
            self.front.memory.write(body.address, data)
        readable = [head, body._replace(length=len(data))] if data else [head]
        writable = [body._replace(length=room)] if room else []
        self.ring.driver.add(readable, [*writable, status._replace(length=1)], number)
        if self.ring.driver.kick_needed():
            self.ring.notify()

    def status(self, number: int) -> int:
        return self.front.memory.read(self.ring.buffer(3 * number + 2, 1).address, 1)[0]

    def data(self, number: int) -> bytes:
        return self.front.memory.read(self.ring.buffer(3 * number + 1, SECTOR).address, SECTOR)

    def done(self, number: int) -> int:
        """The status of the only request there is."""
        [(token, _)] = self.ring.collect(1)
        assert token == number
        return self.status(number)


@pytest.mark.parametrize("words", [(), ("--direct",), ("--direct", "--aio=sync"), ("--num-queues", "2")])
def test_a_disk_is_written_flushed_and_read(path: str, image: Path, words: tuple[str, ...]) -> None:
    if "--direct" in words and not has_direct(image):
        pytest.skip("this file system has no O_DIRECT (TMPDIR=/var/tmp sh tests/run uses one that does)")
    with serving(path, image, "--aio", "io_uring", *words), FrontEnd(path) as front:
        front.negotiate()
        disk = Disk(front, front.start())
        for number in range(DEPTH):
            disk.ask(number, blk.VIRTIO_BLK_T_OUT, 5 + number, bytes([number]) * SECTOR)
        assert len(disk.ring.collect(DEPTH)) == DEPTH
        assert {disk.status(number) for number in range(DEPTH)} == {blk.VIRTIO_BLK_S_OK}
        disk.ask(0, blk.VIRTIO_BLK_T_FLUSH, 0)
        assert disk.done(0) == blk.VIRTIO_BLK_S_OK
        for number in range(DEPTH):
            disk.ask(number, blk.VIRTIO_BLK_T_IN, 5 + number, room=SECTOR)
        assert len(disk.ring.collect(DEPTH)) == DEPTH
        assert [disk.data(number)[0] for number in range(DEPTH)] == list(range(DEPTH))
    assert image.read_bytes()[5 * SECTOR : 7 * SECTOR] == bytes(SECTOR) + b"\1" * SECTOR


def test_a_read_only_disk_refuses_writing(path: str, image: Path) -> None:
    with serving(path, image, "--aio", "io_uring", "--read-only"), FrontEnd(path) as front:
        front.negotiate()
        disk = Disk(front, front.start())
        disk.ask(0, blk.VIRTIO_BLK_T_OUT, 0, bytes(SECTOR))
        assert disk.done(0) == blk.VIRTIO_BLK_S_IOERR
        disk.ask(0, blk.VIRTIO_BLK_T_IN, 0, room=SECTOR)
        assert disk.done(0) == blk.VIRTIO_BLK_S_OK


def test_front_ends_come_and_go_and_leave_nothing(path: str, image: Path, slow: tuple[str, ...]) -> None:
    with serving(path, image, *slow) as session:

        def visit() -> None:
            with FrontEnd(path) as front:
                front.negotiate()
                disk = Disk(front, front.start())
                for number in range(DEPTH):
                    disk.ask(number, blk.VIRTIO_BLK_T_IN, number, room=SECTOR)

        def held() -> tuple[int, int, int]:
            proc = Path(f"/proc/{session.pid}")
            maps = (proc / "maps").read_text()
            return len(os.listdir(proc / "fd")), len(os.listdir(proc / "task")), maps.count("io_uring")

        # Ahead of the first: what a visitor had is let go of a little after it has left.
        before = held()
        assert before[1:] == (2, 0)
        for _ in range(41):
            visit()
        eventually(lambda: held() == before, f"as many descriptors, threads and mappings as before: {before}")


def test_t12_the_memory_is_exchanged_with_requests_in_flight(
    path: str, image: Path, slow: tuple[str, ...]
) -> None:
    with serving(path, image, *slow) as session, FrontEnd(path) as front:
        front.negotiate()
        disk = Disk(front, front.start())
        for turn in range(20):
            for number in range(DEPTH):
                disk.ask(number, blk.VIRTIO_BLK_T_IN, number, room=SECTOR)
            size = MEMORY - 4096 * (1 + turn % 3)
            front.set(abi.VHOST_USER_SET_MEM_TABLE, table(region(size=size)), [front.memory_fd])
            maps = Path(f"/proc/{session.pid}/maps").read_text()
            assert maps.count("memfd:front-end") == 1, "the one before is gone"
            assert len(disk.ring.collect(DEPTH)) == DEPTH
            assert {disk.status(number) for number in range(DEPTH)} == {blk.VIRTIO_BLK_S_OK}


def test_t9_a_ring_is_stopped_and_goes_on_under_load(path: str, image: Path, slow: tuple[str, ...]) -> None:
    with serving(path, image, *slow), FrontEnd(path) as front:
        front.negotiate()
        disk = Disk(front, front.start())
        taken = 0
        for _ in range(20):
            for number in range(DEPTH):
                disk.ask(number, blk.VIRTIO_BLK_T_IN, number, room=SECTOR)
            base = front.stop(disk.ring)
            returned = len(disk.ring.driver.reap())
            assert base == taken + returned, "what was begun is returned, and nothing else"
            front.restart(disk.ring, base)
            if returned < DEPTH:
                assert len(disk.ring.collect(DEPTH - returned)) == DEPTH - returned
            taken += DEPTH


def test_a_reset_with_requests_in_flight_is_a_new_beginning(
    path: str, image: Path, slow: tuple[str, ...]
) -> None:
    with serving(path, image, *slow), FrontEnd(path) as front:
        front.negotiate()
        for _ in range(5):
            disk = Disk(front, front.start())
            for number in range(DEPTH):
                disk.ask(number, blk.VIRTIO_BLK_T_IN, number, room=SECTOR)
            front.set(abi.VHOST_USER_RESET_DEVICE)
            used = disk.ring.used
            time.sleep(0.005)
            assert disk.ring.used == used, "nothing comes after a reset (T3)"
            front.forget_rings()
            front.set(abi.VHOST_USER_SET_FEATURES, u64(front.features))


def test_t17_a_back_end_killed_with_requests_in_flight_loses_none(
    path: str, image: Path, slow: tuple[str, ...]
) -> None:
    seed = 3
    chance = Random(seed)
    expected = bytearray(image.read_bytes())
    with FrontEndLater(path) as front:
        ring: Ring | None = None
        record = -1
        made = b""
        asked = returned = 0
        flying: dict[int, int] = {}
        for life in range(8):
            last = life == 7
            words = (f"--socket-path={path}", f"--blk-file={image}", *slow)
            with Session("serve", "blk", *words) as session:
                session.expect("listening on", messages=True)
                front.connect()
                front.negotiate()
                if record < 0:
                    made, (record,) = front.get_fds(
                        abi.VHOST_USER_GET_INFLIGHT_FD, struct.pack("=QQHHI", 0, 0, 1, 64, 0)
                    )
                front.set(abi.VHOST_USER_SET_INFLIGHT_FD, made, [record])
                ring = ring or front.ring()
                front.tell(ring)
                disk = Disk(front, ring)
                deadline = time.monotonic() + (PATIENCE if last else chance.uniform(0.0, 0.05))
                while time.monotonic() < deadline and not (last and asked >= 3000 and not flying):
                    for number in range(DEPTH):
                        if number not in flying and not (last and asked >= 3000):
                            sector = DEPTH * chance.randrange(SECTORS // DEPTH) + number
                            data = chance.randbytes(SECTOR)
                            expected[SECTOR * sector : SECTOR * (sector + 1)] = data
                            flying[number] = asked
                            asked += 1
                            disk.ask(number, blk.VIRTIO_BLK_T_OUT, sector, data)
                    for number, _ in ring.driver.reap():
                        assert disk.status(number) == blk.VIRTIO_BLK_S_OK, (seed, life)
                        del flying[number]
                        returned += 1
                if not last:
                    session.signal(signal.SIGKILL)
                    session.process.wait(PATIENCE)
                    front.disconnect()
                else:
                    assert not flying, (seed, len(flying))
                    session.signal(signal.SIGTERM)
                    assert session.end().status == 0
        os.close(record)
    assert asked == returned >= 3000
    assert image.read_bytes() == expected, seed


class FrontEndLater(FrontEnd):
    """One whose back-end is not there yet."""

    def connect(self) -> None:
        if os.path.exists(self.path):
            super().connect()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--aio", "threads"), "argument --aio: invalid choice: 'threads'"),
        (("--aio",), "argument --aio: expected one argument"),
    ],
)
def test_there_are_two_ways(path: str, image: Path, words: tuple[str, ...], complaint: str) -> None:
    result = run("serve", "blk", "--socket-path", path, "--blk-file", str(image), *words)
    assert result.status == 2
    assert complaint in one_line(result.errors)


def test_a_file_system_without_direct_access_is_told_of(path: str) -> None:
    words = ("--socket-path", path, "--blk-file", "/proc/self/environ", "--read-only", "--direct")
    result = run("serve", "blk", *words)
    assert result.status == 1
    assert "its file system has no O_DIRECT: leave --direct away" in one_line(result.errors)


def test_it_is_in_the_help() -> None:
    shown = run("serve", "--help").output
    assert "--aio sync|io_uring" in shown and "--direct" in shown
