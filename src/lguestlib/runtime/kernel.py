"""Puts a kernel, or the built-in guest, into a KVM machine, ready to run."""

from contextlib import ExitStack

from lguestlib.memory.image.file import open_image
from lguestlib.memory.image.image import Image, ImageError
from lguestlib.memory.image.linux_boot import LinuxBoot, ram_map
from lguestlib.memory.image.parse import parse
from lguestlib.runtime import guest
from lguestlib.runtime.kvm import KvmMachine


def load_kernel(machine: KvmMachine, kernel: str | None, initrd: str | None, command_line: str) -> None:
    """Place the kernel at path *kernel*, or the built-in guest, and what it is told, and point the CPU at it.

    *initrd* is a path or None.  Raises ImageError, which names the file.
    """
    with ExitStack() as opened:
        ramdisk = opened.enter_context(open_image(initrd)) if initrd else None
        data = opened.enter_context(open_image(kernel or guest.image_path()))
        image = _parse(data, kernel)
        image.place(machine.memory)
        boot = LinuxBoot(image, ram_map(machine.memory), command_line.encode(), ramdisk)
        machine.boot(image.entry, boot.place(machine.memory).address)


def _parse(data: memoryview, kernel: str | None) -> Image:
    try:
        image = parse(data)
    except ImageError as error:
        raise ImageError(f"{kernel}: {error}") from None
    if image.bits != 32:
        raise ImageError(f"{kernel}: {image.format}: its entry is 64-bit; boot the bzImage made from it instead")
    return image
