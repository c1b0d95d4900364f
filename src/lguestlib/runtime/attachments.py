"""The host's side of a machine's devices: opened once, kept over the guest's reboots.

Each attachment makes a fresh device for each boot.
"""

import errno
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network

from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.backend.loopback import Loopback
from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.runtime.backend.pty import Pty
from lguestlib.runtime.backend.random import KernelRandom
from lguestlib.runtime.backend.responder import Responder
from lguestlib.runtime.backend.tap import DEVICE, Tap
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.backend.uring import IO_URING_REMEDY, Uring
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.interface import InterfaceAddress, Interfaces
from lguestlib.runtime.namespace import private_tap
from lguestlib.runtime.options import (
    AioName,
    BridgedNetwork,
    DeviceOption,
    DiskImage,
    HostNetwork,
    LoopbackNetwork,
    NamedTap,
    PrivateNetwork,
    PtyConsole,
    Randomness,
    ScratchDisk,
    VhostUserDisk,
)
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.vhost_user.external import ExternalDisk
from lguestlib.runtime.vhost_user.frontend import BackEndError
from lguestlib.virtio.device import Device
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.multiqueue_net import MultiqueueNet
from lguestlib.virtio.devices.net import Net

Say = Callable[[str], None]
"""Takes a line for people."""


class Attachment(ABC):
    """What one device does to the outside."""

    kind = ""
    """Its device's name, before the number; those of one kind are counted together."""
    shares_memory = False
    """Whether the guest's memory goes to another process."""

    @abstractmethod
    def device(self, number: int) -> Device:
        """A fresh device; *number* counts those of its kind from 0."""

    def guest_parameters(self) -> list[str]:
        """Words of the command line for the built-in guest."""
        return []

    def close(self) -> None:
        """Give back what the host lent."""


class DiskAttachment(Attachment):
    """A disk."""

    kind = "block"

    def __init__(self, disk: FileDisk, queues: int = 1, aio: AioName = "sync") -> None:
        self.disk = disk
        self._queues = queues
        self._transfer_file = disk.fd if aio == "io_uring" else None

    def device(self, number: int) -> Device:
        return Block(self.disk, f"block{number}", self._queues, self._transfer_file)

    def close(self) -> None:
        self.disk.close()


class ExternalDiskAttachment(Attachment):
    """A disk that another process serves, the same over all boots as the conversation is."""

    kind = "block"
    shares_memory = True

    def __init__(self, disk: ExternalDisk) -> None:
        self._disk = disk

    def device(self, number: int) -> Device:
        self._disk.name = f"block{number}"
        return self._disk

    def close(self) -> None:
        self._disk.close()


class EntropyAttachment(Attachment):
    """The kernel's randomness."""

    kind = "rng"

    def device(self, number: int) -> Device:
        return Entropy(KernelRandom(), f"rng{number}")


class ConsoleAttachment(Attachment):
    """The terminal, which stays its owner's."""

    kind = "console"

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def device(self, number: int) -> Device:
        return Console(self._terminal, f"console{number}")


class PtyAttachment(Attachment):
    """A console on a pseudo-terminal."""

    kind = "console"

    def __init__(self, pty: Pty) -> None:
        self._pty = pty

    def device(self, number: int) -> Device:
        return Console(self._pty, f"console{number}")

    def close(self) -> None:
        self._pty.close()


class NetworkAttachment(Attachment):
    """A network on which the host has *address*, where it has one."""

    kind = "net"

    def __init__(self, network: PacketNetwork, address: InterfaceAddress | None, mac: bytes | None) -> None:
        self._network = network
        self._address = address
        self._mac = mac or _station_address(address)

    def device(self, number: int) -> Device:
        network, mac, name = self._network, self._mac, f"net{number}"
        if isinstance(network, Tap) and len(network.pairs) > 1:
            return MultiqueueNet(network, mac, name, mtu=network.mtu)
        return Net(network, mac, name, mtu=network.mtu)

    def guest_parameters(self) -> list[str]:
        if not self._address:
            return []
        network = _network_of(self._address)
        return [f"ip={guest_address(self._address)}::{IPv4Address(self._address.address)}:{network.netmask}"]

    def close(self) -> None:
        self._network.close()


def attach(option: DeviceOption, say: Say, tracer: Tracer | None) -> Attachment:
    """Open what *option* asks for.  Raises LaunchError."""
    match option:
        case DiskImage():
            if option.aio == "io_uring":
                _try_io_uring()
            return DiskAttachment(_open_disk(option, tracer), option.queues, option.aio)
        case VhostUserDisk(path):
            return ExternalDiskAttachment(_reach(path))
        case ScratchDisk(size, queues):
            return DiskAttachment(FileDisk.scratch(size, tracer), queues)
        case Randomness():
            return EntropyAttachment()
        case HostNetwork(address, mac, queues):
            asked = f"--tunnet {IPv4Address(address.address)}"
            if _is_local(address):
                raise LaunchError(f"{asked}: this host has that address already (give another)")
            tap = _open_tap(asked, tracer, queues)
            _configure(tap, asked, lambda interfaces: interfaces.set_address(tap.name, address))
            say(f"network: {tap.name} has {_shown(address)}, the guest {guest_address(address)}")
            return NetworkAttachment(tap, address, mac)
        case BridgedNetwork(bridge, mac, queues):
            asked = f"--tunnet bridge:{bridge}"
            tap = _open_tap(asked, tracer, queues)
            _configure(tap, asked, lambda interfaces: interfaces.add_to_bridge(tap.name, bridge))
            say(f"network: {tap.name} is a port of {bridge}")
            return NetworkAttachment(tap, None, mac)
        case NamedTap(name, mac):
            return NetworkAttachment(_existing_tap(name, tracer), None, mac)
        case LoopbackNetwork(mac):
            return NetworkAttachment(Loopback(tracer), None, mac)
        case PtyConsole():
            pty = _open_pty(tracer)
            say(f"console: {pty.name}")
            return PtyAttachment(pty)
        case PrivateNetwork(address, queues):
            return NetworkAttachment(_private_network(address, queues, say, tracer), address, None)


def _open_disk(image: DiskImage, tracer: Tracer | None) -> FileDisk:
    before, behind = image.asked
    try:
        return FileDisk.open(image.path, image.read_only, tracer, image.direct)
    except ValueError as error:
        raise LaunchError(f"{before}{error}") from None
    except OSError as error:
        asked = f"{image.path}{behind}" if image.read_only else image.path
        missing = f"truncate -s 64M {image.path} makes an empty one"
        if "," in image.path and "," in behind:
            missing = f"after a file's name only {behind} has a meaning"
        remedies = {
            errno.ENOENT: missing,
            errno.EACCES: "chmod it" if image.read_only else f"chmod it, or ask for {image.path}{behind}",
            errno.EROFS: f"ask for {image.path}{behind}",
            errno.EISDIR: "name a raw disk image or a block device",
            errno.EMFILE: "ulimit -n raises the limit",
        }
        if image.direct:
            remedies[errno.EINVAL] = "its file system has no O_DIRECT: leave --direct away"
        raise LaunchError(f"{before}{asked}: {_with_remedy(error, remedies)}") from None


def _try_io_uring() -> None:
    try:
        Uring(1).close()
    except OSError as error:
        raise LaunchError(f"--aio io_uring: {error.strerror} ({IO_URING_REMEDY})") from None


def _reach(path: str) -> ExternalDisk:
    try:
        return ExternalDisk(path, "block")
    except BackEndError as error:
        raise LaunchError(f"--block vhost-user:{error}") from None


def _open_tap(asked: str, tracer: Tracer | None, queues: int) -> Tap:
    try:
        return Tap(tracer=tracer, queues=queues)
    except OSError as error:
        as_root = "run as root, or leave --tunnet away for a network of the launcher's own"
        remedies = {errno.EACCES: as_root, errno.EPERM: as_root, errno.ENOENT: "modprobe tun"}
        raise LaunchError(f"{asked}: no TAP interface: {_with_remedy(error, remedies)}") from None


def _existing_tap(name: str, tracer: Tracer | None) -> Tap:
    try:
        return Tap.existing(name, tracer)
    except ValueError as error:
        raise LaunchError(f"--tap {error}") from None
    except OSError as error:
        remedies = {
            errno.ENODEV: f"ip tuntap add {name} mode tap makes it; --tunnet makes one of its own",
            errno.EBUSY: "another process has it",
            errno.EPERM: f"run as root, or: ip tuntap add {name} mode tap user {os.geteuid()}",
            errno.EACCES: "run as root",
            errno.ENOENT: "modprobe tun",
        }
        raise LaunchError(f"--tap {name}: {_with_remedy(error, remedies)}") from None


def _open_pty(tracer: Tracer | None) -> Pty:
    try:
        return Pty(tracer)
    except OSError as error:
        raise LaunchError(f"--pty: {error.strerror}") from None


def _configure(tap: Tap, asked: str, request: Callable[[Interfaces], None]) -> None:
    try:
        with Interfaces() as interfaces:
            request(interfaces)
            interfaces.set_up(tap.name)
    except OSError as error:
        tap.close()
        bridges = "ip link show type bridge lists them"
        known = {errno.ENODEV: f"no such bridge ({bridges})", errno.EOPNOTSUPP: f"not a bridge ({bridges})"}
        reason = known.get(error.errno or 0) or _with_remedy(error, {errno.EPERM: "run as root"})
        raise LaunchError(f"{asked}: {reason}") from None


def _private_network(address: InterfaceAddress, queues: int, say: Say, tracer: Tracer | None) -> PacketNetwork:
    """The TAP interface, or where anything is in its way the host in this process."""
    try:
        tap, in_user_namespace = private_tap(address, tracer, queues)
    except OSError as error:
        say(f"network: a host inside this process, because no TAP device can be had: {_reason(error)}")
        return Responder(str(IPv4Address(address.address)), tracer)
    enter = f"nsenter {'-U --preserve-credentials ' if in_user_namespace else ''}-n -t {os.getpid()}"
    say(
        f"network: {tap.name} has {_shown(address)} in a namespace of its own"
        f" ({enter} ping {guest_address(address)} reaches the guest)"
    )
    return tap


def _with_remedy(error: OSError, remedies: dict[int, str]) -> str:
    remedy = remedies.get(error.errno or 0)
    return _reason(error) + (f" ({remedy})" if remedy else "")


def _reason(error: OSError) -> str:
    """What failed and why, in one line; the file only where it is not what was asked for."""
    return f"{DEVICE}: {error.strerror}" if error.filename == DEVICE else str(error.strerror)


def _is_local(address: InterfaceAddress) -> bool:
    """Whether the host has this address: to such a one it sends from that one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            sender.connect((str(IPv4Address(address.address)), 9))
        except OSError:
            return False
        return socket.inet_aton(sender.getsockname()[0]) == address.address


def _network_of(address: InterfaceAddress) -> IPv4Network:
    return IPv4Network((address.address, address.prefix), strict=False)


def _shown(address: InterfaceAddress) -> str:
    return f"{IPv4Address(address.address)}/{address.prefix}"


def guest_address(host: InterfaceAddress) -> IPv4Address:
    """The guest's address beside *host*: the next one, or the one before where that is the broadcast."""
    after = IPv4Address(host.address) + 1
    network = _network_of(host)
    return after if after in network and after != network.broadcast_address else after - 2


def _station_address(address: InterfaceAddress | None) -> bytes:
    """A locally administered station address: made from the guest's IPv4 address, else at random."""
    return b"\x02\x00" + guest_address(address).packed if address else b"\x02" + os.urandom(5)
