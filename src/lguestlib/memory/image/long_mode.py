"""Page tables and segments for a kernel that is entered in long mode (Documentation/arch/x86/boot.rst, 64-bit).

Every address below 4 GiB is mapped to itself, in pages of 2 MiB (Intel SDM, volume 3, 4.5).
"""

from typing import NamedTuple

from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.guest import GuestMemory

CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18
"""__BOOT_CS and __BOOT_DS."""

_GDT = (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
"""Nothing, nothing, 64-bit code and data of all addresses."""

_PRESENT_WRITABLE = 0b11
_LARGE = 1 << 7
_ENTRIES = 512
_MAPPED_GIB = 4
_PAGE = 4096


class LongMode(NamedTuple):
    """What goes into CR3 and GDTR; *gdt* in bytes."""

    page_tables: GuestAddress
    gdt: GuestRange


def place_long_mode(memory: GuestMemory, at: GuestAddress = GuestAddress(0x9000)) -> LongMode:
    """Write page tables and a GDT to *memory* from *at*, a page's start, on: seven pages.  Raises AddressError."""
    pointers = at + _PAGE
    directories = pointers + _PAGE
    gdt = GuestRange(GuestAddress(directories + _MAPPED_GIB * _PAGE), 8 * len(_GDT))
    tables = [pointers | _PRESENT_WRITABLE]
    tables += [0] * (_ENTRIES - 1)
    tables += [directories + gib * _PAGE | _PRESENT_WRITABLE for gib in range(_MAPPED_GIB)]
    tables += [0] * (_ENTRIES - _MAPPED_GIB)
    tables += [page << 21 | _LARGE | _PRESENT_WRITABLE for page in range(_MAPPED_GIB * _ENTRIES)]
    tables += _GDT
    memory.write(at, b"".join(entry.to_bytes(8, "little") for entry in tables))
    return LongMode(at, gdt)
