"""fallocate(2)."""

import errno
import os
from collections.abc import Iterator

import pytest

from lguestlib.abi.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from lguestlib.abi.memfd import memfd

PAGE = 4096


@pytest.fixture
def file() -> Iterator[int]:
    fd = memfd("fallocate", 0)
    os.pwrite(fd, b"x" * 3 * PAGE, 0)
    yield fd
    os.close(fd)


def test_a_punched_hole_reads_zero_and_takes_no_room(file: int) -> None:
    before = os.fstat(file).st_blocks
    fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE, PAGE)
    assert os.pread(file, 3 * PAGE, 0) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
    assert os.fstat(file).st_blocks < before


def test_room_can_be_had_past_the_end_at_a_64_bit_offset(file: int) -> None:
    fallocate(file, 0, 1 << 33, PAGE)
    assert os.fstat(file).st_size == (1 << 33) + PAGE


def test_an_error_names_the_call_and_the_descriptor() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match=f"fallocate: Illegal seek: {writing}$") as caught:
            fallocate(writing, 0, 0, PAGE)
    finally:
        os.close(reading)
        os.close(writing)
    assert caught.value.errno == errno.ESPIPE


@pytest.mark.parametrize(
    ("offset", "length"), [(1 << 64, PAGE), (0, (1 << 64) + PAGE), (1 << 63, PAGE), (0, 1 << 63)]
)
def test_s16_an_offset_or_length_over_63_bits_is_refused(file: int, offset: int, length: int) -> None:
    with pytest.raises(OverflowError, match="fallocate"):
        fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
    assert os.pread(file, 3 * PAGE, 0) == b"x" * 3 * PAGE
