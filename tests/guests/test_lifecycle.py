"""Guests that come, go, start over and take their drivers off and put them back, on back-ends that stay.

One process serves a disk, a network card, a console and random numbers to all of
them, one after another.  With LGUESTLIB_LONG=1 there are 100 guests in the row that
leaves nothing behind, and 100 rounds of every driver in QEMU too.
"""

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest
import sessions
from guests.serving import GUESTS, LONG, MIB, Held, Load, bind_anew, holds_again, listening, sparse
from linux import Kind, Linux, SocketDevice
from sessions import Namespace, Session, tick_seconds

ROUNDS = {"uml": 100, "qemu": 100 if LONG else 20}
IN_A_ROW = 100 if LONG else 3
PAUSES = 10
IDLE_SECONDS = 2.0

KINDS: dict[str, tuple[Kind, ...]] = {"uml": ("blk", "net", "console"), "qemu": ("blk", "net", "rng")}
DRIVERS = {"blk": "virtio_blk", "net": "virtio_net", "console": "virtio_console", "rng": "virtio_rng"}


class Host:
    """Devices of each kind, served by one process in a network namespace of its own."""

    def __init__(self, folder: Path, namespace: Namespace) -> None:
        self.folder = folder
        self.namespace = namespace
        self.lines = 0
        self.image = sparse(folder / "disk.img", 8 * MIB)
        namespace.call("ip", "tuntap", "add", "tap0", "mode", "tap")
        namespace.call("ip", "address", "add", "192.168.81.1/24", "dev", "tap0")
        namespace.call("ip", "link", "set", "tap0", "up")
        disk = f"--blk-file={self.image}"
        options = {"blk": [disk], "net": ["--tap=tap0"], "console": ["--pty"], "rng": []}
        words: list[str] = []
        for kind, more in options.items():
            words += [kind, f"--socket-path={folder / kind}", *more]
        self.back_end = Session("serve", *words, prefix=namespace.prefix)
        self.back_end.expect("console: ", messages=True)
        self.pty = os.open(self.back_end.expect("\n", messages=True).strip(), os.O_RDWR | os.O_NOCTTY)
        listening(self.back_end, len(options))

    def start(self, name: str) -> Linux:
        devices = [
            SocketDevice(kind, self.folder / kind, "num-queues=1" if kind == "blk" else "")
            for kind in KINDS[name]
        ]
        return GUESTS[name](devices, self.folder)

    def works(self, guest: Linux) -> None:
        """Every device that *guest* has does something."""
        for kind in KINDS[guest.name]:
            getattr(self, f"{kind}_works")(guest)

    def blk_works(self, guest: Linux) -> None:
        """It is written and read, and the image has what was written."""
        guest.call("dd if=/dev/urandom of=/tmp/sent bs=64k count=1")
        guest.call("dd if=/tmp/sent of=/dev/vda bs=64k oflag=direct")
        guest.call("dd if=/dev/vda of=/tmp/got bs=64k count=1 iflag=direct && cmp /tmp/sent /tmp/got")
        with self.image.open("rb") as file:
            assert guest.call("sha256sum </tmp/sent").split()[0] == sha256(file.read(65536)).hexdigest()

    def net_works(self, guest: Linux) -> None:
        """Its card is set up anew, and each reaches the other."""
        guest.call("ip link set eth0 up && ip address flush dev eth0")
        guest.call("ip address add 192.168.81.2/24 dev eth0")
        guest.call("ping -c 1 -W 10 192.168.81.1")
        self.namespace.call("ping", "-c", "1", "-W", "10", "192.168.81.2")

    def console_works(self, guest: Linux) -> None:
        """A line goes each way."""
        self.lines += 1
        # Open all the time: what comes to one that nobody has open is lost.
        guest.begin(
            f"exec 3<>/dev/hvc0; stty raw -echo <&3; echo line {self.lines} >&3; head -n 1 <&3; exec 3>&-"
        )
        shown = b""
        while not shown.endswith(b"line %d\n" % self.lines):
            assert select.select([self.pty], [], [], sessions.PATIENCE)[0], shown
            shown += os.read(self.pty, 4096)
        os.write(self.pty, b"answer %d\n" % self.lines)
        assert guest.answer() == (f"answer {self.lines}\n", 0)

    def rng_works(self, guest: Linux) -> None:
        """Two pieces are not the same."""
        assert guest.call("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng.")
        draw = "dd if=/dev/hwrng bs=4k count=1 iflag=fullblock 2>/dev/null | sha256sum"
        drawn = guest.call(f"{draw}; {draw}")
        assert len(set(drawn.splitlines())) == 2

    def close(self) -> None:
        os.close(self.pty)
        self.back_end.close()


@contextmanager
def hosting(folder: Path) -> Iterator[Host]:
    """A host whose back-end ends with nothing to complain of."""
    sessions.root_or_skip()
    with Namespace() as namespace:
        host = Host(folder, namespace)
        try:
            yield host
            host.back_end.signal(signal.SIGTERM)
            assert host.back_end.end().status == 0
        finally:
            host.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture(scope="module", params=list(GUESTS))
def guest(request: pytest.FixtureRequest, host: Host) -> Iterator[Linux]:
    with host.start(str(request.param)) as guest:
        # From here on every queue is served.
        host.works(guest)
        yield guest
        assert guest.end() == 0


def test_what_is_idle_uses_no_processor_time(host: Host, guest: Linux) -> None:
    before = tick_seconds(host.back_end.pid)
    time.sleep(IDLE_SECONDS)
    # The network's neighbours may have a word to say.
    assert tick_seconds(host.back_end.pid) - before < 0.025


def test_every_driver_taken_off_and_put_back_leaves_the_device_working(host: Host, guest: Linux) -> None:
    before = Held.by(host.back_end.pid)
    for kind in KINDS[guest.name]:
        guest.call(bind_anew(DRIVERS[kind], ROUNDS[guest.name]))
    host.works(guest)
    holds_again(host.back_end.pid, before)


def test_a_back_end_that_is_stopped_for_a_while_under_load_harms_nothing(host: Host, guest: Linux) -> None:
    """SIGSTOP and SIGCONT, while a disk is written and read and packets go both ways."""
    chance = Random(7)
    guest.call("dd if=/dev/urandom of=/tmp/blob bs=64k count=64")
    disk = Load(
        guest, "disk",
        "dd if=/tmp/blob of=/dev/vda bs=16k oflag=direct"
        " && dd if=/dev/vda of=copy bs=64k count=64 iflag=direct && cmp copy /tmp/blob",
    )  # fmt: skip
    packets = Load(guest, "net", "ping -c 5 -i 0.01 -s 1400 -W 10 192.168.81.1 | grep ' 0% packet loss'")
    for _ in range(PAUSES):
        time.sleep(chance.uniform(0, 0.1))
        host.back_end.signal(signal.SIGSTOP)
        time.sleep(chance.uniform(0.01, 0.1))
        host.back_end.signal(signal.SIGCONT)
    for load in (disk, packets):
        load.goes_on()
        load.stop()
    with host.image.open("rb") as file:
        assert guest.call("sha256sum </tmp/blob").split()[0] == sha256(file.read(4 * MIB)).hexdigest()
    host.works(guest)


def test_a_guest_that_starts_over_finds_its_devices_working(host: Host, guest: Linux) -> None:
    before = Held.by(host.back_end.pid)
    running = float(guest.call("cat /proc/uptime").split()[0])
    guest.reboot()
    assert float(guest.call("cat /proc/uptime").split()[0]) < running
    host.works(guest)
    holds_again(host.back_end.pid, before)


def test_guests_one_after_another_leave_nothing(tmp_path: Path) -> None:
    """Each uses everything it has; every other one has its plug pulled."""
    with hosting(tmp_path) as host:
        pid = host.back_end.pid
        before = Held.by(pid)
        for number in range(IN_A_ROW):
            with host.start("uml") as guest:
                host.works(guest)
                if number % 2:
                    assert guest.end() == 0
            holds_again(pid, before)
