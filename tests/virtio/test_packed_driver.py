"""The driver's side of the packed ring, against devices that keep to the rules and devices that do not."""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from random import Random

import pytest
from virtio.packed_rings import (
    AVAIL,
    DESC,
    DISABLE,
    ENABLE,
    PACKED,
    PACKED_ALL,
    PACKED_EVENT,
    USED,
    Packed,
    PackedRing,
    off_wrap,
    wrap_counter,
)
from virtio.rings import INDIRECT, NEXT, WRITE, memory_of, raised

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import AddressError, GuestMemory
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.driver_queue import DriverQueue, new_driver_queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.packed_driver import PackedDriverQueue
from lguestlib.virtio.split_driver import Buffer, QueueFull, SplitDriverQueue

MEMORY = 1 << 20
TABLE_AT = GuestAddress(0x8000)


def buffer(number: int, length: int = 16) -> Buffer:
    return Buffer(GuestAddress(0x10000 + 64 * number), length)


class Pair:
    """A driver, and the bytes it writes; the device is the test's."""

    def __init__(self, memory: GuestMemory, size: int, features: int) -> None:
        self.memory = memory
        self.size = size
        layout = QueueLayout.contiguous(2, size, GuestAddress(0x1000))
        self.driver: PackedDriverQueue[int] = PackedDriverQueue(layout, memory, features)
        self.ring = PackedRing(memory, layout)
        self.position = 0

    def use(self, number: int, written: int, slots: int = 1) -> None:
        """As a device: return buffer *number*, whose chain had so many *slots*."""
        marks = AVAIL | USED if wrap_counter(self.position, self.size) else 0
        flags = marks | (WRITE if written else 0)
        self.ring.describe(self.position % self.size, Packed(0, written, flags, number))
        self.position += slots


@contextmanager
def pair(size: int = 8, features: int = PACKED_ALL) -> Iterator[Pair]:
    with memory_of((0, MEMORY)) as memory:
        made = Pair(memory, size, features)
        yield made
        made.driver.release()
        made.ring.release()


def test_a_chain_is_written_as_the_specification_has_it() -> None:
    """With its marks, the ID in each descriptor, and the next lap's marks turned round."""
    with pair(3) as made:
        driver, ring = made.driver, made.ring
        for lap in range(4):
            on = AVAIL if lap % 2 == 0 else USED
            number = driver.add([buffer(0)], [buffer(1, 8), buffer(2, 4)], lap)
            assert [ring.described(index) for index in range(3)] == [
                Packed(buffer(0).address, 16, on | NEXT, number),
                Packed(buffer(1).address, 8, on | NEXT | WRITE, number),
                Packed(buffer(2).address, 4, on | WRITE, number),
            ]
            assert (driver.free, driver.in_flight) == (0, 1)
            made.use(number, 12, 3)
            assert driver.reap() == [(lap, 12)]
            assert (driver.free, driver.in_flight) == (3, 0)


def test_what_comes_next_is_a_position_and_the_wrap_counter() -> None:
    with pair(3) as made:
        told = []
        for turn in range(8):
            told.append(made.driver.next_available)
            made.use(made.driver.add([buffer(0)], [], turn), 0)
            made.driver.reap()
        assert told == [0x8000, 0x8001, 0x8002, 0, 1, 2, 0x8000, 0x8001]


def test_an_indirect_chain_takes_one_descriptor() -> None:
    with pair() as made:
        number = made.driver.add([buffer(0)], [buffer(1), buffer(2)], 5, TABLE_AT)
        assert made.ring.described(0) == Packed(TABLE_AT, 48, INDIRECT | AVAIL, number)
        table = made.memory.read(TABLE_AT, 48)
        assert [entry for entry in struct.iter_unpack("<QIHH", table)] == [
            (buffer(index).address, 16, 0, WRITE if index else 0) for index in range(3)
        ]
        assert made.driver.free == 7


def test_a_chain_that_cannot_be_added_leaves_everything_as_it_was() -> None:
    with pair(4) as made:
        driver = made.driver
        driver.add([buffer(0)], [], 0)
        before = made.memory.read(GuestAddress(0x1000), 128)
        refused: list[tuple[type[Exception], Callable[[], object]]] = [
            (ValueError, lambda: driver.add([], [], 1)),
            (QueueFull, lambda: driver.add([buffer(0)] * 4, [], 1)),
            (struct.error, lambda: driver.add([buffer(0)], [buffer(1, 1 << 32)], 1)),
            (struct.error, lambda: driver.add([Buffer(GuestAddress(-1), 1)], [], 1)),
            (AddressError, lambda: driver.add([buffer(0)], [], 1, GuestAddress(MEMORY - 8))),
        ]
        for kind, call in refused:
            with pytest.raises(kind):
                call()
            assert made.memory.read(GuestAddress(0x1000), 128) == before
            assert (driver.free, driver.in_flight) == (3, 1)
        driver.kick_needed()
        assert not driver.kick_needed()


def test_a_new_ring_is_cleared_and_a_bad_one_refused() -> None:
    with GuestMemory.anonymous(MEMORY) as memory:
        memory.write(GuestAddress(0x1000), b"\xff" * 256)
        driver: PackedDriverQueue[int] = PackedDriverQueue(
            QueueLayout.contiguous(0, 5, GuestAddress(0x1000)), memory, PACKED
        )
        assert driver.reap() == [] and memory.read(GuestAddress(0x1000), 84) == bytes(84)
        driver.release()
        for layout in (
            QueueLayout.contiguous(0, 0, GuestAddress(0x1000)),
            QueueLayout.contiguous(0, 5, GuestAddress(0x1004)),
            QueueLayout.contiguous(0, 5, GuestAddress(MEMORY - 64)),
        ):
            assert isinstance(raised(lambda: PackedDriverQueue(layout, memory, PACKED)), errors.QueueLayoutError)


@pytest.mark.parametrize("features", [PACKED, PACKED_EVENT], ids=["flags", "events"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_p6_s24_a_kick_is_due_if_and_only_if_the_device_has_asked_or_talks_nonsense(size: int, features: int) -> None:
    offsets = [off | wrap for off in (*range(size + 2), 0x7FFF) for wrap in (0, 1 << 15)]
    with pair(size, features) as made:
        driver = made.driver
        for moved in range(1, 3 * size + 1):
            for event in product(offsets, (ENABLE, DISABLE, DESC, 3, 4, 0x8000, 0xFFFF)):
                begin = made.position
                for _ in range(moved):
                    made.use(driver.add([buffer(0)], [], 0), 0)
                    driver.reap()
                made.ring.device_event = event
                passed = event[0] in {off_wrap(at, size) for at in range(begin, begin + moved)}
                nonsense = event[1] > DESC or event[1] == DESC and (
                    features == PACKED or event[0] & 0x7FFF >= size
                )  # fmt: skip
                due = event[1] == ENABLE or nonsense or event[1] == DESC and passed
                assert driver.kick_needed() is due, (begin, moved, event)
                assert not driver.kick_needed()


def test_p6_the_driver_asks_by_position_where_it_may_and_by_flag_else() -> None:
    for features in (PACKED, PACKED_EVENT):
        with pair(3, features) as made:
            driver = made.driver
            for position in range(12):
                driver.disable_interrupts()
                assert made.ring.driver_event[1] == DISABLE
                assert not driver.enable_interrupts()
                asked = (off_wrap(position, 3), DESC) if features == PACKED_EVENT else (0, ENABLE)
                assert made.ring.driver_event == asked
                made.use(driver.add([buffer(0)], [], position), 0)
                assert driver.enable_interrupts()
                assert driver.reap() == [(position, 0)]


def test_an_id_that_was_never_given() -> None:
    for number in (1, 8, 0xFFFF):
        with pair() as made:
            good = made.driver.add([buffer(0)], [], 3)
            made.use(good, 0)
            made.use(number, 0)
            # The good one comes first.
            assert made.driver.reap() == [(3, 0)]
            error = raised(made.driver.reap)
            assert isinstance(error, errors.NotInFlight) and error.head == number
            assert made.driver.reap() == []


def test_a_chain_used_twice() -> None:
    with pair() as made:
        number = made.driver.add([buffer(0)], [], 3)
        made.use(number, 0)
        made.use(number, 0)
        assert made.driver.reap() == [(3, 0)]
        assert isinstance(raised(made.driver.reap), errors.NotInFlight)
        assert made.driver.free == 8


@pytest.mark.parametrize("written", [5, 0xFFFF_FFFF])
def test_s19_more_written_than_there_was_room_for(written: int) -> None:
    with pair() as made:
        number = made.driver.add([buffer(0)], [buffer(1, 4)], 3)
        made.use(number, written, 2)
        error = raised(made.driver.reap)
        assert isinstance(error, errors.UsedLengthError) and (error.length, error.room) == (written, 4)
        assert (made.driver.free, made.driver.in_flight) == (8, 0) and made.driver.reap() == []


def test_nothing_leaks_whatever_a_device_returns() -> None:
    random = Random(3)
    with pair(6) as made:
        driver = made.driver
        for turn in range(3000):
            if driver.free >= 2:
                driver.add([buffer(0)], [buffer(1)] * random.randrange(2), turn)
            noise = Packed(0, random.randrange(20), random.randrange(1 << 16), random.randrange(8))
            made.ring.describe(random.randrange(6), noise)
            try:
                driver.reap()
            except errors.QueueError as error:
                assert isinstance(error, errors.NotInFlight | errors.UsedLengthError)
            held = sum(entry.slots for entry in driver._in_flight.values())
            assert driver.free + held == 6 and driver.in_flight + len(driver._free_ids) == 6


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("features", [PACKED, PACKED_ALL], ids=["plain", "all"])
def test_random_work_comes_back_whole_through_many_laps(size: int, features: int) -> None:
    """Our device returns it, in an order of chance; no wake-up is lost on the way either way."""
    random = Random(size)
    layout = QueueLayout.contiguous(0, size, GuestAddress(0x1000))
    with GuestMemory.anonymous(MEMORY) as memory:
        driver: PackedDriverQueue[int] = PackedDriverQueue(layout, memory, features)
        device = PackedDeviceQueue(layout, memory, features)
        sent: dict[int, bytes] = {}
        number = done = 0
        held: list[Chain] = []
        device_sleeps = driver_sleeps = False
        for _ in range(20_000):
            match random.randrange(4):
                case 0:
                    parts = random.randrange(1, 5)
                    table = GuestAddress(0x8000 + 128 * (number % 64)) if features == PACKED_ALL and parts > 2 else None
                    if (1 if table else parts) <= driver.free:
                        data = random.randbytes(16 * (parts - 1))
                        memory.write(buffer(8 * (number % 256)).address, data)
                        cuts = [
                            Buffer(GuestAddress(buffer(8 * (number % 256)).address + 16 * part), 16)
                            for part in range(parts - 1)
                        ]
                        driver.add(cuts, [Buffer(GuestAddress(0x40000 + 64 * (number % 256)), 64)], number, table)
                        sent[number] = data
                        number += 1
                        if driver.kick_needed():
                            device_sleeps = False
                case 1 if not device_sleeps:
                    chains = list(device.pop_many(random.randrange(1, 9), half=random.random() < 0.3))
                    held += chains
                    if not chains:
                        device_sleeps = not device.enable_notifications()
                        if device_sleeps:
                            assert not device.has_available()
                    elif random.random() < 0.3:
                        device.disable_notifications()
                case 2 if held:
                    random.shuffle(held)
                    part = [held.pop() for _ in range(random.randrange(1, len(held) + 1))]
                    for chain in part:
                        chain.written = chain.write(chain.read()[::-1])
                    device.push_many(part)
                    if device.should_interrupt():
                        driver_sleeps = False
                case 3 if not driver_sleeps:
                    reaped = driver.reap()
                    for token, written in reaped:
                        data = sent.pop(token)
                        assert written == len(data)
                        assert memory.read(GuestAddress(0x40000 + 64 * (token % 256)), written) == data[::-1]
                        done += 1
                    if not reaped:
                        driver_sleeps = not driver.enable_interrupts()
            # Nobody sleeps over work.
            assert not (device_sleeps and device.has_available())
            assert not (driver_sleeps and driver._is_used())
        assert done > 600
        driver.release()
        device.release()


def test_the_features_say_which_ring_it_is() -> None:
    layout = QueueLayout.contiguous(0, 8, GuestAddress(0))
    with GuestMemory.anonymous(4096) as memory:
        for features, kind in ((0, SplitDriverQueue), (Feature.RING_PACKED, PackedDriverQueue)):
            queue: DriverQueue[int] = new_driver_queue(layout, memory, int(features))
            assert isinstance(queue, kind)
            queue.release()
