"""The host's busybox, one program that is a whole user space where it is statically linked."""

import ctypes
import os
import shutil

from lguestlib.abi import elf
from lguestlib.memory.image.file import open_image
from lguestlib.memory.image.image import ImageError
from lguestlib.runtime.errors import LaunchError

NAMES = ("busybox", "busybox.static")
"""What distributions call it."""

_REMEDY = "apt-get install busybox-static"


def find_busybox(path: str | None = None) -> str:
    """Where a statically linked busybox is, in the folders of *path*, by default PATH.

    Raises LaunchError where there is none.
    """
    found = [place for name in NAMES if (place := shutil.which(name, path=path))]
    for place in found:
        if is_static(place):
            return place
    if found:
        raise LaunchError(f"{found[0]}: it is not statically linked, and so of no use to a guest ({_REMEDY})")
    raise LaunchError(f"{NAMES[0]}: not found, and the guest's programs are in it ({_REMEDY})")


def is_static(path: str | os.PathLike[str]) -> bool:
    """Whether the file is an executable without an interpreter to load libraries for it (ELF, PT_INTERP)."""
    try:
        with open_image(path) as data:
            return data[:4] == elf.ELFMAG and not any(kind == elf.PT_INTERP for kind in _segments(data))
    except (ImageError, ValueError):
        return False


def _segments(data: memoryview) -> list[int]:
    """The types of an ELF file's program headers.  Raises ValueError where the file ends before them."""
    header: elf.Elf32_Ehdr | elf.Elf64_Ehdr
    kind: type[elf.Elf32_Phdr | elf.Elf64_Phdr]
    if data[elf.EI_CLASS] == elf.ELFCLASS32:
        header, kind = elf.Elf32_Ehdr.from_buffer_copy(data), elf.Elf32_Phdr
    else:
        header, kind = elf.Elf64_Ehdr.from_buffer_copy(data), elf.Elf64_Phdr
    size = ctypes.sizeof(kind)
    places = range(header.e_phoff, header.e_phoff + header.e_phnum * size, size)
    return [kind.from_buffer_copy(data, place).p_type for place in places]
