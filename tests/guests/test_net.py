"""Network cards served to real kernels: what each side leaves to the other, frames of all sizes, a bridge.

A guest of each kind has a card for each thing to try, all served by one process.  Each
card is on a network of its own with the host, but for one that is in a bridge with the
other guest's; all are in a network namespace.  With LGUESTLIB_LONG=1 each of the cards
that differ in what they offer carries 100 MiB both ways, and not the first alone.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import sessions
from guests.serving import GUESTS, LONG, MIB, serving
from linux import Linux, SocketDevice
from sessions import Namespace

from lguestlib.abi import virtio_net

PINGS = 1000
PORT = 5001
ALL = 100
FEWER = 100 if LONG else 10
"""MiB that go to a guest and come back."""

ETHERNET = 14
IP_AND_ICMP = 28

OFFLOADS = (
    "csum", "guest_csum", "host_tso4", "host_tso6", "host_ecn", "guest_tso4", "guest_tso6", "guest_ecn",
)  # fmt: skip


class Card(NamedTuple):
    """One whose network has this *mtu*, and that does not offer what is in *without*."""

    mtu: int = 1500
    without: tuple[str, ...] = ()


CARDS = {
    "all": Card(),
    "one-buffer": Card(without=("mrg_rxbuf",)),
    "nothing": Card(without=(*OFFLOADS, "mrg_rxbuf")),
    "large": Card(9000),
    # A frame takes several buffers though segments are not left to the other side.
    "large-whole": Card(9000, OFFLOADS),
    "small": Card(576),
}

SIZES = {name: ALL if name == "all" else FEWER for name in CARDS}


def bit(feature: str) -> int:
    return int(getattr(virtio_net, f"VIRTIO_NET_F_{feature.upper()}"))


class Frames(NamedTuple):
    """What an interface has carried one way."""

    number: int
    bytes: int

    def average(self, before: "Frames") -> float:
        """The size of those that came after *before*."""
        return (self.bytes - before.bytes) / (self.number - before.number)


class Networks:
    """Those of the *number*th guest's cards, with the host's addresses, in *namespace*."""

    def __init__(self, number: int, namespace: Namespace) -> None:
        self.number = number
        self.namespace = namespace
        for name, card in CARDS.items():
            tap = self.tap(name)
            namespace.call("ip", "tuntap", "add", tap, "mode", "tap")
            namespace.call("ip", "link", "set", tap, "mtu", str(card.mtu), "up")
            namespace.call("ip", "address", "add", f"{self.address(name, 1)}/24", "dev", tap)

    def tap(self, name: str) -> str:
        """The host's interface of a card."""
        return f"tap{self.number}-{[*CARDS].index(name)}"

    def address(self, name: str, end: int) -> str:
        """The host's (*end* 1) or the guest's (2) on a card's network."""
        return f"10.{self.number}.{[*CARDS].index(name)}.{end}"

    def frames(self, name: str) -> tuple[Frames, Frames]:
        """Those to the guest, and those from it."""
        text = self.namespace.call("cat", "/proc/net/dev")
        [counts] = re.findall(rf"{self.tap(name)}:(.*)", text)
        numbers = [int(word) for word in counts.split()]
        return Frames(numbers[9], numbers[8]), Frames(numbers[1], numbers[0])

    @contextmanager
    def listening(self, source: Path, into: Path) -> Iterator[None]:
        """The host sends *source* to whoever connects, and puts what comes *into* another file."""
        words = ["nc.openbsd", "-N", "-l", "-v", "-n", "::", str(PORT)]
        with source.open("rb") as sent, into.open("wb") as received:
            listener = subprocess.Popen(
                [*self.namespace.prefix, *words], stdin=sent, stdout=received, stderr=subprocess.PIPE
            )
        with listener:
            try:
                assert listener.stderr and b"Listening" in listener.stderr.readline()
                yield
                assert listener.wait(sessions.PATIENCE) == 0
            finally:
                listener.kill()


class Rig:
    """A *guest* whose cards are on *networks*, and one more, with the address *bridged*, in the bridge."""

    def __init__(self, guest: Linux, networks: Networks) -> None:
        self.guest = guest
        self.networks = networks
        self.bridged = f"10.9.0.{1 + networks.number}"
        for name in CARDS:
            card = self.card(name)
            guest.call(f"ip link set {card} up && ip address add {networks.address(name, 2)}/24 dev {card}")
        port = f"eth{len(CARDS)}"
        guest.call(f"ip link set {port} up && ip address add {self.bridged}/24 dev {port}")

    @staticmethod
    def card(name: str) -> str:
        """The guest's interface."""
        return f"eth{[*CARDS].index(name)}"

    def carries(self, name: str, host: str, data: Path, back: Path) -> None:
        """All of *data* goes from the *host* to the guest and *back*, in frames as long as was agreed."""
        frames = [self.networks.frames(name)]
        with self.networks.listening(data, Path("/dev/null")):
            self.guest.call(f"nc.openbsd {host} {PORT} </dev/null >/tmp/data")
        frames.append(self.networks.frames(name))
        with self.networks.listening(Path("/dev/null"), back):
            self.guest.call(f"nc.openbsd -N {host} {PORT} </tmp/data && rm /tmp/data")
        frames.append(self.networks.frames(name))
        assert back.read_bytes() == data.read_bytes()
        to_guest = frames[1][0].average(frames[0][0])
        from_guest = frames[2][1].average(frames[1][1])
        longest = ETHERNET + CARDS[name].mtu
        if "host_tso4" in CARDS[name].without:
            assert longest / 2 < to_guest <= longest and longest / 2 < from_guest <= longest
        else:
            assert to_guest > longest and from_guest > longest


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    """With a bridge."""
    sessions.root_or_skip()
    sessions.programs_or_skip(**{"nc.openbsd": "netcat-openbsd", "ping": "iputils-ping"})
    with Namespace() as namespace:
        namespace.call("ip", "link", "add", "br0", "type", "bridge")
        namespace.call("ip", "link", "set", "br0", "up")
        yield namespace


@contextmanager
def running(kind: str, namespace: Namespace, folder: Path) -> Iterator[Rig]:
    networks = Networks([*GUESTS].index(kind), namespace)
    words, devices = [], []
    for name, card in CARDS.items():
        words += ["net", f"--socket-path={folder / name}", f"--tap={networks.tap(name)}"]
        if card.without:
            words += ["--without", ",".join(card.without)]
        # QEMU has its own idea of it.
        devices.append(SocketDevice("net", folder / name, f"host_mtu={card.mtu}"))
    words += ["net", f"--socket-path={folder}/bridge", "--tunnet", "bridge:br0"]
    devices.append(SocketDevice("net", folder / "bridge"))
    with serving(*words, sockets=len(devices), prefix=namespace.prefix):
        with GUESTS[kind](devices, folder, memory=384, programs=["nc.openbsd", "ping"]) as guest:
            yield Rig(guest, networks)
            assert guest.end() == 0


@pytest.fixture(scope="module")
def uml(namespace: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running("uml", namespace, tmp_path_factory.mktemp("uml")) as rig:
        yield rig


@pytest.fixture(scope="module")
def qemu(namespace: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running("qemu", namespace, tmp_path_factory.mktemp("qemu")) as rig:
        yield rig


@pytest.fixture(scope="module", params=list(GUESTS))
def rig(request: pytest.FixtureRequest) -> Rig:
    found = request.getfixturevalue(str(request.param))
    assert isinstance(found, Rig)
    return found


Data = Callable[[int], Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A file of so many MiB to send."""
    folder = tmp_path_factory.mktemp("data")

    @cache
    def make(size: int) -> Path:
        file = folder / str(size)
        file.write_bytes(Random(size).randbytes(size * MIB))
        return file

    return make


@pytest.mark.parametrize("name", CARDS)
def test_what_a_card_offers_the_guest_takes_and_nothing_else(rig: Rig, name: str) -> None:
    bits = rig.guest.call(f"cat /sys/class/net/{rig.card(name)}/device/features")
    negotiated = {feature for feature in (*OFFLOADS, "mrg_rxbuf") if bits[bit(feature)] == "1"}
    assert negotiated == {*OFFLOADS, "mrg_rxbuf"} - {*CARDS[name].without}
    assert bits[bit("mtu")] == "1"


def test_no_ping_is_lost_either_way(rig: Rig) -> None:
    """Both at once, because User-mode Linux may sleep through an interrupt until its next timer."""
    host, guest = (rig.networks.address("all", end) for end in (1, 2))
    # ping waits for a moment only when it has sent the last, and that might be late.
    ping = f"ping -n -c {PINGS + 20} -i 0.002"
    rig.guest.begin(f"/sbin/{ping} {host} >/tmp/pings")
    shown = [rig.networks.namespace.call("sh", "-c", f"{ping} {guest} || true")]
    rig.guest.answer()
    shown += [rig.guest.call("cut -d ' ' -f 5 /tmp/pings")]
    for answers in shown:
        answered = {int(number) for number in re.findall(r"icmp_seq=(\d+)", answers)}
        assert not {*range(1, PINGS + 1)} - answered


@pytest.mark.parametrize("name", CARDS)
def test_what_goes_to_a_guest_and_back_is_the_same(rig: Rig, data: Data, tmp_path: Path, name: str) -> None:
    """In frames longer than the MTU where segments are left to the other side, and in full ones else."""
    rig.carries(name, rig.networks.address(name, 1), data(SIZES[name]), tmp_path / "back")


def test_segments_of_ipv6_are_left_to_the_other_side_too(qemu: Rig, data: Data, tmp_path: Path) -> None:
    tap = qemu.networks.tap("all")
    qemu.networks.namespace.call("ip", "address", "add", "fd00::1/64", "nodad", "dev", tap)
    # Nobody else has its address.
    qemu.guest.call("ip link set eth0 down && echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad")
    qemu.guest.call("ip link set eth0 up && ip address add fd00::2/64 dev eth0")
    qemu.carries("all", "fd00::1", data(FEWER), tmp_path / "back")


@pytest.mark.parametrize("name", ["all", "large", "small"])
def test_a_networks_mtu_is_the_guests_and_frames_as_long_pass(rig: Rig, name: str) -> None:
    mtu = CARDS[name].mtu
    assert int(rig.guest.call(f"cat /sys/class/net/{rig.card(name)}/mtu")) == mtu
    host, guest = (rig.networks.address(name, end) for end in (1, 2))
    for size in {mtu - IP_AND_ICMP, min(mtu - IP_AND_ICMP, 8000)}:
        ping = f"ping -q -c 3 -w 10 -i 0.01 -M do -s {size}"
        # It ends when three are answered; on a busy host some more are on their way then.
        for shown in (rig.networks.namespace.call(*ping.split(), guest), rig.guest.call(f"/sbin/{ping} {host}")):
            assert re.search(" ([3-9]|[0-9]{2,}) received", shown), shown
    shown, status = rig.guest.command(f"/sbin/ping -q -c 1 -W 0.1 -M do -s {mtu - IP_AND_ICMP + 1} {host}")
    assert status == 1 and " 0 received" in shown


def test_two_guests_reach_each_other_through_a_bridge(uml: Rig, qemu: Rig) -> None:
    for one, other in ((uml, qemu), (qemu, uml)):
        one.guest.call("dd if=/dev/urandom of=/tmp/data bs=1M count=20")
        sent = one.guest.call("sha256sum </tmp/data")
        shown = one.guest.call(f"ping -q -c 100 -i 0.01 -W 10 {other.bridged}")
        assert "100 packets transmitted, 100 packets received" in shown
        other.guest.begin(f"nc.openbsd -l {PORT} </dev/null >/tmp/received")
        send = f"nc.openbsd -N {other.bridged} {PORT} </tmp/data"
        one.guest.call(f"until {send}; do sleep 0.05; done; rm /tmp/data")
        assert other.guest.answer().status == 0
        assert other.guest.call("sha256sum </tmp/received && rm /tmp/received") == sent
