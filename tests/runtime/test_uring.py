"""An io_uring: what it is asked is done, in whatever order, and every answer comes once."""

import ctypes
import errno
import mmap
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runtime.rigs import PATIENCE, eventually, nothing_left
from uring import uring_or_skip

from lguestlib.abi import io_uring as abi
from lguestlib.abi.libc import failure
from lguestlib.abi.signals import install_interrupt_handler, interrupt_thread
from lguestlib.runtime import probe
from lguestlib.runtime.attachments import attach
from lguestlib.runtime.backend import uring as module
from lguestlib.runtime.backend.uring import Completion, Uring
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.options import DiskImage
from lguestlib.runtime.trace import Tracer


_kept: list[memoryview] = []
"""What the kernel may still write to."""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    uring_or_skip()
    with nothing_left():
        yield
    _kept.clear()


@pytest.fixture
def ring() -> Iterator[Uring]:
    with Uring(8) as made:
        yield made
        assert made.outstanding == 0


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, bytes(range(256)) * 16)
    yield fd
    os.close(fd)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a stream: a read of one is not complete before the other is written."""
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def views(*sizes: int) -> list[memoryview]:
    made = [memoryview(bytearray(size)) for size in sizes]
    _kept.extend(made)
    return made


def all_of(ring: Uring) -> list[Completion]:
    """Everything that is asked for, once it is complete, in that order."""
    done: list[Completion] = []
    deadline = time.monotonic() + PATIENCE
    while ring.outstanding:
        assert time.monotonic() < deadline
        done += ring.enter(True, 1)
    return done


def test_reads_and_writes_are_at_their_offsets(ring: Uring, file: int) -> None:
    one, several = views(7), views(3, 5, 0, 1)
    ring.read(file, one, 254, 1)
    ring.read(file, several, 1024, 2)
    assert sorted(all_of(ring)) == [(1, 7), (2, 9)]
    assert bytes(one[0]) == bytes([254, 255, 0, 1, 2, 3, 4])
    assert b"".join(several) == bytes(range(9))
    source = memoryview(bytearray(b"helloabc"))
    ring.write(file, [source[:5]], 10, 3)
    ring.write(file, [source[5:6], source[6:]], 100, 4)
    assert sorted(all_of(ring)) == [(3, 5), (4, 3)]
    assert (os.pread(file, 5, 10), os.pread(file, 3, 100)) == (b"hello", b"abc")
    ring.flush(file, 5)
    assert all_of(ring) == [(5, 0)]


def test_results_are_those_of_the_system_calls(ring: Uring, file: int) -> None:
    (room,) = views(8)
    read_only = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    reader, writer = os.pipe()
    wrong: list[tuple[Callable[[int], None], int]] = [
        (lambda number: ring.read(file, [room], 4092, number), 4),
        (lambda number: ring.read(file, [room], 5000, number), 0),
        (lambda number: ring.read(-1, [room], 0, number), -errno.EBADF),
        (lambda number: ring.write(read_only, [room], 0, number), -errno.EBADF),
        (lambda number: ring.flush(reader, number), -errno.EINVAL),
        (lambda number: ring.cancel(12345, number), -errno.ENOENT),
    ]
    for number, (ask, result) in enumerate(wrong):
        ask(number)
        assert all_of(ring) == [(number, result)]
    for fd in (read_only, reader, writer):
        os.close(fd)


def test_a_full_device_is_enospc(ring: Uring) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    ring.write(full, views(8), 0, 1)
    assert all_of(ring) == [(1, -errno.ENOSPC)]
    os.close(full)


def test_more_buffers_than_one_call_takes_are_a_short_count(ring: Uring, file: int) -> None:
    ring.read(file, views(*[1] * 1030), 0, 1)
    assert all_of(ring) == [(1, 1024)]


def test_a_number_has_64_bits(ring: Uring, file: int) -> None:
    numbers = [0, 1 << 32, (1 << 64) - 1]
    for number in numbers:
        ring.read(file, views(1), 0, number)
    assert sorted(all_of(ring)) == [(number, 1) for number in numbers]


def test_what_is_complete_first_comes_first(
    ring: Uring, file: int, pair: tuple[socket.socket, socket.socket]
) -> None:
    one, other = pair
    late = views(4)
    ring.read(one.fileno(), late, 0, 1)
    ring.read(file, views(4), 0, 2)
    assert ring.enter(True) == [(2, 4)]
    assert (ring.enter(False), ring.outstanding) == ([], 1)
    other.send(b"late")
    assert all_of(ring) == [(1, 4)]
    assert bytes(late[0]) == b"late"


def test_what_waits_can_be_cancelled(ring: Uring, pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    room = views(4)
    ring.read(one.fileno(), room, 0, 1)
    assert ring.enter(False) == []
    ring.cancel(1, 2)
    assert sorted(all_of(ring)) == [(1, -errno.ECANCELED), (2, 0)]
    other.send(b"lost")
    assert one.recv(4) == b"lost" and bytes(room[0]) == bytes(4)


def test_a_buffers_list_may_go_once_it_is_submitted(
    ring: Uring, pair: tuple[socket.socket, socket.socket]
) -> None:
    one, other = pair
    whole = bytearray(64)
    ring.read(one.fileno(), [memoryview(whole)[:10], memoryview(whole)[20:30]], 0, 1)
    assert ring.enter(False) == []
    # Where the list was, something else may be now.
    rubbish = [bytes(32) for _ in range(100)]
    other.send(b"x" * 20)
    assert all_of(ring) == [(1, 20)]
    assert whole == b"x" * 10 + bytes(10) + b"x" * 10 + bytes(34)
    del rubbish


def test_waiting_ends_when_its_time_is_over_or_a_signal_comes(
    ring: Uring, pair: tuple[socket.socket, socket.socket]
) -> None:
    one, other = pair
    ring.read(one.fileno(), views(1), 0, 1)
    start = time.monotonic()
    assert ring.enter(True, 0.02) == []
    assert 0.015 < time.monotonic() - start < 2
    install_interrupt_handler()
    this = threading.get_native_id()
    ended = threading.Event()

    def interrupt() -> None:
        while not ended.wait(0.01):
            interrupt_thread(this)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert ring.enter(True) == []
    ended.set()
    thread.join()
    other.send(b"x")
    assert all_of(ring) == [(1, 1)]


def test_a_ring_is_gone_round_many_times_and_nothing_is_lost_or_seen_twice(file: int) -> None:
    seed = 11
    chance = random.Random(seed)
    with Uring(8) as ring:
        waiting: dict[int, tuple[int, memoryview]] = {}
        seen = sent = 0
        while seen < 5000:
            while sent < 5000 and len(waiting) < 8 and chance.random() < 0.8:
                offset, (room,) = chance.randrange(4000), views(chance.randrange(1, 90))
                waiting[sent] = offset, room
                ring.read(file, [room], offset, sent)
                sent += 1
            for number, result in ring.enter(bool(waiting) and chance.random() < 0.5):
                offset, room = waiting.pop(number)
                assert result == len(room), seed
                assert bytes(room) == os.pread(file, len(room), offset), seed
                seen += 1
        assert not waiting and ring.outstanding == 0


def test_as_many_requests_as_were_asked_for_fit_and_more_are_refused(file: int) -> None:
    with Uring(8) as ring:
        for number in range(8):
            ring.read(file, views(1), 0, number)
        with pytest.raises(OverflowError, match="more than 8"):
            ring.flush(file, 8)
        assert len(all_of(ring)) == 8
        ring.flush(file, 8)
        assert all_of(ring) == [(8, 0)]


def test_an_entry_is_the_kernels_structure(
    ring: Uring, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[bytes] = []
    enter = abi.io_uring_enter

    def look(fd: int, submit: int, *rest: int) -> int:
        packed.extend(bytes(ring._entries[64 * index : 64 * index + 64]) for index in range(submit))
        return enter(fd, submit, *rest)

    monkeypatch.setattr(abi, "io_uring_enter", look)
    (room,) = views(9)
    ring.read(file, [room], 1 << 40, (1 << 63) + 7)
    ring.flush(file, 8)
    all_of(ring)
    read, flush = (abi.io_uring_sqe.from_buffer_copy(entry) for entry in packed)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert (read.opcode, read.fd, read.off, read.addr, read.len, read.rw_flags, read.user_data) == (
        abi.IORING_OP_READ, file, 1 << 40, address, 9, 0, (1 << 63) + 7,
    )  # fmt: skip
    assert (flush.opcode, flush.fd, flush.off, flush.addr, flush.len, flush.rw_flags, flush.user_data) == (
        abi.IORING_OP_FSYNC, file, 0, 0, 0, abi.IORING_FSYNC_DATASYNC, 8,
    )  # fmt: skip
    for entry in (read, flush):
        assert not any((entry.flags, entry.ioprio, entry.buf_index, entry.personality, entry.splice_fd_in))
        assert not any((entry.addr3, *entry.pad2))


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EBUSY])
def test_want_of_memory_passes(
    ring: Uring, file: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    enter = abi.io_uring_enter
    refusals = iter([True, False, True, True])
    waits = 0

    def short(fd: int, submit: int, complete: int, *rest: int) -> int:
        nonlocal waits
        if submit and next(refusals, False):
            raise failure(number, "io_uring_enter", fd)
        waits += not submit and complete
        return enter(fd, submit, complete, *rest)

    monkeypatch.setattr(abi, "io_uring_enter", short)
    for turn in range(2):
        ring.read(file, views(1, 1), 0, turn)
        assert all_of(ring) == [(turn, 2)]
    assert waits == 3, "for a while, after each refusal"


def test_what_the_kernel_takes_in_parts_is_all_done(
    ring: Uring, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = abi.io_uring_enter
    monkeypatch.setattr(
        abi, "io_uring_enter", lambda fd, submit, *rest: enter(fd, min(submit, 1), *rest)
    )
    for number in range(5):
        ring.read(file, views(1, 2), 0, number)
    assert sorted(all_of(ring)) == [(number, 3) for number in range(5)]


def test_other_failures_are_raised(ring: Uring, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: int) -> int:
        raise failure(errno.EBADR, "io_uring_enter")

    monkeypatch.setattr(abi, "io_uring_enter", fail)
    with pytest.raises(OSError, match="io_uring_enter"):
        ring.enter(False)


def test_an_older_kernels_ring_is_set_up_with_fewer_flags(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = abi.io_uring_setup
    tried: list[int] = []

    def old(entries: int, parameters: abi.io_uring_params) -> int:
        tried.append(parameters.flags)
        if parameters.flags:
            raise failure(errno.EINVAL, "io_uring_setup")
        return setup(entries, parameters)

    monkeypatch.setattr(abi, "io_uring_setup", old)
    with Uring(2) as ring:
        ring.read(file, views(3), 0, 1)
        assert all_of(ring) == [(1, 3)]
    assert len(tried) == 3 and tried[-1] == 0


def test_a_ring_that_cannot_be_is_an_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError) as caught:
        Uring(1 << 20)
    assert caught.value.errno == errno.EINVAL
    monkeypatch.setitem(module._NEEDED, "SOMETHING_NEW", 1 << 31)
    with pytest.raises(OSError, match="io_uring without SOMETHING_NEW") as caught:
        Uring(1)
    assert caught.value.errno == errno.ENOSYS

    def unmappable(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, "mmap")

    monkeypatch.undo()
    monkeypatch.setattr(mmap, "mmap", unmappable)
    with pytest.raises(OSError, match="mmap"):
        Uring(1)


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EPERM, "not permitted"), (errno.ENOSYS, "implemented")]
)
def test_a_disk_is_not_opened_where_the_kernel_refuses_io_uring(
    file: int, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    def refuse(entries: int, parameters: abi.io_uring_params) -> int:
        raise failure(number, "io_uring_setup")

    monkeypatch.setattr(abi, "io_uring_setup", refuse)
    image = DiskImage(f"/proc/self/fd/{file}", aio="io_uring")
    told = f"--aio io_uring: io_uring_setup: .*{reason}.*kernel.io_uring_disabled"
    with pytest.raises(LaunchError, match=told):
        attach(image, lambda line: None, None)
    assert probe._io_uring().usable is False


def test_closing_unmaps() -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("[io_uring]")

    before = mapped()
    with Uring(4):
        assert mapped() == before + 2
    assert mapped() == before


def test_calls_are_traced(file: int) -> None:
    tracer = Tracer()
    with Uring(2, tracer) as ring:
        ring.read(file, views(3), 0, 1)
        ring.enter(True)
    assert [(call.call, call.role, call.result) for call in tracer.calls] == [("io_uring_enter", "disk", 1)]


def test_guest_memory_need_not_be_private() -> None:
    """As it is for a vhost-user front-end's: shared, and mapped from a descriptor."""
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 8192)
    zeros = os.open("/dev/zero", os.O_RDONLY)
    with (
        mmap.mmap(fd, 8192) as mapping,
        Uring(2) as ring,
        memoryview(mapping) as view,
        view[4000:5000] as room,
    ):
        room[:] = b"x" * 1000
        ring.read(zeros, [room], 0, 1)
        assert all_of(ring) == [(1, 1000)]
        eventually(lambda: not any(os.pread(fd, 1000, 4000)), "the zeros")
    os.close(zeros)
    os.close(fd)
