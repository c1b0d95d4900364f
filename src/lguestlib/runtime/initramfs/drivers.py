"""The drivers of our devices: the modules that a guest's kernel has for them, if they are not built in."""

from collections.abc import Callable, Iterable
from pathlib import Path

from lguestlib.abi.virtio_ids import VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_RNG
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.initramfs.modules import resolve
from lguestlib.virtio.device import Device

DRIVERS = {
    VIRTIO_ID_NET: "virtio_net",
    VIRTIO_ID_BLOCK: "virtio_blk",
    VIRTIO_ID_CONSOLE: "virtio_console",
    VIRTIO_ID_RNG: "virtio_rng",
}


def resolve_drivers(
    modules: Path, devices: Iterable[Device], say: Callable[[str], None], transport: str | None = None
) -> list[Path]:
    """The files to load, in this order, for *devices* behind the bus that module *transport* drives.

    *modules* is the kernel's folder.  *say* is told of a device for which there is no
    driver.  Raises LaunchError where there is none for a console or for the bus.
    """
    wanted = [transport] if transport else []
    for device in devices:
        name = DRIVERS[device.device_type]
        try:
            resolve(modules, [name])
            wanted.append(name)
        except LaunchError as error:
            if device.device_type == VIRTIO_ID_CONSOLE:
                raise
            say(f"{device.name} is there, but out of the guest's reach: {error}")
    return resolve(modules, wanted)
