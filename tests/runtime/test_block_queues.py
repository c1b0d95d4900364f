"""A disk at work: its queues' threads side by side, a full or broken disk, one that changes its size."""

import errno
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import sessions
from runtime.rigs import PATIENCE, eventually, nothing_left

from lguestlib.abi import virtio_blk as blk
from lguestlib.abi.sched import unshare
from lguestlib.abi.virtio_mmio import VIRTIO_MMIO_INT_CONFIG
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.mmio_runner import MmioDeviceRunner
from lguestlib.virtio.device import RING_FEATURES
from lguestlib.virtio.devices.block import SECTOR, Block, BlockBackend
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.mmio_driver import MmioDriver
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue

IN, OUT, FLUSH, DISCARD = (
    blk.VIRTIO_BLK_T_IN, blk.VIRTIO_BLK_T_OUT, blk.VIRTIO_BLK_T_FLUSH, blk.VIRTIO_BLK_T_DISCARD,
)  # fmt: skip
CLONE_NEWNS = 0x2_0000
"""linux/sched.h"""

OK, IOERR = blk.VIRTIO_BLK_S_OK, blk.VIRTIO_BLK_S_IOERR

SLOT = 0x2_0000
"""Guest memory of one request: header, status, data."""


class Guest:
    """The driver of a disk, one request at a time in each queue."""

    def __init__(self, disk: BlockBackend, queues: int = 1) -> None:
        self.device = Block(disk, "disk", queues)
        self.memory = GuestMemory.anonymous(16 << 20)
        self.reports: list[str] = []
        self.runner = MmioDeviceRunner(self.device, self.memory, self.reports.append)
        self.driver = MmioDriver(self.runner)
        features = self.driver.negotiate(int(RING_FEATURES) | self.device.features)
        self.rings: list[SplitDriverQueue[int]] = []
        for index in range(queues):
            layout = QueueLayout.contiguous(index, 16, GuestAddress(0x1000 * (index + 1)))
            self.rings.append(SplitDriverQueue(layout, self.memory, features))
            self.driver.enable_queue(layout)
        self.driver.ready()

    def ask(
        self, kind: int, sector: int = 0, payload: bytes = b"", room: int = 0, queue: int = 0
    ) -> tuple[int, bytes]:
        """The status of a request, and the data that came, *room* bytes of it."""
        at = 0x10_0000 + SLOT * queue
        header, status = Buffer(GuestAddress(at), 16), Buffer(GuestAddress(at + 16), 1)
        data = Buffer(GuestAddress(at + 0x1000), len(payload) or room)
        self.memory.write(header.address, bytes(blk.virtio_blk_outhdr(type=kind, sector=sector)) + b"\xff")
        self.memory.write(data.address, payload)
        ring = self.rings[queue]
        ring.add([header, data] if payload else [header], [data, status] if room else [status], 1)
        if ring.kick_needed():
            self.runner.kicks[queue].signal()
        eventually(lambda: len(ring.reap()) == 1, "the answer")
        return self.memory.read(status.address, 1)[0], self.memory.read(data.address, room)

    @property
    def capacity(self) -> int:
        """Bytes, as the driver sees it."""
        return int.from_bytes(self.driver.config(0, 8), "little") * SECTOR

    def close(self) -> None:
        for ring in self.rings:
            ring.release()
        self.runner.close()
        self.memory.close()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def start() -> Iterator[Callable[[BlockBackend, int], Guest]]:
    """Makes guests, and ends them."""
    guests: list[Guest] = []

    def make(disk: BlockBackend, queues: int = 1) -> Guest:
        guests.append(Guest(disk, queues))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


Start = Callable[[BlockBackend, int], Guest]


def in_parallel(work: Callable[[int], None], count: int) -> None:
    """Run *work* with each number below *count* on a thread of its own."""
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_requests_in_several_queues_are_served_at_the_same_time(start: Start) -> None:
    together = threading.Barrier(4)

    class Meeting(FileDisk):
        def read(self, buffers: Sequence[memoryview], offset: int) -> int:
            together.wait(PATIENCE)
            return super().read(buffers, offset)

    disk = Meeting.scratch(1 << 20)
    guest = start(disk, 4)

    def work(queue: int) -> None:
        for _ in range(20):
            assert guest.ask(IN, queue, room=SECTOR, queue=queue) == (OK, bytes(SECTOR))

    in_parallel(work, 4)
    assert guest.reports == []
    disk.close()


def test_queues_do_not_disturb_each_other(start: Start) -> None:
    queues, share = 4, 64
    disk = FileDisk.scratch(queues * share * SECTOR)
    guest = start(disk, queues)

    def work(queue: int) -> None:
        seed = 70 + queue
        turn = random.Random(seed)
        expected = bytearray(share * SECTOR)
        for _ in range(150):
            sector, count = turn.randrange(share - 8), turn.randrange(1, 9)
            place = slice(sector * SECTOR, (sector + count) * SECTOR)
            first = queue * share + sector
            if turn.randrange(2):
                expected[place] = data = turn.randbytes(count * SECTOR)
                assert guest.ask(OUT, first, data, queue=queue)[0] == OK, seed
            else:
                answer = guest.ask(IN, first, room=count * SECTOR, queue=queue)
                assert answer == (OK, bytes(expected[place])), seed
            if not turn.randrange(20):
                assert guest.ask(FLUSH, queue=queue)[0] == OK, seed
                assert guest.ask(IN, queues * share, room=SECTOR, queue=queue)[0] == IOERR, seed

    in_parallel(work, queues)
    assert guest.reports == [] and disk.size == queues * share * SECTOR
    disk.close()


def test_a_ring_that_is_broken_stops_all_queues_and_a_reset_mends_them(start: Start) -> None:
    disk = FileDisk.scratch(1 << 20)
    guest = start(disk, 3)
    assert guest.ask(FLUSH, queue=2)[0] == OK
    guest.memory.write(GuestAddress(guest.rings[1].layout.available + 2), b"\xff\x7f")
    guest.runner.kicks[1].signal()
    eventually(lambda: bool(guest.reports), "the report")
    assert guest.reports[0].startswith("disk queue1: queue 1: avail index runs ahead")
    guest.driver.reset()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("disk ")]
    disk.close()


def on_a_small_file_system(path: Path) -> FileDisk:
    """A sparse disk of 1 MiB where there is room for 64 KiB."""
    sessions.root_or_skip()
    disks: list[FileDisk] = []
    refused: list[str] = []

    def make() -> None:
        # The mount is this thread's, and lasts as long as the file is open.
        unshare(CLONE_NEWNS)
        for command in (
            ["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(path)],
        ):  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                refused.append(done.stderr)
                return
        file = path / "image"
        file.write_bytes(b"")
        os.truncate(file, 1 << 20)
        disks.append(FileDisk.open(str(file)))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if refused:
        pytest.skip(f"no file system may be mounted here (run as root, outside a container): {refused[0]}")
    return disks[0]


def test_t24_a_full_file_system_is_an_error_of_the_request_and_of_nothing_else(
    start: Start, tmp_path: Path
) -> None:
    disk = on_a_small_file_system(tmp_path)
    guest = start(disk, 2)
    page = bytes([7]) * 4096
    statuses = [guest.ask(OUT, 8 * number, page)[0] for number in range(20)]
    written = statuses.index(IOERR)
    assert 10 <= written <= 16 and set(statuses[written:]) == {IOERR}
    for queue in (0, 1):
        assert guest.ask(IN, 0, room=4096, queue=queue) == (OK, page)
        assert guest.ask(IN, 8 * written, room=4096, queue=queue) == (OK, bytes(4096))
        assert guest.ask(FLUSH, queue=queue)[0] == OK
    # Room for a page is made, and taken.
    segment = blk.virtio_blk_discard_write_zeroes(sector=0, num_sectors=8)
    assert guest.ask(DISCARD, 0, bytes(segment))[0] == OK
    assert guest.ask(OUT, 8 * written, page, queue=1)[0] == OK
    assert guest.ask(OUT, 8 * written + 8, page, queue=1)[0] == IOERR
    assert guest.reports == [] and disk.size == 1 << 20
    disk.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ENOMEM])
def test_t24_a_part_of_the_disk_that_fails_is_an_error_of_its_requests_and_of_nothing_else(
    start: Start, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(name: str) -> Callable[[int, Sequence[memoryview], int], int]:
        call: Callable[[int, Sequence[memoryview], int], int] = getattr(os, name)

        def made(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if offset == 8 * SECTOR:
                raise OSError(number, os.strerror(number))
            return call(fd, buffers, offset)

        return made

    for name in ("preadv", "pwritev"):
        monkeypatch.setattr(os, name, failing(name))
    disk = FileDisk.scratch(1 << 20)
    guest = start(disk, 2)
    for turn in range(5):
        queue = turn % 2
        assert guest.ask(IN, 8, room=SECTOR, queue=queue)[0] == IOERR
        assert guest.ask(OUT, 8, bytes(SECTOR), queue=queue)[0] == IOERR
        assert guest.ask(OUT, 9, bytes([turn]) * SECTOR, queue=queue)[0] == OK
        assert guest.ask(IN, 9, room=SECTOR, queue=1 - queue) == (OK, bytes([turn]) * SECTOR)
    assert guest.reports == []
    disk.close()


def test_t24_a_file_cut_short_behind_our_back_is_an_error_past_its_end(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes([5]) * 16 * SECTOR)
    disk = FileDisk.open(str(path))
    guest = start(disk, 1)
    os.truncate(path, 4 * SECTOR)
    assert guest.ask(IN, 2, room=2 * SECTOR) == (OK, bytes([5]) * 2 * SECTOR)
    for sector in (3, 4, 14):
        assert guest.ask(IN, sector, room=2 * SECTOR)[0] == IOERR
    assert guest.ask(FLUSH)[0] == OK and guest.reports == []
    disk.close()


def test_a_file_that_grows_or_shrinks_is_told_to_the_driver_and_used_as_it_is(
    start: Start, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4 * SECTOR))
    disk = FileDisk.open(str(path))
    guest = start(disk, 2)
    assert guest.capacity == 4 * SECTOR
    guest.device.resized()
    assert not guest.driver.take_interrupt() & VIRTIO_MMIO_INT_CONFIG, "nothing has changed"
    for sectors in (100, 7, 50):
        os.truncate(path, sectors * SECTOR + 100)
        guest.device.resized()
        assert guest.driver.take_interrupt() & VIRTIO_MMIO_INT_CONFIG
        assert guest.capacity == sectors * SECTOR == disk.size
        for queue in (0, 1):
            assert guest.ask(OUT, sectors - 1, bytes([9]) * SECTOR, queue=queue)[0] == OK
            assert guest.ask(OUT, sectors, bytes(SECTOR), queue=queue)[0] == IOERR
            assert guest.ask(IN, sectors - 1, room=SECTOR, queue=queue) == (OK, bytes([9]) * SECTOR)
        assert path.stat().st_size == sectors * SECTOR + 100
    disk.close()


def test_a_file_that_changes_its_size_while_requests_are_under_way(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(64 * SECTOR))
    disk = FileDisk.open(str(path))
    guest = start(disk, 2)
    done = threading.Event()

    def work(queue: int) -> None:
        if queue == 2:
            for turn in range(200):
                os.truncate(path, (64 + turn % 2) * SECTOR)
                guest.device.resized()
            done.set()
            return
        while not done.is_set():
            assert guest.ask(IN, 0, room=8 * SECTOR, queue=queue) == (OK, bytes(8 * SECTOR))
            assert guest.ask(IN, 64, room=SECTOR, queue=queue)[0] in (OK, IOERR)
            assert guest.ask(IN, 65, room=SECTOR, queue=queue)[0] == IOERR

    in_parallel(work, 3)
    assert guest.reports == []
    disk.close()
