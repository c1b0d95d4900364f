"""A device at work behind a PCI function: doorbells, messages, the pin, and resets with I/O under way."""

import os
import select
import struct
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from runtime.rigs import BUFFERS_AT, buffer, eventually, nothing_left
from runtime.wires import FakeWires

from lguestlib.abi.eventfd import SIGNAL
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.pc.registers import PciRegisters
from lguestlib.runtime.pc.runner import PciDeviceRunner
from lguestlib.runtime.pc.vectors import Routes
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import RING_FEATURES, Device, Queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.pci.effects import CONFIG
from lguestlib.virtio.pci.function import COMMON_AT, CONFIG_AT, ISR_AT, MSIX_PENDING_AT, MSIX_TABLE_AT, NOTIFY_AT
from lguestlib.virtio.split_driver import SplitDriverQueue

BAR = 0xC000_0000
MSIX_CONTROL = 0x42
ENABLE, MASK_ALL = 0x8000, 0x4000
INTX_DISABLE = 0x400


class Echo(Device):
    """Copies what it is given back, on either queue."""

    device_type = 42

    def __init__(self) -> None:
        super().__init__("echo")
        self.space = b"config"
        self.begun = threading.Event()

    def config(self) -> bytes:
        return self.space

    def queues(self) -> Sequence[Queue]:
        return [Queue(f"work{index}", self.serve) for index in range(2)]

    def serve(self, chain: Chain) -> int:
        data = chain.read()
        if data == b"fail":
            raise OSError(5, "the device is broken")
        if data == b"slow":
            self.begun.set()
            time.sleep(0.05)
        return chain.write(data)


class Guest:
    """The driver: what the specification tells it to do, access by access."""

    def __init__(self, memory: GuestMemory, doorbell_length: int = 0) -> None:
        self.wires = FakeWires()
        self.pins: list[bool] = []
        self.reports: list[str] = []
        self.memory = memory
        self.device = Echo()
        self.registers = PciRegisters(self.device, self.wires, Routes(self.wires), self.pins.append, doorbell_length)
        self.runner = PciDeviceRunner(self.device, self.registers, memory, self.reports.append)
        self.rings: list[SplitDriverQueue[int]] = []

    def put(self, at: int, layout: str, value: int) -> None:
        self.registers.write(at, struct.pack("<" + layout, value))

    def get(self, at: int, layout: str) -> int:
        value: int = struct.unpack("<" + layout, self.registers.read(at, struct.calcsize("<" + layout)))[0]
        return value

    def decode(self, bar: int = BAR) -> None:
        self.registers.write_config(0x10, bar.to_bytes(8, "little"))
        self.registers.write_config(4, b"\x06\0")

    def message(self, vector: int, data: int, masked: bool = False) -> None:
        at = MSIX_TABLE_AT + 16 * vector
        self.registers.write(at, (0xFEE0_0000).to_bytes(8, "little"))
        self.put(at + 8, "I", data)
        self.put(at + 12, "I", masked)

    def control(self, flags: int) -> None:
        self.registers.write_config(MSIX_CONTROL, flags.to_bytes(2, "little"))

    def start(self, vectors: bool = True, features: int = int(RING_FEATURES)) -> None:
        for status in (0, 1, 3):
            self.put(COMMON_AT + 20, "B", status)
        for page in (0, 1):
            self.put(COMMON_AT + 8, "I", page)
            self.put(COMMON_AT + 12, "I", features >> 32 * page & 0xFFFF_FFFF)
        self.put(COMMON_AT + 20, "B", 11)
        if vectors:
            self.put(COMMON_AT + 16, "H", 0)
        for index in range(2):
            self.enable(QueueLayout.contiguous(index, 16, GuestAddress(0x1000 * (index + 1))), vectors)
        self.put(COMMON_AT + 20, "B", 15)

    def enable(self, layout: QueueLayout, vectors: bool = True) -> None:
        index = layout.index
        self.rings.insert(index, SplitDriverQueue(layout, self.memory, int(RING_FEATURES)))
        self.put(COMMON_AT + 22, "H", index)
        self.put(COMMON_AT + 24, "H", layout.size)
        if vectors:
            self.put(COMMON_AT + 26, "H", index + 1)
        for offset, address in ((32, layout.descriptors), (40, layout.available), (48, layout.used)):
            self.put(COMMON_AT + offset, "I", address)
        self.put(COMMON_AT + 28, "H", 1)

    def reset_queue(self, index: int) -> None:
        """Reset that queue, which is over when this returns (4.1.4.3.2)."""
        self.put(COMMON_AT + 22, "H", index)
        self.put(COMMON_AT + 58, "H", 1)
        assert (self.get(COMMON_AT + 58, "H"), self.get(COMMON_AT + 28, "H")) == (0, 0)
        self.rings.pop(index).release()

    def request(self, queue: int, text: bytes) -> None:
        self.memory.write(GuestAddress(BUFFERS_AT), text)
        self.rings[queue].add([buffer(0, len(text))], [buffer(1)], 0)
        os.write(self.wires.doorbells[BAR + NOTIFY_AT + 4 * queue], SIGNAL)

    def interrupts(self, source: int) -> bool:
        """Whether an interrupt of *source* is on its way through its eventfd."""
        registers = self.registers
        fd = registers.config_interrupt.fd if source == CONFIG else registers.interrupts[source].fd
        return bool(select.select([fd], [], [], 0)[0])

    def close(self) -> None:
        for ring in self.rings:
            ring.release()
        self.runner.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    with nothing_left(), GuestMemory.anonymous(16 << 20) as memory:
        made = Guest(memory)
        yield made
        made.close()


def queue_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("echo"))


def used(guest: Guest, queue: int) -> bytes:
    done: list[tuple[int, int]] = []

    def back() -> bool:
        done.extend(guest.rings[queue].reap())
        return bool(done)

    eventually(back, "the answer")
    return guest.memory.read(buffer(1).address, done[0][1])


def test_each_queue_has_a_doorbell_that_moves_with_the_bar(guest: Guest) -> None:
    assert guest.wires.doorbells == {}
    guest.decode()
    fds = [kick.fd for kick in guest.runner.kicks]
    assert guest.wires.doorbells == {BAR + NOTIFY_AT: fds[0], BAR + NOTIFY_AT + 4: fds[1]}
    guest.registers.write_config(0x14, b"\x12\0\0\0")
    moved = 0x12_0000_0000 + BAR + NOTIFY_AT
    assert guest.wires.doorbells == {moved: fds[0], moved + 4: fds[1]}
    guest.registers.write_config(4, b"\0\0")
    assert guest.wires.doorbells == {} and guest.registers.bar is None


def test_a_request_is_rung_for_and_its_answer_is_the_queues_own_message(guest: Guest) -> None:
    guest.decode()
    guest.control(ENABLE)
    guest.start()
    for vector in range(3):
        guest.message(vector, 0x40 + vector)
    assert sorted(route.data for route in guest.wires.routes.values()) == [0x40, 0x41, 0x42]
    for queue in (1, 0):
        gsi = guest.wires.irqfds[guest.registers.interrupts[queue].fd]
        assert guest.wires.routes[gsi].data == 0x41 + queue
        guest.request(queue, b"hello")
        assert used(guest, queue) == b"hello"
        eventually(lambda: guest.interrupts(queue), "the interrupt")
        guest.wires.deliver()
        assert guest.wires.taken == [gsi]
        guest.wires.taken.clear()
    assert guest.pins == [] and guest.get(ISR_AT, "B") == 0


def test_t8_an_interrupt_while_its_vector_is_masked_pends_until_it_is_unmasked(guest: Guest) -> None:
    guest.decode()
    guest.control(ENABLE)
    guest.start()
    guest.message(1, 0x41, masked=True)
    guest.request(0, b"hello")
    used(guest, 0)
    eventually(lambda: guest.get(MSIX_PENDING_AT, "I") == 0b010, "the pending bit")
    guest.put(MSIX_TABLE_AT + 16 + 12, "I", 0)
    assert len(guest.wires.taken) == 1
    assert guest.get(MSIX_PENDING_AT, "I") == 0


def test_without_msix_the_pin_is_asserted_until_the_isr_is_read(guest: Guest) -> None:
    guest.decode()
    guest.start(vectors=False)
    guest.request(0, b"hello")
    assert used(guest, 0) == b"hello"
    eventually(lambda: guest.pins == [True], "the pin")
    assert guest.get(ISR_AT, "B") == 1
    assert guest.pins == [True, False]
    guest.device.space = b"other!"
    guest.device.on_config_change(guest.device)
    assert guest.pins == [True, False, True]
    assert guest.get(CONFIG_AT, "I") == int.from_bytes(b"othe", "little")
    assert (guest.get(ISR_AT, "B"), guest.pins[-1]) == (2, False)


def test_a_disabled_pin_stays_as_it_is(guest: Guest) -> None:
    guest.decode()
    guest.start(vectors=False)
    guest.registers.write_config(4, (2 | INTX_DISABLE).to_bytes(2, "little"))
    guest.request(0, b"hello")
    used(guest, 0)
    eventually(lambda: bool(guest.registers.function.transport.isr), "the ISR")
    assert guest.pins == []


def test_a_changed_config_space_interrupts_by_its_own_vector(guest: Guest) -> None:
    guest.decode()
    guest.control(ENABLE)
    guest.start()
    generation = guest.get(COMMON_AT + 21, "B")
    guest.device.space = b"other!"
    guest.device.on_config_change(guest.device)
    assert guest.interrupts(CONFIG)
    assert guest.get(COMMON_AT + 21, "B") != generation


def test_a_device_that_fails_says_so_by_its_config_interrupt(guest: Guest) -> None:
    guest.decode()
    guest.control(ENABLE)
    guest.start()
    guest.request(0, b"fail")
    eventually(lambda: bool(guest.reports), "the report")
    assert "the device is broken" in guest.reports[0]
    assert guest.get(COMMON_AT + 20, "B") == 15 | 0x40
    assert guest.interrupts(CONFIG)


def test_t3_a_reset_ends_the_threads_and_takes_the_vectors(guest: Guest) -> None:
    guest.decode()
    guest.control(ENABLE)
    guest.start()
    for vector in range(3):
        guest.message(vector, 0x40 + vector)
    assert len(guest.wires.irqfds) == 3
    assert queue_threads() == ["echo work0", "echo work1"]
    guest.put(COMMON_AT + 20, "B", 0)
    assert guest.get(COMMON_AT + 20, "B") == 0
    assert queue_threads() == []
    assert guest.wires.irqfds == {} and len(guest.wires.doorbells) == 2
    for ring in guest.rings:
        ring.release()
    guest.rings.clear()
    guest.start()
    guest.request(1, b"again")
    assert used(guest, 1) == b"again"


def test_t4_a_queue_is_reset_and_set_up_anew_while_the_other_goes_on(guest: Guest) -> None:
    guest.decode()
    guest.control(ENABLE)
    guest.start(features=int(RING_FEATURES | Feature.RING_RESET))
    for vector in range(3):
        guest.message(vector, 0x40 + vector)
    [other] = [thread for thread in threading.enumerate() if thread.name == "echo work0"]
    fds = [interrupt.fd for interrupt in guest.registers.interrupts]
    doorbells = dict(guest.wires.doorbells)
    taken = []
    for turn, size in enumerate((4, 64, 16)):
        guest.request(1, b"before")
        assert used(guest, 1) == b"before"
        begun = time.monotonic()
        guest.reset_queue(1)
        taken.append(time.monotonic() - begun)
        assert queue_threads() == ["echo work0"] and guest.wires.irqfds.keys() == {fds[0], guest.registers.config_interrupt.fd}
        guest.request(0, b"the other")
        assert used(guest, 0) == b"the other"
        guest.enable(QueueLayout.contiguous(1, size, GuestAddress(0x8000 + 0x4000 * turn)))
        gsi = guest.wires.irqfds[fds[1]]
        assert guest.wires.routes[gsi].data == 0x42 and guest.wires.doorbells == doorbells
        guest.wires.deliver()
        guest.wires.taken.clear()
        guest.request(1, b"after")
        assert used(guest, 1) == b"after"
        eventually(lambda: guest.interrupts(1), "the interrupt")
        guest.wires.deliver()
        assert guest.wires.taken == [gsi]
    assert min(taken) < 0.1
    assert other.is_alive() and guest.reports == []


def test_t4_what_a_queue_has_begun_does_not_land_in_memory_after_its_reset(guest: Guest) -> None:
    guest.decode()
    guest.start(features=int(RING_FEATURES | Feature.RING_RESET))
    for ends in (0, 1):
        guest.device.begun.clear()
        guest.request(ends, b"slow")
        assert guest.device.begun.wait(5)
        guest.reset_queue(ends)
        where = GuestAddress(0x1000 * (ends + 1))
        guest.memory.write(where, b"reused" * 100)
        guest.memory.write(buffer(1).address, b"reused")
        time.sleep(0.1)
        assert guest.memory.read(where, 600) == b"reused" * 100
        assert guest.memory.read(buffer(1).address, 6) == b"reused"
        guest.enable(QueueLayout.contiguous(ends, 8, GuestAddress(0x8000)))
        guest.request(ends, b"again")
        assert used(guest, ends) == b"again"
        guest.reset_queue(ends)
        guest.enable(QueueLayout.contiguous(ends, 16, where))


def test_t4_a_driver_may_reset_a_queue_and_leave_it(guest: Guest) -> None:
    guest.decode()
    guest.start(features=int(RING_FEATURES | Feature.RING_RESET))
    guest.reset_queue(0)
    os.write(guest.wires.doorbells[BAR + NOTIFY_AT], SIGNAL)
    assert queue_threads() == ["echo work1"]
    guest.put(COMMON_AT + 20, "B", 0)
    assert guest.get(COMMON_AT + 20, "B") == 0 and queue_threads() == []


def test_a_notification_with_data_is_for_the_queue_whose_address_it_is(guest: Guest) -> None:
    guest.decode()
    guest.start(features=int(RING_FEATURES | Feature.NOTIFICATION_DATA))
    kicks = guest.runner.counters
    for data in (0x0001_0001, 0x8001_0000, 0xFFFF_FFFF):
        before = [counters.kicks for counters in kicks]
        guest.put(NOTIFY_AT + 4, "I", data)
        eventually(lambda: kicks[1].kicks > before[1], "the kick")
        assert kicks[0].kicks == before[0]
    guest.request(1, b"hello")
    assert used(guest, 1) == b"hello"


def test_data_are_offered_where_a_notification_of_any_width_rings_the_doorbell() -> None:
    for length, offered in ((0, True), (2, False)):
        with GuestMemory.anonymous(1 << 20) as memory:
            guest = Guest(memory, length)
            assert bool(guest.registers.function.transport.offered & Feature.NOTIFICATION_DATA) is offered
            guest.close()


def test_t8_a_kick_before_driver_ok_is_served_when_the_thread_is_there(guest: Guest) -> None:
    guest.decode()
    os.write(guest.wires.doorbells[BAR + NOTIFY_AT], SIGNAL)
    guest.put(NOTIFY_AT, "H", 0)
    guest.start()
    guest.request(0, b"hello")
    assert used(guest, 0) == b"hello"
