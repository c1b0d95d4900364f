"""The dirty log: which bits a write sets, what the log does not hold, and that no mark is lost."""

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import cast

import interpreters
import pytest

from lguestlib.abi import futex
from lguestlib.abi.libc import check, syscall
from lguestlib.abi.mmap import address_of
from lguestlib.memory import dirty_log as module
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.dirty_log import PAGE, DirtyLog, DirtyLogError
from memory import dirty_pages

HOST_PAGE = mmap.PAGESIZE
TOP = 1 << 64


@pytest.fixture
def file() -> Iterator[int]:
    """A file of three pages of zeros."""
    fd = os.memfd_create("log")
    os.ftruncate(fd, 3 * HOST_PAGE)
    yield fd
    os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def marked(fd: int, offset: int = 0) -> set[int]:
    """The pages whose bit is set, by the specification: page p is bit p % 8 of byte p // 8."""
    pages = set()
    for index, byte in enumerate(content(fd)):
        pages |= {8 * (index - offset) + bit for bit in range(8) if byte >> bit & 1}
    return pages


@pytest.mark.parametrize(
    ("address", "length", "pages"),
    [
        (0, 1, {0}), (0, 4096, {0}), (0, 4097, {0, 1}), (4095, 1, {0}), (4095, 2, {0, 1}), (4096, 1, {1}),
        (7 * 4096, 4097, {7, 8}), (31 * 4096, 4097, {31, 32}), (5 * 4096 + 17, 3 * 4096, {5, 6, 7, 8}),
        (4096, 0, set()),
    ],
)  # fmt: skip
def test_t16_each_page_of_a_write_has_its_bit(address: int, length: int, pages: set[int], file: int) -> None:
    log = DirtyLog(file, HOST_PAGE)
    log.mark(GuestAddress(address), length)
    assert marked(file) == pages
    log.close()


def test_t16_the_bits_are_byte_for_byte_the_specifications(file: int) -> None:
    log = DirtyLog(file, 16, offset=8)
    log.mark(GuestAddress(3 * 4096), 1)
    log.mark(GuestAddress(0x21 * 4096 + 5), 4096)
    log.mark(GuestAddress(127 * 4096 + 4095), 1)
    expected = bytearray(3 * HOST_PAGE)
    expected[8] = 0b1000
    expected[8 + 4] = 0b110
    expected[8 + 15] = 0b1000_0000
    assert content(file) == expected
    log.close()


@pytest.mark.parametrize("first", [0, 1, 31, 32, 33, 40])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100, 128])
def test_long_writes_set_all_their_bits_and_no_other(first: int, count: int, file: int) -> None:
    log = DirtyLog(file, HOST_PAGE, offset=HOST_PAGE)
    log.mark(GuestAddress(first * PAGE + 9), count * PAGE - 9)
    assert marked(file, HOST_PAGE) == set(range(first, first + count))
    log.close()


def test_a_bit_that_is_set_costs_no_call_and_a_long_write_few(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    one, many = futex.set_bit, futex.set_all_bits

    def set_bit(address: int, bit: int) -> None:
        calls.append("bit")
        one(address, bit)

    def set_all_bits(address: int) -> None:
        calls.append("word")
        many(address)

    monkeypatch.setattr(module, "set_bit", set_bit)
    monkeypatch.setattr(module, "set_all_bits", set_all_bits)
    log = DirtyLog(file, HOST_PAGE)
    log.mark(GuestAddress(31 * PAGE), 66 * PAGE)
    assert calls == ["bit", "word", "word", "bit"]
    log.mark(GuestAddress(31 * PAGE), 66 * PAGE)
    log.mark(GuestAddress(40 * PAGE), 1)
    assert len(calls) == 4
    log.mark(GuestAddress(30 * PAGE), 2 * PAGE)
    assert calls[4:] == ["bit"]
    log.close()


def test_the_writes_are_fenced_from_the_look_at_the_bits_once(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the look may come before the write, find the bit that is about to be cleared, and leave it."""
    story: list[str] = []
    log = DirtyLog(file, 64)

    class Bits:
        def __getitem__(self, index: int) -> int:
            story.append("look")
            return 0xFF

    log._bytes.release()
    log._bytes = cast(memoryview, Bits())
    monkeypatch.setattr(module, "new_fence", lambda: lambda: story.append("fence"))
    log.mark_all([(0, 1), (9 * PAGE, 1)])
    assert story == ["fence", "look", "look"]
    log.mark_all([(0, 0)])
    assert len(story) == 3
    log._mapping.close()


@pytest.mark.parametrize("size", [1, 3, 4, 8, 10])
def test_t16_cve_2020_10722_pages_past_a_small_log_are_an_error_and_nothing_is_marked(
    size: int, file: int
) -> None:
    log = DirtyLog(file, size)
    end = 8 * size * PAGE
    assert log.covers(end) and log.covers(0) and not log.covers(end + 1)
    for address, length in (
        (end, 1), (end - 1, 2), (0, end + 1), (TOP - 1, 1), (TOP - PAGE, PAGE), (end, TOP), (0, 1 << 80),
        (-1, 1), (-PAGE, 2 * PAGE), (0, -1), (end + 1, 0),
    ):  # fmt: skip
        with pytest.raises(DirtyLogError) as caught:
            log.mark_all([(0, PAGE), (address, length)])
        assert (caught.value.address, caught.value.length) == (address, length)
        assert f"{address:#x}" in str(caught.value)
    assert marked(file) == set()
    log.mark(GuestAddress(0), end)
    assert marked(file) == set(range(8 * size))
    log.close()


def test_cve_2019_14835_a_length_of_zero_marks_nothing_not_even_at_the_end(file: int) -> None:
    log = DirtyLog(file, 4)
    for address in (0, 1, PAGE - 1, PAGE, 32 * PAGE):
        log.mark(GuestAddress(address), 0)
    log.mark_all([])
    assert marked(file) == set()
    log.close()


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (0, 0), (-4, 0), (3 * HOST_PAGE + 1, 0), (3 * HOST_PAGE, 4), (4, 3 * HOST_PAGE), (4, -4), (4, 1),
        (4, 2), (4, 3), (4, 4097), (4, 1 << 63), (4, TOP), (1 << 63, 0), (TOP - 4, 8), (TOP, 0), (1 << 80, 0),
    ],
)  # fmt: skip
def test_t13_t16_a_log_that_the_file_does_not_hold_is_refused(size: int, offset: int, file: int) -> None:
    with pytest.raises(ValueError, match="dirty log"):
        DirtyLog(file, size, offset)


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(bytes(64))
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(PermissionError):
            DirtyLog(fd, 64)
    finally:
        os.close(fd)


def test_the_descriptor_stays_the_callers_and_a_closed_log_marks_nothing(file: int) -> None:
    log = DirtyLog(file, 64)
    descriptors = os.listdir("/proc/self/fd")
    log.close()
    log.close()
    assert len(os.listdir("/proc/self/fd")) == len(descriptors) - 1  # mmap.mmap has its own copy
    os.fstat(file)
    with pytest.raises(ValueError, match="released"):
        log.mark(GuestAddress(0), 1)


def test_t16_tiny_logs_hold_what_they_can_and_refuse_the_rest() -> None:
    """Random logs at random places in small files: against sets of pages, and with the rest untouched."""
    seed = 20260102
    random = Random(seed)
    for turn in range(400):
        fd = os.memfd_create("tiny")
        try:
            length = random.choice([0, 1, 5, 64, 4095, 4096, 4100, 8192])
            os.ftruncate(fd, length)
            size = random.randrange(-1, 70)
            offset = random.choice([0, 0, 1, 4, 60, 4092, 4096, 4100, 1 << 63])
            possible = size > 0 and offset % 4 == 0 and offset + size <= length
            try:
                log = DirtyLog(fd, size, offset)
            except ValueError:
                assert not possible, (seed, turn)
                continue
            assert possible, (seed, turn)
            expected: set[int] = set()
            for _ in range(8):
                address = random.randrange(8 * size * PAGE + PAGE)
                count = random.choice([0, 1, PAGE, 50 * PAGE])
                try:
                    log.mark(GuestAddress(address), count)
                except DirtyLogError:
                    assert address + count > 8 * size * PAGE, (seed, turn)
                    continue
                assert address + count <= 8 * size * PAGE, (seed, turn)
                expected |= set(range(address // PAGE, -(-(address + count) // PAGE))) if count else set()
            log.close()
            assert marked(fd, offset) == expected, (seed, turn)
        finally:
            os.close(fd)


def test_threads_that_mark_in_the_same_words_lose_nothing(file: int) -> None:
    log = DirtyLog(file, 512)

    def mark(first: int) -> None:
        for page in range(first, 4096, 4):
            log.mark(GuestAddress(page * PAGE), 1)

    threads = [threading.Thread(target=mark, args=[first]) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert marked(file) == set(range(4096))
    log.close()


FUTEX_OP_ANDN = 3


def take(words: memoryview, index: int) -> list[int]:
    """The bits set in a word, which are cleared: what a front-end's exchange does.

    Bits that are set meanwhile stay, for the next time.
    """
    word = words[index]
    bits = [bit for bit in range(32) if word >> bit & 1]
    address = address_of(words) + 4 * index
    for bit in bits:
        operation = (FUTEX_OP_ANDN | futex.FUTEX_OP_OPARG_SHIFT) << 28 | bit << 12
        check(syscall(futex.SYS_futex, address, futex.FUTEX_WAKE_OP, 0, 0, address, operation), "futex")
    return bits


SIZE = 16
"""Bytes of the log that processes mark: 128 pages."""
TURNS = 200


class Copies:
    """What came of the pages of a log that two processes mark while they are copied as a front-end does."""

    def __init__(self, wait: bool) -> None:
        fd = os.memfd_create("log")
        writers: list[subprocess.Popen[bytes]] = []
        self.taken = [0] * (8 * SIZE)
        self.copy = bytearray(8 * SIZE)
        environment = os.environ | {"PYTHONPATH": str(interpreters.SOURCE)}
        try:
            os.ftruncate(fd, HOST_PAGE + 8 * SIZE)
            with (
                mmap.mmap(fd, SIZE) as log, mmap.mmap(fd, 8 * SIZE, offset=HOST_PAGE) as pages,
                memoryview(log) as part, part.cast("I") as words,
            ):  # fmt: skip
                for first in (0, 1):
                    arguments = (fd, SIZE, first, 2, TURNS, int(wait))
                    command = [sys.executable, dirty_pages.__file__, *map(str, arguments)]
                    writers.append(subprocess.Popen(command, env=environment, pass_fds=[fd]))
                deadline = time.monotonic() + 60
                running = True
                while running:
                    # Once more when both are done: what they marked last.
                    running = any(writer.poll() is None for writer in writers)
                    assert time.monotonic() < deadline
                    for index in range(len(words)):
                        for bit in take(words, index):
                            self.taken[32 * index + bit] += 1
                            self.copy[32 * index + bit] = pages[32 * index + bit]
            assert [writer.wait(30) for writer in writers] == [0, 0]
        finally:
            for writer in writers:
                writer.kill()
                writer.wait()
            os.close(fd)


def test_t16_marks_of_two_processes_and_what_a_third_clears_do_not_undo_each_other() -> None:
    """Each marks a page when its last mark has been taken: so many marks are taken as were made."""
    assert Copies(wait=True).taken == [TURNS] * (8 * SIZE)


def test_t16_no_write_goes_uncopied_though_a_bit_that_is_set_is_left_alone() -> None:
    copies = Copies(wait=False)
    assert copies.copy == bytes([TURNS]) * (8 * SIZE)
    assert all(1 <= taken <= TURNS for taken in copies.taken)
