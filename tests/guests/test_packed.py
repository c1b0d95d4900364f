"""Packed rings under real drivers: disks and a network card, in QEMU where it is asked for, and in User-mode Linux.

QEMU offers its guest what it is told to (packed=on); User-mode Linux takes what is offered.
With LGUESTLIB_LONG=1 there is four times as much to write, another reboot, and User-mode Linux.
"""

import re
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import sessions
from guests.serving import LONG, MIB, serving, sparse
from linux import Linux, Qemu, SocketDevice, UserModeLinux
from sessions import Namespace

from lguestlib.abi.virtio_config import VIRTIO_F_RING_PACKED

KINDS: dict[str, type[UserModeLinux] | type[Qemu]] = {"qemu": Qemu} | ({"uml": UserModeLinux} if LONG else {})
SIZE = 32 * MIB
PIECES = {"4k": 4 * MIB, "64k": 4 * MIB, "1M": 8 * MIB} if LONG else {"4k": MIB, "64k": MIB, "1M": 2 * MIB}
"""What goes to a disk in pieces of each size, in bytes."""
ALL = 16 * MIB if LONG else 4 * MIB
REBOOTS = 2 if LONG else 1
DISKS = {
    "uring": ("--num-queues", "2", "--aio", "io_uring"),
    "flags": ("--without", "event_idx"),
} | ({"plain": ("--num-queues", "2"), "direct": ("--without", "indirect_desc")} if LONG else {})
PORT = 5001


class Rig:
    """A guest with a disk of each kind, whose images are in *folder*, and a card on *namespace*'s network."""

    def __init__(self, guest: Linux, namespace: Namespace, folder: Path) -> None:
        self.guest = guest
        self.namespace = namespace
        self.folder = folder

    def disk(self, name: str) -> str:
        return f"vd{'abcd'[[*DISKS].index(name)]}"

    def is_packed(self, device: str) -> bool:
        return self.guest.call(f"cat /sys/{device}/device/features")[VIRTIO_F_RING_PACKED] == "1"

    def exchanges(self, name: str) -> None:
        """Chance data go to the disk in pieces of many sizes, and come back past the guest's cache."""
        disk = f"/dev/{self.disk(name)}"
        call = self.guest.call
        call(f"dd if=/dev/urandom of=/tmp/data bs=1M count={ALL // MIB}")
        for unit, size in PIECES.items():
            count = size // {"4k": 4096, "64k": 65536, "1M": MIB}[unit]
            call(f"dd if=/tmp/data of={disk} bs={unit} count={count} oflag=direct conv=fsync")
            sent = call(f"head -c {size} /tmp/data | sha256sum").split()[0]
            got = call(f"dd if={disk} bs={unit} count={count} iflag=direct 2>/dev/null | sha256sum").split()[0]
            with (self.folder / f"{name}.img").open("rb") as image:
                assert got == sent == sha256(image.read(size)).hexdigest(), (name, unit)
        # Many at a time: the guest's cache writes and reads ahead.
        call(f"dd if=/tmp/data of={disk} bs=1M count={ALL // MIB} conv=fsync && echo 1 >/proc/sys/vm/drop_caches")
        quarter = ALL // 4096 // 4
        readers = " & ".join(
            f"dd if={disk} bs=4k skip={part * quarter} count={quarter} 2>/dev/null >/tmp/part{part}" for part in range(4)
        )
        call(f"{readers} & wait; cat /tmp/part? | cmp - /tmp/data")


@pytest.fixture(scope="module", params=list(KINDS))
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    sessions.root_or_skip()
    sessions.programs_or_skip(**{"nc.openbsd": "netcat-openbsd"})
    folder = tmp_path_factory.mktemp("packed")
    words, devices = [], []
    for name, options in DISKS.items():
        image, socket = sparse(folder / f"{name}.img", SIZE), folder / f"{name}.sock"
        words += ["blk", f"--socket-path={socket}", f"--blk-file={image}", *options]
        queues = 2 if "--num-queues" in options else 1
        devices.append(SocketDevice("blk", socket, f"num-queues={queues},packed=on"))
    words += ["net", f"--socket-path={folder}/card", "--tap=tap0"]
    devices.append(SocketDevice("net", folder / "card", "packed=on"))
    with Namespace() as namespace:
        namespace.call("ip", "tuntap", "add", "tap0", "mode", "tap")
        namespace.call("ip", "link", "set", "tap0", "up")
        namespace.call("ip", "address", "add", "10.0.0.1/24", "dev", "tap0")
        with (
            serving(*words, sockets=len(devices), prefix=namespace.prefix),
            KINDS[str(request.param)](devices, folder, memory=256, programs=["nc.openbsd"]) as guest,
        ):
            yield Rig(guest, namespace, folder)
            assert guest.end() == 0


@pytest.mark.parametrize("name", DISKS)
def test_what_is_written_to_a_disk_is_there_and_is_read(rig: Rig, name: str) -> None:
    assert rig.is_packed(f"block/{rig.disk(name)}")
    rig.exchanges(name)


def test_what_goes_over_the_network_comes_back_the_same(rig: Rig, tmp_path: Path) -> None:
    rig.guest.call("ip link set eth0 up && ip address add 10.0.0.2/24 dev eth0")
    assert rig.is_packed("class/net/eth0")
    shown = rig.namespace.call("ping", "-n", "-c", "200", "-i", "0.002", "10.0.0.2")
    assert re.search(r"\b200 received", shown)
    rig.guest.call("dd if=/dev/urandom of=/tmp/data bs=1M count=20")
    back = tmp_path / "back"
    with back.open("wb") as received:
        listener = subprocess.Popen(
            [*rig.namespace.prefix, "nc.openbsd", "-N", "-l", "-v", "-n", "0.0.0.0", str(PORT)],
            stdin=subprocess.DEVNULL, stdout=received, stderr=subprocess.PIPE,
        )  # fmt: skip
    with listener:
        assert listener.stderr and b"Listening" in listener.stderr.readline()
        rig.guest.call(f"nc.openbsd -N 10.0.0.1 {PORT} </tmp/data")
        assert listener.wait(sessions.PATIENCE) == 0
    assert rig.guest.call("sha256sum </tmp/data").split()[0] == sha256(back.read_bytes()).hexdigest()


def test_after_a_reboot_the_rings_begin_anew(rig: Rig) -> None:
    for _ in range(REBOOTS):
        rig.guest.reboot()
        for name in DISKS:
            assert rig.is_packed(f"block/{rig.disk(name)}")
        rig.exchanges("uring")
        rig.guest.call("ip link set eth0 up && ip address add 10.0.0.2/24 dev eth0")
        assert " 3 received" in rig.namespace.call("ping", "-n", "-c", "3", "-w", "10", "-i", "0.2", "10.0.0.2")
