"""A disk whose queues are processes: all that holds of threads holds of them, and they may die."""

import os
import random
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import pytest
from runtime.rigs import PATIENCE, eventually, nothing_left
from runtime.test_vhost_user_conversation import MENDINGS, DiskLoad, Load, Log, pages, spoil, storm
from runtime.vhost_user_rig import (
    FEATURES,
    LOG_ALL,
    MEMORY,
    FrontEnd,
    Ring,
    Served,
    region,
    table,
    u64,
    within,
)
from uring import uring_or_skip

from lguestlib.abi import vhost_user as abi
from lguestlib.abi import virtio_blk as blk
from lguestlib.abi.memfd import memfd
from lguestlib.memory.address import GuestAddress
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.vhost_user.process_rings import QueueProcesses
from lguestlib.runtime.vhost_user.queue_process import QueueOfDisk
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.split_driver import Buffer
from lguestlib.virtio.status import Status

STOP_SECONDS = 0.3
"""The longest that stopping anything may take: a few turns of several processes."""

END_SECONDS = 0.9
"""The longest that interpreters may take to end; after a second they would be killed."""

QUEUES = 3
SECTOR = 512


class ServedDisk(Served):
    """A disk of 1 MiB, with a process for each of its queues."""

    def __init__(self, folder: Path, transfers: bool = False) -> None:
        self.image = folder / "disk.img"
        self.image.write_bytes(bytes(1 << 20))
        self.disk = FileDisk.open(str(self.image))
        self.block = Block(self.disk, "block", QUEUES)

        def started(report: Callable[[str], None]) -> QueueProcesses:
            return QueueProcesses(
                [
                    (
                        QueueOfDisk(
                            "block", index, self.disk.fd, str(self.image), False, False, QUEUES, transfers, 0, 0
                        ),
                        f"block queue{index}",
                    )
                    for index in range(QUEUES)
                ],
                report,
            )

        super().__init__(self.block, folder, started)
        eventually(lambda: len(self.children) == QUEUES, "the processes' start")

    @property
    def children(self) -> list[int]:
        """The processes, in the order of their queues."""
        found = {}
        for pid in children():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if len(words) > 1 and str(self.image).encode() in words[-2]:
                found[words[-2].partition(b'"index": ')[2][:1]] = pid
        return [found[index] for index in sorted(found)]

    def serves(self, count: int) -> None:
        """Wait until so many queues have a thread: one that has been joined takes a moment to be gone."""
        eventually(lambda: len(self._queue_threads()) == count, f"{count} threads, not {self._queue_threads()}")

    def _queue_threads(self) -> list[str]:
        names = []
        for pid in self.children:
            for task in Path(f"/proc/{pid}/task").iterdir():
                if task.name != str(pid):
                    with suppress(OSError):
                        names.append((task / "comm").read_text().strip())
        return [name for name in names if name.startswith("block queue")]

    def mapped(self, name: str) -> list[int]:
        """How often each of them has that memfd mapped."""
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in self.children]
        return [text.count(f"memfd:{name} ") for text in maps]

    def close(self) -> None:
        self.disk.close()


def children() -> list[int]:
    """The processes that this one has started and not reaped."""
    pids = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            pids += [int(pid) for pid in (task / "children").read_text().split()]
    return pids


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, descriptor or thread is left, and no process has complained on its standard error."""
    # What it forgets to close it complains of.
    monkeypatch.setenv("PYTHONDEVMODE", "1")
    said = tmp_path / "standard error"
    before, errors = children(), os.dup(2)
    with said.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        with nothing_left():
            yield
        assert children() == before
    finally:
        os.dup2(errors, 2)
        os.close(errors)
    assert said.read_text() == ""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDisk]:
    made = ServedDisk(tmp_path)
    with made:
        yield made
    made.close()


@pytest.fixture
def front(served: ServedDisk) -> Iterator[FrontEnd]:
    with served.front() as made:
        yield made


def ask(ring: Ring, kind: int, sector: int, data: bytes = b"", room: int = 0, token: int = 0) -> None:
    """Make a request of the disk available, and kick."""
    memory = ring.front.memory
    head = ring.buffer(2 * token, 16)
    status, body = Buffer(GuestAddress(head.address + 64), 1), ring.buffer(2 * token + 1, len(data) or room)
    memory.write(head.address, struct.pack("<IIQ", kind, 0, sector))
    memory.write(status.address, b"\xff")
    if data:
        memory.write(body.address, data)
    ring.driver.add([head, body] if data else [head], [body, status] if room else [status], token)
    if ring.driver.kick_needed():
        ring.notify()


def status_of(ring: Ring, token: int = 0) -> int:
    return ring.front.memory.read(GuestAddress(ring.buffer(2 * token, 1).address + 64), 1)[0]


def written(ring: Ring, sector: int, data: bytes) -> int:
    ask(ring, blk.VIRTIO_BLK_T_OUT, sector, data)
    ring.collect(1)
    return status_of(ring)


def read(ring: Ring, sector: int, length: int = SECTOR) -> bytes:
    ask(ring, blk.VIRTIO_BLK_T_IN, sector, room=length)
    ring.collect(1)
    assert status_of(ring) == blk.VIRTIO_BLK_S_OK
    return ring.answer(0, length)



def works(front: FrontEnd) -> None:
    """The disk serves new rings on this connection."""
    front.forget_rings()
    front.set(abi.VHOST_USER_SET_FEATURES, u64(FEATURES))
    for index in range(QUEUES):
        ring = front.start(index)
        data = bytes([index, 7]) * 256
        assert written(ring, index, data) == blk.VIRTIO_BLK_S_OK
        assert read(ring, index) == data


def started(front: FrontEnd) -> list[Ring]:
    """All the rings, each of which has done something."""
    rings = [front.start(index) for index in range(QUEUES)]
    for ring in rings:
        assert read(ring, 100) == bytes(SECTOR)
    return rings


def test_each_queue_is_a_thread_of_a_process_of_its_own(served: ServedDisk, front: FrontEnd) -> None:
    works(front)
    assert served.image.read_bytes()[SECTOR : SECTOR + 4] == b"\1\7\1\7"
    assert len(served.children) == QUEUES
    assert served.threads() == [f"queue{index} process" for index in range(QUEUES)], "no queue is served here"
    for index, pid in enumerate(served.children):
        names = [(task / "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()]
        assert f"block queue{index}" in names and f"block queue{(index + 1) % QUEUES}" not in names


@pytest.mark.parametrize("transfers", [False, True])
def test_a_disk_holds_what_was_written_whatever_a_front_end_does_under_load(
    tmp_path: Path, transfers: bool
) -> None:
    if transfers:
        uring_or_skip()
    served = ServedDisk(tmp_path, transfers)
    with served, served.front() as front:
        loads: list[Load] = [DiskLoad(front.start(0), 16), DiskLoad(front.start(2), 4)]
        storm(served, front, loads, 7)
        assert all(load.finish() > 12 for load in loads)
    served.close()


def test_t9_a_ring_is_stopped_and_goes_on_under_load(served: ServedDisk, front: FrontEnd) -> None:
    loads = [DiskLoad(front.start(0), 16), DiskLoad(front.start(1), 16)]
    for turn in range(40):
        load = loads[turn % 2]
        load.reach(3)
        with load.lock:
            base = front.stop(load.ring)
            assert base == load.ring.used, "all that it has taken it has returned"
        served.serves(1)
        front.restart(load.ring, base)
    assert all(load.finish() > 60 for load in loads)


def test_reconnected_under_load_a_ring_loses_nothing(served: ServedDisk, front: FrontEnd) -> None:
    loads = [DiskLoad(front.start(0), 16), DiskLoad(front.start(1), 16)]
    before = served.children
    for _ in range(20):
        for load in loads:
            load.reach(2)
        front.disconnect()
        front.connect()
        # Served only when the conversation before has come to its end: all it has taken is returned.
        front.negotiate()
        for load in loads:
            front.tell(load.ring, load.ring.used)
    assert all(load.finish() for load in loads)
    assert served.children == before


def test_t12_the_memory_table_is_replaced_under_load_and_the_old_mapping_goes(
    served: ServedDisk, front: FrontEnd
) -> None:
    loads = [DiskLoad(front.start(0), 16), DiskLoad(front.start(1), 16)]
    for turn in range(20):
        for load in loads:
            load.reach(2)
        size = MEMORY - 4096 * (turn % 3)
        front.set(abi.VHOST_USER_SET_MEM_TABLE, table(region(size=size)), [front.memory_fd])
        assert served.mapped("front-end") == [1] * QUEUES
    assert all(load.finish() for load in loads)
    front.disconnect()
    eventually(lambda: served.mapped("front-end") == [0] * QUEUES, "the end of their mappings")


def test_t12_a_region_is_added_and_removed_again(served: ServedDisk, front: FrontEnd) -> None:
    rings = started(front)
    extra = memfd("extra", 0x10000)
    told = table(region(0x9000_0000, 0x10000, 0x6000_0000_0000))
    front.set(abi.VHOST_USER_ADD_MEM_REG, told, [extra])
    assert served.mapped("extra") == [1] * QUEUES
    front.set(abi.VHOST_USER_REM_MEM_REG, told)
    assert served.mapped("extra") == [0] * QUEUES
    assert all(read(ring, 0) == bytes(SECTOR) for ring in rings)
    os.close(extra)


def test_t12_memory_without_the_rings_fails_the_device_with_one_line(
    served: ServedDisk, front: FrontEnd
) -> None:
    started(front)
    front.set(abi.VHOST_USER_SET_MEM_TABLE, table(region(0, MEMORY, 0)), [front.memory_fd])
    assert "no memory region holds the front-end's address" in served.report()
    assert front.status() & Status.NEEDS_RESET
    served.serves(0)
    front.set(abi.VHOST_USER_RESET_DEVICE)
    front.share()
    works(front)


def test_memory_that_cannot_be_mapped_is_refused_and_the_old_one_stays(
    served: ServedDisk, front: FrontEnd
) -> None:
    rings = started(front)
    short = memfd("short", 0x1000)
    assert front.try_set(abi.VHOST_USER_SET_MEM_TABLE, table(region()), [short]) == 1
    assert all(read(ring, 0) == bytes(SECTOR) for ring in rings)
    front.send(abi.VHOST_USER_SET_MEM_TABLE, table(region()), [short])
    assert front.closed()
    assert served.report() == (
        "block: the front-end is cut off: SET_MEM_TABLE:"
        " memory region: 0x400000 bytes at offset 0x0 of a file of 0x1000"
    )
    os.close(short)


def test_t16_pages_are_logged_by_every_process(served: ServedDisk, front: FrontEnd) -> None:
    rings = started(front)
    log = Log()
    log.share(front)
    assert log.take() == set()
    front.set(abi.VHOST_USER_SET_FEATURES, u64(FEATURES | LOG_ALL))
    for ring in rings:
        front.set_address(ring, 1, ring.layout.used)
        log.take()
        assert read(ring, 0) == bytes(SECTOR)
        buffers = pages(ring.buffer(0, 1).address, 128) | pages(ring.buffer(1, 1).address, SECTOR)
        assert log.take() == buffers | pages(ring.layout.used, 4)
    os.close(log.fd)
    short = memfd("short", 16)
    front.send(abi.VHOST_USER_SET_LOG_BASE, u64(17) + u64(0), [short])
    assert front.closed()
    assert served.report() == (
        "block: the front-end is cut off: SET_LOG_BASE: dirty log: 0x11 bytes at offset 0x0 of a file of 0x10"
    )
    os.close(short)


# Resets and failures.


def test_a_reset_under_load_is_prompt_and_a_new_beginning(served: ServedDisk, front: FrontEnd) -> None:
    for turn in range(6):
        rings = [front.start(index) for index in range(QUEUES)]
        for ring in rings:
            for token in range(16):
                ask(ring, blk.VIRTIO_BLK_T_IN, token, room=SECTOR, token=token)
        within(STOP_SECONDS, lambda: list(MENDINGS.values())[1 + turn % 2](front))
        used = [ring.used for ring in rings]
        served.serves(0)
        assert [ring.used for ring in rings] == used, "nothing comes after a reset (T3)"
        front.forget_rings()
        front.set(abi.VHOST_USER_SET_FEATURES, u64(front.features))
    works(front)


@pytest.mark.parametrize("mending", [*MENDINGS, "another connection"])
def test_a_malformed_chain_stops_all_the_processes_with_one_line_and_signals_the_error(
    served: ServedDisk, front: FrontEnd, mending: str
) -> None:
    rings = started(front)
    front.set(abi.VHOST_USER_SET_STATUS, u64(15))
    spoil(rings[1])
    line = served.report()
    assert line.startswith("block queue1: queue 1: outside guest memory (head ")
    assert line.endswith("; the device has stopped until it is reset")
    served.serves(0)
    assert select.select([rings[1].error], [], [], PATIENCE)[0]
    assert os.eventfd_read(rings[1].error) == 1
    assert not select.select([rings[0].error, rings[2].error], [], [], 0)[0]
    assert front.status() == 15 | Status.NEEDS_RESET
    # Nothing but a reset helps; the connection is as good as ever.
    rings[0].notify()
    front.set_kick(rings[0])
    front.set_call(rings[0])
    front.enable(rings[0])
    front.share()
    served.serves(0)
    if mending == "another connection":
        front.disconnect()
        front.forget_rings()
        front.connect()
        front.negotiate()
    elif mending == "a stop of all rings":
        assert front.stop(rings[0]) == rings[0].used
        front.restart(rings[0], rings[0].used)
        served.serves(0)
        for ring, base in zip(rings, (1, 2, 1)):
            assert front.status() & Status.NEEDS_RESET
            # What was malformed has been gone past.
            assert front.stop(ring) == base
        assert front.status() == 15
    else:
        MENDINGS[mending](front)
        assert front.status() == 0
    works(front)


def test_rings_that_break_at_the_same_time_are_one_failure(served: ServedDisk, front: FrontEnd) -> None:
    for _ in range(20):
        rings = [front.start(index) for index in range(QUEUES)]
        for ring in rings:
            spoil(ring)
        eventually(lambda: bool(served.reports), "a report")
        for ring in rings:
            front.stop(ring)
        assert "outside guest memory" in served.report()
        assert not front.status() & Status.NEEDS_RESET
        front.forget_rings()


def test_a_failure_and_a_reset_at_the_same_time_are_a_device_that_works(
    served: ServedDisk, front: FrontEnd
) -> None:
    for _ in range(20):
        ring = front.start(1)
        spoil(ring)
        front.set(abi.VHOST_USER_RESET_DEVICE)
        # It may have failed before the reset, and no other way.
        works(front)
        front.set(abi.VHOST_USER_RESET_DEVICE)
        front.forget_rings()
        front.set(abi.VHOST_USER_SET_FEATURES, u64(FEATURES))
        assert len(served.reports) <= 1 and not front.status() & Status.NEEDS_RESET
        served.reports.clear()


# Processes that die.


def test_a_process_that_is_killed_ends_the_connection_with_one_line_and_the_next_has_another(
    served: ServedDisk,
) -> None:
    for index in (0, 2):
        with served.front() as front:
            works(front)
            before = served.children
            os.kill(before[index], signal.SIGKILL)
            assert front.closed()
            assert served.report() == (
                f"block queue{index}: its process has ended (signal 9); the next front-end gets another"
            )
            assert before[index] not in children(), "it is reaped"
        with served.front() as front:
            works(front)
            now = served.children
            kept = [old == new for old, new in zip(before, now)]
            assert kept == [number != index for number in range(QUEUES)]


def test_a_process_that_is_killed_while_nobody_is_there_is_replaced(served: ServedDisk) -> None:
    before = served.children
    os.kill(before[1], signal.SIGKILL)
    assert "block queue1: its process has ended (signal 9)" in served.report()
    assert before[1] not in children()
    with served.front() as front:
        works(front)


def test_a_process_that_is_killed_and_a_request_at_the_same_time(served: ServedDisk) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    for _ in range(12):
        with served.front() as front:
            started(front)
            pid = chance.choice(served.children)
            killing = threading.Timer(chance.random() / 200, os.kill, (pid, signal.SIGKILL))
            killing.start()
            with suppress(EOFError, ConnectionError):
                while True:
                    front.stop(front.rings[0])
                    front.restart(front.rings[0], front.rings[0].used)
                    front.share()
            killing.join()
        eventually(lambda: bool(served.reports), "a report")
        assert "(signal 9)" in served.report(), seed
    with served.front() as front:
        works(front)


def test_t17_a_process_killed_under_load_again_and_again_loses_no_request_and_returns_none_twice(
    served: ServedDisk,
) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    front = served.front()
    shape, (record,) = front.get_fds(
        abi.VHOST_USER_GET_INFLIGHT_FD, struct.pack("=QQHHI", 0, 0, QUEUES, 64, 0)
    )
    front.set(abi.VHOST_USER_SET_INFLIGHT_FD, shape, [record])
    loads = [DiskLoad(front.start(index), 16) for index in range(QUEUES)]
    for _ in range(12):
        for load in loads:
            load.reach(chance.randrange(1, 20))
        os.kill(chance.choice(served.children), signal.SIGKILL)
        while True:
            try:
                front.settled()
            except (EOFError, ConnectionError):
                break
        eventually(lambda: bool(served.reports), "a report")
        assert "(signal 9)" in served.report(), seed
        front.disconnect()
        front.connect()
        front.negotiate()
        front.set(abi.VHOST_USER_SET_INFLIGHT_FD, shape, [record])
        for load in loads:
            # What the front-end says is of no account: the record tells.
            front.tell(load.ring, load.ring.available)
    for load in loads:
        assert load.finish() > 12, seed
    front.close()
    os.close(record)


def test_t17_a_reset_begins_the_record_anew(served: ServedDisk, front: FrontEnd) -> None:
    shape, (record,) = front.get_fds(
        abi.VHOST_USER_GET_INFLIGHT_FD, struct.pack("=QQHHI", 0, 0, QUEUES, 64, 0)
    )
    front.set(abi.VHOST_USER_SET_INFLIGHT_FD, shape, [record])
    started(front)
    size = os.fstat(record).st_size
    assert any(os.pread(record, size, 0))
    front.set(abi.VHOST_USER_RESET_DEVICE)
    assert not any(os.pread(record, size, 0))
    works(front)
    os.close(record)


# What is asked of the processes beside.


def test_the_counters_are_those_of_the_processes_also_of_those_that_have_died(
    served: ServedDisk, front: FrontEnd
) -> None:
    assert served.processes
    counters = served.server.counters
    rings = started(front)
    for _ in range(5):
        read(rings[1], 0)

    def chains() -> list[int]:
        assert served.processes
        served.processes.count(counters)
        return [each.chains for each in counters]

    # They are counted when they have been returned.
    eventually(lambda: chains() == [1, 6, 1], "the counters")
    assert counters[1].bytes == 6 * (16 + SECTOR + 1)
    assert counters[1].kicks >= counters[1].wakeups > 0 and counters[1].interrupts > 0
    told = [astuple(each) for each in counters]
    served.processes.count(counters)
    assert [astuple(each) for each in counters] == told
    os.kill(served.children[1], signal.SIGKILL)
    assert front.closed() and served.report()
    assert chains() == [1, 6, 1]
    front.disconnect()
    front.forget_rings()
    front.connect()
    front.negotiate()
    started(front)
    eventually(lambda: chains() == [2, 7, 2], "the counters, of a new process too")


def test_a_disk_that_has_grown_is_so_in_every_process_before_its_driver_is_told(
    served: ServedDisk, front: FrontEnd
) -> None:
    assert served.processes
    rings = started(front)
    end = (1 << 20) // SECTOR
    os.truncate(served.image, 2 << 20)
    assert written(rings[0], end, bytes(SECTOR)) == blk.VIRTIO_BLK_S_IOERR
    served.processes.resized()
    for ring in rings:
        assert written(ring, end + ring.index, b"end!" * 128) == blk.VIRTIO_BLK_S_OK
        assert read(ring, end + ring.index) == b"end!" * 128


# The end.


def idle(front: FrontEnd) -> None:
    """Nothing but a connection."""


def disconnected(front: FrontEnd) -> None:
    front.disconnect()


def inside_a_header(front: FrontEnd) -> None:
    front.send_bytes(b"\1\0")


def asleep(front: FrontEnd) -> None:
    started(front)


def busy(front: FrontEnd) -> None:
    for ring in [front.start(index) for index in range(QUEUES)]:
        for token in range(16):
            ask(ring, blk.VIRTIO_BLK_T_IN, token, room=SECTOR, token=token)


STATES = [idle, disconnected, inside_a_header, asleep, busy]


@pytest.mark.parametrize("state_", STATES, ids=lambda state: state.__name__)
def test_a_server_and_its_processes_stop_promptly_whatever_they_do(
    served: ServedDisk, state_: Callable[[FrontEnd], None]
) -> None:
    assert served.processes
    with served.front() as front:
        works(front)
        front.forget_rings()
        front.set(abi.VHOST_USER_RESET_DEVICE)
        front.set(abi.VHOST_USER_SET_FEATURES, u64(FEATURES))
        state_(front)
        within(STOP_SECONDS, served.server.stop)
        assert served.mapped("front-end") == [0] * QUEUES
        within(END_SECONDS, served.processes.close)
        assert served.children == []


def test_processes_that_have_only_just_been_started_are_stopped(tmp_path: Path) -> None:
    served = ServedDisk(tmp_path)
    with served:
        assert len(children()) == QUEUES
    served.close()


def test_a_process_that_does_not_answer_any_more_is_killed_in_the_end(tmp_path: Path) -> None:
    served = ServedDisk(tmp_path)
    with served:
        with served.front() as front:
            works(front)
        served.rest()
        os.kill(served.children[0], signal.SIGSTOP)
    served.close()


def test_signals_of_the_terminal_are_left_to_the_parent(served: ServedDisk, front: FrontEnd) -> None:
    rings = started(front)
    before = served.children
    for pid in before:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
            os.kill(pid, number)
    time.sleep(0.02)
    assert all(read(ring, 100) == bytes(SECTOR) for ring in rings)
    assert served.children == before


def test_a_disk_that_cannot_be_opened_again_is_told_of(served: ServedDisk) -> None:
    with served.front() as front:
        works(front)
    os.kill(served.children[0], signal.SIGKILL)
    assert "(signal 9)" in served.report()
    os.truncate(served.image, 0)
    with FrontEnd(served.path) as front:
        front.send(abi.VHOST_USER_GET_FEATURES)
        assert front.closed()
    eventually(lambda: len(served.reports) == 2, "two lines")
    first, second = served.reports
    assert first.startswith(f"block: {served.image}: shorter than one sector")
    assert second == "block queue0: its process has ended (exit status 1); the next front-end gets another"
    served.reports.clear()
