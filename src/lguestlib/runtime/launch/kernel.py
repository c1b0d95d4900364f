"""A kernel, its initrd, and the built-in guest: found, opened, and told apart."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import NamedTuple

from lguestlib.abi.bootparam import setup_header
from lguestlib.memory.image.file import open_image
from lguestlib.memory.image.image import Image, ImageError
from lguestlib.memory.image.lguest_boot import is_32_bit
from lguestlib.memory.image.linux_boot import plain_setup
from lguestlib.memory.image.parse import parse
from lguestlib.runtime import guest

COMMAND_LINE_SIZE = 65535
"""Bytes of command line for the built-in guest."""


def setup_of(kernel: str | None) -> setup_header | None:
    """What the built-in guest, if *kernel* is None, would say of itself: a user's kernel does so.

    It reads a line to its end, and what 64 devices take is more than Linux does.
    """
    if kernel is not None:
        return None
    setup = plain_setup()
    setup.cmdline_size = COMMAND_LINE_SIZE
    return setup


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
        with opened(kernel, None) as (image, _):
            return KernelKind(is_32_bit(image), image.setup is not None or image.bits == 64)
    except ImageError:
        return KernelKind(False, False)


@contextmanager
def opened(kernel: str | None, initrd: str | None) -> Iterator[tuple[Image, memoryview | None]]:
    """The image at path *kernel*, or the built-in guest's, and the bytes at path *initrd*.

    Raises ImageError, which names what it is about.
    """
    with ExitStack() as stack:
        ramdisk = None
        if initrd is not None:
            with about("initrd "):
                ramdisk = stack.enter_context(open_image(initrd))
        with about("kernel "):
            data = stack.enter_context(open_image(os.fspath(guest.image_path()) if kernel is None else kernel))
        with about(f"kernel {kernel}: "):
            image = parse(data)
        yield image, ramdisk


@contextmanager
def about(prefix: str) -> Iterator[None]:
    """Puts *prefix* before what an ImageError says."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{prefix}{error}") from None
