"""Whole blocks only: what is not goes through a buffer, and no byte beside it changes."""

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
from runtime.rigs import nothing_left

from lguestlib.runtime.backend import bounce as module
from lguestlib.runtime.backend.bounce import BLOCK_SIZE_MAX, Bounce, block_size_of
from lguestlib.runtime.backend.file import FileDisk

BLOCK = 4096
SIZE = 16 * BLOCK


class Strict:
    """`os.preadv` and `os.pwritev` of a file that takes whole blocks only, as one with O_DIRECT is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, block: int = BLOCK) -> None:
        self.block = block
        self.refused = 0
        self.seconds = 0.0
        """How long a read takes."""
        preadv, pwritev = os.preadv, os.pwritev

        def read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            self._check(buffers, offset)
            got = preadv(fd, buffers, offset)
            time.sleep(self.seconds)
            return got

        def write(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            self._check(buffers, offset)
            return pwritev(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", read)
        monkeypatch.setattr(os, "pwritev", write)

    def _check(self, buffers: Sequence[memoryview], offset: int) -> None:
        if offset % self.block or any(len(buffer) % self.block for buffer in buffers):
            self.refused += 1
            raise OSError(errno.EINVAL, "not aligned")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Strict:
    return Strict(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(Random(3).randbytes(SIZE))
    return path


@pytest.fixture
def bounce(path: Path, strict: Strict) -> Iterator[Bounce]:
    fd = os.open(path, os.O_RDWR)
    made = Bounce(fd, BLOCK)
    yield made
    made.close()
    os.close(fd)
    assert strict.refused == 0


def cut(data: bytearray, chance: Random) -> list[memoryview]:
    """Views that are all of *data*, cut anywhere."""
    edges = sorted([0, len(data), *(chance.randrange(len(data) + 1) for _ in range(chance.randrange(4)))])
    return [memoryview(data)[low:high] for low, high in zip(edges, edges[1:])]


def test_reads_of_any_length_at_any_place_are_what_the_file_holds(bounce: Bounce, path: Path) -> None:
    chance = Random(4)
    content = path.read_bytes()
    for turn in range(500):
        offset = chance.randrange(SIZE)
        room = bytearray(chance.randrange(1, SIZE - offset + 1))
        assert bounce.read(cut(room, chance), offset) == len(room), turn
        assert room == content[offset : offset + len(room)], turn


def test_writes_of_any_length_at_any_place_change_nothing_beside_them(bounce: Bounce, path: Path) -> None:
    chance = Random(5)
    expected = bytearray(path.read_bytes())
    for turn in range(300):
        offset = chance.randrange(SIZE)
        data = bytearray(chance.randbytes(chance.randrange(1, SIZE - offset + 1)))
        assert bounce.write(cut(data, chance), offset) == len(data), turn
        expected[offset : offset + len(data)] = data
    assert path.read_bytes() == expected


def test_more_than_the_buffer_holds_is_a_short_count(
    bounce: Bounce, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", 2 * BLOCK)
    content = path.read_bytes()
    room = bytearray(5 * BLOCK)
    assert bounce.read([memoryview(room)], 100) == 2 * BLOCK - 100
    assert room[: 2 * BLOCK - 100] == content[100 : 2 * BLOCK] and not any(room[2 * BLOCK - 100 :])
    assert bounce.write([memoryview(bytearray(5 * BLOCK))], 2 * BLOCK) == 2 * BLOCK
    assert path.read_bytes() == content[: 2 * BLOCK] + bytes(2 * BLOCK) + content[4 * BLOCK :]


def test_t24_a_file_that_has_become_shorter_does_not_grow_again(bounce: Bounce, path: Path) -> None:
    os.truncate(path, 2 * BLOCK + 512)
    room = memoryview(bytearray(1000))
    assert bounce.read([room], 2 * BLOCK) == 512
    assert bounce.read([room], 3 * BLOCK) == 0
    assert bounce.write([room], 2 * BLOCK + 100) == 0
    assert path.stat().st_size == 2 * BLOCK + 512


def test_threads_that_write_side_by_side_keep_each_others_bytes(
    bounce: Bounce, strict: Strict, path: Path
) -> None:
    strict.seconds = 0.0003
    expected = bytearray(path.read_bytes())

    def write(place: int) -> None:
        for turn in range(20):
            data = memoryview(bytearray([place + 1]) * 512)
            assert bounce.write([data], BLOCK * (place // 2) + 512 * place) == 512, turn

    threads = [threading.Thread(target=write, args=[place]) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(8):
        at = BLOCK * (place // 2) + 512 * place
        expected[at : at + 512] = bytes([place + 1]) * 512
    assert path.read_bytes() == expected


@pytest.mark.parametrize("block", [512, 1024, 4096, BLOCK_SIZE_MAX])
def test_the_size_of_a_block_is_found_out(path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    Strict(monkeypatch, block)
    fd = os.open(path, os.O_RDONLY)
    assert block_size_of(fd) == block
    os.close(fd)


def test_what_takes_no_block_at_all_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = Strict(monkeypatch, 2 * BLOCK_SIZE_MAX)
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError, match="not aligned"):
        block_size_of(fd)
    assert strict.refused == 8
    os.close(fd)


def test_what_cannot_be_read_is_an_error_at_once(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    with pytest.raises(OSError) as caught:
        block_size_of(fd)
    assert caught.value.errno == errno.EBADF
    os.close(fd)


# A disk that is opened so.


@pytest.fixture
def disk(path: Path, strict: Strict) -> Iterator[FileDisk]:
    made = FileDisk(os.open(path, os.O_RDWR), str(path), direct=True)
    yield made
    made.close()


def test_a_direct_disk_reads_and_writes_what_is_not_aligned(
    disk: FileDisk, strict: Strict, path: Path
) -> None:
    expected = bytearray(path.read_bytes())
    assert disk.block_size == BLOCK
    refused = strict.refused
    room = memoryview(bytearray(BLOCK))
    assert disk.read([room], BLOCK) == BLOCK and strict.refused == refused, "whole blocks are read in place"
    assert disk.read([room[:1000], room[1000:1024]], 512) == 1024
    assert room[:1024] == expected[512:1536]
    assert disk.write([memoryview(bytearray(b"x" * 512))], 3 * BLOCK - 512) == 512
    expected[3 * BLOCK - 512 : 3 * BLOCK] = b"x" * 512
    assert strict.refused == refused + 2
    assert path.read_bytes() == expected


def test_a_direct_disk_is_zeroed_where_the_file_system_does_not_help(
    disk: FileDisk, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "fallocate")

    monkeypatch.setattr("lguestlib.runtime.backend.file.fallocate", refuse)
    expected = bytearray(path.read_bytes())
    disk.write_zeroes(512, 9 * BLOCK, False)
    expected[512 : 512 + 9 * BLOCK] = bytes(9 * BLOCK)
    assert path.read_bytes() == expected
    os.truncate(path, BLOCK)
    with pytest.raises(OSError) as caught:
        disk.write_zeroes(BLOCK + 512, 512, False)
    assert caught.value.errno == errno.EIO
    assert path.stat().st_size == BLOCK


def test_bytes_past_the_last_whole_block_are_out_of_sight(strict: Strict, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(2 * BLOCK + 512))
    disk = FileDisk(os.open(path, os.O_RDWR), str(path), direct=True)
    assert disk.size == 2 * BLOCK
    disk.close()
    path.write_bytes(bytes(BLOCK - 512))
    with pytest.raises(ValueError, match=f"shorter than one sector of {BLOCK} bytes"):
        FileDisk(os.open(path, os.O_RDWR), str(path), direct=True)


def test_other_errors_of_a_direct_disk_are_its_own(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(os, "pwritev", fail)
    for call in (disk.read, disk.write):
        with pytest.raises(OSError, match="broken"):
            call([memoryview(bytearray(BLOCK))], 0)


def test_past_the_page_cache_for_real(path: Path) -> None:
    try:
        disk = FileDisk.open(str(path), direct=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this file system has no O_DIRECT (TMPDIR=/var/tmp sh tests/run uses one that does)")
    content = path.read_bytes()
    room = memoryview(bytearray(1537))
    assert disk.read([room[1:]], 1024) == 1536 and room[1:] == content[1024:2560]
    assert disk.write([room[1:513]], 512) == 512
    disk.flush()
    assert path.read_bytes() == content[:512] + content[1024:1536] + content[1024:]
    assert os.get_blocking(disk.fd)
    disk.close()
