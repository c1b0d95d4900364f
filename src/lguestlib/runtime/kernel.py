"""Puts a kernel, or the built-in guest, into a KVM machine, ready to run."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lguestlib.memory.image.file import open_image
from lguestlib.memory.image.image import ImageError
from lguestlib.memory.image.linux_boot import LinuxBoot, plain_setup, ram_map
from lguestlib.memory.image.parse import parse
from lguestlib.runtime import guest
from lguestlib.runtime.kvm import KvmMachine

COMMAND_LINE_SIZE = 65535
"""Bytes of command line for the built-in guest."""


def load_kernel(machine: KvmMachine, kernel: str | None, initrd: str | None, command_line: str) -> None:
    """Place the kernel at path *kernel*, or the built-in guest, and what it is told, and point the CPU at it.

    *initrd* is a path or None.  Raises ImageError, which names what it is about.
    """
    with ExitStack() as opened:
        ramdisk = None
        if initrd is not None:
            with _about("initrd "):
                ramdisk = opened.enter_context(open_image(initrd))
        with _about("kernel "):
            data = opened.enter_context(open_image(guest.image_path() if kernel is None else kernel))
        with _about(f"kernel {kernel}: "):
            image = parse(data)
            if image.bits != 32:
                raise ImageError(f"{image.format}: the entry is 64-bit; boot the bzImage made from it")
            image.place(machine.memory)
        setup = None
        if kernel is None:
            # It reads a line to its end: what 64 devices take is more than Linux does.
            setup = plain_setup()
            setup.cmdline_size = COMMAND_LINE_SIZE
        boot = LinuxBoot(image, ram_map(machine.memory), os.fsencode(command_line), ramdisk, setup)
        machine.boot(image.entry, boot.place(machine.memory).address)


@contextmanager
def _about(prefix: str) -> Iterator[None]:
    """Puts *prefix* before what an ImageError says."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{prefix}{error}") from None
