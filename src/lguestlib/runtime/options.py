"""What a launcher is asked for."""

from dataclasses import dataclass
from typing import Literal

from lguestlib.runtime.interface import InterfaceAddress

MEBIBYTE = 1 << 20
MEMORY = 64 * MEBIBYTE
SCRATCH_SIZE = 1 * MEBIBYTE

HypervisorName = Literal["auto", "kvm", "inprocess"]


@dataclass(frozen=True)
class DiskImage:
    """A disk in the file, or block device, at *path*."""

    path: str
    read_only: bool = False


@dataclass(frozen=True)
class ScratchDisk:
    """An empty disk in memory, of *size* bytes."""

    size: int = SCRATCH_SIZE


@dataclass(frozen=True)
class HostNetwork:
    """A TAP interface of the host's, with an IPv4 address there; *mac* is the guest's."""

    address: InterfaceAddress
    mac: bytes | None = None


@dataclass(frozen=True)
class BridgedNetwork:
    """A TAP interface that is a port of the host's *bridge*; *mac* is the guest's."""

    bridge: str
    mac: bytes | None = None


@dataclass(frozen=True)
class PrivateNetwork:
    """A TAP interface with *address* in a network namespace of the launcher's own.

    Where that may not be had: a host in this process.
    """

    address: InterfaceAddress


@dataclass(frozen=True)
class Randomness:
    """An entropy device."""


DeviceOption = DiskImage | ScratchDisk | HostNetwork | BridgedNetwork | PrivateNetwork | Randomness

DEFAULT_NETWORK = PrivateNetwork(InterfaceAddress(bytes([192, 168, 19, 1]), 24))
DEFAULT_DEVICES: tuple[DeviceOption, ...] = (DEFAULT_NETWORK, ScratchDisk(), Randomness())


@dataclass(frozen=True)
class MachineOptions:
    """A machine to launch: *memory* in bytes, *devices* in bus order, the console behind them.

    Without *kernel*, a path, the built-in guest runs; *arguments* are words of
    the guest's command line.
    """

    hypervisor: HypervisorName = "auto"
    memory: int = MEMORY
    devices: tuple[DeviceOption, ...] = DEFAULT_DEVICES
    kernel: str | None = None
    initrd: str | None = None
    arguments: tuple[str, ...] = ()
