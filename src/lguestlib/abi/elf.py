"""Executables, linux/elf.h and linux/elf-em.h, little-endian."""

import ctypes
from typing import Annotated

from lguestlib.abi.layout import Structure, u16, u32, u64

ELFMAG = b"\x7fELF"

EI_CLASS = 4
EI_DATA = 5
EI_VERSION = 6
EI_NIDENT = 16

ELFCLASS32 = 1
ELFCLASS64 = 2
ELFDATA2LSB = 1
EV_CURRENT = 1

ET_EXEC = 2
ET_DYN = 3
EM_386 = 3
EM_X86_64 = 62

PT_LOAD = 1
PT_INTERP = 3
PT_NOTE = 4

PF_X = 1
PF_W = 2
PF_R = 4


class Elf32_Ehdr(Structure):
    """linux/elf.h: the header of a 32-bit file."""

    e_ident: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * EI_NIDENT]
    e_type: u16
    e_machine: u16
    e_version: u32
    e_entry: u32
    e_phoff: u32
    e_shoff: u32
    e_flags: u32
    e_ehsize: u16
    e_phentsize: u16
    e_phnum: u16
    e_shentsize: u16
    e_shnum: u16
    e_shstrndx: u16


class Elf64_Ehdr(Structure):
    """linux/elf.h: the header of a 64-bit file."""

    e_ident: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * EI_NIDENT]
    e_type: u16
    e_machine: u16
    e_version: u32
    e_entry: u64
    e_phoff: u64
    e_shoff: u64
    e_flags: u32
    e_ehsize: u16
    e_phentsize: u16
    e_phnum: u16
    e_shentsize: u16
    e_shnum: u16
    e_shstrndx: u16


class Elf32_Phdr(Structure):
    """linux/elf.h: a segment of a 32-bit file."""

    p_type: u32
    p_offset: u32
    p_vaddr: u32
    p_paddr: u32
    p_filesz: u32
    p_memsz: u32
    p_flags: u32
    p_align: u32


class Elf64_Phdr(Structure):
    """linux/elf.h: a segment of a 64-bit file."""

    p_type: u32
    p_flags: u32
    p_offset: u64
    p_vaddr: u64
    p_paddr: u64
    p_filesz: u64
    p_memsz: u64
    p_align: u64


class Elf32_Nhdr(Structure):
    """linux/elf.h: a note's header, the same in both classes; the name and the descriptor follow."""

    n_namesz: u32
    n_descsz: u32
    n_type: u32
