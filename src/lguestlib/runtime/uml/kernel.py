"""A User-mode Linux kernel: where it is, its release, and the drivers that it has as modules."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.initramfs.drivers import resolve_drivers
from lguestlib.virtio.device import Device

NAMES = ("linux.uml", "linux")
"""What distributions call it."""

MODULES = ("/usr/lib/uml/modules", "/lib/modules")
"""Where they have its modules, in a folder for each release."""

_RELEASE = re.compile(r"\d+\.\d+\S*")
_VERSION_SECONDS = 10


@dataclass(frozen=True)
class UmlKernel:
    """The kernel at *path* of that *release*, such as 6.1.176."""

    path: str
    release: str

    @classmethod
    def find(cls, path: str | None = None) -> "UmlKernel":
        """The kernel at *path*, by default the distribution's.  Raises LaunchError."""
        if path is None:
            path = next(filter(None, map(shutil.which, NAMES)), None)
            if path is None:
                raise LaunchError(f"uml: {NAMES[0]}: not found (apt-get install user-mode-linux)")
        try:
            command = [os.path.abspath(path), "--version"]
            asked = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_VERSION_SECONDS
            )
        except OSError as error:
            raise LaunchError(f"kernel {path}: {error.strerror} (name a User-mode Linux)") from None
        except subprocess.TimeoutExpired:
            raise LaunchError(f"kernel {path}: it does not tell its --version: no User-mode Linux") from None
        release = asked.stdout.decode(errors="replace").strip()
        if not _RELEASE.fullmatch(release):
            raise LaunchError(f"kernel {path}: its --version is no kernel's: no User-mode Linux")
        return cls(command[0], release)

    def drivers(self, devices: Iterable[Device], say: Callable[[str], None]) -> list[Path]:
        """The modules to load for *devices*, in this order; none of a kernel that has no modules.

        *say* is told of a device for which there is no driver.  Raises LaunchError
        where there is none for a console.
        """
        folder = next(filter(Path.is_dir, (Path(place, self.release) for place in MODULES)), None)
        if folder is None:
            return []
        return resolve_drivers(folder, devices, say)
