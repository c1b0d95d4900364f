"""The built-in guest: a small program that drives every device from the other side of its rings.

It is a freestanding 32-bit executable, ``guest.elf``, loaded and entered as
Linux is (the 32-bit boot protocol).  It finds its virtio-mmio devices on the
command line, answers ARP and ping, and offers a shell on the console.  The C it
is made of stands beside it, with a Makefile; a good order to read it in is
``start.S``, ``guest.c``, ``virtio.c``, a driver (``rng.c`` is the smallest),
``shell.c``.
"""

from pathlib import Path


def image_path() -> Path:
    """Where the executable is: an ELF32 for an i386, its segments from 1 MiB up."""
    return Path(__file__).with_name("guest.elf")
