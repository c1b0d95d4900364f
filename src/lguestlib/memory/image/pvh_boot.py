"""What a kernel is told at its PVH entry (xen/arch-x86/hvm/start_info.h; Xen, docs/misc/pvh.pandoc).

It is entered with EBX holding the address of the start information, in protected
mode with flat segments and without paging.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from lguestlib.abi import xen as abi
from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.image import Image, check_apart, check_memory
from lguestlib.memory.image.linux_boot import (
    COMMAND_LINE_SIZE,
    E820Entry,
    BootParameters,
    check_command_line,
    check_map,
    initrd_place,
)

VERSION = 1
"""The first that has a memory map."""

INITRD_LAST = 0x7FFF_FFFF


@dataclass(frozen=True, eq=False)
class PvhBoot:
    """What to tell *kernel*, an image with a `pvh_entry`; as `LinuxBoot`."""

    kernel: Image
    e820: Sequence[E820Entry]
    command_line: bytes = b""
    initrd: bytes | memoryview | None = None
    rsdp: GuestAddress | None = None
    start_info_at: GuestAddress = GuestAddress(0x6000)
    """Where the start information goes, and behind it module list and memory map: a page is enough."""
    command_line_at: GuestAddress = GuestAddress(0x20000)

    def place(self, memory: GuestMemory) -> BootParameters:
        """Write all of it to *memory*; the kernel places itself.

        Raises ImageError where it does not fit, or would be where the kernel is, and
        writes nothing then.
        """
        check_command_line(self.command_line, COMMAND_LINE_SIZE)
        check_map(self.e820, memory, 1)
        module_at = self.start_info_at + ctypes.sizeof(abi.hvm_start_info)
        map_at = module_at + ctypes.sizeof(abi.hvm_modlist_entry)
        end = map_at + len(self.e820) * ctypes.sizeof(abi.hvm_memmap_table_entry)
        info = GuestRange(self.start_info_at, end - self.start_info_at)
        command_line = GuestRange(self.command_line_at, len(self.command_line) + 1)
        named = [("start information", info), ("command line", command_line)]
        for what, where in named:
            check_memory(memory, where, what)
        for kernel in self.kernel.occupied:
            check_apart([*named, ("the kernel", kernel)])
        initrd = None
        if self.initrd is not None:
            initrd = initrd_place(
                self.kernel, self.e820, len(self.initrd), INITRD_LAST, [info, command_line]
            )
            memory.write(initrd.start, self.initrd)
        module = abi.hvm_modlist_entry(*initrd) if initrd else abi.hvm_modlist_entry()
        start = abi.hvm_start_info(
            magic=abi.XEN_HVM_START_MAGIC_VALUE, version=VERSION, nr_modules=int(initrd is not None),
            modlist_paddr=module_at, cmdline_paddr=command_line.start, rsdp_paddr=self.rsdp or 0,
            memmap_paddr=map_at, memmap_entries=len(self.e820),
        )  # fmt: skip
        entries = (abi.hvm_memmap_table_entry(where.start, where.size, type) for where, type in self.e820)
        memory.write(command_line.start, self.command_line + b"\0")
        memory.write(info.start, bytes(start) + bytes(module) + b"".join(map(bytes, entries)))
        return BootParameters(info.start, command_line, initrd)
