"""The page tables a 64-bit kernel is entered with, walked as the processor does (Intel SDM, volume 3, 4.5)."""

import struct

import pytest

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import AddressError, GuestMemory
from lguestlib.memory.image.long_mode import place_long_mode

PRESENT, WRITABLE, LARGE = 1, 2, 0x80


def walk(memory: GuestMemory, root: int, address: int) -> int | None:
    """The physical address behind the virtual one, or None."""
    table = root
    for shift in (39, 30, 21):
        index = address >> shift & 511
        entry = int.from_bytes(memory.read(GuestAddress(table + 8 * index), 8), "little")
        if not entry & PRESENT:
            return None
        assert entry & WRITABLE
        table = entry & 0x000F_FFFF_FFFF_F000
        if entry & LARGE:
            assert shift == 21
            return table | address & (1 << 21) - 1
    raise AssertionError("pages of 4 KiB are not expected")


def test_the_first_four_gigabytes_are_mapped_to_themselves_and_no_more() -> None:
    with GuestMemory.anonymous(1 << 20) as memory:
        made = place_long_mode(memory)
        for address in (0, 0x1234, 0x1F_FFFF, 0x20_0000, 0x1234_5678, 0xBFFF_FFFF, 0xFEE0_0000, 0xFFFF_FFFF):
            assert walk(memory, made.page_tables, address) == address
        for address in (1 << 32, 1 << 39, (1 << 48) - 1):
            assert walk(memory, made.page_tables, address) is None


def test_the_segments_are_where_the_boot_protocol_wants_them() -> None:
    with GuestMemory.anonymous(1 << 20) as memory:
        made = place_long_mode(memory, GuestAddress(0x10000))
        assert made.page_tables == 0x10000
        null, unused, code, data = struct.unpack("<4Q", memory.read(made.gdt.start, made.gdt.size))
        assert null == unused == 0
        # Present, code readable or data writable, accessed; L in the one, D in the other; all of memory.
        assert code == 0x00AF9B000000FFFF and data == 0x00CF93000000FFFF
        end = made.gdt.end
        assert memory.read(end, 0x1000) == bytes(0x1000)


def test_memory_that_is_too_small_is_told() -> None:
    with GuestMemory.anonymous(0x8000) as memory, pytest.raises(AddressError):
        place_long_mode(memory)
