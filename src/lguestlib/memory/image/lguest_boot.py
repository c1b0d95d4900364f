"""What a 32-bit Linux kernel is told when it is lguest's guest.

As lguest's own launcher does it (Linux, Documentation/virtual/lguest/lguest.c): the
kernel is entered with ESI 0, where the boot parameters are, and finds in them which
kind of machine it is on (boot protocol 2.07, hardware_subarch).
"""

import ctypes
from dataclasses import dataclass

from lguestlib.abi import bootparam as abi
from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.bzimage import unpacked
from lguestlib.memory.image.image import Image, ImageError, check_apart, not_in_memory
from lguestlib.memory.image.initrd import PAGE
from lguestlib.memory.image.linux_boot import (
    COMMAND_LINE_SIZE,
    COMMAND_LINE_SIZE_BEFORE_2_06,
    E820Entry,
    boot_params,
    check_command_line,
)

VERSION = 0x0207
"""The boot protocol that has a hardware_subarch, whatever the image's own."""

KERNEL_ALIGNMENT = 0x100_0000

PARAMETERS_AT = GuestAddress(0)
COMMAND_LINE_AT = GuestAddress(ctypes.sizeof(abi.boot_params))


def is_32_bit(kernel: Image) -> bool:
    """Whether *kernel* is a 32-bit one: a bzImage is entered in that mode in any case."""
    return kernel.bits == 32 and not (kernel.setup and kernel.setup.xloadflags & abi.XLF_KERNEL_64)


@dataclass(frozen=True, eq=False)
class LguestBoot:
    """What to tell *kernel* in a guest with *size* bytes of RAM from 0."""

    kernel: Image
    size: int
    command_line: bytes = b""
    initrd: bytes | memoryview | None = None
    """The initial ramdisk's bytes; it goes to the top of RAM."""

    def place(self, memory: GuestMemory) -> None:
        """Write boot parameters, command line and initrd to *memory*; the kernel places itself, after this.

        Raises ImageError for a kernel that is not for 32 bits, and for what does not fit
        into RAM beside the rest, and writes nothing then.
        """
        self.check_kernel()
        setup = self.kernel.setup
        if setup is None:
            limit = COMMAND_LINE_SIZE
        else:
            limit = setup.cmdline_size or COMMAND_LINE_SIZE_BEFORE_2_06
        check_command_line(self.command_line, limit)
        header = abi.setup_header(
            version=VERSION,
            loadflags=abi.KEEP_SEGMENTS,
            cmd_line_ptr=COMMAND_LINE_AT,
            kernel_alignment=KERNEL_ALIGNMENT,
            hardware_subarch=abi.X86_SUBARCH_LGUEST,
        )
        taken = [
            ("boot parameters", GuestRange(PARAMETERS_AT, ctypes.sizeof(abi.boot_params))),
            ("command line", GuestRange(COMMAND_LINE_AT, len(self.command_line) + 1)),
        ]
        if self.initrd is not None:
            place = self._initrd_place(len(self.initrd))
            taken.append(("initrd", place))
            header.type_of_loader = abi.TYPE_OF_LOADER_UNDEFINED
            header.ramdisk_image, header.ramdisk_size = place
        for what, where in self._kernel_ranges():
            # One at a time: the kernel unpacks itself onto its own image.
            check_apart([*taken, (what, where)])

        if self.initrd is not None:
            memory.write(GuestAddress(header.ramdisk_image), self.initrd)
        memory.write(COMMAND_LINE_AT, self.command_line + b"\0")
        ram = E820Entry(GuestRange(GuestAddress(0), self.size))
        memory.write(PARAMETERS_AT, bytes(boot_params(header, [ram])))

    def check_kernel(self) -> None:
        """Raise ImageError for a kernel that is not for 32 bits, or that RAM does not hold."""
        if not is_32_bit(self.kernel):
            raise ImageError(f"{self.kernel.format}: a 64-bit kernel: lguest runs 32-bit ones alone")
        for what, where in self._kernel_ranges():
            if where.end > self.size:
                raise not_in_memory(where, what, self.size)

    def _kernel_ranges(self) -> list[tuple[str, GuestRange]]:
        """All that the kernel takes, at first and when it has unpacked itself, as what it is told makes it."""
        kernel = self.kernel
        ranges = [
            (f"{kernel.format}: segment {index}", segment.where) for index, segment in enumerate(kernel.segments)
        ]
        if kernel.setup and (room := unpacked(kernel.setup, KERNEL_ALIGNMENT)):
            ranges.append((f"{kernel.format}: the unpacked kernel", room))
        return ranges

    def _initrd_place(self, size: int) -> GuestRange:
        if not size:
            raise ImageError("initrd: empty")
        room = -(-size // PAGE) * PAGE
        if room > self.size:
            raise ImageError(f"initrd: {size:#x} bytes do not fit into {self.size:#x} bytes of memory")
        return GuestRange(GuestAddress(self.size - room), room)
