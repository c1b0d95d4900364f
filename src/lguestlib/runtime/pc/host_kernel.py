"""The Linux kernel that this host runs: its image and its modules, to boot a guest with."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.initramfs.drivers import resolve_drivers
from lguestlib.runtime.options import TransportName
from lguestlib.virtio.device import Device

IMAGES = ("/boot/vmlinuz-{release}", "/lib/modules/{release}/vmlinuz", "/boot/vmlinuz")
"""Where distributions have it."""

MODULES = "/lib/modules/{release}"

TRANSPORTS: dict[TransportName, str] = {"pci": "virtio_pci", "mmio": "virtio_mmio"}
"""The drivers of the ways to get at devices."""


@dataclass(frozen=True)
class HostKernel:
    """The image at *path*, and the folder of the modules of its *release*."""

    path: str
    modules: Path

    @classmethod
    def find(cls, root: Path = Path("/")) -> "HostKernel":
        """The kernel that runs here, below *root*.  Raises LaunchError."""
        release = os.uname().release
        places = [root / place.format(release=release).lstrip("/") for place in IMAGES]
        modules = root / MODULES.format(release=release).lstrip("/")
        path = next(filter(Path.is_file, places), None)
        if path is None:
            raise LaunchError(
                f"--linux: {places[0]}: No such file or directory"
                " (install this kernel's package, or name a kernel: run MEM KERNEL)"
            )
        return cls(str(path), modules)

    def drivers(
        self, devices: Iterable[Device], transport: TransportName, say: Callable[[str], None]
    ) -> list[Path]:
        """The modules to load for *devices* behind *transport*, in this order; as `resolve_drivers`."""
        return resolve_drivers(self.modules, devices, say, TRANSPORTS[transport])
