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
from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.runtime.backend.random import KernelRandom
from lguestlib.runtime.backend.responder import Responder
from lguestlib.runtime.backend.tap import DEVICE, Tap
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.interface import InterfaceAddress, Interfaces
from lguestlib.runtime.namespace import private_tap
from lguestlib.runtime.options import (
    BridgedNetwork,
    DeviceOption,
    DiskImage,
    HostNetwork,
    PrivateNetwork,
    Randomness,
    ScratchDisk,
)
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.device import Device
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.net import Net

Say = Callable[[str], None]
"""Takes a line for people."""


class Attachment(ABC):
    """What one device does to the outside."""

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

    def __init__(self, disk: FileDisk) -> None:
        self._disk = disk

    def device(self, number: int) -> Device:
        return Block(self._disk, f"block{number}")

    def close(self) -> None:
        self._disk.close()


class EntropyAttachment(Attachment):
    """The kernel's randomness."""

    def device(self, number: int) -> Device:
        return Entropy(KernelRandom(), f"rng{number}")


class ConsoleAttachment(Attachment):
    """The terminal, which stays its owner's."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def device(self, number: int) -> Device:
        return Console(self._terminal, f"console{number}")


class NetworkAttachment(Attachment):
    """A network on which the host has *address*, where it has one."""

    def __init__(self, network: PacketNetwork, address: InterfaceAddress | None, mac: bytes | None) -> None:
        self._network = network
        self._address = address
        self._mac = mac or _station_address(address)

    def device(self, number: int) -> Device:
        return Net(self._network, self._mac, f"net{number}")

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
        case DiskImage(path, read_only):
            return DiskAttachment(_open_disk(path, read_only, tracer))
        case ScratchDisk(size):
            return DiskAttachment(FileDisk.scratch(size, tracer))
        case Randomness():
            return EntropyAttachment()
        case HostNetwork(address, mac):
            asked = f"--tunnet {IPv4Address(address.address)}"
            if _is_local(address):
                raise LaunchError(f"{asked}: this host has that address already (give another)")
            tap = _open_tap(asked, tracer)
            _configure(tap, asked, lambda interfaces: interfaces.set_address(tap.name, address))
            say(f"network: {tap.name} has {_shown(address)}, the guest {guest_address(address)}")
            return NetworkAttachment(tap, address, mac)
        case BridgedNetwork(bridge, mac):
            asked = f"--tunnet bridge:{bridge}"
            tap = _open_tap(asked, tracer)
            _configure(tap, asked, lambda interfaces: interfaces.add_to_bridge(tap.name, bridge))
            say(f"network: {tap.name} is a port of {bridge}")
            return NetworkAttachment(tap, None, mac)
        case PrivateNetwork(address):
            return NetworkAttachment(_private_network(address, say, tracer), address, None)


def _open_disk(path: str, read_only: bool, tracer: Tracer | None) -> FileDisk:
    try:
        return FileDisk.open(path, read_only, tracer)
    except ValueError as error:
        raise LaunchError(f"--block {error}") from None
    except OSError as error:
        asked = f"{path},readonly" if read_only else path
        missing = f"truncate -s 64M {path} makes an empty one"
        if "," in path:
            missing = "after a file's name only ,readonly has a meaning"
        remedies = {
            errno.ENOENT: missing,
            errno.EACCES: "chmod it" if read_only else f"chmod it, or ask for {path},readonly",
            errno.EROFS: f"ask for {path},readonly",
            errno.EISDIR: "name a raw disk image or a block device",
            errno.EMFILE: "ulimit -n raises the limit",
        }
        raise LaunchError(f"--block {asked}: {_with_remedy(error, remedies)}") from None


def _open_tap(asked: str, tracer: Tracer | None) -> Tap:
    try:
        return Tap(tracer=tracer)
    except OSError as error:
        as_root = "run as root, or leave --tunnet away for a network of the launcher's own"
        remedies = {errno.EACCES: as_root, errno.EPERM: as_root, errno.ENOENT: "modprobe tun"}
        raise LaunchError(f"{asked}: no TAP interface: {_with_remedy(error, remedies)}") from None


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


def _private_network(address: InterfaceAddress, say: Say, tracer: Tracer | None) -> PacketNetwork:
    """The TAP interface, or where anything is in its way the host in this process."""
    try:
        tap, in_user_namespace = private_tap(address, tracer)
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
