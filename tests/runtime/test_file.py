"""A disk in a file: read, written, flushed, never grown (T22, T24)."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime.rigs import nothing_left, open_descriptors

from lguestlib.runtime.backend import file as module
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.trace import Tracer

SECTOR = 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * 16)
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[FileDisk]:
    with nothing_left():
        disk = FileDisk.open(str(image))
        yield disk
        disk.close()


def views(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in sizes]


def filled(*pieces: bytes) -> list[memoryview]:
    return [memoryview(bytearray(piece)) for piece in pieces]


def test_reads_and_writes_are_at_their_offsets(disk: FileDisk, image: Path) -> None:
    buffers = views(3, 5)
    assert disk.read(buffers, 254) == 8
    assert b"".join(buffers) == bytes([254, 255, 0, 1, 2, 3, 4, 5])
    assert disk.write(filled(b"he", b"llo"), 1000) == 5
    disk.flush()
    assert image.read_bytes()[1000:1005] == b"hello"
    assert image.stat().st_size == 4096


def test_more_buffers_than_one_call_takes_are_a_short_count(disk: FileDisk) -> None:
    assert disk.read(views(*[1] * 1030), 0) == 1024
    assert disk.write(views(*[1] * 1030), 0) == 1024


@pytest.mark.parametrize(("length", "size"), [(512, 512), (1023, 512), (1024, 1024), (4097, 4096)])
def test_bytes_past_the_last_whole_sector_are_out_of_sight(tmp_path: Path, length: int, size: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(length))
    disk = FileDisk.open(str(path))
    assert disk.size == size
    disk.close()


def test_the_size_is_the_files_as_it_is_now(disk: FileDisk, image: Path) -> None:
    for length, size in ((8192, 8192), (1000, 512), (100, 0), (4096, 4096)):
        os.truncate(image, length)
        assert disk.size == size


def test_what_is_no_disk_is_refused_and_closed(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(SECTOR - 1))
    os.mkfifo(tmp_path / "fifo")
    before = open_descriptors()
    for name, reason in (("short", "shorter than one sector"), ("fifo", "neither a regular"), (".", "neither")):
        with pytest.raises(ValueError, match=reason) as caught:
            FileDisk.open(str(tmp_path / name), read_only=True)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(IsADirectoryError):
        FileDisk.open(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        FileDisk.open(str(tmp_path / "missing"))
    assert open_descriptors() == before


def test_a_read_only_disk_cannot_be_written(image: Path) -> None:
    disk = FileDisk.open(str(image), read_only=True)
    assert disk.read_only
    with pytest.raises(OSError):
        disk.write(filled(b"x"), 0)
    disk.close()


def test_the_identity_is_the_end_of_the_files_name_whatever_its_bytes(tmp_path: Path) -> None:
    name = b"a long name that ends with \xff.img"
    path = os.fsencode(tmp_path) + b"/" + name
    Path(os.fsdecode(path)).write_bytes(bytes(SECTOR))
    disk = FileDisk.open(os.fsdecode(path))
    assert disk.identity == name[-20:]
    disk.close()


def test_a_scratch_disk_is_empty_and_writable() -> None:
    with nothing_left():
        disk = FileDisk.scratch(4096)
        assert (disk.size, disk.read_only) == (4096, False)
        buffers = views(4096)
        assert disk.read(buffers, 0) == 4096 and not any(buffers[0])
        assert disk.write(filled(b"x"), 4095) == 1
        disk.close()


def test_discarded_blocks_read_as_zeros_and_the_size_stays(disk: FileDisk, image: Path) -> None:
    try:
        disk.discard(SECTOR, 2 * SECTOR)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this file system punches no holes (TMPDIR=/dev/shm sh tests/run uses one that does)")
    data = image.read_bytes()
    assert data[SECTOR : 3 * SECTOR] == bytes(2 * SECTOR) and len(data) == 4096
    assert data[SECTOR - 1] == 255 and data[3 * SECTOR + 1] == 1


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize("refusal", [None, errno.EOPNOTSUPP, errno.ENOSYS])
def test_zeroes_are_written_whether_the_file_system_helps_or_not(
    disk: FileDisk, image: Path, monkeypatch: pytest.MonkeyPatch, unmap: bool, refusal: int | None
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(refusal, "fallocate")

    if refusal:
        monkeypatch.setattr(module, "fallocate", refuse)
    disk.write_zeroes(SECTOR, 3 * SECTOR, unmap)
    data = image.read_bytes()
    assert data[SECTOR : 4 * SECTOR] == bytes(3 * SECTOR) and len(data) == 4096
    assert data[SECTOR - 1] == 255 and data[4 * SECTOR + 1] == 1


def test_other_failures_of_the_file_system_are_raised(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "fallocate")

    monkeypatch.setattr(module, "fallocate", fail)
    with pytest.raises(OSError, match="fallocate"):
        disk.write_zeroes(0, SECTOR, False)


def test_calls_are_traced_with_their_role(image: Path) -> None:
    tracer = Tracer()
    disk = FileDisk.open(str(image), tracer=tracer)
    disk.read(views(10), 0)
    disk.write(filled(b"12"), 0)
    disk.flush()
    disk.close()
    assert [(call.call, call.role, call.result) for call in tracer.calls] == [
        ("preadv", "disk", 10), ("pwritev", "disk", 2), ("fdatasync", "disk", 0),
    ]  # fmt: skip
