"""Network cards served to real kernels: what they leave to each other, frames of all sizes, a bridge between two.

A guest of each kind has a card for each thing to try, all served by one process; each
card has a network of its own with the host, and one is in a bridge with the other
guest's.  All of it is in a network namespace.  With LGUESTLIB_LONG=1 every card that
differs in what it offers carries 100 MiB each way, and not just the first.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import pytest
import sessions
from guests.serving import GUESTS, LONG, MIB, serving
from linux import Linux, SocketDevice
from sessions import Namespace

from lguestlib.abi import virtio_net

PINGS = 1000
PORT = "5001"
SIZE = 100
"""MiB that go to a guest and come back."""

FEWER = 100 if LONG else 20

CHECKSUMS_AND_SEGMENTS = (
    "csum", "guest_csum", "host_tso4", "host_tso6", "host_ecn", "guest_tso4", "guest_tso6", "guest_ecn",
)  # fmt: skip
ETHERNET = 14
IP_AND_ICMP = 28


class Card(NamedTuple):
    """One that does not offer what is in *without*, on a network with this *mtu*."""

    without: tuple[str, ...] = ()
    mtu: int = 1500

    @property
    def offers(self) -> set[int]:
        """The bits of those that are left."""
        names = {*CHECKSUMS_AND_SEGMENTS, "mrg_rxbuf"} - {*self.without}
        return {_bit(name) for name in names}


CARDS = {
    "everything": Card(),
    "one buffer": Card(("mrg_rxbuf",)),
    "nothing": Card((*CHECKSUMS_AND_SEGMENTS, "mrg_rxbuf")),
    "large": Card(mtu=9000),
    # Its frames take several buffers each though nothing is left to the other side.
    "large, whole": Card(CHECKSUMS_AND_SEGMENTS, 9000),
    "small": Card(mtu=576),
}

Transfer = tuple[str, int, int]
"""A card, a version of IP and MiB."""

TRANSFERS: list[Transfer] = [
    ("everything", 4, SIZE), ("everything", 6, 20), ("one buffer", 4, FEWER), ("one buffer", 6, 5),
    ("nothing", 4, FEWER), ("nothing", 6, 5), ("large", 4, 20), ("large, whole", 4, 20), ("small", 4, 5),
]  # fmt: skip


def _bit(name: str) -> int:
    return int(getattr(virtio_net, f"VIRTIO_NET_F_{name.upper()}"))


class Frames(NamedTuple):
    """What an interface has carried."""

    count: int
    bytes: int

    def since(self, before: "Frames") -> float:
        """The average size of those after *before*."""
        return (self.bytes - before.bytes) / (self.count - before.count)


class Rig:
    """A guest and its cards' networks, the *number*th rig in *network*."""

    def __init__(self, guest: Linux, network: Namespace, number: int, folder: Path) -> None:
        self.guest = guest
        self.network = network
        self.number = number
        self.folder = folder
        lines = []
        for name in CARDS:
            card = self.interface(name)
            lines += [f"ip address add {self.address(name, 2)}/24 dev {card}"]
            if CARDS[name].mtu >= 1280:
                lines += [f"echo 0 >/proc/sys/net/ipv6/conf/{card}/accept_dad"]
                lines += [f"ip address add {self.address(name, 2, 6)}/64 dev {card}"]
            lines += [f"ip link set {card} up"]
        lines += [f"ip address add {self.bridged} dev {self.bridge_port} && ip link set {self.bridge_port} up"]
        guest.call(" && ".join(lines))

    def address(self, name: str, host: int, version: int = 4) -> str:
        """Of *host*, which is 1, or of the guest, 2, on the card's network."""
        network = list(CARDS).index(name)
        return f"10.{self.number}.{network}.{host}" if version == 4 else f"fd00:{self.number}:{network}::{host}"

    def interface(self, name: str) -> str:
        """The card, in the guest."""
        return f"eth{list(CARDS).index(name)}"

    def tap(self, name: str) -> str:
        """The other end of it, in the namespace."""
        return tap(self.number, name)

    @property
    def bridge_port(self) -> str:
        """The card in the bridge."""
        return f"eth{len(CARDS)}"

    @property
    def bridged(self) -> str:
        """The guest's address there."""
        return f"10.9.0.{1 + self.number}/24"

    def frames(self, name: str) -> tuple[Frames, Frames]:
        """Those from the guest and those to it."""
        [line] = re.findall(rf"{self.tap(name)}:(.*)", self.network.call("cat", "/proc/net/dev"))
        counts = [int(word) for word in line.split()]
        return Frames(counts[1], counts[0]), Frames(counts[9], counts[8])

    @contextmanager
    def listener(self, *words: str, source: IO[bytes] | int, into: IO[bytes] | int) -> Iterator[None]:
        """A host that waits for the guest to connect, sends *source* and keeps what comes."""
        command = [*self.network.prefix, "nc.openbsd", "-l", "-v", "-n", *words, PORT]
        process = subprocess.Popen(command, stdin=source, stdout=into, stderr=subprocess.PIPE)
        assert process.stderr
        try:
            assert b"Listening" in process.stderr.readline()
            yield
            assert process.wait(sessions.PATIENCE) == 0
        finally:
            process.kill()
            process.wait()
            process.stderr.close()


def tap(number: int, name: str) -> str:
    return f"tap{number}-{list(CARDS).index(name)}"


@pytest.fixture(scope="module")
def network() -> Iterator[Namespace]:
    """A network namespace with a bridge."""
    sessions.root_or_skip()
    sessions.programs_or_skip(**{"nc.openbsd": "netcat-openbsd", "ping": "iputils-ping"})
    with Namespace() as namespace:
        namespace.call("ip", "link", "add", "br0", "type", "bridge")
        namespace.call("ip", "link", "set", "br0", "up")
        yield namespace


@contextmanager
def running(kind: str, network: Namespace, number: int, folder: Path) -> Iterator[Rig]:
    words, devices = [], []
    for name, card in CARDS.items():
        interface, socket = tap(number, name), folder / name
        network.call("ip", "tuntap", "add", interface, "mode", "tap")
        network.call("ip", "link", "set", interface, "mtu", str(card.mtu), "up")
        network.call("ip", "address", "add", f"{Rig.address_of(number, name)}/24", "dev", interface)
        words += ["net", f"--socket-path={socket}", "--tap", interface]
        devices.append(SocketDevice("net", socket, f"host_mtu={card.mtu}"))
        if card.without:
            words += ["--without", ",".join(card.without)]
