"""A machine on the test double of /dev/lguest: how its guest starts, what it asks for, and how it ends."""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from lguest_double import GuestCpu, GuestProgram, LguestDouble
from lguest_guest import (
    FAILED,
    LINUX_2_6_33,
    LINUX_3_11,
    RNG,
    Linux,
    Release,
    RngDriver,
    session,
)
from runtime.rigs import eventually, nothing_left

from lguestlib.memory.image.image import Image
from lguestlib.memory.image.parse import parse
from lguestlib.runtime.lguest.file import LguestFile, LguestUnusable
from lguestlib.runtime.lguest.machine import LguestMachine
from lguestlib.runtime.machine import Crash, Outcome, PowerOff, Reboot, Stopped
from lguestlib.virtio.chain import part
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.errors import HeadOutOfRange
from lguestlib.virtio.lguest import BusFull
from memory.images import Load, elf

MIB = 1 << 20
MEMORY = 8 * MIB
RELEASES = pytest.mark.parametrize("release", [LINUX_2_6_33, LINUX_3_11], ids=["2.6.33", "3.11"])


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


class Counting:
    """Ten bytes at a time, each the number of the time before it."""

    def __init__(self) -> None:
        self.times = 0

    def fill(self, buffers: Sequence[memoryview]) -> int:
        self.times += 1
        for piece in part(tuple(buffers), 0, 10):
            piece[:] = bytes([self.times]) * len(piece)
        return 10


def kernel() -> Image:
    return parse(bytes(elf(32, MIB, [Load(MIB, b"\x90" * 64, 4096)])))


class Rig:
    """A machine with two rng devices, whose guest is *program*."""

    def __init__(self, program: GuestProgram) -> None:
        self.double = LguestDouble(program)
        self.said: list[str] = []
        self.machine = LguestMachine(MEMORY, self.said.append, open_file=lambda: self.double)
        self.runners = [self.machine.add(Entropy(Counting(), f"rng{number}")) for number in range(2)]
        self.machine.boot(kernel(), None, b"root=/dev/vda")

    def run(self) -> Outcome:
        with self.machine:
            self.machine.start()
            outcome = self.machine.wait()
            if outcome != Stopped():
                self.machine.finish()
        assert self.double.failure is None, self.double.failure
        return outcome


def test_the_guest_is_initialized_with_memory_up_to_the_last_ring_and_the_kernels_entry() -> None:
    rig = Rig(session(lambda linux: None))
    base = rig.machine.memory.regions[0].host_address
    assert rig.run() == PowerOff(0)
    # The device page and two rings of three pages.
    assert rig.double.requests[0] == (0, base, (MEMORY >> 12) + 7, MIB)


@RELEASES
def test_a_device_serves_its_driver_by_an_eventfd_and_an_interrupt(release: Release) -> None:
    answers: list[bytes] = []

    def steps(linux: Linux) -> None:
        driver = RngDriver(linux.of_type(RNG, 1))
        answers.extend(driver.read() for _ in range(3))
        assert linux.spurious == []

    rig = Rig(session(steps, release))
    assert rig.run() == PowerOff(0)
    assert answers == [bytes([number]) * 10 for number in (1, 2, 3)]
    ring = MEMORY + 4096 + 3 * 4096
    assert [words[:2] for words in rig.double.requests if words[0] == 4] == [(4, ring)]
    assert [words for words in rig.double.requests if words[0] == 2] == [(2, 2)] * 3
    assert ring not in rig.double.exits


@RELEASES
def test_what_the_guest_says_early_is_told_by_the_line(release: Release) -> None:
    rig = Rig(session(lambda linux: linux.early_console("no end"), release))
    rig.run()
    assert rig.said == ["Linux on lguest, 8 MiB: root=/dev/vda", "no end"]


def test_or_goes_as_it_comes_to_who_wants_it() -> None:
    got = bytearray()
    double = LguestDouble(session(lambda linux: None))
    with LguestMachine(MEMORY, print, open_file=lambda: double, early=got.extend) as machine:
        machine.boot(kernel(), None, b"x=y")
        machine.start()
        assert machine.wait() == PowerOff(0)
    assert bytes(got) == b"Linux on lguest, 8 MiB: x=y\n"


@RELEASES
def test_a_driver_can_be_unbound_and_bound_again_and_the_eventfd_is_the_same(release: Release) -> None:
    answers: list[bytes] = []

    def steps(linux: Linux) -> None:
        driver = RngDriver(linux.of_type(RNG))
        for _ in range(5):
            answers.append(driver.read())
            driver.remove()
            driver.probe()
        answers.append(driver.read())

    rig = Rig(session(steps, release))
    assert rig.run() == PowerOff(0)
    assert answers == [bytes([number]) * 10 for number in range(1, 7)]
    assert len([words for words in rig.double.requests if words[0] == 4]) == 1


@RELEASES
def test_t21_a_driver_that_is_bound_again_may_use_its_device_before_driver_ok_too(release: Release) -> None:
    class Early(RngDriver):
        def set_up(self) -> None:
            super().set_up()
            started = rig.runners[0].transport
            assert started.started is (release is LINUX_3_11), "what was kicked before is forgotten"
            assert self.read() == bytes([len(answers) + 1]) * 10
            answers.append(1)
            assert started.started and started.features == self.device.features

    answers: list[int] = []

    def steps(linux: Linux) -> None:
        driver = Early(linux.of_type(RNG))
        for _ in range(3):
            driver.remove()
            driver.probe()
        # Nobody is left waiting for a first kick that does not come.
        driver.remove()
        driver.device.accept(0)
        driver.remove()
        driver.device.accept(0)

    rig = Rig(session(steps, release))
    assert rig.run() == PowerOff(0)
    assert len(answers) == 4


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (Linux.power_off, PowerOff(0)),
        (Linux.reboot, Reboot()),
        (lambda linux: linux.panic("Attempted to kill init!"), Crash("CRASH: Attempted to kill init!")),
        (lambda linux: linux.cpu.die("Bad hypercall 77"), Crash("Bad hypercall 77")),
    ],
    ids=["power-off", "reboot", "panic", "killed"],
)
def test_a_guest_ends_with_its_last_words(end: Callable[[Linux], None], outcome: Outcome) -> None:
    assert Rig(session(end)).run() == outcome


def test_a_kernel_that_dies_before_a_word_is_told_to_lack_support() -> None:
    outcome = Rig(lambda cpu: cpu.die("unhandled trap 13 at 0x100000 (0x0)")).run()
    assert isinstance(outcome, Crash)
    assert outcome.reason.startswith("unhandled trap 13 at 0x100000 (0x0) (at once: a kernel without lguest support")
    assert Rig(lambda cpu: cpu.crash("too little memory")).run() == Crash("CRASH: too little memory")


def test_a_guest_that_does_not_end_is_stopped() -> None:
    def spin(cpu: GuestCpu) -> None:
        Linux(cpu).boot()
        while True:
            cpu.relax()

    for program in (spin, session(lambda linux: linux.wait_until(lambda: False, 1000))):
        rig = Rig(program)
        with rig.machine:
            rig.machine.start()
            eventually(lambda: len(rig.said) > 0, "its first words")
            begun = time.monotonic()
            rig.machine.request_stop()
            assert rig.machine.wait() == Stopped()
            rig.machine.stop()
            assert time.monotonic() - begun < 1


def test_a_machine_that_is_not_started_leaves_nothing() -> None:
    rig = Rig(session(lambda linux: None))
    rig.machine.close()
    assert rig.double.requests == []


def test_a_broken_ring_stops_its_device_and_not_the_other() -> None:
    def steps(linux: Linux) -> None:
        broken, good = (RngDriver(linux.of_type(RNG, number)) for number in range(2))
        broken.queue.publish(256)
        broken.queue.notify()
        assert good.read() == bytes([1]) * 10
        while not rig.runners[0].failure:
            linux.cpu.relax()
        # A reset mends it.
        broken.remove()
        broken.probe()
        assert broken.read() == bytes([1]) * 10

    rig = Rig(session(steps))
    failures: list[object] = []
    take = rig.said.append

    def note(line: str) -> None:
        failures.append(rig.runners[0].failure)
        take(line)

    rig.runners[0]._report = note
    assert rig.run() == PowerOff(0)
    assert rig.said[1].startswith("rng0 requests: queue 0: ") and "256" in rig.said[1]
    assert isinstance(failures[0], HeadOutOfRange)


def test_a_driver_that_gives_up_is_told_and_its_device_stopped() -> None:
    def steps(linux: Linux) -> None:
        RngDriver(linux.of_type(RNG)).device.add_status(FAILED)
        assert RngDriver(linux.of_type(RNG, 1)).read()

    rig = Rig(session(steps))
    assert rig.run() == PowerOff(0)
    assert rig.said[1:] == ["rng0: its driver has given it up"]
    assert not rig.runners[0].transport.started


def test_notifying_where_nothing_is_is_told_once_and_harms_nobody() -> None:
    def steps(linux: Linux) -> None:
        for address in (MEMORY + 3, MEMORY + 4096 + 8, 0xFFFF_FFF0):
            linux.cpu.notify(address)
        linux.of_type(RNG).notify_status()
        assert RngDriver(linux.of_type(RNG)).read()

    rig = Rig(session(steps))
    assert rig.run() == PowerOff(0)
    assert rig.said[1:] == [f"the guest notifies {MEMORY + 3:#x}, where nothing is; more of that is not told"]


def test_garbage_in_status_and_features_is_taken_for_what_it_can_mean() -> None:
    def steps(linux: Linux) -> None:
        device = linux.of_type(RNG)
        for status in range(256):
            device.write_accepted(b"\xff" * device.feature_len)
            device.write_status(status)
            device.notify_status()
        device.reset()
        assert RngDriver(device).read()
        assert RngDriver(linux.of_type(RNG, 1)).read()

    assert Rig(session(steps)).run() == PowerOff(0)


def test_memory_past_the_rings_is_not_the_guests() -> None:
    outcome = Rig(session(lambda linux: linux.cpu.write(MEMORY + 7 * 4096, b"x"))).run()
    assert isinstance(outcome, Crash) and outcome.reason.startswith("bad write address")


class Refusing:
    """A /dev/lguest whose every request fails with *number*."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = 0

    def write(self, request: bytes, /) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def pread(self, size: int, /) -> bytes:
        raise AssertionError("not initialized")

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EBUSY, "/dev/lguest: Device or resource busy (it has a guest already)"),
        (errno.ENOMEM, "/dev/lguest: Cannot allocate memory (the host has too little memory)"),
        (errno.EFAULT, "/dev/lguest: Bad address"),
    ],
)
def test_a_host_that_does_not_take_the_guest_says_why(number: int, told: str) -> None:
    file = Refusing(number)
    with LguestMachine(MEMORY, print, open_file=lambda: file) as machine:
        machine.boot(kernel(), None, b"")
        machine.start()
        assert machine.wait() == Crash(told)
    assert file.closed == 1


def test_where_there_is_no_lguest_nothing_is_made() -> None:
    def absent() -> LguestFile:
        raise LguestUnusable("no such thing", "make one")

    with pytest.raises(LguestUnusable):
        LguestMachine(MEMORY, print, open_file=absent)


def test_a_bus_that_is_full_says_so_and_the_machine_goes_on() -> None:
    double = LguestDouble(session(lambda linux: None))
    with LguestMachine(MEMORY, print, open_file=lambda: double) as machine:
        for number in range(31):
            machine.add(Entropy(Counting(), f"rng{number}"))
        with pytest.raises(BusFull, match="rng31: 1 interrupts"):
            machine.add(Entropy(Counting(), "rng31"))
        machine.boot(kernel(), None, b"")
        machine.start()
        assert machine.wait() == PowerOff(0)
    assert double.failure is None


def test_two_machines_at_once() -> None:
    def steps(linux: Linux) -> None:
        driver = RngDriver(linux.of_type(RNG))
        for _ in range(20):
            assert driver.read()

    rigs = [Rig(session(steps)), Rig(session(steps))]
    with rigs[0].machine, rigs[1].machine:
        for rig in rigs:
            rig.machine.start()
        assert [rig.machine.wait() for rig in rigs] == [PowerOff(0)] * 2
    assert [rig.double.failure for rig in rigs] == [None, None]
