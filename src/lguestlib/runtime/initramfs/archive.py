"""Puts busybox, ``init.sh`` and a kernel's modules into an archive that the kernel boots to."""

from collections.abc import Iterable
from pathlib import Path

from lguestlib.memory.image.newc import NewcArchive
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.initramfs.busybox import find_busybox
from lguestlib.runtime.initramfs.modules import read_module


def make_initramfs(
    modules: Iterable[Path] = (), commands: bytes | None = None, busybox: str | None = None
) -> NewcArchive:
    """An initramfs whose init loads *modules* in order, and then gives the console to a shell.

    *commands*, if not None, is a shell's script that runs in place of a person's
    shell.  *busybox* is a path, by default the host's.  What the guest should find
    beyond that can be added.  Raises LaunchError.
    """
    archive = NewcArchive()
    archive.file("init", init_path().read_bytes(), 0o755)
    archive.file("bin/busybox", _read(busybox or find_busybox()), 0o755)
    archive.symlink("bin/sh", "busybox")
    for path in ("proc", "sys", "root", "run"):
        archive.directory(path)
    archive.directory("tmp", 0o1777)
    # What init's first messages go to, before there is a devtmpfs.
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3, 0o666)
    for number, module in enumerate(modules):
        archive.file(f"modules/{number:03}-{module.name.partition('.ko')[0]}.ko", read_module(module))
    if commands is not None:
        archive.file("commands", commands)
    return archive


def init_path() -> Path:
    """Where the script is that the kernel starts."""
    return Path(__file__).with_name("init.sh")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise LaunchError(f"{path}: {error.strerror}") from None
