"""A machine whose guest is a Python function, and the shell that is one."""

import os
import re
import time
from collections.abc import Iterator, Sequence

import pytest
from runtime.dialogue import HELP, REFUSED
from runtime.rigs import nothing_left

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.backend.random import KernelRandom
from lguestlib.runtime.backend.responder import Responder
from lguestlib.runtime.inprocess.driver import GuestDevice, Pages
from lguestlib.runtime.inprocess.machine import InprocessMachine
from lguestlib.runtime.inprocess.shell import shell
from lguestlib.runtime.inprocess.terminal import LINE_MAX, LineEditor
from lguestlib.runtime.machine import Crash, Outcome, PowerOff, Reboot, Stopped
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.net import Net
from lguestlib.virtio.features import Feature
from lguestlib.virtio.split_driver import Buffer

MEMORY = 16 << 20
STOP_SECONDS = 0.1
ADDRESSES = "ip=192.168.19.2::192.168.19.1:255.255.255.0"


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


class Doubler(Device):
    """Repeats each chain's bytes twice."""

    device_type = 63

    def queues(self) -> Sequence[Queue]:
        return (Queue("work", lambda chain: chain.write(chain.read() * 2)),)


class Script:
    """A console whose keys are given, and whose output is kept."""

    def __init__(self, keys: bytes) -> None:
        self.shown = bytearray()
        self._reader, writer = os.pipe()
        os.write(writer, keys)
        os.close(writer)

    def read(self, buffers: Sequence[memoryview]) -> int:
        return os.readv(self._reader, buffers)

    def write(self, buffers: Sequence[memoryview]) -> int:
        for buffer in buffers:
            self.shown += buffer
        return sum(map(len, buffers))

    def size(self) -> tuple[int, int]:
        return 80, 25

    def close(self) -> None:
        os.close(self._reader)


def run(keys: str, command_line: str = ADDRESSES, devices: str = "block net rng") -> tuple[Outcome, str]:
    """A session with the shell: how it ended, and all that the console showed."""
    script = Script(keys.encode())
    disk = FileDisk.scratch(128 * 512)
    network = Responder("192.168.19.1")
    made: dict[str, Device] = {
        "block": Block(disk), "net": Net(network, bytes.fromhex("020000000002")), "rng": Entropy(KernelRandom()),
    }  # fmt: skip
    said: list[str] = []
    with InprocessMachine(GuestMemory.anonymous(MEMORY), shell(command_line), said.append) as machine:
        for name in devices.split():
            machine.add(made[name])
        machine.add(Console(script))
        machine.start()
        outcome = machine.wait()
        machine.finish()
    for owner in (script, disk, network):
        owner.close()
    assert said == []
    return outcome, script.shown.decode()


def answer(command: str, **others: str) -> str:
    """What the shell says to one command."""
    _, shown = run(f"{command}\noff\n", **others)
    return shown.split(f"> {command}\n", 1)[1].split("> off")[0]


def test_a_program_drives_a_device_and_its_outcome_is_the_machines() -> None:
    def program(machine: InprocessMachine) -> Outcome:
        device = GuestDevice("doubler", machine.runners[0], machine.memory, Pages(GuestAddress(0x10_0000)))
        device.start()
        machine.memory.write(GuestAddress(0x1000), b"ha")
        room = Buffer(GuestAddress(0x2000), 16)
        queue = device.queues[0]
        queue.submit([Buffer(GuestAddress(0x1000), 2)], [room], room)
        while not (used := queue.reap()):
            if not queue.ring.enable_interrupts():
                machine.wait_for_interrupt()
        device.release()
        return PowerOff(used[0].written)

    with InprocessMachine(GuestMemory.anonymous(MEMORY), program, print) as machine:
        machine.add(Doubler("doubler"))
        machine.start()
        assert machine.wait() == PowerOff(4)
        assert machine.memory.read(GuestAddress(0x2000), 4) == b"haha"


@pytest.mark.parametrize("kind", [0, int(Feature.RING_PACKED)], ids=["split", "packed"])
def test_a_notification_may_carry_what_the_ring_says(kind: int) -> None:
    """Through the registers, and through more than one lap."""
    wanted = int(Feature.NOTIFICATION_DATA) | kind

    def program(machine: InprocessMachine) -> Outcome:
        pages = Pages(GuestAddress(0x10_0000))
        device = GuestDevice("doubler", machine.runners[0], machine.memory, pages, wanted)
        device.start()
        assert device.features & wanted == wanted and device.features & Feature.IN_ORDER
        room, queue = Buffer(GuestAddress(0x2000), 16), device.queues[0]
        for turn in range(200):
            machine.memory.write(GuestAddress(0x1000), b"%3d" % turn)
            queue.submit([Buffer(GuestAddress(0x1000), 3)], [room], room)
            while not queue.reap():
                if not queue.ring.enable_interrupts():
                    machine.wait_for_interrupt()
            assert machine.memory.read(room.address, 6) == b"%3d" % turn * 2
        device.release()
        return PowerOff(queue.kicks > 0)

    with InprocessMachine(GuestMemory.anonymous(MEMORY), program, print) as machine:
        doubler = Doubler("doubler")
        doubler.withheld = 0
        machine.add(doubler)
        machine.start()
        assert machine.wait() == PowerOff(1)


def test_a_program_that_raises_is_a_crash() -> None:
    def program(machine: InprocessMachine) -> Outcome:
        raise RuntimeError("out of ideas")

    with InprocessMachine(GuestMemory.anonymous(MEMORY), program, print) as machine:
        machine.start()
        assert machine.wait() == Crash("RuntimeError: out of ideas")


def test_a_sleeping_program_is_stopped_promptly() -> None:
    def program(machine: InprocessMachine) -> Outcome:
        while True:
            machine.wait_for_interrupt()

    machine = InprocessMachine(GuestMemory.anonymous(MEMORY), program, print)
    machine.start()
    time.sleep(0.02)
    start = time.monotonic()
    machine.request_stop()
    assert machine.wait() == Stopped()
    machine.close()
    assert time.monotonic() - start < STOP_SECONDS


def test_waiting_for_an_interrupt_ends_at_its_time() -> None:
    def program(machine: InprocessMachine) -> Outcome:
        start = time.monotonic()
        assert not machine.wait_for_interrupt(0.05)
        return PowerOff(int(time.monotonic() - start >= 0.05))

    with InprocessMachine(GuestMemory.anonymous(MEMORY), program, print) as machine:
        machine.start()
        assert machine.wait() == PowerOff(1)


def test_off_has_the_verdict_of_all_commands_and_reboot_is_one_outcome() -> None:
    assert run("help\noff\n")[0] == PowerOff(0)
    assert run("nonsense\nhelp\noff\n")[0] == PowerOff(1)
    assert run("reboot\n")[0] == Reboot()


def test_help_shows_every_command() -> None:
    assert answer("help") == HELP


def test_what_is_written_is_read_back() -> None:
    _, shown = run("write 3 hello world\nread 3\nread 4\nflush\noff\n")
    assert "wrote sector 3\n" in shown
    assert "00000000  68 65 6c 6c 6f 20 77 6f  72 6c 64 00 00 00 00 00  |hello world.....|\n" in shown
    assert f"00000000  {'00 ' * 8} {'00 ' * 8} |{'.' * 16}|\n*\n00000200\n" in shown
    assert "flushed\n" in shown


def test_random_bytes_come_in_lines_of_32() -> None:
    lines = answer("rand 70").splitlines()
    assert [len(line) for line in lines] == [64, 64, 12]
    assert lines[0] != lines[1]


def test_a_ping_tells_its_round_trip() -> None:
    reply = r"reply from 192\.168\.19\.1: 98 bytes, \d+\.\d{3} us\n"
    assert re.fullmatch(reply, answer("ping"))
    assert re.fullmatch(f"({reply}){{3}}3 sent, 3 received\n", answer("ping 192.168.19.1 3"))


def test_stat_tells_of_every_device_and_queue() -> None:
    lines = answer("stat").splitlines()
    assert lines[0] == "block0: features FLUSH EVENT_IDX VERSION_1; 0 interrupts; requests: 0 requests, 0 kicks"
    assert [line.split(":")[0] for line in lines] == ["block0", "net0", "rng0", "console0"]


def test_without_an_address_there_is_no_ping_and_quiet_leaves_the_banner_out() -> None:
    refusal = "ping: no address of our own; boot with ip=GUEST::GATEWAY:NETMASK\n"
    assert answer("ping", command_line="quiet") == refusal
    assert answer("ping", command_line="ip=192.168.19.2") == "ping: no gateway; name an address\n"
    assert run("off\n", command_line="quiet")[1] == "> off\n"
    assert "guest: 16 MiB, 4 devices; try help" in run("off\n")[1]


def test_resets_under_load_leave_everything_working() -> None:
    outcome, shown = run("ping\nreset 50\nping\nread 0\nrand 4\noff\n")
    assert outcome == PowerOff(0)
    assert "50 resets, ok\n" in shown and shown.count("reply from") == 2


def test_what_cannot_be_done_is_refused_in_one_line_and_spoils_the_verdict() -> None:
    outcome, shown = run("".join(f"{command}\n" for command in REFUSED) + "flush\noff\n")
    assert outcome == PowerOff(1)
    answers = re.findall(r"^> (.*)\n(.*)$", shown, re.MULTILINE)
    assert dict(answers[: len(REFUSED)]) == REFUSED
    assert answers[len(REFUSED)] == ("flush", "flushed")


@pytest.mark.parametrize(
    ("command", "refusal"),
    [("read 0", "no disk"), ("flush", "no disk"), ("rand 1", "no entropy device"), ("ping", "no network")],
)
def test_a_device_that_is_not_there_is_said_to_be_missing(command: str, refusal: str) -> None:
    assert answer(command, devices="") == f"{command.split()[0]}: {refusal}\n"


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (b"help\n", b"help"),
        (b"help\r", b"help"),
        (b"hexx\x7f\blp\n", b"help"),
        (b"\x7fhelp\n", b"help"),
        (b"nonsense\x15help\n", b"help"),
        (b"nonsense\x03", b""),
        (b"he\x1b[Dl\x1b[1;5Cp\x1bOA\n", b"help"),
        (b"read\t1\n", b"read 1"),
        (b"caf\xc3\xa9\x7fe\n", b"cafe"),
        (b"x" * LINE_MAX + b"\n", b"x" * LINE_MAX),
    ],
)
def test_a_line_is_edited_as_it_is_typed(typed: bytes, line: bytes) -> None:
    editor = LineEditor()
    *before, last = typed
    for byte in before:
        editor.key(byte)
        assert editor.ended is None
    editor.key(last)
    assert editor.ended == line


def test_a_line_that_does_not_fit_is_refused_whole() -> None:
    outcome, shown = run("off" + " " * LINE_MAX + "\nhelp\noff\n")
    assert outcome == PowerOff(1)
    assert "the line is too long\n> help\n" in shown


def test_carriage_return_and_line_feed_end_one_line() -> None:
    assert run("help\r\noff\r\n")[1].count("> ") == 2


def test_input_of_any_size_is_taken_a_line_at_a_time() -> None:
    outcome, shown = run("rand 1\n" * 500 + "off\n")
    assert outcome == PowerOff(0)
    assert len(re.findall(r"^[0-9a-f]{2}$", shown, re.MULTILINE)) == 500


def test_a_failed_device_is_started_again_by_its_driver() -> None:
    class Moody(Entropy):
        calls = 0

        def serve_request(self, chain: Chain) -> int:
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("a bad day")
            return super().serve_request(chain)

    script = Script(b"rand 1\nrand 2\noff\n")
    said: list[str] = []
    with InprocessMachine(GuestMemory.anonymous(MEMORY), shell(""), said.append) as machine:
        machine.add(Moody(KernelRandom(), "moody"))
        machine.add(Console(script))
        machine.start()
        outcome = machine.wait()
        machine.finish()
    script.close()
    assert len(said) == 1 and "a bad day" in said[0]
    assert outcome == PowerOff(1)
    assert re.search(r"> rand 1\n.*the device has failed.*\n> rand 2\n[0-9a-f]{4}\n", script.shown.decode(), re.DOTALL)
