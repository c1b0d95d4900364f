"""ioctl(2): encoding requests, and the call."""

import ctypes
import errno
import os
import termios
from collections.abc import Iterator

import pytest

from lguestlib.abi.ioctl import IO, IOR, IOW, IOWR, ioctl


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def test_requests_are_encoded_as_the_kernels_macros_do() -> None:
    assert IO(0xAE, 0x80) == 0xAE80
    assert IOR("T", 210, 4) == 0x8004_54D2
    assert IOW("T", 202, 4) == 0x4004_54CA
    assert IOWR(0xAE, 5, 8) == 0xC008_AE05
    assert IOR("T", 0, 0x3FFF) == 0xBFFF_5400


@pytest.mark.parametrize(
    ("type_", "number", "size"),
    [("T", 256, 4), ("T", -1, 4), (256, 0, 4), ("T", 0, 1 << 14), ("T", 0, -1), ("€", 0, 4)],
)
def test_what_has_no_room_in_a_request_is_refused(type_: int | str, number: int, size: int) -> None:
    with pytest.raises(ValueError, match="ioctl request"):
        IOWR(type_, number, size)


def test_the_kernel_fills_in_what_it_is_given_the_address_of(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"five!")
    waiting = ctypes.c_int()
    assert ioctl(pipe[0], termios.FIONREAD, waiting, "FIONREAD", pipe[0]) == 0
    assert waiting.value == 5


def test_an_integer_is_handed_over_as_it_is(pipe: tuple[int, int]) -> None:
    waiting = ctypes.c_int(-1)
    assert ioctl(pipe[0], termios.FIONREAD, ctypes.addressof(waiting), "FIONREAD") == 0
    assert waiting.value == 0


def test_an_error_carries_the_request_and_what_it_was_about(pipe: tuple[int, int]) -> None:
    with pytest.raises(OSError, match=r"^\[Errno 25\] TIOCGWINSZ: .*: 'console'$") as caught:
        ioctl(pipe[0], termios.TIOCGWINSZ, ctypes.create_string_buffer(8), "TIOCGWINSZ", "console")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOTTY, "console")


def test_an_address_the_kernel_cannot_write_is_efault(pipe: tuple[int, int]) -> None:
    with pytest.raises(OSError, match="FIONREAD: Bad address") as caught:
        ioctl(pipe[0], termios.FIONREAD, 0, "FIONREAD")
    assert caught.value.errno == errno.EFAULT


def test_s16_an_integer_over_a_word_is_refused(pipe: tuple[int, int]) -> None:
    word = 1 << 8 * ctypes.sizeof(ctypes.c_void_p)
    waiting = ctypes.c_int(-1)
    for hostile in (word + ctypes.addressof(waiting), word, -1):
        with pytest.raises(OverflowError, match="FIONREAD"):
            ioctl(pipe[0], termios.FIONREAD, hostile, "FIONREAD")
    with pytest.raises(OverflowError, match="ioctl request"):
        ioctl(pipe[0], termios.FIONREAD + (1 << 32), waiting, "FIONREAD")
    assert waiting.value == -1
