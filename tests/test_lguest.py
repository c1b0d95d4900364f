"""A whole machine on lguest's double: Linux's drivers on one side, this library's devices on the other."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
from lguest_double import PAGE_SIZE, GuestCpu, GuestProgram, LguestDouble
from lguest_guest import (
    ACKNOWLEDGE,
    BARRIER,
    BLK_BARRIER,
    BLK_FLUSH,
    BLOCK,
    CONSOLE,
    DRIVER,
    EVENT_IDX,
    FAILED,
    FLUSH,
    INDIRECT_DESC,
    LINUX_2_6_33,
    LINUX_3_0,
    LINUX_3_11,
    NET,
    NET_GUEST_TSO4,
    NET_MRG_RXBUF,
    READ,
    RNG,
    SCSI_COMMAND,
    WRITE,
    BigNetDriver,
    BlockDriver,
    ConsoleDriver,
    Linux,
    NetDriver,
    PlainNetDriver,
    Release,
    RngDriver,
    session,
)
from memory.images import Load, elf
from runtime.rigs import nothing_left

from lguestlib.abi import uio
from lguestlib.memory.image.parse import parse
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.backend.random import KernelRandom
from lguestlib.runtime.backend.responder import Responder
from lguestlib.runtime.lguest.machine import LguestMachine
from lguestlib.runtime.machine import Crash, Outcome, PowerOff, Reboot
from lguestlib.runtime.packets import Station, arp_reply, arp_request, echo_reply, echo_request
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.net import Net

RAM = 16 << 20
KERNEL = parse(bytes(elf(32, 0x10_0000, [Load(0x10_0000, b"\x90" * 100, 0x1000, 0xC010_0000)])))
SECTORS = 256
MAC, GUEST, GATEWAY = bytes.fromhex("0200c0a81302"), bytes([192, 168, 19, 2]), bytes([192, 168, 19, 1])
PATIENCE = 60.0

releases = pytest.mark.parametrize(
    "release", [LINUX_2_6_33, LINUX_3_0, LINUX_3_11], ids=["2.6.33", "3.0", "3.11"]
)


class Line:
    """A console's other end: what is typed, and what was shown."""

    def __init__(self) -> None:
        self.shown = bytearray()
        self._reader, self._writer = os.pipe()

    def type(self, keys: bytes) -> None:
        os.write(self._writer, keys)

    def read(self, buffers: Sequence[memoryview]) -> int:
        return uio.readv(self._reader, buffers)

    def write(self, buffers: Sequence[memoryview]) -> int:
        for buffer in buffers:
            self.shown += buffer
        return sum(map(len, buffers))

    def size(self) -> tuple[int, int]:
        return 80, 25

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


class Host:
    """What the devices have behind them, and a machine with one of each."""

    def __init__(self, image: Path, read_only: bool = False) -> None:
        image.write_bytes(bytes(SECTORS * 512))
        self.image = image
        self.disk = FileDisk.open(str(image), read_only)
        self.network = Responder("192.168.19.1")
        self.line = Line()
        self.said: list[str] = []
        self.early = bytearray()
        self.doubles: list[LguestDouble] = []

    def boot(self, program: GuestProgram, initrd: bytes | None = None) -> Outcome:
        """From start to end.  Raises the guest's own error."""

        def open_file() -> LguestDouble:
            self.doubles.append(LguestDouble(program))
            return self.doubles[-1]

        with LguestMachine(RAM, self.said.append, open_file=open_file, early=self.early.extend) as machine:
            machine.add(Net(self.network, MAC))
            machine.add(Block(self.disk))
            machine.add(Entropy(KernelRandom()))
            machine.add(Console(self.line))
            machine.boot(KERNEL, initrd, b"root=/dev/vda console=hvc0")
            watchdog = threading.Timer(PATIENCE, machine.request_stop)
            watchdog.start()
            machine.start()
            outcome = machine.wait()
            machine.finish()
            watchdog.cancel()
            watchdog.join()
        failure = self.doubles[-1].failure
        if failure:
            raise failure
        return outcome

    def close(self) -> None:
        for owner in (self.disk, self.network, self.line):
            owner.close()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def host(tmp_path: Path, clean: None) -> Iterator[Host]:
    made = Host(tmp_path / "disk")
    yield made
    made.close()


def use_console(linux: Linux) -> ConsoleDriver:
    console = ConsoleDriver(linux.of_type(CONSOLE))
    console.write(b"login: ")
    console.write(b"hello " + console.read_line() + b"\n")
    return console


def use_block(linux: Linux) -> BlockDriver:
    disk = BlockDriver(linux.of_type(BLOCK))
    assert disk.capacity == SECTORS
    disk.write(1, b"a sector".ljust(512, b"."))
    disk.write(8, bytes(range(256)) * 64)
    disk.flush()
    assert disk.read(1, 512).startswith(b"a sector")
    assert disk.read(8, 16384, pieces=4) == bytes(range(256)) * 64
    assert disk.identity() == b"disk"
    return disk


def use_rng(linux: Linux) -> RngDriver:
    rng = RngDriver(linux.of_type(RNG))
    read = [rng.read(), rng.read()]
    assert read[0] != read[1]
    assert [len(piece) for piece in read] == [64, 64]
    return rng


def use_net(linux: Linux, driver: Callable[..., NetDriver] = NetDriver, pings: int = 20) -> NetDriver:
    net = driver(linux.of_type(NET))
    assert net.mac == MAC
    station = Station(net.mac, GUEST)
    net.send(arp_request(station, GATEWAY))
    gateway = arp_reply(net.receive())
    assert gateway
    for number in range(pings):
        net.send(echo_request(station, gateway, 7, number, bytes([number]) * 56))
        frame = net.receive()
        reply = echo_reply(frame, GUEST)
        assert reply and reply.sequence == number and frame[42:] == bytes([number]) * 56
    return net


@releases
def test_every_device_serves_linux(host: Host, release: Release) -> None:
    def steps(linux: Linux) -> None:
        assert (linux.memory_size, linux.command_line) == (RAM, "root=/dev/vda console=hvc0")
        assert [device.type for device in linux.devices] == [NET, BLOCK, RNG, CONSOLE]
        net = use_net(linux)
        assert net.device.features & NET_MRG_RXBUF
        use_block(linux)
        use_rng(linux)
        use_console(linux)
        assert linux.spurious == []

    host.line.type(b"world\n")
    assert host.boot(session(steps, release)) == PowerOff()
    assert host.line.shown == b"login: hello world\n"
    assert host.early == b"Linux on lguest, 16 MiB: root=/dev/vda console=hvc0\n"
    assert host.image.read_bytes()[512:520] == b"a sector"
    assert host.said == []


@releases
def test_features_are_what_the_driver_knows(host: Host, release: Release) -> None:
    def steps(linux: Linux) -> None:
        disk = use_block(linux)
        assert bool(disk.device.features & EVENT_IDX) == (release is not LINUX_2_6_33)
        assert bool(disk.device.features & BLK_BARRIER) == (release is LINUX_2_6_33)
        assert disk.device.features & INDIRECT_DESC

    assert host.boot(session(steps, release)) == PowerOff()


@releases
@pytest.mark.parametrize("driver", [PlainNetDriver, BigNetDriver])
def test_a_driver_without_mergeable_buffers_has_headers_of_ten_bytes(
    host: Host, driver: type[NetDriver], release: Release
) -> None:
    def steps(linux: Linux) -> None:
        net = use_net(linux, driver)
        assert not net.mergeable
        assert net.big == (driver is BigNetDriver and bool(net.device.offered & NET_GUEST_TSO4))
        # And one with them, after it, twelve again.
        net.remove()
        assert use_net(linux).mergeable

    assert host.boot(session(steps, release)) == PowerOff()


@releases
def test_a_driver_is_unbound_and_bound_again(host: Host, release: Release) -> None:
    def steps(linux: Linux) -> None:
        for name in (b"one", b"two", b"three"):
            host.line.type(name + b"\n")
            for use in (use_net, use_block, use_rng, use_console):
                use(linux).remove()
        assert linux.spurious == []

    assert host.boot(session(steps, release)) == PowerOff()
    assert host.line.shown == b"login: hello one\nlogin: hello two\nlogin: hello three\n"


def test_an_eventfd_is_attached_once_for_each_queue_whatever_is_reset(host: Host) -> None:
    def steps(linux: Linux) -> None:
        for _ in range(3):
            use_block(linux).remove()
            use_net(linux, pings=2).remove()

    assert host.boot(session(steps)) == PowerOff()
    [double] = host.doubles
    attached = [words[1] for words in double.requests if words[0] == 4]
    assert len(attached) == 3
    assert len(set(attached)) == 3
    # Nor does a kick come out, once they are.
    assert not set(double.exits) & set(attached)


def test_a_barrier_is_a_write_and_a_request_nobody_knows_is_unsupported(host: Host) -> None:
    def steps(linux: Linux) -> None:
        disk = BlockDriver(linux.of_type(BLOCK))
        disk.write(3, b"x" * 512, barrier=True)
        assert disk.request(SCSI_COMMAND, 0, answer=96)[0] == 2
        assert disk.request(SCSI_COMMAND | BARRIER, 0, answer=96)[0] == 2
        assert disk.request(READ, SECTORS, answer=512)[0] == 1
        assert disk.request(WRITE, SECTORS - 1, bytes(1024))[0] == 1
        assert disk.request(FLUSH, 0)[0] == 0
        assert disk.read(3, 512) == b"x" * 512

    assert host.boot(session(steps, LINUX_2_6_33)) == PowerOff()
    assert host.image.stat().st_size == SECTORS * 512


def test_a_disk_that_is_not_to_be_written_says_so(tmp_path: Path) -> None:
    def steps(linux: Linux) -> None:
        disk = BlockDriver(linux.of_type(BLOCK))
        assert disk.device.offered & 1 << 5
        assert disk.request(WRITE, 0, bytes(512))[0] == 1
        assert disk.device.features & BLK_FLUSH

    host = Host(tmp_path / "disk", read_only=True)
    assert host.boot(session(steps)) == PowerOff()
    host.close()


def test_a_disk_goes_on_past_what_32_bits_count(host: Host) -> None:
    sectors = (5 << 30) // 512
    os.truncate(host.image, 5 << 30)

    def steps(linux: Linux) -> None:
        disk = BlockDriver(linux.of_type(BLOCK))
        assert disk.capacity == sectors
        disk.write(sectors - 1, b"the last".ljust(512, b"."))
        disk.flush()
        assert disk.read(sectors - 1, 512).startswith(b"the last")
        assert disk.request(READ, sectors, answer=512)[0] == 1

    assert host.boot(session(steps)) == PowerOff()
    with host.image.open("rb") as image:
        image.seek(-512, os.SEEK_END)
        assert image.read(8) == b"the last"


def test_an_initrd_is_at_the_top_of_memory(host: Host) -> None:
    initrd = os.urandom(5000)

    def steps(linux: Linux) -> None:
        assert linux.initrd == (RAM - 8192, 8192)
        assert linux.cpu.read(RAM - 8192, 5000) == initrd
        assert linux.cpu.start == 0x10_0000
        assert linux.cpu.read(0x10_0000, 101) == b"\x90" * 100 + b"\0"

    assert host.boot(session(steps), initrd) == PowerOff()


@pytest.mark.parametrize("text", ["Kernel panic - not syncing: VFS", "Power downwards", ""])
def test_last_words_are_the_reason(host: Host, text: str) -> None:
    assert host.boot(session(lambda linux: linux.panic(text))) == Crash(f"CRASH: {text}")


def test_a_reboot_is_an_outcome(host: Host) -> None:
    assert host.boot(session(lambda linux: linux.reboot())) == Reboot()


def test_a_kernel_that_is_no_guest_of_lguests_is_told_of(host: Host) -> None:
    def program(cpu: GuestCpu) -> None:
        cpu.die("unhandled trap 13 at 0x100000 (0x0)")

    outcome = host.boot(program)
    assert isinstance(outcome, Crash)
    assert outcome.reason.startswith("unhandled trap 13 at 0x100000 (0x0)")
    assert "lguest" in outcome.reason


def test_memory_ends_behind_the_last_ring_and_has_guards(host: Host) -> None:
    protections: list[str] = []

    def steps(linux: Linux) -> None:
        base, pfn_limit, _ = host.doubles[-1].memory
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            if last == base or first == base + RAM + 256 * PAGE_SIZE or first == base:
                protections.append(line.split()[1])
        # Three pages for each of six rings, and the descriptors'.
        assert pfn_limit == (RAM >> 12) + 1 + 6 * 3
        linux.cpu.read(pfn_limit * PAGE_SIZE, 1)

    outcome = host.boot(session(steps))
    assert isinstance(outcome, Crash)
    assert outcome.reason.startswith("bad read address")
    assert protections == ["---p", "rw-p", "---p"]


def test_two_machines_run_at_once(tmp_path: Path) -> None:
    meeting = threading.Barrier(2, timeout=PATIENCE)

    def steps(linux: Linux) -> None:
        meeting.wait()
        for _ in range(3):
            use_net(linux).remove()
            use_block(linux).remove()

    hosts = [Host(tmp_path / name) for name in ("disk", "disk2")]
    hosts[1].disk.name = "disk"
    outcomes: list[Outcome] = []

    def boot(host: Host) -> None:
        outcomes.append(host.boot(session(steps)))

    threads = [threading.Thread(target=boot, args=[host]) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [PowerOff(), PowerOff()]
    for host in hosts:
        host.close()


def test_a_guest_that_sleeps_is_stopped(host: Host) -> None:
    asleep = threading.Event()

    def steps(linux: Linux) -> None:
        use_rng(linux)
        asleep.set()
        while True:
            linux.cpu.halt()

    def stop() -> None:
        asleep.wait(PATIENCE)
        machines[0].request_stop()

    machines: list[LguestMachine] = []
    with LguestMachine(RAM, host.said.append, open_file=lambda: LguestDouble(session(steps))) as machine:
        machines.append(machine)
        machine.add(Entropy(KernelRandom()))
        machine.boot(KERNEL, None, b"")
        machine.start()
        thread = threading.Thread(target=stop)
        thread.start()
        assert machine.wait() not in (PowerOff(), Reboot())
        thread.join()


Misdeed = Callable[[Linux], None]


def garbage_features(linux: Linux) -> None:
    device = linux.of_type(RNG)
    device.add_status(DRIVER)
    device.write_accepted(b"\xff" * device.feature_len)
    device.notify_status()


def garbage_status(linux: Linux) -> None:
    device = linux.of_type(RNG)
    for status in (0xFF, 0x40, 0x0F, 3, 0x83, 0x7F, 0, 4, 2, 0, 0x80):
        device.write_status(status)
        device.notify_status()


def garbage_page(linux: Linux) -> None:
    device = linux.of_type(RNG)
    found = linux.cpu.read(device.address, device.size)
    linux.cpu.write(device.address, b"\xff" * device.size)
    device.notify_status()
    linux.cpu.write(device.address, found)


def head_out_of_range(linux: Linux) -> None:
    rng = RngDriver(linux.of_type(RNG))
    rng.queue.publish(0xFFFF)
    rng.queue.notify()


def index_too_far_ahead(linux: Linux) -> None:
    rng = RngDriver(linux.of_type(RNG))
    linux.cpu.store16(rng.queue.avail + 2, 300)
    rng.queue.notify()


def looping_chain(linux: Linux) -> None:
    rng = RngDriver(linux.of_type(RNG))
    linux.cpu.write(rng.queue.address, (4096).to_bytes(8, "little") + bytes([1, 0, 0, 0, 1, 0, 0, 0]))
    rng.queue.publish(0)
    rng.queue.notify()


def buffer_outside_memory(linux: Linux) -> None:
    rng = RngDriver(linux.of_type(RNG))
    rng.queue.add([], [(0xFFFF_F000, 4096)], None)
    rng.queue.kick()


def odd_notifications(linux: Linux) -> None:
    device = linux.of_type(RNG)
    ring = device.queue_config(0)[2] * PAGE_SIZE
    for address in (
        1, device.address + 1, device.address - 1, ring + 1, ring + PAGE_SIZE, RAM + 4095,
        RAM + 256 * PAGE_SIZE, 0x8000_0000, 0xFFFF_FFFF, 0xFFFF_F000,
    ):  # fmt: skip
        linux.cpu.notify(address)


def kick_before_any_status(linux: Linux) -> None:
    device = linux.of_type(RNG)
    device.reset()
    for index in range(device.num_vq):
        linux.cpu.notify(device.queue_config(index)[2] * PAGE_SIZE)


def endless_early_text(linux: Linux) -> None:
    linux.cpu.write(RAM - 8192, b"x" * 8192)
    linux.cpu.notify(RAM - 8192)
    linux.cpu.notify(RAM - 1)


def failed_driver(linux: Linux) -> None:
    rng = RngDriver(linux.of_type(RNG))
    rng.device.add_status(FAILED)


@releases
@pytest.mark.parametrize(
    "misdeed",
    [
        garbage_features, garbage_status, garbage_page, head_out_of_range, index_too_far_ahead, looping_chain,
        buffer_outside_memory, odd_notifications, kick_before_any_status, endless_early_text, failed_driver,
    ],
    ids=lambda misdeed: misdeed.__name__,
)  # fmt: skip
def test_what_a_guest_does_wrong_is_that_devices_misfortune(
    host: Host, misdeed: Misdeed, release: Release
) -> None:
    """The others go on, and when it is reset and its driver bound again, so does that one."""

    def steps(linux: Linux) -> None:
        use_block(linux).remove()
        use_net(linux, pings=2)
        misdeed(linux)
        use_block(linux).remove()
        use_console(linux)
        rng = linux.of_type(RNG)
        rng.reset()
        rng.del_vqs()
        rng.add_status(ACKNOWLEDGE)
        use_rng(linux)

    host.line.type(b"world\n")
    assert host.boot(session(steps, release)) == PowerOff()
    assert host.line.shown == b"login: hello world\n"
    assert len(host.said) <= 3


@pytest.mark.parametrize(
    "misdeed", [head_out_of_range, index_too_far_ahead, looping_chain, buffer_outside_memory],
    ids=lambda misdeed: misdeed.__name__,
)  # fmt: skip
def test_a_malformed_request_is_told_once_and_stops_the_device(host: Host, misdeed: Misdeed) -> None:
    def steps(linux: Linux) -> None:
        misdeed(linux)
        for _ in range(100):
            linux.cpu.notify(linux.of_type(RNG).queue_config(0)[2] * PAGE_SIZE)
        use_block(linux)

    assert host.boot(session(steps)) == PowerOff()
    [line] = host.said
    assert line.startswith("entropy requests: ")


def test_random_words_in_the_page_and_the_rings_are_survived(host: Host) -> None:
    def program(cpu: GuestCpu) -> None:
        random = Random(5)
        linux = Linux(cpu)
        linux.boot()
        pages = 1 + 3 * 6
        for _ in range(600):
            at = RAM + random.randrange(pages * PAGE_SIZE - 8)
            cpu.write(at, random.randbytes(random.randrange(1, 8)))
            device = random.choice(linux.devices)
            cpu.write(device.address + 4, bytes([random.choice([0, 1, 3, 7, 0x83, 255])]))
            cpu.notify(random.choice([device.address, at, RAM + PAGE_SIZE * random.randrange(pages)]))
        linux.power_off()

    assert host.boot(program) == PowerOff()


def test_a_mistake_of_the_guests_program_is_seen_here(host: Host) -> None:
    def steps(linux: Linux) -> None:
        linux.wait_until(lambda: False, 0.01)

    with pytest.raises(AssertionError, match="no interrupt came"):
        host.boot(session(steps, LINUX_3_11))
