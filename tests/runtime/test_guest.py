"""The built-in guest, freshly built and as shipped, on KVM against the real devices."""

import errno
import fcntl
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

import pytest
from runtime.dialogue import HELP, REFUSED

from lguestlib.abi import uio
from lguestlib.abi.elf import PT_LOAD, Elf32_Ehdr, Elf32_Phdr
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.runtime.backend.random import KernelRandom
from lguestlib.runtime.backend.responder import Responder
from lguestlib.runtime.guest import image_path
from lguestlib.runtime.kvm import KvmMachine
from lguestlib.runtime.machine import Outcome, PowerOff, Reboot
from lguestlib.runtime.pc.machine import PcMachine
from lguestlib.runtime.pc.runner import PciDeviceRunner
from lguestlib.runtime.vm import KvmUnusable, open_kvm
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.net import HEADER_SIZE, Net
from lguestlib.virtio.features import Feature
from lguestlib.virtio.split_device import SplitDeviceQueue

SOURCES = image_path().parent
MEMORY = 32 << 20
SECTORS = 128
PARAMETERS_AT, COMMAND_LINE_AT = GuestAddress(0x7000), GuestAddress(0x20000)
GUEST, GATEWAY = "192.168.19.2", "192.168.19.1"
ADDRESSES = f"ip={GUEST}::{GATEWAY}:255.255.255.0"
GUEST_MAC, PEER_MAC = bytes.fromhex("02005e000002"), bytes.fromhex("02005e000001")
PATIENCE = 20.0
"""Seconds until an answer that does not come is a failure."""


def build(directory: Path, *arguments: str) -> Path:
    """guest.elf made from its sources in *directory*."""
    command = ["make", "--silent", f"O={directory}", *arguments]
    subprocess.run(command, cwd=SOURCES, check=True, capture_output=True, text=True)
    return directory / "guest.elf"


@pytest.fixture(scope="session")
def compiler() -> None:
    for program, package in (("gcc", "gcc"), ("make", "make"), ("objdump", "binutils")):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed: apt-get install {package}")
    trial = ["gcc", "-m32", "-march=i386", "-ffreestanding", "-c", "-x", "c", "-o", "/dev/null", "/dev/null"]
    if subprocess.run(trial, capture_output=True).returncode:
        pytest.skip("gcc -m32 makes no i386 code here: apt-get install gcc-multilib, on an x86-64")


@pytest.fixture(scope="session")
def built(compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("guest"))


@pytest.fixture(scope="session")
def with_symbols(compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("symbols"), "STRIP=")


@pytest.fixture(params=["shipped", "built"])
def image(request: pytest.FixtureRequest) -> Path:
    if request.param == "shipped":
        return image_path()
    path = request.getfixturevalue("built")
    assert isinstance(path, Path)
    return path


@pytest.fixture
def kvm() -> None:
    try:
        os.close(open_kvm())
    except KvmUnusable as error:
        pytest.skip(f"KVM cannot be used: {error}")


def nothing() -> None:
    """What usually happens."""


def fail() -> None:
    """A fault of the device: it stops until it is reset."""
    raise RuntimeError("a fault of the device")


class Disk(FileDisk):
    """A disk with `before_read` in the way of each read."""

    before_read: Callable[[], None] = staticmethod(nothing)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        self.before_read()
        return super().read(buffers, offset)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(range(256)) + bytes(SECTORS * 512 - 256))
    disk = Disk.open(str(path))
    yield disk
    disk.close()


@pytest.fixture
def responder() -> Iterator[Responder]:
    responder = Responder(GATEWAY)
    yield responder
    responder.close()


class Keyboard:
    """A console back-end: `type` is its input, `expect` looks for its output."""

    before_write: Callable[[], None] = staticmethod(nothing)

    def __init__(self) -> None:
        self._input, self._typing = os.pipe()
        self._shown = bytearray()
        self._more = threading.Condition()

    def read(self, buffers: Sequence[memoryview]) -> int:
        return uio.readv(self._input, buffers)

    def write(self, buffers: Sequence[memoryview]) -> int:
        self.before_write()
        with self._more:
            self._shown += b"".join(buffers)
            self._more.notify_all()
        return sum(map(len, buffers))

    def size(self) -> tuple[int, int]:
        return 80, 24

    def type(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._typing, data) :]

    def shrink(self) -> None:
        """Hold no more input than a page."""
        fcntl.fcntl(self._typing, fcntl.F_SETPIPE_SZ, 4096)

    def expect(self, text: str) -> str:
        """Wait for *text*; return the output up to it, which is then gone."""
        wanted = text.encode()
        with self._more:
            assert self._more.wait_for(lambda: wanted in self._shown, PATIENCE), bytes(self._shown)
            end = self._shown.index(wanted) + len(wanted)
            shown = self._shown[:end].decode()
            del self._shown[:end]
        return shown

    @property
    def shown(self) -> str:
        """All output that `expect` has left."""
        with self._more:
            return self._shown.decode()

    def close(self) -> None:
        os.close(self._typing)
        os.close(self._input)


class Session:
    """A machine running the guest *image* with *devices*, and the console last."""

    def __init__(
        self,
        image: Path,
        *devices: Device,
        words: str = ADDRESSES,
        console: Callable[[Keyboard], Device] = Console,
        without: int = 0,
        bus: Literal["mmio", "pci"] = "mmio",
    ) -> None:
        self.reports: list[str] = []
        self.keyboard = Keyboard()
        self.machine: KvmMachine | PcMachine
        memory, parts = GuestMemory.anonymous(MEMORY), (*devices, console(self.keyboard))
        entry = load(memory, image)
        memory.write(PARAMETERS_AT, boot_parameters())
        if bus == "pci":
            self.machine = pc = PcMachine(memory, self.reports.append)
            for device in parts:
                runner = pc.add(device)
                assert isinstance(runner, PciDeviceRunner)
                runner.registers.function.transport.offered &= ~without
            pc.place_firmware()
            pc.boot_32(entry, esi=PARAMETERS_AT)
        else:
            self.machine = small = KvmMachine(memory, self.reports.append)
            for device in parts:
                small.add(device).transport.offered &= ~without
            words = " ".join([*small.device_parameters(), words])
            small.boot(entry, PARAMETERS_AT)
        memory.write(COMMAND_LINE_AT, words.encode() + b"\0")
        self.machine.start()

    def boot(self) -> str:
        """What is shown before the first prompt."""
        return self.keyboard.expect("> ").removesuffix("> ")

    def run(self, command: str) -> str:
        """What *command* shows, without its echo and the next prompt."""
        self.keyboard.type(command.encode() + b"\n")
        shown = self.keyboard.expect("\n> ").removesuffix("> ")
        assert shown.startswith(command + "\n")
        return shown.removeprefix(command + "\n")

    def end(self, command: str = "off") -> Outcome:
        self.keyboard.type(command.encode() + b"\n")
        patience = threading.Timer(PATIENCE, self.machine.request_stop)
        patience.start()
        outcome = self.machine.wait()
        patience.cancel()
        patience.join()
        return outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.machine.close()
        self.keyboard.close()


def load(memory: GuestMemory, image: Path) -> GuestAddress:
    data = image.read_bytes()
    header = Elf32_Ehdr.from_buffer_copy(data)
    for index in range(header.e_phnum):
        segment = Elf32_Phdr.from_buffer_copy(data, header.e_phoff + index * header.e_phentsize)
        if segment.p_type == PT_LOAD:
            content = data[segment.p_offset :][: segment.p_filesz].ljust(segment.p_memsz, b"\0")
            memory.write(GuestAddress(segment.p_paddr), content)
    return GuestAddress(header.e_entry)


def boot_parameters() -> bytes:
    page = bytearray(4096)
    page[0x1E8] = 1
    struct.pack_into("<QQI", page, 0x2D0, 0, MEMORY, 1)
    struct.pack_into("<I", page, 0x228, COMMAND_LINE_AT)
    return bytes(page)


def everything(network: PacketNetwork, *disks: Disk) -> list[Device]:
    return [Net(network, GUEST_MAC), *map(Block, disks), Entropy(KernelRandom())]


def small(queues: Sequence[Queue], size: int) -> list[Queue]:
    return [Queue(queue.name, queue.service, size, queue.from_outside) for queue in queues]


class SmallNet(Net):
    def queues(self) -> Sequence[Queue]:
        return small(super().queues(), 4)


class SmallConsole(Console):
    def queues(self) -> Sequence[Queue]:
        return small(super().queues(), 8)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


SECTOR_0 = """\
00000000  00 01 02 03 04 05 06 07  08 09 0a 0b 0c 0d 0e 0f  |................|
00000010  10 11 12 13 14 15 16 17  18 19 1a 1b 1c 1d 1e 1f  |................|
00000020  20 21 22 23 24 25 26 27  28 29 2a 2b 2c 2d 2e 2f  | !"#$%&'()*+,-./|
00000030  30 31 32 33 34 35 36 37  38 39 3a 3b 3c 3d 3e 3f  |0123456789:;<=>?|
00000040  40 41 42 43 44 45 46 47  48 49 4a 4b 4c 4d 4e 4f  |@ABCDEFGHIJKLMNO|
00000050  50 51 52 53 54 55 56 57  58 59 5a 5b 5c 5d 5e 5f  |PQRSTUVWXYZ[\\]^_|
00000060  60 61 62 63 64 65 66 67  68 69 6a 6b 6c 6d 6e 6f  |`abcdefghijklmno|
00000070  70 71 72 73 74 75 76 77  78 79 7a 7b 7c 7d 7e 7f  |pqrstuvwxyz{|}~.|
"""

SECTOR_0_END = """\
000000f0  f0 f1 f2 f3 f4 f5 f6 f7  f8 f9 fa fb fc fd fe ff  |................|
00000100  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|
*
00000200
"""

SECTOR_5 = """\
00000000  68 65 6c 6c 6f 2c 20 20  64 69 73 6b 00 00 00 00  |hello,  disk....|
00000010  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|
*
00000200
"""


@pytest.mark.parametrize("bus", ["mmio", "pci"])
def test_every_command_does_what_help_says(
    kvm: None, image: Path, responder: Responder, disk: Disk, bus: Literal["mmio", "pci"]
) -> None:
    with Session(image, *everything(responder, disk), bus=bus) as session:
        assert session.boot() == "lguestlib guest: 32 MiB, 4 devices; try help\n"
        run = session.run
        assert run("help") == HELP
        reply = rf"reply from {re.escape(GATEWAY)}: 98 bytes, \d+\.\d{{3}} us\n"
        assert re.fullmatch(reply, run("ping"))
        assert re.fullmatch(reply, run(f"ping {GATEWAY}"))
        assert re.fullmatch(reply + "1 sent, 1 received\n", run(f"ping {GATEWAY} 1"))
        assert re.fullmatch(f"({reply}){{25}}25 sent, 25 received\n", run(f"ping {GATEWAY} 25"))
        dump = run("read 0")
        assert dump.startswith(SECTOR_0) and dump.endswith(SECTOR_0_END)
        assert run("write 5 hello,  disk") == "wrote sector 5\n"
        assert run("read 0x5") == SECTOR_5
        assert run("read 5 0") == SECTOR_5
        assert run("flush") == "flushed\n"
        assert re.fullmatch(r"([0-9a-f]{64}\n){2}[0-9a-f]{12}\n", run("rand 70"))
        assert run("rand 32") != run("rand 32")
        assert len(run("rand 1024")) == 32 * 65
        assert run("reset") == "1 resets, ok\n"
        assert re.fullmatch(reply, run("ping"))
        assert run("") == ""
        assert session.end() == PowerOff(0)
        assert os.pread(disk.fd, 512, 5 * 512) == b"hello,  disk".ljust(512, b"\0")


def test_stat_tells_features_and_counts_and_a_ping_costs_one_interrupt(
    kvm: None, image: Path, responder: Responder, disk: Disk
) -> None:
    with Session(image, *everything(responder, disk)) as session:
        session.boot()
        session.run(f"ping {GATEWAY} 20")
        session.run("read 3")
        net, block, entropy, console = session.run("stat").splitlines()
        # The ARP reply and the echoes, one interrupt each unless the guest was awake already;
        # the frames that asked for them are taken back without.
        counts = re.fullmatch(
            r"net0: features MAC EVENT_IDX VERSION_1; (\d+) interrupts;"
            r" receive: 85 requests, 1 kicks; transmit: 21 requests, (\d+) kicks",
            net,
        )
        assert counts and 0 < int(counts[1]) <= 21 and 0 < int(counts[2]) <= 21
        assert block == (
            "block0: features FLUSH EVENT_IDX VERSION_1; 1 interrupts; requests: 1 requests, 1 kicks"
        )
        assert entropy == "rng0: features EVENT_IDX VERSION_1; 0 interrupts; requests: 0 requests, 0 kicks"
        assert console.startswith("console0: features SIZE EVENT_IDX VERSION_1; ")
        receive, transmit = session.machine.runners[0].counters
        assert receive.chains == 21 and receive.interrupts == int(counts[1])
        assert (transmit.chains, transmit.interrupts) == (21, 0)
        assert session.machine.runners[3].counters[1].interrupts == 0


def test_what_cannot_be_done_is_refused_in_one_line_and_spoils_the_verdict(
    kvm: None, image: Path, responder: Responder, disk: Disk
) -> None:
    with Session(image, *everything(responder, disk)) as session:
        session.boot()
        for command, refusal in REFUSED.items():
            assert session.run(command) == refusal + "\n"
        assert session.run("flush") == "flushed\n"
        assert session.end() == PowerOff(1)


def test_commands_say_which_device_they_miss(kvm: None, image: Path) -> None:
    with Session(image) as session:
        session.boot()
        assert session.run("ping") == "ping: no network\n"
        assert session.run("read 0") == "read: no disk\n"
        assert session.run("write 0 x") == "write: no disk\n"
        assert session.run("flush") == "flush: no disk\n"
        assert session.run("rand 5") == "rand: no entropy device\n"
        assert session.end("reboot") == Reboot()


def test_without_an_address_there_is_no_ping_and_quiet_leaves_the_banner_out(
    kvm: None, image: Path, responder: Responder
) -> None:
    with Session(image, *everything(responder), words="quiet root=/dev/vda") as session:
        assert session.boot() == ""
        refusal = "ping: no address of our own; boot with ip=GUEST::GATEWAY:NETMASK\n"
        assert session.run("ping") == refusal
    with Session(image, *everything(responder), words=f"ip={GUEST} quietly") as session:
        assert session.boot() != ""
        assert session.run("ping") == "ping: no gateway; name an address\n"
        assert session.run(f"ping {GATEWAY}").startswith("reply from ")


def test_input_in_chunks_of_any_size_is_executed_in_order(
    kvm: None, image: Path, responder: Responder, disk: Disk
) -> None:
    chance = random.Random(19)
    numbers = list(range(40))
    ends = [b"\n", b"\r", b"\r\n"]
    typed = b"".join(b"write %d number %d" % (n, n) + chance.choice(ends) for n in numbers)
    with Session(image, *everything(responder, disk)) as session:
        session.boot()
        while typed:
            length = chance.choice([1, 2, 3, 7, 60, 300])
            session.keyboard.type(typed[:length])
            typed = typed[length:]
            time.sleep(chance.choice([0, 0.001]))
        for n in numbers:
            assert session.keyboard.expect("\n> ") == f"write {n} number {n}\nwrote sector {n}\n> "
        assert session.end() == PowerOff(0)
        for n in numbers:
            assert os.pread(disk.fd, 512, n * 512).rstrip(b"\0") == b"number %d" % n


def test_more_input_than_the_buffers_hold_waits_and_none_is_lost(
    kvm: None, image: Path, responder: Responder
) -> None:
    # 8 buffers of 256 bytes are posted, and a pipe of 4 KiB is before them.
    typed = b"".join(b"what-is-%d\n" % n for n in range(800))
    with Session(image, *everything(responder), console=SmallConsole) as session:
        session.boot()
        session.keyboard.shrink()
        typist = threading.Thread(target=session.keyboard.type, args=(typed,))
        typist.start()
        for n in range(800):
            shown = session.keyboard.expect("\n> ")
            assert shown == f"what-is-{n}\nwhat-is-{n}: unknown command; try help\n> "
        typist.join()


def test_a_line_is_edited_as_it_is_typed(kvm: None, image: Path) -> None:
    with Session(image) as session:
        session.boot()
        for typed, shown in (
            (b"rux\b\x7f\x7frand\n", "rux\b \b\b \b\b \brand\nrand: how many bytes?\n> "),
            (b"\b\b\n", "\n> "),
            (b"help\x15rand\n", "help" + "\b \b" * 4 + "rand\nrand: how many bytes?\n> "),
            (b"off\x03rand\n", "off^C\n> rand\nrand: how many bytes?\n> "),
            (b"r\x1b[Aa\x1b[1;5Cn\x1bOPd\x01\n", "rand\nrand: how many bytes?\n> "),
            ("ä\bxß\n".encode(), "ä\b \bxß\nxß: unknown command; try help\n> "),
            (b"x\t1\n", "x 1\nx: unknown command; try help\n> "),
        ):
            session.keyboard.type(typed)
            for line in shown.splitlines(keepends=True):
                assert session.keyboard.expect(line) == line


def test_a_line_too_long_is_not_executed(
    kvm: None, image: Path, responder: Responder, disk: Disk
) -> None:
    with Session(image, *everything(responder, disk)) as session:
        session.boot()
        session.keyboard.type(b"write 1 " + b"x" * 1000 + b"\n")
        assert session.keyboard.expect("\n> ").endswith("x\nthe line is too long\n> ")
        assert session.end() == PowerOff(1)
        assert os.pread(disk.fd, 512, 512) == bytes(512)


@pytest.mark.parametrize("end", ["off", "reboot"])
def test_all_is_shown_before_the_end(kvm: None, image: Path, end: str) -> None:
    with Session(image) as session:
        session.boot()
        session.keyboard.before_write = lambda: time.sleep(0.01)
        session.keyboard.type(b"help\n")
        session.end(end)
        assert session.keyboard.shown == f"help\n{HELP}> {end}\n"


def test_a_hundred_resets_under_load_leave_everything_working(
    kvm: None, image: Path, responder: Responder, disk: Disk
) -> None:
    with Session(image, *everything(responder, disk)) as session:
        session.boot()
        threads = threading.active_count()
        assert session.run("reset 100") == "100 resets, ok\n"
        assert session.run(f"ping {GATEWAY} 5").endswith("5 sent, 5 received\n")
        assert session.run("read 0").startswith(SECTOR_0)
        assert len(session.run("rand 8")) == 17
        assert threading.active_count() == threads
        assert session.end() == PowerOff(0)
        assert not session.reports


def checksum(data: bytes) -> int:
    """RFC 1071: 0 over data that holds its right checksum."""
    total = sum(byte << 8 * (position % 2 ^ 1) for position, byte in enumerate(data))
    while total > 0xFFFF:
        total = (total >> 16) + (total & 0xFFFF)
    return total ^ 0xFFFF


def arp(operation: int, sender: str, target: str) -> bytes:
    return struct.pack(
        "!6s6sHHHBBH6s4s6s4s", b"\xff" * 6, PEER_MAC, 0x0806, 1, 0x0800, 6, 4, operation,
        PEER_MAC, socket.inet_aton(sender), bytes(6), socket.inet_aton(target),
    )  # fmt: skip


def echo_request(source: str, target: str, data: bytes, fragment: int = 0) -> bytes:
    def summed(packet: bytes, position: int) -> bytes:
        return packet[:position] + struct.pack("!H", checksum(packet)) + packet[position + 2 :]

    icmp = summed(struct.pack("!BBHHH", 8, 0, 0, 0x1234, 7) + data, 2)
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    ip = summed(struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(icmp), 99, fragment, 5, 1, 0) + addresses, 10)
    return GUEST_MAC + PEER_MAC + b"\x08\x00" + ip + icmp


class Peer(PacketNetwork):
    """A network at whose other end the test sits."""

    def __init__(self) -> None:
        near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.far.settimeout(PATIENCE)
        super().__init__(near.detach(), "peer")

    def tell(self, frame: bytes) -> None:
        self.far.send(bytes(HEADER_SIZE) + frame)

    def hear(self) -> bytes:
        packet = self.far.recv(2000)
        assert packet[:HEADER_SIZE] == bytes(HEADER_SIZE)
        return packet[HEADER_SIZE:]

    def ask_for_guest(self) -> None:
        """An ARP request, and the answer to it."""
        self.tell(arp(1, GATEWAY, GUEST))
        answer = struct.unpack("!6s6sHHHBBH6s4s6s4s", self.hear())
        assert answer == (
            PEER_MAC, GUEST_MAC, 0x0806, 1, 0x0800, 6, 4, 2,
            GUEST_MAC, socket.inet_aton(GUEST), PEER_MAC, socket.inet_aton(GATEWAY),
        )  # fmt: skip

    def ping_guest(self, data: bytes) -> None:
        self.tell(echo_request(GATEWAY, GUEST, data))
        frame = self.hear()
        assert frame[:14] == PEER_MAC + GUEST_MAC + b"\x08\x00"
        ip, icmp = frame[14:34], frame[34:]
        assert checksum(ip) == 0 and checksum(icmp) == 0
        assert ip[8] == 64 and ip[12:20] == socket.inet_aton(GUEST) + socket.inet_aton(GATEWAY)
        assert struct.unpack("!BB2xHH", icmp[:8]) == (0, 0, 0x1234, 7)
        assert icmp[8:] == data

    def close(self) -> None:
        super().close()
        self.far.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def test_arp_and_echo_are_answered_at_the_prompt(kvm: None, image: Path, peer: Peer) -> None:
    with Session(image, *everything(peer)) as session:
        session.boot()
        peer.ask_for_guest()
        for size in (0, 1, 2, 3, 56, 57, 1471, 1472):
            peer.ping_guest(random.Random(size).randbytes(size))
        # A sum of all ones, which has two ways to be written.
        peer.ping_guest(bytes.fromhex("edc4"))
        for _ in range(200):
            peer.ping_guest(b"again")
        assert session.run("rand") == "rand: how many bytes?\n"


def test_frames_that_are_damaged_or_for_others_are_not_answered(kvm: None, image: Path, peer: Peer) -> None:
    good = echo_request(GATEWAY, GUEST, bytes(56))

    def spoilt(position: int, byte: int) -> bytes:
        return good[:position] + bytes([byte]) + good[position + 1 :]

    with Session(image, *everything(peer)) as session:
        session.boot()
        for frame in (
            spoilt(60, 1), spoilt(22, 9), spoilt(14, 0x44), spoilt(14, 0x65), spoilt(16, 0xFF),
            good[:-1], good[:33], good[:14], good[:9], b"", good[:12] + b"\x86\xdd" + good[14:],
            echo_request(GATEWAY, "192.168.19.3", bytes(56)), arp(1, GATEWAY, "192.168.19.3"),
            echo_request(GATEWAY, GUEST, bytes(56), fragment=0x2000),
            echo_request(GATEWAY, GUEST, bytes(56), fragment=7),
            arp(2, GATEWAY, GUEST), arp(1, GATEWAY, GUEST)[:41], bytes(1514), b"\xff" * 1514,
        ):  # fmt: skip
            peer.tell(frame)
        # Whatever it had to say to those would come before this.
        peer.ping_guest(b"in order")
        assert session.end() == PowerOff(0)


def test_the_network_is_answered_while_a_command_waits(
    kvm: None, image: Path, peer: Peer, disk: Disk
) -> None:
    go_on = threading.Event()
    disk.before_read = lambda: nothing() if go_on.wait(PATIENCE) else fail()
    with Session(image, *everything(peer, disk)) as session:
        session.boot()
        session.keyboard.type(b"read 0\nread 1\n")
        session.keyboard.expect("read 0\n")
        peer.ask_for_guest()
        peer.ping_guest(b"are you there?")
        go_on.set()
        assert session.keyboard.expect("\n> ").startswith(SECTOR_0)
        assert session.keyboard.expect("\n> ").startswith("read 1\n00000000 ")


def test_a_ping_is_a_well_formed_frame_and_wants_its_own_answer(kvm: None, image: Path, peer: Peer) -> None:
    with Session(image, *everything(peer)) as session:
        session.boot()
        session.keyboard.type(b"ping\n")
        asked = peer.hear()
        assert asked == b"\xff" * 6 + GUEST_MAC + arp(1, GUEST, GATEWAY)[12:22] + GUEST_MAC + (
            socket.inet_aton(GUEST) + bytes(6) + socket.inet_aton(GATEWAY)
        )
        peer.tell(arp(2, GATEWAY, GUEST))
        frame = peer.hear()
        assert len(frame) == 98 and frame[:14] == PEER_MAC + GUEST_MAC + b"\x08\x00"
        ip, icmp = frame[14:34], frame[34:]
        assert checksum(ip) == 0 and checksum(icmp) == 0
        assert ip[12:20] == socket.inet_aton(GUEST) + socket.inet_aton(GATEWAY)
        reply = echo_request(GATEWAY, GUEST, icmp[8:])
        addressed, fields = reply[:34], icmp[4:]

        def answer(identity: bytes, padding: bytes = b"", addressed: bytes = addressed) -> bytes:
            body = identity + fields[4:]
            return addressed + b"\0\0" + struct.pack("!H", checksum(b"\0\0\0\0" + body)) + body + padding

        stranger = echo_request("192.168.19.9", GUEST, icmp[8:])[:34]
        # For someone else, late, from a stranger, and then the one waited for: told apart by length.
        peer.tell(answer(b"\x12\x34" + fields[2:4], b"x"))
        peer.tell(answer(fields[:2] + b"\x77\x77", b"xx"))
        peer.tell(answer(fields[:4], b"xxx", stranger))
        peer.ping_guest(b"it is still waiting")
        peer.tell(answer(fields[:4]))
        assert session.keyboard.expect("\n> ").startswith(f"ping\nreply from {GATEWAY}: 98 bytes, ")


def test_a_ping_without_an_answer_fails_after_a_second_and_an_unknown_host_after_three(
    kvm: None, peer: Peer
) -> None:
    with Session(image_path(), *everything(peer)) as session:
        session.boot()
        start = time.monotonic()
        assert session.run("ping") == f"ping: no such host on the network: {GATEWAY}\n"
        assert time.monotonic() - start > 2.9
        assert [len(peer.hear()) for _ in range(3)] == [42] * 3
        peer.ask_for_guest()
        # The gateway is known now, and it is the way to what is not on the network.
        start = time.monotonic()
        assert session.run("ping 10.1.2.3") == "no answer from 10.1.2.3\n"
        assert time.monotonic() - start > 0.9
        frame = peer.hear()
        assert frame[:6] == PEER_MAC and frame[30:34] == socket.inet_aton("10.1.2.3")
        assert session.end() == PowerOff(1)


def test_only_the_first_of_two_networks_has_the_address(kvm: None, image: Path, peer: Peer) -> None:
    other = Peer()
    try:
        with Session(image, *everything(peer), Net(other, PEER_MAC, "other")) as session:
            session.boot()
            for _ in range(100):
                other.tell(arp(1, GATEWAY, GUEST))
            peer.ask_for_guest()
            wait_until(lambda: session.machine.runners[2].counters[0].chains == 100)
            other.far.setblocking(False)
            with pytest.raises(BlockingIOError):
                other.far.recv(2000)
    finally:
        other.close()


def test_each_of_several_disks_is_read_by_its_number(
    kvm: None, image: Path, responder: Responder, disk: Disk, tmp_path: Path
) -> None:
    path = tmp_path / "second"
    path.write_bytes(b"second" + bytes(1018))
    second = Disk.open(str(path), read_only=True)
    try:
        with Session(image, *everything(responder, disk, second)) as session:
            session.boot()
            assert session.run("read 0 1").startswith("00000000  73 65 63 6f 6e 64 00 00 ")
            assert session.run("read 0").startswith(SECTOR_0)
            assert session.run("flush 1") == "flushed\n"
            assert "block1: features RO FLUSH " in session.run("stat")
            assert session.run("read 2 1") == (
                "read: sector 2 is past the end of the disk (capacity 2 sectors)\n"
            )
        with Session(image, Block(second)) as session:
            session.boot()
            assert session.run("write 0 x") == "write: the disk is read-only\n"
    finally:
        second.close()


def test_an_io_error_is_told_and_the_disk_goes_on(kvm: None, image: Path, disk: Disk) -> None:
    def bad_medium() -> None:
        raise OSError(errno.EIO, "bad medium")

    with Session(image, Block(disk)) as session:
        session.boot()
        disk.before_read = bad_medium
        assert session.run("read 0") == "read: I/O error\n"
        disk.before_read = nothing
        assert session.run("read 0").startswith(SECTOR_0)


def test_a_device_that_needs_a_reset_gets_it(kvm: None, image: Path, disk: Disk) -> None:
    with Session(image, Block(disk)) as session:
        session.boot()
        for _ in range(5):
            disk.before_read = fail
            assert session.run("read 0") == "read: the disk was reset meanwhile\n"
            disk.before_read = nothing
            assert session.run("read 0").startswith(SECTOR_0)
        assert session.reports.count("block0: needs a reset, and gets it") == 5


def test_a_device_that_fails_for_ever_is_given_up(
    kvm: None, image: Path, responder: Responder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(buffers: Sequence[memoryview]) -> int:
        raise OSError(errno.EIO, "the cable is cut")

    monkeypatch.setattr(responder, "receive", broken)
    with Session(image, Net(responder, GUEST_MAC)) as session:
        wait_until(lambda: "net0: needs a reset again and again, and is given up" in session.reports)
        assert session.reports.count("net0: needs a reset, and gets it") == 3
        session.boot()
        assert session.run("ping") == "ping: no network\n"


def test_a_console_that_fails_comes_back(kvm: None, image: Path) -> None:
    with Session(image) as session:
        session.boot()
        assert session.run("rand") == "rand: how many bytes?\n"

        def fail_once() -> None:
            session.keyboard.before_write = nothing
            fail()

        session.keyboard.before_write = fail_once
        session.keyboard.type(b"x")
        wait_until(lambda: "console0: needs a reset, and gets it" in session.reports)
        session.keyboard.type(b"y\n")
        assert session.keyboard.expect("\n> ") == "y\nxy: unknown command; try help\n> "


def test_it_works_without_the_event_index(
    kvm: None, image: Path, responder: Responder, disk: Disk
) -> None:
    with Session(image, *everything(responder, disk), without=Feature.RING_EVENT_IDX) as session:
        session.boot()
        assert session.run("read 0").startswith(SECTOR_0)
        assert session.run(f"ping {GATEWAY} 50").endswith("50 sent, 50 received\n")
        assert session.run("reset 3") == "3 resets, ok\n"
        assert len(session.run("rand 1024")) == 32 * 65
        stat = session.run("stat")
        assert "net0: features MAC VERSION_1; " in stat
        assert "block0: features FLUSH VERSION_1; " in stat
        assert session.machine.runners[0].counters[1].interrupts == 0


def test_queues_as_small_as_the_device_wants(
    kvm: None, image: Path, responder: Responder, disk: Disk
) -> None:
    with Session(image, SmallNet(responder, GUEST_MAC), Block(disk), console=SmallConsole) as session:
        session.boot()
        for _ in range(3):
            assert session.run("read 0").startswith(SECTOR_0)
            assert session.run(f"ping {GATEWAY} 30").endswith("30 sent, 30 received\n")
        assert session.run("x" * 600) == "x" * 600 + ": unknown command; try help\n"


def test_an_idle_guest_sleeps(kvm: None, image: Path, responder: Responder, disk: Disk) -> None:
    with Session(image, *everything(responder, disk)) as session:
        session.boot()
        session.run("ping")
        guest = next(thread for thread in threading.enumerate() if thread.name == "guest")
        clock = time.pthread_getcpuclockid(guest.ident or 0)
        before = time.clock_gettime(clock)
        time.sleep(0.3)
        assert time.clock_gettime(clock) - before < 0.01


def test_an_exception_is_the_last_word(kvm: None, with_symbols: Path) -> None:
    symbols = subprocess.run(["nm", with_symbols], check=True, capture_output=True, text=True).stdout
    found = re.search(r"^([0-9a-f]{8}) t help$", symbols, re.MULTILINE)
    assert found
    undefined_instruction = b"\x0f\x0b"
    with Session(with_symbols) as session:
        session.boot()
        session.machine.memory.write(GuestAddress(int(found[1], 16)), undefined_instruction)
        assert session.end("help") == PowerOff(255)
        assert session.reports == [f"panic: exception 6 at 0x{found[1]}"]


FOREIGN = re.compile(r"iret|cmov|f(?!s)|endbr|bswap|xadd|cmpxchg|cpuid|rdtsc|sys|ud|p(?!op|ush)|\(bad\)")
"""Mnemonics of what an i386, or KVM's emulator, does not know: among them all of x87, MMX and SSE."""


def test_there_is_no_instruction_the_emulator_does_not_know(compiler: None, image: Path) -> None:
    listing = subprocess.run(["objdump", "-d", image], check=True, capture_output=True, text=True).stdout
    mnemonics = set(re.findall(r"^ +[0-9a-f]+:\t[0-9a-f ]+\t(?:lock |rep )?(\S+)", listing, re.MULTILINE))
    assert {"call", "hlt", "popf", "ret", "sti"} <= mnemonics
    assert not [mnemonic for mnemonic in mnemonics if FOREIGN.match(mnemonic)]
    assert not re.search(r"%(xmm|mm|st|cr|dr)", listing)


def test_both_stores_of_an_index_are_fenced_from_the_look_that_follows(compiler: None, image: Path) -> None:
    listing = subprocess.run(["objdump", "-d", image], check=True, capture_output=True, text=True).stdout
    assert len(re.findall(r"\tlock ", listing)) == 2


def tools(image: Path) -> str:
    """What the image says of the compiler and the linker that made it."""
    command = ["readelf", "--string-dump=.comment", str(image)]
    dumped = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dumped[dumped.index("String dump") :]


def test_the_shipped_guest_is_what_its_sources_make(built: Path) -> None:
    if tools(built) != tools(image_path()):
        pytest.skip(f"other tools made the shipped guest: readelf --string-dump=.comment {image_path()}")
    assert built.read_bytes() == image_path().read_bytes(), f"make -C {SOURCES} brings it up to date"


def test_it_is_small(image: Path) -> None:
    assert image.stat().st_size < 16384


def test_behind_pci_each_queue_has_a_message_of_its_own(
    kvm: None, image: Path, responder: Responder, disk: Disk
) -> None:
    with Session(image, *everything(responder, disk), bus="pci") as session:
        session.boot()
        session.run("ping")
        # Each a notification of 32 bits, and no exit: its data are none of KVM's business.
        assert session.run("stat").count("VERSION_1 NOTIFICATION_DATA") == 4
        assert isinstance(session.machine, PcMachine)
        exits = session.machine.exits
        session.run("ping 192.168.19.1 100")
        assert session.machine.exits - exits < 100
        gsis: list[int] = []
        for runner in session.machine.runners:
            assert isinstance(runner, PciDeviceRunner)
            assert runner.registers.function.msix.enabled and not runner.registers.function.transport.isr & 1
            attached = runner.registers.vectors._attached
            assert attached.keys() == {-1, *range(len(runner.queues))}
            gsis += attached.values()
        assert len(gsis) == len(set(gsis)) == 4 + 2 + 1 + 1 + 2
        assert session.end() == PowerOff(0)


def test_a_device_that_needs_a_reset_gets_it_behind_pci(kvm: None, image: Path, disk: Disk) -> None:
    with Session(image, Block(disk), bus="pci", without=int(Feature.RING_EVENT_IDX)) as session:
        session.boot()
        for _ in range(5):
            disk.before_read = fail
            assert session.run("read 0") == "read: the disk was reset meanwhile\n"
            disk.before_read = nothing
            assert session.run("read 0").startswith(SECTOR_0)
        assert session.reports.count("block0: needs a reset, and gets it") == 5


def test_as_many_devices_as_the_pci_bus_has_room_for(kvm: None, image: Path) -> None:
    with Session(image, *(Entropy(KernelRandom(), f"rng{number}") for number in range(30)), bus="pci") as session:
        assert session.boot() == "lguestlib guest: 32 MiB, 31 devices; try help\n"
        assert len(session.run("rand 1024")) == 32 * 65


def in_order(device: Device) -> Device:
    device.withheld &= ~int(Feature.IN_ORDER)
    return device


def test_what_comes_back_in_order_may_be_told_of_in_batches(
    kvm: None, responder: Responder, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: Counter[int] = Counter()

    held: dict[SplitDeviceQueue, Chain] = {}

    def tell_of_the_last(queue: SplitDeviceQueue, chains: Sequence[Chain]) -> None:
        # What is sent is told of by twos.
        if len(chains) == 1 and not chains[0].writable_length and queue not in held:
            held[queue] = chains[0]
            return
        chains = [*([held.pop(queue)] if queue in held else []), *chains]
        slot = (queue._used & queue._mask) << 1
        queue._used_ring[slot], queue._used_ring[slot + 1] = chains[-1].head, chains[-1].written
        for chain in chains:
            chain.in_flight = False
        queue._used += len(chains)
        queue._used_idx[0] = queue._used & 0xFFFF
        batches[len(chains)] += 1

    parts = [in_order(device) for device in everything(responder, disk)]
    with Session(image_path(), *parts, console=lambda keyboard: in_order(Console(keyboard))) as session:
        session.boot()
        assert session.run("stat").count("VERSION_1 IN_ORDER") == 4
        # First by a device that tells of each.
        assert session.run(f"ping {GATEWAY} 20").endswith("20 sent, 20 received\n")
        monkeypatch.setattr(SplitDeviceQueue, "push_many", tell_of_the_last)
        for _ in range(2):
            assert session.run(f"ping {GATEWAY} 20").endswith("20 sent, 20 received\n")
            assert session.run("read 0").startswith(SECTOR_0)
            assert len(session.run("rand 1024")) == 32 * 65
            assert session.run("reset") == "1 resets, ok\n"
            assert session.run("help") == HELP
        # It would wait for the last of what it shows, which is not told of.
        session.machine.request_stop()
    assert batches[1] > 0 and batches[2] >= 40, batches
