"""Puts a kernel, or the built-in guest, into a machine, ready to run."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import NamedTuple

from lguestlib.abi.bootparam import setup_header
from lguestlib.memory.image.file import open_image
from lguestlib.memory.image.image import Image, ImageError
from lguestlib.memory.image.lguest_boot import is_32_bit
from lguestlib.memory.image.linux_boot import LinuxBoot, plain_setup, ram_map
from lguestlib.memory.image.long_mode import place_long_mode
from lguestlib.memory.image.parse import parse
from lguestlib.memory.image.pvh_boot import PvhBoot
from lguestlib.runtime import guest
from lguestlib.runtime.kvm import KvmMachine
from lguestlib.runtime.lguest.machine import LguestMachine
from lguestlib.runtime.pc.machine import PcMachine

COMMAND_LINE_SIZE = 65535
"""Bytes of command line for the built-in guest."""


def load_kernel(machine: KvmMachine, kernel: str | None, initrd: str | None, command_line: str) -> None:
    """Place the kernel at path *kernel*, or the built-in guest, and what it is told, and point the CPU at it.

    *initrd* is a path or None.  Raises ImageError, which names what it is about.
    """
    with _opened(os.fspath(guest.image_path()) if kernel is None else kernel, initrd) as (image, ramdisk):
        with _about(f"kernel {kernel}: "):
            if image.bits != 32:
                raise ImageError(f"{image.format}: the entry is 64-bit; boot the bzImage made from it")
            image.place(machine.memory)
        setup = _patient_setup() if kernel is None else None
        boot = LinuxBoot(image, ram_map(machine.memory), os.fsencode(command_line), ramdisk, setup)
        machine.boot(image.entry, boot.place(machine.memory).address)


def load_pc_kernel(
    machine: PcMachine, kernel: str | None, initrd: str | bytes | None, command_line: str
) -> None:
    """As `load_kernel`, for a PC, whose devices are all there; *initrd* may be the bytes.

    A kernel is entered in long mode where it can be, and by PVH or in protected mode
    otherwise.  Raises ImageError.
    """
    path = initrd if isinstance(initrd, str) else None
    with _opened(os.fspath(guest.image_path()) if kernel is None else kernel, path) as (image, mapped):
        ramdisk = initrd if isinstance(initrd, bytes) else mapped
        memory, words, e820 = machine.memory, os.fsencode(command_line), machine.memory_map()
        with _about(f"kernel {kernel}: "):
            image.place(memory)
        rsdp = machine.place_firmware()
        if image.pvh_entry is not None:
            info = PvhBoot(image, e820, words, ramdisk, rsdp).place(memory).address
            machine.boot_32(image.pvh_entry, ebx=info)
            return
        setup = _patient_setup() if kernel is None else None
        told = LinuxBoot(image, e820, words, ramdisk, setup, rsdp=rsdp).place(memory)
        if image.long_entry is not None:
            machine.boot_64(image.long_entry, told.address, place_long_mode(memory))
        else:
            machine.boot_32(image.entry, esi=told.address)


def _patient_setup() -> setup_header:
    """The built-in guest's: it reads a line to its end, and what 64 devices take is more than Linux does."""
    setup = plain_setup()
    setup.cmdline_size = COMMAND_LINE_SIZE
    return setup


def load_lguest_kernel(machine: LguestMachine, kernel: str, initrd: str | None, command_line: str) -> None:
    """As `load_kernel`, for lguest."""
    with _opened(kernel, initrd) as (image, ramdisk):
        with _about(f"kernel {kernel}: "):
            machine.check_kernel(image)
        machine.boot(image, ramdisk, os.fsencode(command_line))


class KernelKind(NamedTuple):
    """What there is to know of a kernel before it is loaded: whether it is a 32-bit one, and whether it wants a PC."""

    is_32_bit: bool
    wants_pc: bool


@lru_cache(maxsize=1)
def kernel_kind(kernel: str) -> KernelKind:
    """The kind of the kernel at path *kernel*: a PC is for a bzImage and for 64 bits.  Neither for what is no kernel.

    Asked for again it is known: to unpack one that is compressed takes its time.
    """
    try:
        with _opened(kernel, None) as (image, _):
            return KernelKind(is_32_bit(image), image.setup is not None or image.bits == 64)
    except ImageError:
        return KernelKind(False, False)


@contextmanager
def _opened(kernel: str, initrd: str | None) -> Iterator[tuple[Image, memoryview | None]]:
    """The image at path *kernel* and the bytes at path *initrd*.  Raises ImageError."""
    with ExitStack() as opened:
        ramdisk = None
        if initrd is not None:
            with _about("initrd "):
                ramdisk = opened.enter_context(open_image(initrd))
        with _about("kernel "):
            data = opened.enter_context(open_image(kernel))
        with _about(f"kernel {kernel}: "):
            image = parse(data)
        yield image, ramdisk


@contextmanager
def _about(prefix: str) -> Iterator[None]:
    """Puts *prefix* before what an ImageError says."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{prefix}{error}") from None
