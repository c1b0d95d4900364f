"""A device at work behind its registers: start, stop, reset, failure, each with I/O under way."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from runtime.rigs import BUFFERS_AT, buffer, eventually, nothing_left

from lguestlib.abi import uio
from lguestlib.abi import virtio_mmio as abi
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.mmio_runner import MmioDeviceRunner
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import RING_FEATURES, Device, Queue
from lguestlib.virtio.errors import AvailIndexError, QueueLayoutError
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.mmio_driver import MmioDriver
from lguestlib.virtio.split_driver import SplitDriverQueue
from lguestlib.virtio.status import Status

RESET_SECONDS = 0.1
"""The longest a reset may take, whatever is in flight."""


class Echo(Device):
    """Copies what it is given back; queue 1 sleeps in a pipe for its work."""

    device_type = 42

    def __init__(self, source: int = -1) -> None:
        super().__init__("echo")
        self.activated: list[int] = []
        self.deactivated = 0
        self.serve: Callable[[Chain], int] = lambda chain: chain.write(chain.read())
        self._source = source

    def queues(self) -> Sequence[Queue]:
        return (
            Queue("work", lambda chain: self.serve(chain)),
            Queue("source", lambda chain: uio.readv(self._source, chain.writable), from_outside=True),
        )

    def activate(self, features: int) -> None:
        self.activated.append(features)

    def deactivate(self) -> None:
        self.deactivated += 1


class Guest:
    """The driver of one device, with a ring for each queue."""

    def __init__(self, runner: MmioDeviceRunner, memory: GuestMemory) -> None:
        self.runner = runner
        self.memory = memory
        self.driver = MmioDriver(runner)
        self.layouts = [
            QueueLayout.contiguous(index, 16, GuestAddress(0x1000 * (index + 1)))
            for index in range(len(runner.queues))
        ]
        self.rings: list[SplitDriverQueue[int]] = []

    def start(self) -> None:
        self.release()
        features = self.driver.negotiate(int(RING_FEATURES))
        for layout in self.layouts:
            self.rings.append(SplitDriverQueue(layout, self.memory, features))
            self.driver.enable_queue(layout)
        self.driver.ready()

    def request(self, text: bytes) -> bytes:
        """One request to the echo, and its answer."""
        self.memory.write(GuestAddress(BUFFERS_AT), text)
        self.rings[0].add([buffer(0, len(text))], [buffer(1)], 0)
        self.runner.kicks[0].signal()
        done: list[tuple[int, int]] = []

        def back() -> bool:
            done.extend(self.rings[0].reap())
            return bool(done)

        eventually(back, "the answer")
        return self.memory.read(buffer(1).address, done[0][1])

    def release(self) -> None:
        for ring in self.rings:
            ring.release()
        self.rings.clear()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.anonymous(16 << 20) as made:
        yield made


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def device(source: tuple[int, int]) -> Echo:
    return Echo(source[0])


@pytest.fixture
def guest(device: Echo, memory: GuestMemory, reports: list[str]) -> Iterator[Guest]:
    runner = MmioDeviceRunner(device, memory, reports.append)
    made = Guest(runner, memory)
    yield made
    made.release()
    runner.close()


def queue_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("echo"))


def test_a_thread_for_each_queue_from_driver_ok_to_reset(guest: Guest, device: Echo) -> None:
    assert queue_threads() == []
    guest.start()
    assert queue_threads() == ["echo source", "echo work"]
    assert device.activated == [int(RING_FEATURES)]
    assert guest.request(b"hello") == b"hello"
    guest.driver.reset()
    assert queue_threads() == []
    assert (device.deactivated, guest.driver.status) == (2, Status(0))


@pytest.mark.parametrize("gil", [True, False])
def test_threads_that_wake_each_other_share_a_processor_where_they_must_take_turns(
    device: Echo, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, gil: bool
) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: gil, raising=False)
    allowed = os.sched_getaffinity(0)
    runner = MmioDeviceRunner(device, memory, print)
    guest = Guest(runner, memory)
    guest.start()
    assert guest.request(b"here") == b"here"
    threads = [thread.native_id or 0 for thread in threading.enumerate() if thread.name.startswith("echo ")]
    work, source = (os.sched_getaffinity(thread) for thread in threads)
    assert work == source and work <= allowed
    assert len(work) == 1 if gil else work == allowed
    assert os.sched_getaffinity(0) == allowed
    guest.release()
    runner.close()


def test_a_thousand_resets_with_io_in_flight_are_prompt_and_leave_nothing(guest: Guest) -> None:
    guest.start()
    for turn in range(1000):
        guest.rings[1].add([], [buffer(2)], 0)
        for number in range(8):
            guest.rings[0].add([buffer(number)], [buffer(8 + number)], number)
        guest.runner.kicks[0].signal()
        start = time.monotonic()
        guest.driver.reset()
        assert time.monotonic() - start < RESET_SECONDS
        assert queue_threads() == []
        guest.start()
        if turn % 50 == 0:
            assert guest.request(b"%d" % turn) == b"%d" % turn


def test_t3_what_is_in_flight_at_a_reset_never_lands_in_memory_used_for_something_else(
    guest: Guest, device: Echo
) -> None:
    entered, go = threading.Event(), threading.Event()

    def slow(chain: Chain) -> int:
        entered.set()
        go.wait()
        return chain.write(b"late")

    device.serve = slow
    guest.start()
    guest.rings[0].add([buffer(0)], [buffer(1)], 0)
    guest.runner.kicks[0].signal()
    entered.wait()
    threading.Timer(0.05, go.set).start()
    guest.driver.reset()
    # The device has said that it is done, so this memory is the guest's again.
    guest.memory.write(buffer(1).address, b"mine")
    time.sleep(0.05)
    assert guest.memory.read(buffer(1).address, 4) == b"mine"
    device.serve = lambda chain: 0


def test_t7_a_stopped_queue_reads_back_0_and_the_others_go_on(guest: Guest) -> None:
    guest.start()
    guest.runner.write(abi.VIRTIO_MMIO_QUEUE_SEL, (1).to_bytes(4, "little"))
    guest.runner.write(abi.VIRTIO_MMIO_QUEUE_READY, bytes(4))
    assert guest.runner.read(abi.VIRTIO_MMIO_QUEUE_READY, 4) == bytes(4)
    assert queue_threads() == ["echo work"]
    assert guest.request(b"still here") == b"still here"
    guest.driver.enable_queue(guest.layouts[1])
    assert queue_threads() == ["echo source", "echo work"]


def test_a_broken_ring_stops_its_device_and_a_reset_mends_it(guest: Guest, reports: list[str]) -> None:
    guest.start()
    guest.driver.take_interrupt()
    guest.memory.write(GuestAddress(guest.layouts[0].available + 2), (1000).to_bytes(2, "little"))
    guest.runner.kicks[0].signal()
    eventually(lambda: bool(guest.driver.status & Status.NEEDS_RESET), "the device's cry for a reset")
    eventually(lambda: bool(reports), "the report")
    failure = guest.runner.failure
    assert isinstance(failure, AvailIndexError)
    assert (failure.queue, failure.index, failure.last, failure.size) == (0, 1000, 0, 16)
    assert len(reports) == 1 and reports[0].startswith("echo work: queue 0: avail index runs ahead")
    assert guest.driver.take_interrupt() & abi.VIRTIO_MMIO_INT_CONFIG
    eventually(lambda: queue_threads() in ([], ["echo source"]), "the threads' end")
    guest.start()
    assert guest.runner.failure is None
    assert guest.request(b"well again") == b"well again"


def test_a_service_that_raises_fails_its_device_and_no_other(
    guest: Guest, device: Echo, memory: GuestMemory, reports: list[str]
) -> None:
    other = MmioDeviceRunner(Echo(), memory, reports.append)
    device.serve = lambda chain: 1 // 0
    guest.start()
    guest.rings[0].add([buffer(0)], [], 0)
    guest.runner.kicks[0].signal()
    eventually(lambda: bool(reports), "the report")
    assert "ZeroDivisionError" in reports[0]
    assert guest.driver.status & Status.NEEDS_RESET
    assert not other.transport.status & Status.NEEDS_RESET
    assert other.failure is None
    other.close()


def test_a_device_that_cannot_be_activated_fails_alone(
    guest: Guest, device: Echo, reports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(features: int) -> None:
        raise OSError(5, "no such luck")

    monkeypatch.setattr(device, "activate", refuse)
    guest.start()
    assert guest.driver.status & Status.NEEDS_RESET
    assert queue_threads() == []
    assert reports == ["echo: [Errno 5] no such luck; the device has stopped until it is reset"]


@pytest.mark.parametrize("address", [0x1001, 16 << 20, 0xFFFF_FFFF_FFFF_F000])
def test_s32_a_ring_that_cannot_be_fails_the_device(guest: Guest, address: int) -> None:
    guest.layouts[1] = QueueLayout.contiguous(1, 16, GuestAddress(address))
    guest.driver.negotiate(int(RING_FEATURES))
    for layout in guest.layouts:
        guest.driver.enable_queue(layout)
    guest.driver.ready()
    failure = guest.runner.failure
    assert isinstance(failure, QueueLayoutError) and failure.queue == 1
    assert guest.driver.status & Status.NEEDS_RESET


def test_a_changed_configuration_interrupts_a_driver_that_is_ready(guest: Guest, device: Echo) -> None:
    device.on_config_change(device)
    guest.start()
    guest.driver.take_interrupt()
    generation = guest.runner.read(abi.VIRTIO_MMIO_CONFIG_GENERATION, 4)
    device.on_config_change(device)
    os.read(guest.runner.interrupt.fd, 8)
    assert guest.driver.take_interrupt() & abi.VIRTIO_MMIO_INT_CONFIG
    assert guest.runner.read(abi.VIRTIO_MMIO_CONFIG_GENERATION, 4) != generation


def test_finishing_sees_requests_through_but_waits_for_nothing_from_outside(guest: Guest, device: Echo) -> None:
    served: list[bytes] = []

    def note(chain: Chain) -> int:
        time.sleep(0.005)
        served.append(chain.read(1))
        return 0

    device.serve = note
    guest.start()
    guest.rings[1].add([], [buffer(2)], 0)
    for number in range(10):
        guest.rings[0].add([buffer(number)], [], number)
    guest.runner.kicks[0].signal()
    guest.runner.finish(lambda: False)
    assert len(served) == 10


def test_finishing_can_be_given_up(guest: Guest, device: Echo) -> None:
    go = threading.Event()
    device.serve = lambda chain: int(not go.wait())
    guest.start()
    guest.rings[0].add([buffer(0)], [], 0)
    guest.runner.kicks[0].signal()
    start = time.monotonic()
    guest.runner.finish(lambda: time.monotonic() - start > 0.05)
    assert time.monotonic() - start < 0.3
    go.set()


def test_a_queue_whose_thread_cannot_start_fails_its_device_with_one_line_until_the_reset(
    guest: Guest, reports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, starts = threading.Thread.start, 0

    def refuse(thread: threading.Thread) -> None:
        nonlocal starts
        starts += 1
        if starts == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    guest.start()
    assert reports == ["echo source: RuntimeError: can't start new thread; the device has stopped until it is reset"]
    assert guest.driver.status & Status.NEEDS_RESET
    guest.start()
    assert guest.request(b"again") == b"again" and len(reports) == 1
