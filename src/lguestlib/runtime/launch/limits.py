"""How large a machine may be."""

import os

from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.options import MEBIBYTE

MEMORY_MIN = 4 * MEBIBYTE


def check_memory(size: int, most: int, least: int = MEMORY_MIN) -> None:
    """Raise LaunchError for *size* bytes of memory where a guest can have *least* to *most*, or this host has less."""
    given = f"--memory {size // MEBIBYTE}"
    if size < least:
        raise LaunchError(f"{given}: at least {least // MEBIBYTE} MiB are needed")
    if size > most:
        raise LaunchError(f"{given}: at most {most // MEBIBYTE} MiB fit below the devices")
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > held:
        raise LaunchError(f"{given}: this host has {held // MEBIBYTE} MiB (give the guest less)")


def check_bus(devices: int, most: int) -> None:
    """Raise LaunchError for more *devices* than a bus takes, the console not counted."""
    if devices + 1 > most:
        raise LaunchError(
            f"{devices + 1} devices: the bus has room for {most}, the console included"
            " (name fewer --block, --tunnet and --rng)"
        )
