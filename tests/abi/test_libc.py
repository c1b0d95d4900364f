"""The C library bound on first use, its errors, and what ctypes must not cut."""

import ctypes
import errno
import platform
from collections.abc import Iterator

import pytest

from lguestlib.abi import libc


@pytest.fixture
def unknown_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    libc._table.cache_clear()
    yield
    libc._table.cache_clear()


def test_an_error_carries_errno_call_and_subject_in_one_line() -> None:
    error = libc.failure(errno.EBADF, "readv", 7)
    assert (error.errno, error.filename) == (errno.EBADF, 7)
    assert str(error) == f"[Errno {errno.EBADF}] readv: Bad file descriptor: 7"


def test_an_error_about_nothing_in_particular_says_no_more() -> None:
    error = libc.failure(errno.EMFILE, "eventfd")
    assert str(error) == f"[Errno {errno.EMFILE}] eventfd: Too many open files"


def test_an_error_is_of_the_subclass_of_its_errno() -> None:
    assert isinstance(libc.failure(errno.EINTR, "readv"), InterruptedError)
    assert isinstance(libc.failure(errno.EACCES, "open"), PermissionError)


def test_check_takes_errno_from_the_call_and_returns_what_is_not_negative() -> None:
    close = libc.function("close", ctypes.c_int)
    with pytest.raises(OSError, match="close: Bad file descriptor") as caught:
        libc.check(close(-1), "close", -1)
    assert caught.value.errno == errno.EBADF
    assert libc.check(5, "anything") == 5


def test_a_function_the_c_library_lacks_is_enosys_and_named() -> None:
    with pytest.raises(OSError, match="no_such_function") as caught:
        libc.function("no_such_function")
    assert caught.value.errno == errno.ENOSYS
    with pytest.raises(OSError, match="no_such_function") as caught:
        libc.large_file_function("no_such_function")
    assert caught.value.errno == errno.ENOSYS


def test_a_function_without_a_64_bit_variant_is_taken_as_it_is() -> None:
    assert libc.large_file_function("getpid")() == libc.function("getpid")()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1 << 64, ctypes.c_uint64),
        ((1 << 64) + 4096, ctypes.c_uint64),
        (1 << 63, ctypes.c_int64),
        (-1, ctypes.c_uint64),
        (1 << 32, ctypes.c_uint32),
        (1 << 8 * ctypes.sizeof(ctypes.c_size_t), ctypes.c_size_t),
    ],
)
def test_s16_what_does_not_fit_is_an_overflow_error_that_names_it(
    value: int, kind: "type[ctypes._SimpleCData[int]]"
) -> None:
    with pytest.raises(OverflowError, match=f"^length: {value:#x} does not fit in"):
        libc.fitting(value, kind, "length")


def test_s16_the_largest_that_fits_passes() -> None:
    assert libc.fitting((1 << 64) - 1, ctypes.c_uint64, "address") == (1 << 64) - 1
    assert libc.fitting(-1, ctypes.c_int64, "offset") == -1


def test_a_system_call_reaches_the_kernel_under_its_number_here() -> None:
    getpid = (39, 20, 172)
    assert libc.syscall(getpid) == libc.function("getpid")()


@pytest.mark.usefixtures("unknown_machine")
def test_a_system_call_whose_number_is_unknown_here_is_enosys() -> None:
    with pytest.raises(OSError, match="pdp11") as caught:
        libc.syscall((39, 20, 172))
    assert caught.value.errno == errno.ENOSYS
