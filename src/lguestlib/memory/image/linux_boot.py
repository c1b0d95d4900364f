"""What a Linux kernel is told at its 32- or 64-bit entry: boot parameters, command line, initrd.

Documentation/arch/x86/boot.rst (32- and 64-bit boot protocols), zero-page.rst.  The
kernel is entered at its image's entry with ESI holding the address of the boot
parameters, EBX, EBP and EDI zero, in protected mode with flat segments and
without paging; or at its `long_entry` with RSI holding it, as `long_mode` prepares.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lguestlib.abi import bootparam as abi
from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.bzimage import LOAD_ADDRESS, PROTOCOL_MIN
from lguestlib.memory.image.image import Image, ImageError, check_apart, check_memory
from lguestlib.memory.image.initrd import initrd_range

COMMAND_LINE_SIZE = 2047
"""Bytes a command line may have, without its NUL, in x86 kernels that do not say."""

COMMAND_LINE_SIZE_BEFORE_2_06 = 255
"""What a cmdline_size of zero stands for."""

INITRD_ADDR_MAX_BEFORE_2_03 = 0x37FFFFFF
"""What an initrd_addr_max of zero stands for."""


HOLE = GuestRange(GuestAddress(0xA0000), 0x60000)
"""Where a PC has its display and its BIOS."""


class E820Entry(NamedTuple):
    """A range of the memory map, with its E820_TYPE."""

    where: GuestRange
    type: int = abi.E820_TYPE_RAM


class BootParameters(NamedTuple):
    """Where they are, for ESI, and where the command line, with its NUL, and the initrd went."""

    address: GuestAddress
    command_line: GuestRange
    initrd: GuestRange | None


@dataclass(frozen=True, eq=False)
class LinuxBoot:
    """What to tell *kernel*.  Everything not named here is zero."""

    kernel: Image
    e820: Sequence[E820Entry]
    """The memory map, up to 128 entries; `ram_map` makes one of all of guest memory.

    Linux on a PC wants two at least: it takes a single one for a mistake of the
    BIOS's, and believes that there is no memory.
    """
    command_line: bytes = b""
    initrd: bytes | memoryview | None = None
    """The initial ramdisk's bytes; it goes as high as the map and the header's initrd_addr_max allow."""
    setup: abi.setup_header | None = None
    """The header to fill in a copy of: the image's own by default, or a plain one for an ELF kernel.

    Give one to ask for more, such as a hardware_subarch and KEEP_SEGMENTS.
    """
    parameters_at: GuestAddress = GuestAddress(0x7000)
    """Where the boot parameters go, 4096 bytes."""
    command_line_at: GuestAddress = GuestAddress(0x20000)
    """Where the command line and its NUL go."""
    rsdp: GuestAddress | None = None
    """Where the ACPI tables begin, if there are any; Linux before 5.0 looks for them below 1 MiB."""

    def place(self, memory: GuestMemory) -> BootParameters:
        """Write boot parameters, command line and initrd to *memory*; the kernel places itself.

        Raises ImageError where they do not fit, or would be where the kernel is,
        and writes nothing then.
        """
        header = abi.setup_header.from_buffer_copy(self.setup or self.kernel.setup or plain_setup())
        parameters = GuestRange(self.parameters_at, ctypes.sizeof(abi.boot_params))
        command_line = GuestRange(self.command_line_at, len(self.command_line) + 1)
        check_command_line(self.command_line, header.cmdline_size or COMMAND_LINE_SIZE_BEFORE_2_06)
        check_map(self.e820, memory, 2 if header.hardware_subarch == abi.X86_SUBARCH_PC else 1)
        named = [("boot parameters", parameters), ("command line", command_line)]
        for what, where in named:
            if where.end > 1 << 32:
                raise ImageError(f"{what}: {where} is past the 32 bits of address the kernel starts with")
            check_memory(memory, where, what)
        for kernel in self.kernel.occupied:
            check_apart([*named, ("the kernel", kernel)])

        initrd = None
        if self.initrd is not None:
            last = header.initrd_addr_max or INITRD_ADDR_MAX_BEFORE_2_03
            initrd = initrd_place(self.kernel, self.e820, len(self.initrd), last, [parameters, command_line])
            memory.write(initrd.start, self.initrd)
            header.ramdisk_image, header.ramdisk_size = initrd
        header.cmd_line_ptr = command_line.start
        header.type_of_loader = header.type_of_loader or abi.TYPE_OF_LOADER_UNDEFINED
        memory.write(command_line.start, self.command_line + b"\0")
        told = boot_params(header, self.e820)
        told.acpi_rsdp_addr = self.rsdp or 0
        memory.write(parameters.start, bytes(told))
        return BootParameters(parameters.start, command_line, initrd)


def check_command_line(command_line: bytes, limit: int) -> None:
    """Raise ImageError for a NUL in *command_line*, or more than *limit* bytes without the one behind it."""
    if b"\0" in command_line:
        raise ImageError(f"command line: has a NUL at byte {command_line.index(0)}")
    if len(command_line) > limit:
        raise ImageError(f"command line: {len(command_line)} bytes, this kernel takes {limit}")


def check_map(e820: Sequence[E820Entry], memory: GuestMemory, least: int) -> None:
    """Raise ImageError for fewer entries than *least*, more than the kernel takes, or RAM that *memory* is not."""
    count, most = len(e820), abi.E820_MAX_ENTRIES_ZEROPAGE
    if not least <= count <= most:
        raise ImageError(f"memory map: {count} entries, this kernel takes {least} to {most}")
    for index, (where, type) in enumerate(e820):
        if where.start < 0 or not 0 < where.size < 1 << 64 or where.end > 1 << 64:
            raise ImageError(f"memory map: entry {index}, {where}, is no range of 64-bit addresses")
        if type == abi.E820_TYPE_RAM:
            check_memory(memory, where, f"memory map: entry {index}")


def initrd_place(
    kernel: Image, e820: Sequence[E820Entry], size: int, last: int, taken: Sequence[GuestRange]
) -> GuestRange:
    """Where an initrd of *size* bytes goes, up to address *last*, beside *kernel* and what is *taken*.

    Raises ImageError.
    """
    ram = [entry.where for entry in e820 if entry.type == abi.E820_TYPE_RAM]
    # The first MiB is the BIOS's on a PC, and Linux treats it so.
    return initrd_range(size, ram, last, [GuestRange(GuestAddress(0), LOAD_ADDRESS), *kernel.occupied, *taken])


def boot_params(header: abi.setup_header, e820: Sequence[E820Entry]) -> abi.boot_params:
    """The boot parameters that hold *header* and the memory map, and are zero elsewhere."""
    parameters = abi.boot_params(hdr=header, e820_entries=len(e820))
    for index, (where, type) in enumerate(e820):
        parameters.e820_table[index] = abi.boot_e820_entry(where.start, where.size, type)
    return parameters


def plain_setup() -> abi.setup_header:
    """A header for a kernel that comes without one, an ELF file, as Linux on a PC expects it."""
    return abi.setup_header(
        boot_flag=abi.BOOT_FLAG,
        header=abi.HEADER_MAGIC,
        version=PROTOCOL_MIN,
        loadflags=abi.LOADED_HIGH,
        initrd_addr_max=INITRD_ADDR_MAX_BEFORE_2_03,
        kernel_alignment=0x1000000,
        cmdline_size=COMMAND_LINE_SIZE,
    )


def ram_map(memory: GuestMemory) -> list[E820Entry]:
    """All of *memory* as RAM, adjacent regions in one entry, without the PC's hole below 1 MiB."""
    ranges: list[GuestRange] = []
    for region in memory.regions:
        for start, end in (
            (region.base, min(region.end, HOLE.start)),
            (max(region.base, HOLE.end), region.end),
        ):
            if start >= end:
                continue
            if ranges and ranges[-1].end == start:
                start = ranges.pop().start
            ranges.append(GuestRange(start, end - start))
    return [E820Entry(where) for where in ranges]
