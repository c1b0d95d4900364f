"""Addresses of buffers, and mprotect(2)."""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from lguestlib.abi.mmap import PROT_NONE, PROT_READ, PROT_WRITE, address_of, mprotect

PAGE = mmap.PAGESIZE


@pytest.fixture
def pages() -> Iterator[memoryview]:
    """Two pages, whose protection a test may change."""
    mapping = mmap.mmap(-1, 2 * PAGE)
    view = memoryview(mapping)
    address = address_of(view)
    yield view
    mprotect(address, 2 * PAGE, PROT_READ | PROT_WRITE)
    view.release()
    mapping.close()


def _kernel_can_write(view: memoryview) -> bool:
    """Whether the kernel can write there for us; a fault of our own would end the process."""
    with open("/dev/zero", "rb", buffering=0) as zero:
        try:
            return os.readv(zero.fileno(), [view]) > 0
        except OSError as error:
            assert error.errno == errno.EFAULT
            return False


def _kernel_can_read(view: memoryview) -> bool:
    reading, writing = os.pipe()
    try:
        return os.write(writing, view[:1]) == 1
    except OSError as error:
        assert error.errno == errno.EFAULT
        return False
    finally:
        os.close(reading)
        os.close(writing)


def test_the_address_is_that_of_the_first_byte() -> None:
    memory = bytearray(b"abcdef")
    with memoryview(memory) as whole, whole[2:] as part:
        assert address_of(part) == address_of(whole) + 2
        assert ctypes.string_at(address_of(part), 4) == b"cdef"
        ctypes.memset(address_of(part), 0, 1)
    assert memory == b"ab\0def"


def test_taking_an_address_keeps_no_hold_on_the_buffer() -> None:
    memory = bytearray(8)
    with memoryview(memory) as view:
        address_of(view)
    memory.extend(b"more")
    assert len(memory) == 12


def test_a_read_only_or_empty_buffer_has_no_address() -> None:
    with pytest.raises(TypeError):
        address_of(memoryview(b"constant"))
    with pytest.raises(ValueError, match="at least"):
        address_of(memoryview(bytearray()))


def test_read_only_pages_cannot_be_written_and_no_pages_cannot_be_read(pages: memoryview) -> None:
    assert _kernel_can_write(pages[:PAGE])
    mprotect(address_of(pages), PAGE, PROT_READ)
    assert not _kernel_can_write(pages[:PAGE])
    assert _kernel_can_read(pages[:PAGE])
    mprotect(address_of(pages), PAGE, PROT_NONE)
    assert not _kernel_can_read(pages[:PAGE])


def test_only_the_pages_named_change(pages: memoryview) -> None:
    mprotect(address_of(pages) + PAGE, PAGE, PROT_NONE)
    assert _kernel_can_write(pages[:PAGE])
    assert not _kernel_can_read(pages[PAGE:])


def test_an_unaligned_address_is_einval_and_is_named(pages: memoryview) -> None:
    address = address_of(pages) + 1
    with pytest.raises(OSError, match=f"mprotect: Invalid argument: '{address:#x}'") as caught:
        mprotect(address, PAGE, PROT_READ)
    assert caught.value.errno == errno.EINVAL


def test_an_unmapped_range_is_enomem() -> None:
    with pytest.raises(OSError, match="mprotect") as caught:
        mprotect(0, PAGE, PROT_NONE)
    assert caught.value.errno == errno.ENOMEM


def test_s16_an_address_or_length_over_a_word_is_refused_and_nothing_changes(pages: memoryview) -> None:
    word = 1 << 8 * ctypes.sizeof(ctypes.c_void_p)
    address = address_of(pages)
    for hostile_address, hostile_length in ((address + word, PAGE), (address, PAGE + word), (-word, PAGE)):
        with pytest.raises(OverflowError, match="mprotect"):
            mprotect(hostile_address, hostile_length, PROT_NONE)
    assert _kernel_can_write(pages)
