"""mmap(2) beyond the standard library's `mmap.mmap`, asm/mman.h: addresses and protections."""

import ctypes

from lguestlib.abi.libc import check, fitting, function, large_file_function

PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_32BIT = 0x40
"""An address of 31 bits; x86's alone, and of no effect elsewhere."""
MAP_NORESERVE = 0x4000


def address_of(buffer: memoryview) -> int:
    """The address in this process of the first byte of a writable, non-empty *buffer*.

    Valid while the buffer's exporter keeps it in place.  Raises TypeError for a
    read-only buffer, ValueError for an empty one.
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def mprotect(address: int, length: int, protection: int) -> None:
    """Set the protection of the pages at *address*, *length* bytes.

    Raises OSError (EINVAL for an address off a page boundary, ENOMEM where
    nothing is mapped), OverflowError for what no address space has room for.
    """
    call = function("mprotect", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    fitting(address, ctypes.c_size_t, "mprotect address")
    fitting(length, ctypes.c_size_t, "mprotect length")
    check(call(address, length, protection), "mprotect", hex(address))


def replace_pages(address: int, length: int) -> None:
    """Put private zeroed pages in the place of what is mapped at *address*, *length* bytes.

    Raises OSError (EINVAL for an address off a page boundary, and inside a huge
    page; ENOMEM), OverflowError for what no address space has room for.
    """
    call = large_file_function(
        "mmap", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
        result=ctypes.c_ssize_t,
    )  # fmt: skip
    fitting(address, ctypes.c_size_t, "mmap address")
    fitting(length, ctypes.c_size_t, "mmap length")
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
    result = call(address, length, PROT_READ | PROT_WRITE, flags, -1, 0)
    check(-1 if result == -1 else 0, "mmap", hex(address))
