"""ELF headers, read off a file that the kernel runs."""

import ctypes
import os
import struct
from pathlib import Path

import interpreters
import pytest

from lguestlib.abi import elf
from lguestlib.abi.elf import Elf32_Ehdr, Elf32_Phdr, Elf64_Ehdr, Elf64_Phdr


def test_this_interpreters_own_headers_make_sense() -> None:
    image = Path("/proc/self/exe").read_bytes()
    wide = image[elf.EI_CLASS] == elf.ELFCLASS64
    header = Elf64_Ehdr.from_buffer_copy(image) if wide else Elf32_Ehdr.from_buffer_copy(image)
    assert bytes(header.e_ident[:4]) == elf.ELFMAG
    assert header.e_type in (elf.ET_EXEC, elf.ET_DYN)
    assert header.e_version == header.e_ident[elf.EI_VERSION] == elf.EV_CURRENT
    kind = Elf64_Phdr if wide else Elf32_Phdr
    assert (header.e_ehsize, header.e_phentsize) == (ctypes.sizeof(header), ctypes.sizeof(kind))
    segments = [
        kind.from_buffer_copy(image, header.e_phoff + index * header.e_phentsize)
        for index in range(header.e_phnum)
    ]
    loaded = [segment for segment in segments if segment.p_type == elf.PT_LOAD]
    assert all(segment.p_filesz <= segment.p_memsz for segment in loaded)
    entered = [segment for segment in loaded if 0 <= header.e_entry - segment.p_vaddr < segment.p_memsz]
    assert [segment.p_flags & elf.PF_X for segment in entered] == [elf.PF_X]


def test_a_32_bit_programs_headers_make_sense() -> None:
    command = interpreters.i386()
    if command is None:
        pytest.skip("no 32-bit program at hand (tests/i386/fetch unpacks some)")
    root = Path(os.path.dirname(command[0])).parent.parent
    image = next(root.glob("usr/bin/python3.*[0-9]")).read_bytes()
    header = Elf32_Ehdr.from_buffer_copy(image)
    assert (header.e_ident[elf.EI_CLASS], header.e_ident[elf.EI_DATA]) == (elf.ELFCLASS32, elf.ELFDATA2LSB)
    assert (header.e_machine, header.e_ehsize) == (elf.EM_386, ctypes.sizeof(Elf32_Ehdr))
    segments = [
        Elf32_Phdr.from_buffer_copy(image, header.e_phoff + index * header.e_phentsize)
        for index in range(header.e_phnum)
    ]
    assert elf.PT_INTERP in [segment.p_type for segment in segments]
    assert struct.unpack_from("<I", image, 24)[0] == header.e_entry
