"""memfd_create(2) and seals."""

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator

import pytest

from lguestlib.abi.memfd import (
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    add_seals,
    get_seals,
    memfd,
)

SIZE = 8192


@pytest.fixture
def fd() -> Iterator[int]:
    made = memfd("abi-test", SIZE)
    yield made
    os.close(made)


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_it_has_its_size_and_name_is_zero_and_not_inherited(fd: int) -> None:
    assert os.fstat(fd).st_size == SIZE
    assert os.pread(fd, SIZE, 0) == bytes(SIZE)
    assert "abi-test" in os.readlink(f"/proc/self/fd/{fd}")
    assert not os.get_inheritable(fd)


def test_seals_add_up(fd: int) -> None:
    assert get_seals(fd) == 0
    add_seals(fd, F_SEAL_SHRINK)
    add_seals(fd, F_SEAL_GROW)
    assert get_seals(fd) == F_SEAL_SHRINK | F_SEAL_GROW


def test_a_sealed_size_does_not_change(fd: int) -> None:
    add_seals(fd, F_SEAL_SHRINK | F_SEAL_GROW)
    for size in (SIZE - 4096, SIZE + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    assert os.fstat(fd).st_size == SIZE


def test_a_write_seal_is_busy_while_a_writable_mapping_lives(fd: int) -> None:
    with mmap.mmap(fd, SIZE), pytest.raises(OSError, match="F_ADD_SEALS") as caught:
        add_seals(fd, F_SEAL_WRITE)
    assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, fd)
    add_seals(fd, F_SEAL_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)


def test_a_future_write_seal_leaves_the_mapping_that_is_there(fd: int) -> None:
    with mmap.mmap(fd, SIZE) as mapping:
        add_seals(fd, F_SEAL_FUTURE_WRITE)
        mapping[0] = 1
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
    assert os.pread(fd, 1, 0) == b"\x01"


def test_a_sealed_set_of_seals_takes_no_more(fd: int) -> None:
    add_seals(fd, F_SEAL_SEAL)
    with pytest.raises(PermissionError, match="F_ADD_SEALS: Operation not permitted"):
        add_seals(fd, F_SEAL_SHRINK)
    assert get_seals(fd) == F_SEAL_SEAL


def test_a_file_without_seals_says_so() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match="F_GET_SEALS") as caught:
            get_seals(reading)
    finally:
        os.close(reading)
        os.close(writing)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("size", [-1, 1 << 63, 1 << 64, (1 << 64) + 4096])
def test_s16_a_hostile_size_is_refused_and_leaves_no_descriptor(size: int) -> None:
    before = _open_descriptors()
    with pytest.raises((OSError, OverflowError)):
        memfd("hostile", size)
    assert _open_descriptors() == before


def test_a_size_the_kernel_refuses_names_call_and_memfd() -> None:
    with pytest.raises(OSError, match=r"ftruncate: .*'named'$"):
        memfd("named", -1)
    with pytest.raises(OSError, match=r"memfd_create: Invalid argument"):
        memfd("n" * 250, SIZE)


def test_a_system_without_it_is_enosys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="memfd_create") as caught:
        memfd("absent", SIZE)
    assert caught.value.errno == errno.ENOSYS


def test_a_bad_descriptor_is_ebadf() -> None:
    with tempfile.TemporaryFile() as file:
        closed = file.fileno()
    with pytest.raises(OSError, match="F_GET_SEALS") as caught:
        get_seals(closed)
    assert caught.value.errno == errno.EBADF
