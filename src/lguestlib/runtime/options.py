"""What a launcher is asked for."""

from dataclasses import dataclass
from typing import Literal

from lguestlib.runtime.interface import InterfaceAddress

MEBIBYTE = 1 << 20
MEMORY = 64 * MEBIBYTE
SCRATCH_SIZE = 1 * MEBIBYTE

LINUX_MEMORY = 256 * MEBIBYTE

HypervisorName = Literal["auto", "kvm", "lguest", "inprocess", "uml"]
TransportName = Literal["pci", "mmio"]
AioName = Literal["sync", "io_uring"]


@dataclass(frozen=True)
class DiskImage:
    """A disk in the file, or block device, at *path*, with so many *queues*.

    *asked*: what the user puts before the path, and behind it for a read-only one.
    *aio*: whether a queue does one request after the other, or many at a time.
    *direct*: past the page cache.
    """

    path: str
    read_only: bool = False
    queues: int = 1
    asked: tuple[str, str] = ("--block ", ",readonly")
    aio: AioName = "sync"
    direct: bool = False


@dataclass(frozen=True)
class VhostUserDisk:
    """The disk of the vhost-user back-end that listens at *path*."""

    path: str


@dataclass(frozen=True)
class ScratchDisk:
    """An empty disk in memory, of *size* bytes, with so many *queues*."""

    size: int = SCRATCH_SIZE
    queues: int = 1


@dataclass(frozen=True)
class HostNetwork:
    """A TAP interface of the host's, with an IPv4 address there; *mac* is the guest's.

    It has so many *queues* each way.
    """

    address: InterfaceAddress
    mac: bytes | None = None
    queues: int = 1


@dataclass(frozen=True)
class BridgedNetwork:
    """A TAP interface that is a port of the host's *bridge*; otherwise as `HostNetwork`."""

    bridge: str
    mac: bytes | None = None
    queues: int = 1


@dataclass(frozen=True)
class NamedTap:
    """The TAP interface of the host that has this *name* already; *mac* is the guest's."""

    name: str
    mac: bytes | None = None


@dataclass(frozen=True)
class LoopbackNetwork:
    """A network that gives each frame back to the guest; *mac* is the guest's."""

    mac: bytes | None = None


@dataclass(frozen=True)
class PrivateNetwork:
    """A TAP interface with *address* and so many *queues* in a network namespace of the launcher's own.

    Where that may not be had: a host in this process.
    """

    address: InterfaceAddress
    queues: int = 1


@dataclass(frozen=True)
class Randomness:
    """An entropy device."""


@dataclass(frozen=True)
class TerminalConsole:
    """A console on this process's terminal, which its owner attaches."""


@dataclass(frozen=True)
class PtyConsole:
    """A console on a new pseudo-terminal."""


DeviceOption = (
    DiskImage | VhostUserDisk | ScratchDisk | HostNetwork | BridgedNetwork | PrivateNetwork | NamedTap
    | LoopbackNetwork | Randomness | PtyConsole
)  # fmt: skip

DEFAULT_NETWORK = PrivateNetwork(InterfaceAddress(bytes([192, 168, 19, 1]), 24))
DEFAULT_DEVICES: tuple[DeviceOption, ...] = (DEFAULT_NETWORK, ScratchDisk(), Randomness())


@dataclass(frozen=True)
class MachineOptions:
    """A machine to launch: *memory* in bytes, *devices* in bus order, the console behind them.

    Without *kernel*, a path, the built-in guest runs, or the distribution's
    User-mode Linux; *arguments* are words of the guest's command line.  User-mode
    Linux without *initrd* has a shell, which is *script*'s if that is not None.
    *verbose*: tell where a guest on lguest finds its devices.  *linux*: without *kernel* the
    host's own Linux runs, on KVM, otherwise as User-mode Linux does.  *cpus* and *transport*
    are for guests on KVM; by default a Linux finds its devices by PCI.  A disk or a network gets
    as many queues as there are processors, if it is not said otherwise.
    """

    hypervisor: HypervisorName = "auto"
    memory: int = MEMORY
    devices: tuple[DeviceOption, ...] = DEFAULT_DEVICES
    kernel: str | None = None
    initrd: str | None = None
    script: bytes | None = None
    arguments: tuple[str, ...] = ()
    verbose: bool = False
    linux: bool = False
    cpus: int = 1
    transport: TransportName | None = None
