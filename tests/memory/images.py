"""Kernel images made by hand, a field at a time, and the real ones that tests may find.

Offsets and formats are written out here from the ELF specification and from
Documentation/arch/x86/boot.rst, and owe nothing to the code under test.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

import pytest

Field = tuple[str, int]
"""A field's `struct` format and its offset."""

HEADER_FIELDS: dict[int, dict[str, Field]] = {
    32: {
        "e_type": ("<H", 16), "e_machine": ("<H", 18), "e_version": ("<I", 20), "e_entry": ("<I", 24),
        "e_phoff": ("<I", 28), "e_ehsize": ("<H", 40), "e_phentsize": ("<H", 42), "e_phnum": ("<H", 44),
    },
    64: {
        "e_type": ("<H", 16), "e_machine": ("<H", 18), "e_version": ("<I", 20), "e_entry": ("<Q", 24),
        "e_phoff": ("<Q", 32), "e_ehsize": ("<H", 52), "e_phentsize": ("<H", 54), "e_phnum": ("<H", 56),
    },
}  # fmt: skip
SEGMENT_FIELDS: dict[int, dict[str, Field]] = {
    32: {
        "p_type": ("<I", 0), "p_offset": ("<I", 4), "p_vaddr": ("<I", 8), "p_paddr": ("<I", 12),
        "p_filesz": ("<I", 16), "p_memsz": ("<I", 20), "p_flags": ("<I", 24), "p_align": ("<I", 28),
    },
    64: {
        "p_type": ("<I", 0), "p_flags": ("<I", 4), "p_offset": ("<Q", 8), "p_vaddr": ("<Q", 16),
        "p_paddr": ("<Q", 24), "p_filesz": ("<Q", 32), "p_memsz": ("<Q", 40), "p_align": ("<Q", 48),
    },
}  # fmt: skip
HEADER_SIZE = {32: 52, 64: 64}
SEGMENT_SIZE = {32: 32, 64: 56}
MACHINE = {32: 3, 64: 62}

SETUP_FIELDS: dict[str, Field] = {
    "setup_sects": ("<B", 0x1F1), "syssize": ("<I", 0x1F4), "boot_flag": ("<H", 0x1FE),
    "jump_length": ("<B", 0x201), "header": ("<I", 0x202), "version": ("<H", 0x206),
    "type_of_loader": ("<B", 0x210), "loadflags": ("<B", 0x211), "code32_start": ("<I", 0x214),
    "initrd_addr_max": ("<I", 0x22C), "kernel_alignment": ("<I", 0x230),
    "relocatable_kernel": ("<B", 0x234), "xloadflags": ("<H", 0x236), "cmdline_size": ("<I", 0x238),
    "hardware_subarch": ("<I", 0x23C), "pref_address": ("<Q", 0x258), "init_size": ("<I", 0x260), "kernel_info_offset": ("<I", 0x268),
}  # fmt: skip


class Load(NamedTuple):
    """A segment to make: where, what, how much memory, and where it believes to be."""

    physical: int
    content: bytes
    memory: int
    virtual: int | None = None


def put(image: bytearray, field: Field, value: int, base: int = 0) -> None:
    """Write *value* into the field of *image*."""
    struct.pack_into(field[0], image, base + field[1], value)


def get(image: bytes | memoryview, field: Field, base: int = 0) -> int:
    """The value of the field in *image*."""
    value: int = struct.unpack_from(field[0], image, base + field[1])[0]
    return value


def elf(bits: int, entry: int, loads: list[Load]) -> bytearray:
    """An executable: header, program headers, contents."""
    image = bytearray(HEADER_SIZE[bits] + SEGMENT_SIZE[bits] * len(loads))
    image[:7] = b"\x7fELF" + bytes([bits // 32, 1, 1])
    header = {
        "e_type": 2, "e_machine": MACHINE[bits], "e_version": 1, "e_entry": entry,
        "e_phoff": HEADER_SIZE[bits], "e_ehsize": HEADER_SIZE[bits], "e_phentsize": SEGMENT_SIZE[bits],
        "e_phnum": len(loads),
    }  # fmt: skip
    for name, value in header.items():
        put(image, HEADER_FIELDS[bits][name], value)
    for index, load in enumerate(loads):
        virtual = load.physical if load.virtual is None else load.virtual
        values = {
            "p_type": 1, "p_offset": len(image), "p_vaddr": virtual, "p_paddr": load.physical,
            "p_filesz": len(load.content), "p_memsz": load.memory, "p_flags": 7, "p_align": 4,
        }  # fmt: skip
        for name, value in values.items():
            put_segment(image, bits, index, name, value)
        image += load.content
    return image


def note_elf(entry: int, loads: list[Load], pvh: int) -> bytes:
    """A 64-bit executable with the notes of a Linux kernel: one of its build, and Xen's of the PVH entry."""
    image = elf(64, entry, [*loads, Load(0, b"", 0)])
    notes = struct.pack("<III4s20s", 4, 20, 3, b"GNU", b"build")
    notes += struct.pack("<III4sI", 4, 4, 18, b"Xen", pvh)
    values = {"p_type": 4, "p_offset": len(image), "p_filesz": len(notes), "p_memsz": len(notes)}
    for name, value in values.items():
        put_segment(image, 64, len(loads), name, value)
    return bytes(image + notes)


def put_segment(image: bytearray, bits: int, index: int, name: str, value: int) -> None:
    """Write *value* into a field of program header *index*."""
    put(image, SEGMENT_FIELDS[bits][name], value, HEADER_SIZE[bits] + index * SEGMENT_SIZE[bits])


def bzimage(code: bytes, sectors: int = 2, **fields: int) -> bytearray:
    """A kernel of boot protocol 2.15 whose protected-mode part is *code*; *fields* have the last word."""
    image = bytearray((1 + (sectors or 4)) * 512)
    header = {
        "setup_sects": sectors, "syssize": -(-len(code) // 16), "boot_flag": 0xAA55, "jump_length": 0x6A,
        "header": 0x53726448, "version": 0x20F, "loadflags": 1, "code32_start": 0x100000,
        "initrd_addr_max": 0x7FFFFFFF, "kernel_alignment": 0x1000, "relocatable_kernel": 1,
        "cmdline_size": 2047, "pref_address": 0x104000, "init_size": 0x8000,
    }  # fmt: skip
    image[0x200] = 0xEB
    for name, value in (header | fields).items():
        put(image, SETUP_FIELDS[name], value)
    return image + code


def real_kernel() -> Path:
    """Debian's bzImage as tests/memory/fetch_kernel leaves it, or the running test is skipped."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for kernel in sorted((cache / "lguestlib/kernel/boot").glob("vmlinuz-*")):
        return kernel
    pytest.skip("no Linux kernel (tests/memory/fetch_kernel unpacks one)")
