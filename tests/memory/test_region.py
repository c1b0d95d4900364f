"""A region: what can be one, what its views share, and how it goes."""

import gc
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import interpreters
import pytest

from lguestlib.abi.mmap import address_of
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.region import Region

PAGE = mmap.PAGESIZE
BASE = GuestAddress(0x10_0000)
HUGE = sys.maxsize // 2 + 1
"""Bytes: more than a machine has, or, of 32 bits, a quarter of all addresses."""


def _descriptors() -> set[str]:
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file of five pages, each of them full of its number."""
    path = tmp_path / "memory"
    path.write_bytes(b"".join(bytes([page]) * PAGE for page in range(5)))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("make", [Region.anonymous, Region.memfd])
def test_new_memory_is_zero_and_as_long_as_asked(make: Callable[[GuestAddress, int], Region]) -> None:
    region = make(BASE, 5000)
    try:
        with region.view() as view:
            assert bytes(view) == bytes(5000)
            assert not view.readonly
        assert (region.base, region.end) == (0x10_0000, 0x10_0000 + 5000)
    finally:
        region.close()


@pytest.mark.parametrize(
    ("base", "size"),
    [
        (0, 0), (0, -1), (-1, 4096), (-4096, 4096), (1 << 64, 1), ((1 << 64) - 1, 2), (1, 1 << 64),
        (0, 1 << 64), (0, 1 << 63), (0, (1 << 64) + 4096), ((1 << 64) + 4096, 4096),
    ],
)  # fmt: skip
def test_t13_s16_a_range_that_is_empty_or_not_of_64_bits_is_refused(base: int, size: int, file: int) -> None:
    before = _descriptors()
    for make in (Region.anonymous, Region.memfd):
        with pytest.raises(ValueError, match="no range"):
            make(GuestAddress(base), size)
    with pytest.raises(ValueError, match="no range"):
        Region.from_fd(GuestAddress(base), size, file)
    assert _descriptors() == before


def test_s16_a_range_may_end_where_addresses_do() -> None:
    region = Region.anonymous(GuestAddress((1 << 64) - PAGE), PAGE)
    assert region.end == 1 << 64
    region.close()


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """This process may map half a GiB more than it has, which 32 bits leave more of."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (512 << 20), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("limited_memory")
@pytest.mark.parametrize("make", [Region.anonymous, Region.memfd])
def test_more_than_the_machine_has_is_an_oserror_that_leaves_nothing(
    make: Callable[[GuestAddress, int], Region],
) -> None:
    before = _descriptors()
    with pytest.raises(OSError, match=r"."):
        make(GuestAddress(0), HUGE - PAGE)
    assert _descriptors() == before


def test_a_memfd_shows_what_is_written_and_the_other_way_round() -> None:
    region = Region.memfd(BASE, PAGE)
    try:
        with region.view() as view:
            view[10:13] = b"abc"
            os.pwrite(region.fd, b"xyz", 20)
            assert os.pread(region.fd, 3, 10) == b"abc"
            assert bytes(view[20:23]) == b"xyz"
    finally:
        region.close()


def test_t13_a_memfd_that_was_handed_out_cannot_shrink() -> None:
    region = Region.memfd(BASE, 2 * PAGE)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, PAGE)
    finally:
        region.close()


def test_a_memfd_is_not_inherited() -> None:
    region = Region.memfd(BASE, PAGE)
    assert not os.get_inheritable(region.fd)
    region.close()


@pytest.mark.parametrize("offset", [0, 1, 7, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 2, 4 * PAGE + 100])
def test_a_received_file_is_mapped_at_any_offset(offset: int, file: int) -> None:
    held = os.pread(file, 5 * PAGE, 0)
    for size in (1, min(PAGE + 3, 5 * PAGE - offset), 5 * PAGE - offset):
        region = Region.from_fd(BASE, size, file, offset)
        try:
            with region.view() as view:
                assert bytes(view) == held[offset : offset + size]
                assert address_of(view) == region.host_address
                view[0], saved = 0xEE, view[0]
                assert os.pread(file, 1, offset) == b"\xee"
                view[0] = saved
        finally:
            region.close()


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (5 * PAGE + 1, 0), (1, 5 * PAGE), (PAGE, 4 * PAGE + 1), (2, 5 * PAGE - 1), (1, 5 * PAGE + 1),
        (1, 1 << 40), (HUGE, 0), (HUGE, PAGE), (PAGE, -PAGE), (PAGE, -1), (1, (1 << 64) - 1),
        (PAGE, 1 << 64), (PAGE, 1 << 63),
    ],
)  # fmt: skip
def test_t13_a_range_that_the_file_does_not_hold_is_refused(size: int, offset: int, file: int) -> None:
    before = _descriptors()
    with pytest.raises(ValueError, match="of a file of 0x5000"):
        Region.from_fd(BASE, size, file, offset)
    assert _descriptors() == before


def test_the_last_byte_of_a_received_file_is_held(file: int) -> None:
    region = Region.from_fd(BASE, PAGE, file, 4 * PAGE)
    with region.view() as view:
        assert view[PAGE - 1] == 4
    region.close()


def test_a_received_descriptor_stays_the_callers(file: int) -> None:
    before = _descriptors()
    region = Region.from_fd(BASE, PAGE, file)
    assert region.fd == -1
    region.close()
    assert _descriptors() == before
    os.fstat(file)


def test_a_descriptor_without_write_permission_is_refused_and_none_is_left(tmp_path: Path) -> None:
    path = tmp_path / "readable"
    path.write_bytes(bytes(PAGE))
    fd = os.open(path, os.O_RDONLY)
    try:
        before = _descriptors()
        with pytest.raises(PermissionError):
            Region.from_fd(BASE, PAGE, fd)
        assert _descriptors() == before
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_t13_what_is_not_a_file_holds_nothing(kind: str, tmp_path: Path) -> None:
    fds = os.pipe() if kind == "pipe" else (os.open(tmp_path, os.O_RDONLY),)
    try:
        with pytest.raises((ValueError, OSError)):
            Region.from_fd(BASE, 1 << 20, fds[0])
    finally:
        for fd in fds:
            os.close(fd)


def test_y4_close_refuses_while_a_view_lives_and_succeeds_later() -> None:
    region = Region.memfd(BASE, PAGE)
    view = region.view()
    piece = view[5:10]
    view.release()
    with pytest.raises(BufferError, match="0x100000"):
        region.close()
    piece[:] = b"still"
    with region.view() as again:
        assert bytes(again[5:10]) == b"still"
    piece.release()
    region.close()
    with pytest.raises(ValueError, match="closed"):
        region.view()


def test_closing_gives_back_the_memfd_even_while_a_view_lives() -> None:
    before = _descriptors()
    region = Region.memfd(BASE, PAGE)
    fd = region.fd
    view = region.view()
    with pytest.raises(BufferError):
        region.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert region.fd == -1
    del view
    region.close()
    assert _descriptors() == before


def test_closing_twice_closes_nobody_elses_descriptor() -> None:
    region = Region.memfd(BASE, PAGE)
    fd = region.fd
    region.close()
    other = os.memfd_create("takes-the-number")
    try:
        assert other == fd
        region.close()
        os.fstat(other)
    finally:
        os.close(other)


def test_y6_every_view_is_its_own() -> None:
    region = Region.anonymous(BASE, PAGE)
    one, other = region.view(), region.view()
    one.release()
    other[0] = 1
    other.release()
    region.close()


def test_a_guarded_region_has_a_page_on_either_side_that_kills_who_touches_it() -> None:
    program = f"""
import ctypes, sys
from lguestlib.memory.region import Region
region = Region.guarded(0, {2 * PAGE})
with region.view() as view:
    assert len(view) == {2 * PAGE} and not any(view)
    view[0] = view[-1] = 1
assert region.host_address + {2 * PAGE} < 1 << 32
where = {{"before": region.host_address - 1, "first": region.host_address,
          "last": region.host_address + {2 * PAGE} - 1, "behind": region.host_address + {2 * PAGE}}}
print(ctypes.c_char.from_address(where[sys.argv[1]]).value[0])
"""
    environment = os.environ | {"PYTHONPATH": str(interpreters.SOURCE)}
    ended = {
        name: subprocess.run([sys.executable, "-c", program, name], env=environment, capture_output=True, text=True)
        for name in ("before", "first", "last", "behind")
    }
    assert [ended[name].stdout for name in ("first", "last")] == ["1\n", "1\n"]
    assert {ended[name].returncode for name in ("before", "behind")} == {-signal.SIGSEGV}


def test_a_guarded_region_is_whole_pages_and_goes_like_any_other() -> None:
    with pytest.raises(ValueError, match="whole pages"):
        Region.guarded(BASE, PAGE + 1)
    region = Region.guarded(BASE, PAGE)
    view = region.view()
    with pytest.raises(BufferError):
        region.close()
    view.release()
    region.close()
    region.close()
