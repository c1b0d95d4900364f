"""Linux's bzImage, as the 32- and 64-bit boot protocols have it (Documentation/arch/x86/boot.rst).

The setup sectors are for a BIOS and stay where they are; the rest goes to 1 MiB
and is entered at code32_start, or behind it in long mode.
"""

import ctypes

from lguestlib.abi import bootparam as abi
from lguestlib.abi.layout import offset_of
from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.image.image import Image, ImageError, Segment, check_file

LOAD_ADDRESS = GuestAddress(0x100000)
"""Where the protected-mode part goes when LOADED_HIGH is set."""

LONG_ENTRY = 0x200
"""Where the 64-bit entry is, in bytes from the 32-bit one, in a kernel that has it."""

PROTOCOL_MIN = 0x0206
"""The oldest protocol taken: Linux 2.6.22, the first to tell how long a command line may be."""

_HEADER = offset_of(abi.boot_params, "hdr")
_FLAG = _HEADER + offset_of(abi.setup_header, "boot_flag")
_MAGIC = _LENGTH_BASE = _HEADER + offset_of(abi.setup_header, "header")
"""What the second byte of the jump counts the header's length from."""
_SECTOR = 512
_SECTORS_DEFAULT = 4


def has_boot_flag(data: memoryview) -> bool:
    """Whether *data* has a boot sector's signature: a kernel's, or any disk's."""
    return data[_FLAG : _FLAG + 2] == abi.BOOT_FLAG.to_bytes(2, "little")


def is_bzimage(data: memoryview) -> bool:
    """Whether *data* has a boot sector's signature and Linux's behind it."""
    return has_boot_flag(data) and data[_MAGIC : _MAGIC + 4] == abi.HEADER_MAGIC.to_bytes(4, "little")


def parse_bzimage(data: memoryview) -> Image:
    """The kernel in *data*, of which `is_bzimage` is true.  Raises ImageError."""
    header = _setup_header(data)
    if not header.loadflags & abi.LOADED_HIGH:
        raise ImageError(f"bzImage: load flags {header.loadflags:#x}: a zImage, for low memory: make bzImage")
    sectors = header.setup_sects or _SECTORS_DEFAULT
    start = (sectors + 1) * _SECTOR
    length = len(data) - start
    if length <= 0:
        raise ImageError(
            f"bzImage: {sectors} setup sectors end at {start:#x},"
            f" the file at {len(data):#x}: it is cut short or damaged"
        )
    # syssize counts paragraphs, the last of them perhaps begun only.
    check_file(data, start, (header.syssize - 1) * 16 + 1, "bzImage: the protected-mode code")
    where = GuestRange(LOAD_ADDRESS, length)
    if not where.start <= header.code32_start < where.end:
        raise ImageError(f"bzImage: entry {header.code32_start:#x} is outside the code, {where}")
    return Image(
        "bzImage",
        data,
        (Segment(where, start, length),),
        GuestAddress(header.code32_start),
        32,
        header,
        unpacked(header, header.kernel_alignment),
        _long_entry(header, where),
    )


def _long_entry(header: abi.setup_header, where: GuestRange) -> GuestAddress | None:
    entry = GuestAddress(header.code32_start + LONG_ENTRY)
    return entry if header.xloadflags & abi.XLF_KERNEL_64 and entry < where.end else None


def _setup_header(data: memoryview) -> abi.setup_header:
    """A copy of the header, as long as it says it is."""
    check_file(data, _HEADER, ctypes.sizeof(abi.setup_header), "bzImage: setup header")
    whole = abi.setup_header.from_buffer_copy(data, _HEADER)
    if whole.version < PROTOCOL_MIN:
        raise ImageError(
            f"bzImage: boot protocol {_version(whole.version)}:"
            f" {_version(PROTOCOL_MIN)} is the oldest known here, Linux 2.6.22"
        )
    size = _LENGTH_BASE + (whole.jump >> 8) - _HEADER
    least = offset_of(abi.setup_header, "hardware_subarch")
    if size < least:
        raise ImageError(
            f"bzImage: a header of {size:#x} bytes, {least:#x} at least"
            f" with boot protocol {_version(whole.version)}"
        )
    size = min(size, ctypes.sizeof(whole))
    return abi.setup_header.from_buffer_copy(bytes(whole)[:size].ljust(ctypes.sizeof(whole), b"\0"))


def unpacked(header: abi.setup_header, kernel_alignment: int) -> GuestRange | None:
    """The memory that init_size asks for, boot protocol 2.10 on, where the kernel will be.

    *kernel_alignment* is what the boot parameters say, in bytes.
    """
    if not header.init_size:
        return None
    start = header.pref_address
    if header.relocatable_kernel:
        alignment = kernel_alignment or 1
        start = -(-max(LOAD_ADDRESS, start) // alignment) * alignment
    return GuestRange(GuestAddress(start), header.init_size)


def _version(version: int) -> str:
    return f"{version >> 8}.{version & 0xFF:02}"
