"""ELF executables, 32- and 64-bit x86 (linux/elf.h; System V ABI, chapters 4 and 5).

Loadable segments go to their physical addresses.  The entry of a kernel may be
given as a virtual address: it is then the same place in the segment it is in.  A
note may name another entry, PVH's.
"""

import ctypes
from typing import Literal

from lguestlib.abi import elf as abi
from lguestlib.abi import xen
from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.image.image import Format, Image, ImageError, Segment, check_apart, check_file

PROGRAM_HEADERS_MAX = 1 << 16
"""Bytes of program headers at most, as Linux's own loader has it."""

_Header = abi.Elf32_Ehdr | abi.Elf64_Ehdr
_ProgramHeader = abi.Elf32_Phdr | abi.Elf64_Phdr


def parse_elf(data: memoryview) -> Image:
    """The executable in *data*, bytes with the ELF magic.  Raises ImageError."""
    check_file(data, 0, abi.EI_NIDENT, "ELF: identification")
    if data[abi.EI_DATA] != abi.ELFDATA2LSB:
        raise ImageError(f"ELF: byte order {data[abi.EI_DATA]} is not little-endian: not built for x86")
    if data[abi.EI_VERSION] != abi.EV_CURRENT:
        raise ImageError(f"ELF: version {data[abi.EI_VERSION]} of the format is unknown")
    if data[abi.EI_CLASS] == abi.ELFCLASS32:
        return _parse(data, "ELF32", 32, abi.EM_386, abi.Elf32_Ehdr, abi.Elf32_Phdr)
    if data[abi.EI_CLASS] == abi.ELFCLASS64:
        return _parse(data, "ELF64", 64, abi.EM_X86_64, abi.Elf64_Ehdr, abi.Elf64_Phdr)
    raise ImageError(f"ELF: class {data[abi.EI_CLASS]} is neither 32-bit nor 64-bit")


def _parse(
    data: memoryview,
    format: Format,
    bits: Literal[32, 64],
    machine: int,
    header_type: type[_Header],
    program_header_type: type[_ProgramHeader],
) -> Image:
    check_file(data, 0, ctypes.sizeof(header_type), f"{format}: header")
    header = header_type.from_buffer_copy(data)
    if header.e_machine != machine:
        raise ImageError(f"{format}: machine {header.e_machine} is not x86, which is {machine} here")
    if header.e_type != abi.ET_EXEC:
        raise ImageError(
            f"{format}: type {header.e_type} is not an executable at fixed addresses,"
            f" which is {abi.ET_EXEC}: link it with -static -no-pie"
        )
    size = ctypes.sizeof(program_header_type)
    if header.e_phentsize != size:
        raise ImageError(f"{format}: program headers of {header.e_phentsize} bytes, not {size}")
    if not 0 < header.e_phnum * size <= PROGRAM_HEADERS_MAX:
        most = PROGRAM_HEADERS_MAX // size
        raise ImageError(f"{format}: {header.e_phnum} program headers, not 1 to {most}")
    check_file(data, header.e_phoff, header.e_phnum * size, f"{format}: program headers")

    loads: list[tuple[Segment, int]] = []
    pvh: GuestAddress | None = None
    for index in range(header.e_phnum):
        entry = program_header_type.from_buffer_copy(data, header.e_phoff + index * size)
        if entry.p_type == abi.PT_INTERP:
            raise ImageError(f"{format}: program header {index} wants an interpreter: link with -static")
        if entry.p_type == abi.PT_NOTE:
            pvh = _pvh_entry(data, entry, f"{format}: program header {index}") or pvh
        if entry.p_type == abi.PT_LOAD:
            segment = _segment(data, entry, bits, f"{format}: program header {index}")
            if segment.where.size:
                loads.append((segment, entry.p_vaddr))
    if not loads:
        raise ImageError(f"{format}: none of {header.e_phnum} program headers loads anything: no executable")
    loads.sort()
    check_apart((f"{format}: segment {index}", load.where) for index, (load, _) in enumerate(loads))
    segments = tuple(load for load, _ in loads)
    if pvh is not None and not any(where.start <= pvh < where.end for where, _, _ in segments):
        raise ImageError(f"{format}: the PVH entry {pvh:#x} is in none of its segments")
    start = _entry(header.e_entry, loads, format)
    return Image(
        format, data, segments, start, bits, long_entry=start if bits == 64 else None, pvh_entry=pvh
    )


def _segment(data: memoryview, entry: _ProgramHeader, bits: int, what: str) -> Segment:
    if entry.p_filesz > entry.p_memsz:
        raise ImageError(f"{what}: {entry.p_filesz:#x} bytes in the file, {entry.p_memsz:#x} in memory")
    # Where nothing is in the file, linkers leave an offset that may be past its end.
    if entry.p_filesz:
        check_file(data, entry.p_offset, entry.p_filesz, what)
    for kind, address in (("physical", entry.p_paddr), ("virtual", entry.p_vaddr)):
        if entry.p_memsz > (1 << bits) - address:
            raise ImageError(
                f"{what}: {entry.p_memsz:#x} bytes at {kind} address {address:#x} go past {bits} bits"
            )
    return Segment(GuestRange(GuestAddress(entry.p_paddr), entry.p_memsz), entry.p_offset, entry.p_filesz)


def _pvh_entry(data: memoryview, entry: _ProgramHeader, what: str) -> GuestAddress | None:
    """What Xen's note of a 32-bit entry says, if it is among these notes."""
    check_file(data, entry.p_offset, entry.p_filesz, what)
    at, end = entry.p_offset, entry.p_offset + entry.p_filesz
    # Names and descriptors are padded to 4 bytes; some linkers align notes to 8, but not Linux's.
    while end - at >= ctypes.sizeof(abi.Elf32_Nhdr):
        note = abi.Elf32_Nhdr.from_buffer_copy(data, at)
        name = at + ctypes.sizeof(note)
        descriptor = name + -(-note.n_namesz // 4) * 4
        at = descriptor + -(-note.n_descsz // 4) * 4
        if at > end:
            return None
        if note.n_type == xen.XEN_ELFNOTE_PHYS32_ENTRY and data[name:descriptor] == xen.XEN_ELFNOTE_NAME + b"\0":
            return GuestAddress(int.from_bytes(data[descriptor : descriptor + min(note.n_descsz, 8)], "little"))
    return None


def _entry(entry: int, loads: list[tuple[Segment, int]], format: Format) -> GuestAddress:
    for segment, _ in loads:
        if segment.where.start <= entry < segment.where.end:
            return GuestAddress(entry)
    for segment, virtual in loads:
        if virtual <= entry < virtual + segment.where.size:
            return GuestAddress(segment.where.start + entry - virtual)
    raise ImageError(f"{format}: entry {entry:#x} is in none of its segments")
