"""The test double of /dev/lguest answers as the driver does."""

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from abi.interruption import interrupted
from lguest_double import GuestCpu, GuestProgram, LguestDouble

from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd
from lguestlib.abi.lguest import eventfd_request, initialize_request, irq_request
from lguestlib.abi.mmap import MAP_ANONYMOUS, MAP_PRIVATE, address_of

MAP_32BIT = 0x40
PAGES = 4


@contextmanager
def guest_memory() -> Iterator[tuple[mmap.mmap, int]]:
    """Pages where 32 bits reach them, and their address."""
    mapping = mmap.mmap(-1, PAGES * 4096, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT)
    try:
        with memoryview(mapping) as view:
            address = address_of(view)
        yield mapping, address
    finally:
        mapping.close()


@contextmanager
def running(program: GuestProgram) -> Iterator[tuple[LguestDouble, mmap.mmap]]:
    """The file of a guest that is initialized, and its memory."""
    with guest_memory() as (mapping, base), LguestDouble(program) as file:
        assert file.write(initialize_request(base, PAGES, 0x1000)) == 12
        yield file, mapping


def refused(file: LguestDouble, request: bytes) -> int | None:
    with pytest.raises(OSError) as caught:
        file.write(request)
    return caught.value.errno


def ended(file: LguestDouble) -> int | None:
    with pytest.raises(OSError) as caught:
        file.pread(4)
    return caught.value.errno


def patiently(file: LguestDouble) -> int:
    """The next notification, whatever signals come."""
    while True:
        try:
            return int.from_bytes(file.pread(4), "little")
        except InterruptedError:
            continue


def idle(cpu: GuestCpu) -> None:
    """A guest that sleeps for ever."""


def test_only_initialize_is_taken_at_first_and_only_once() -> None:
    doorbell = eventfd()
    with guest_memory() as (_, base), LguestDouble(idle) as file:
        for request in (irq_request(1), eventfd_request(4096, doorbell), (1).to_bytes(8, "little")):
            assert refused(file, request) == errno.EINVAL
        assert ended(file) == errno.EINVAL
        assert file.write(initialize_request(base, PAGES, 0)) == 12
        assert refused(file, initialize_request(base, PAGES, 0)) == errno.EBUSY
        assert file.write(eventfd_request(4096, doorbell)) == 0
        assert file.write(irq_request(1)) == 0
    os.close(doorbell)


@pytest.mark.parametrize("kind", [1, 3, 5])
def test_other_requests_are_refused(kind: int) -> None:
    with running(idle) as (file, _):
        assert refused(file, kind.to_bytes(4, "little") + bytes(12)) == errno.EINVAL


def test_the_length_of_a_request_is_the_kernels_to_know() -> None:
    with running(idle) as (file, _):
        assert file.write(irq_request(1) + bytes(40)) == 0
        assert refused(file, irq_request(1)[:4]) == errno.EFAULT


def test_interrupts_are_32() -> None:
    with running(idle) as (file, _):
        assert file.write(irq_request(31)) == 0
        assert refused(file, irq_request(32)) == errno.EINVAL


def test_an_eventfd_is_attached_to_an_address_that_is_not_zero() -> None:
    reader, writer = os.pipe()
    doorbell = eventfd()
    with running(idle) as (file, _):
        assert refused(file, eventfd_request(0, doorbell)) == errno.EINVAL
        assert refused(file, eventfd_request(4096, reader)) == errno.EINVAL
        assert refused(file, eventfd_request(4096, 0xFFFF_FFFF)) == errno.EBADF
        os.close(doorbell)
        assert refused(file, eventfd_request(4096, doorbell)) == errno.EBADF
    os.close(reader)
    os.close(writer)


def test_a_notification_that_no_eventfd_takes_comes_out_and_the_next_read_goes_on() -> None:
    def program(cpu: GuestCpu) -> None:
        cpu.notify(0x5000)
        cpu.notify(0)
        cpu.notify(0x6000)
        cpu.crash("Power down")

    with running(program) as (file, _):
        assert file.pread(4) == bytes.fromhex("00500000")
        assert file.pread(4) == bytes.fromhex("00600000")
        assert ended(file) == errno.ENOENT


def test_the_first_eventfd_attached_stays_in_charge_and_outlives_the_launchers() -> None:
    def program(cpu: GuestCpu) -> None:
        cpu.notify(0x5000)
        cpu.notify(0x5001)

    first, second = eventfd(), eventfd()
    kept = os.dup(first)
    with running(program) as (file, _):
        assert file.write(eventfd_request(0x5000, first)) == 0
        assert file.write(eventfd_request(0x5000, second)) == 0
        os.close(first)
        assert file.pread(4) == (0x5001).to_bytes(4, "little")
        assert os.read(kept, BYTES) == SIGNAL
        os.set_blocking(second, False)
        with pytest.raises(BlockingIOError):
            os.read(second, BYTES)
    os.close(kept)
    os.close(second)


def test_only_the_thread_that_initialized_runs_the_guest() -> None:
    def program(cpu: GuestCpu) -> None:
        cpu.take_interrupts()
        cpu.notify(4096 + cpu.halt()[0])

    answers: list[int | None] = []
    with running(program) as (file, _):

        def other() -> None:
            answers.append(ended(file))
            answers.append(file.write(irq_request(7)))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        # It came before the guest's interrupts were set up.
        assert ended(file) == errno.ENOENT
    assert answers == [errno.EPERM, 0]


def test_a_dead_guests_reason_is_read_again_and_again() -> None:
    with running(lambda cpu: cpu.crash("Power down")) as (file, _):
        assert ended(file) == errno.ENOENT
        for _ in range(3):
            assert file.pread(4096) == b"CRASH: Power down\0"
        assert file.pread(5) == b"CRASH"
        assert refused(file, irq_request(1)) == errno.ENOENT
        assert refused(file, eventfd_request(4096, 0)) == errno.ENOENT


def test_a_guest_that_restarts_says_so_for_ever() -> None:
    with running(lambda cpu: cpu.restart()) as (file, _):
        assert [ended(file) for _ in range(3)] == [85, 85, 85]
        assert refused(file, irq_request(1)) == errno.ENOENT


def test_a_signal_ends_the_read_and_the_guest_sleeps_on() -> None:
    def program(cpu: GuestCpu) -> None:
        cpu.take_interrupts()
        cpu.notify(0x1000)
        cpu.notify(cpu.halt()[0] << 12)

    came: list[BaseException | None] = []
    with guest_memory() as (_, base), LguestDouble(program) as file:

        def runs() -> None:
            file.write(initialize_request(base, PAGES, 0))
            assert patiently(file) == 0x1000
            try:
                file.pread(4)
            except InterruptedError as error:
                came.append(error)
            file.write(irq_request(3))
            assert patiently(file) == 3 << 12

        assert interrupted(runs) is None
    assert len(came) == 1


def test_an_interrupt_wakes_a_halted_guest_and_so_does_its_timer() -> None:
    def program(cpu: GuestCpu) -> None:
        cpu.take_interrupts()
        assert cpu.halt(0.01) == [0]
        cpu.notify(0x1000)
        assert cpu.halt() == [3, 5]
        cpu.notify(0x2000)
        assert cpu.halt() == [5]
        cpu.crash("Power down")

    with running(program) as (file, _):
        assert file.pread(4) == (0x1000).to_bytes(4, "little")
        for irq in (5, 3, 5):
            file.write(irq_request(irq))
        assert file.pread(4) == (0x2000).to_bytes(4, "little")
        timer = threading.Timer(0.02, lambda: file.write(irq_request(5)))
        timer.start()
        assert ended(file) == errno.ENOENT
        timer.join()
        assert file.failure is None


def test_an_interrupt_kills_a_guest_that_has_not_set_its_interrupts_up() -> None:
    with running(idle) as (file, _):
        assert file.write(irq_request(1)) == 0
        assert ended(file) == errno.ENOENT
        assert file.pread(4096).startswith(b"unhandled trap")


def test_the_guests_memory_is_the_launchers_up_to_the_limit() -> None:
    def program(cpu: GuestCpu) -> None:
        assert cpu.read(0, 5) == b"hello"
        cpu.write(PAGES * 4096 - 3, b"end")
        cpu.store16(4096, 0x1234)
        assert (cpu.load16(4096), cpu.start) == (0x1234, 0x1000)
        cpu.notify(4096)
        cpu.read(PAGES * 4096 - 3, 4)

    with running(program) as (file, mapping):
        mapping[:5] = b"hello"
        assert file.pread(4) == (4096).to_bytes(4, "little")
        assert (mapping[-3:], mapping[4096:4098]) == (b"end", b"\x34\x12")
        assert ended(file) == errno.ENOENT
        assert file.pread(4096) == b"bad read address 0x3ffd len 4\0"
        assert file.failure is None


def test_the_guest_runs_only_while_it_is_read() -> None:
    def program(cpu: GuestCpu) -> None:
        cpu.notify(4096)
        cpu.write(0, b"went on")
        cpu.notify(4096)

    with running(program) as (file, mapping):
        file.pread(4)
        time.sleep(0.02)
        assert mapping[:7] == bytes(7)
        file.pread(4)
        assert mapping[:7] == b"went on"


def test_a_mistake_in_the_guests_program_is_its_death_and_is_told() -> None:
    def program(cpu: GuestCpu) -> None:
        raise ValueError("no such thing")

    with running(program) as (file, _):
        assert ended(file) == errno.ENOENT
        assert b"ValueError: no such thing" in file.pread(4096)
        assert isinstance(file.failure, ValueError)


def test_nothing_is_left_of_a_guest_that_slept_when_its_file_was_closed() -> None:
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    for program in (idle, lambda cpu: cpu.notify(4096), lambda cpu: cpu.crash("Power down")):
        with guest_memory() as (_, base):
            file = LguestDouble(program)
            file.write(initialize_request(base, PAGES, 0))
            doorbell = eventfd()
            file.write(eventfd_request(8192, doorbell))
            os.close(doorbell)
            if program is not idle:
                try:
                    file.pread(4)
                except OSError:
                    pass
            file.close()
            with pytest.raises(OSError, match="Bad file descriptor"):
                file.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
