"""readv(2) and its family: whole vectors, at offsets, and interruptible."""

import errno
import os
from collections.abc import Iterator

import pytest

from abi.interruption import interrupted
from lguestlib.abi.memfd import memfd
from lguestlib.abi.uio import UIO_MAXIOV, preadv, pwritev, readv, write, writev

HUGE = (1 << 32) + 5
"""An offset that 32 bits do not hold."""


@pytest.fixture
def file() -> Iterator[int]:
    fd = memfd("uio", 64)
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def _views(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in sizes]


def _text(*parts: bytes) -> list[memoryview]:
    return [memoryview(bytearray(part)) for part in parts]


def fill(pipe: int) -> None:
    """Until one more page would block."""
    os.set_blocking(pipe, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(pipe, bytes(4096))
    os.set_blocking(pipe, True)


def test_a_vector_is_written_and_read_in_order(pipe: tuple[int, int]) -> None:
    assert writev(pipe[1], _text(b"one", b"two", b"three")) == 11
    into = _views(4, 1, 10)
    assert readv(pipe[0], into) == 11
    assert [bytes(view) for view in into] == [b"onet", b"w", b"othree\0\0\0\0"]


def test_a_vector_is_written_and_read_at_an_offset_and_the_position_stays(file: int) -> None:
    os.lseek(file, 3, os.SEEK_SET)
    assert pwritev(file, _text(b"abc", b"de", b"f"), 10) == 6
    into = _views(2, 3)
    assert preadv(file, into, 11) == 5
    assert [bytes(view) for view in into] == [b"bc", b"def"]
    assert os.lseek(file, 0, os.SEEK_CUR) == 3


def test_offsets_have_64_bits(file: int) -> None:
    assert pwritev(file, _text(b"far"), HUGE) == 3
    assert os.fstat(file).st_size == HUGE + 3
    into = _views(3)
    assert preadv(file, into, HUGE) == 3
    assert bytes(into[0]) == b"far"


def test_buffers_may_be_parts_of_one_and_of_any_item_size(file: int) -> None:
    memory = bytearray(16)
    with memoryview(memory) as view, view[8:].cast("I") as words:
        assert preadv(file, [view[2:4], words], 0) == 10
        words[0] = 0x41414141
        assert pwritev(file, [words, view[:2]], 0) == 10
    assert os.pread(file, 10, 0) == b"AAAA\0\0\0\0\0\0"


def test_empty_buffers_and_empty_vectors_are_nothing(pipe: tuple[int, int]) -> None:
    assert writev(pipe[1], _text(b"", b"x", b"")) == 1
    into = _views(0, 1)
    assert readv(pipe[0], into) == 1
    assert bytes(into[1]) == b"x"
    assert writev(pipe[1], []) == 0


def test_end_of_file_is_0(file: int) -> None:
    assert preadv(file, _views(4), 64) == 0


def test_a_full_vector_works_and_one_more_is_einval(file: int) -> None:
    assert preadv(file, _views(*[1] * UIO_MAXIOV), 0) == 64
    with pytest.raises(OSError, match="preadv") as caught:
        preadv(file, _views(*[1] * (UIO_MAXIOV + 1)), 0)
    assert caught.value.errno == errno.EINVAL


def test_a_read_only_buffer_is_refused_before_the_call(file: int) -> None:
    with pytest.raises(TypeError):
        preadv(file, [memoryview(b"constant")], 0)


def test_errors_name_the_call_and_the_descriptor(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with pytest.raises(OSError, match=f"writev: Bad file descriptor: {reading}$") as caught:
        writev(reading, _text(b"x"))
    assert (caught.value.errno, caught.value.filename) == (errno.EBADF, reading)
    with pytest.raises(OSError, match=f"readv: Bad file descriptor: {writing}$"):
        readv(writing, _views(1))
    with pytest.raises(OSError, match="preadv: Illegal seek"):
        preadv(reading, _views(1), 0)
    with pytest.raises(OSError, match="pwritev: Illegal seek"):
        pwritev(writing, _text(b"x"), 0)
    os.set_blocking(reading, False)
    with pytest.raises(BlockingIOError, match="readv"):
        readv(reading, _views(1))


@pytest.mark.parametrize("offset", [1 << 63, 1 << 64, (1 << 64) + 8, -(1 << 63) - 1])
def test_s16_an_offset_over_63_bits_is_refused_and_touches_nothing(file: int, offset: int) -> None:
    into = _text(b"kept")
    with pytest.raises(OverflowError, match="preadv offset"):
        preadv(file, into, offset)
    with pytest.raises(OverflowError, match="pwritev offset"):
        pwritev(file, _text(b"lost"), offset)
    assert bytes(into[0]) == b"kept"
    assert os.pread(file, 64, 0) == bytes(64)


def test_a_negative_offset_is_the_kernels_einval(file: int) -> None:
    with pytest.raises(OSError, match="preadv: Invalid argument"):
        preadv(file, _views(1), -1)


def test_y3_a_blocked_readv_is_interrupted(pipe: tuple[int, int]) -> None:
    raised = interrupted(lambda: readv(pipe[0], _views(8)))
    assert isinstance(raised, InterruptedError)
    assert "readv" in str(raised)


def test_y3_a_blocked_writev_is_interrupted(pipe: tuple[int, int]) -> None:
    fill(pipe[1])
    assert isinstance(interrupted(lambda: writev(pipe[1], _text(b"x" * 4096))), InterruptedError)


def test_bytes_are_written(pipe: tuple[int, int]) -> None:
    assert write(pipe[1], b"with a \0 inside") == 15
    assert os.read(pipe[0], 64) == b"with a \0 inside"
    with pytest.raises(OSError, match=f"write: Bad file descriptor: {pipe[0]}$"):
        write(pipe[0], b"x")


def test_y3_a_blocked_write_is_interrupted(pipe: tuple[int, int]) -> None:
    fill(pipe[1])
    assert isinstance(interrupted(lambda: write(pipe[1], b"x" * 4096)), InterruptedError)
