"""The driver's side of the split ring, against this library's device side and a device that cheats."""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from random import Random

import pytest
from virtio.rings import (
    INDIRECT,
    NEXT,
    PLAIN,
    WITH_EVENT,
    WITH_INDIRECT,
    WRITE,
    Descriptor,
    Refusal,
    Ring,
    memory_of,
    raised,
    refusal,
)

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import AddressError, GuestMemory
from lguestlib.virtio import errors
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.split_driver import Buffer, QueueFull, SplitDriverQueue

LAYOUT = QueueLayout.contiguous(6, 8, GuestAddress(0x1000))
SEAM, END = 0x8000, 0x20000
TABLES_AT = 0x2000
BUFFERS_AT = 0x4000


def buffer(length: int = 16, number: int = 0) -> Buffer:
    return Buffer(GuestAddress(BUFFERS_AT + 64 * number), length)


class Both:
    """A driver's queue and the ring under it, for tests to be the device."""

    def __init__(self, memory: GuestMemory, features: int) -> None:
        self.memory = memory
        self.driver: SplitDriverQueue[object] = SplitDriverQueue(LAYOUT, memory, features)
        self.ring = Ring(memory, LAYOUT)

    def use(self, *elements: tuple[int, int]) -> None:
        """Return chains by head and length, as the device."""
        for head, length in elements:
            self.ring.set_used(self.ring.used_idx, head, length)
            self.ring.used_idx += 1


@contextmanager
def both(features: int = PLAIN) -> Iterator[Both]:
    with memory_of((0, SEAM), (SEAM, END - SEAM)) as memory:
        made = Both(memory, features)
        yield made
        made.driver.release()
        made.ring.release()


def test_a_chain_is_written_as_the_specification_has_it() -> None:
    with both() as made:
        driver, ring = made.driver, made.ring
        assert driver.add([buffer(5, 1), buffer(6, 2)], [buffer(7, 3)], "three") == 0
        assert driver.add([], [buffer(8, 4)], "one") == 3
        assert [ring.described(index) for index in range(4)] == [
            (buffer(5, 1).address, 5, NEXT, 1), (buffer(6, 2).address, 6, NEXT, 2),
            (buffer(7, 3).address, 7, WRITE, 0), (buffer(8, 4).address, 8, WRITE, 0),
        ]  # fmt: skip
        assert (ring.avail_idx, driver.free, driver.in_flight) == (2, 4, 2)


def test_what_comes_next_is_the_available_index() -> None:
    with both() as made:
        for turn in range(0x1_0002):
            assert made.driver.next_available == made.ring.avail_idx == turn & 0xFFFF
            made.use((made.driver.add([buffer()], [], turn), 0))
            made.driver.reap()


def test_an_indirect_chain_takes_one_descriptor() -> None:
    with both(WITH_INDIRECT) as made:
        made.memory.write(GuestAddress(TABLES_AT), b"\xff" * 256)
        made.driver.add(
            [buffer(5, index) for index in range(9)], [buffer(7, 9)], "ten", GuestAddress(TABLES_AT)
        )
        assert made.ring.described(0) == (TABLES_AT, 160, INDIRECT, 0)
        table = made.memory.read(GuestAddress(TABLES_AT), 176)
        entries = [Descriptor(*struct.unpack_from("<QIHH", table, 16 * index)) for index in range(11)]
        assert entries[:9] == [(buffer(5, index).address, 5, NEXT, index + 1) for index in range(9)]
        assert entries[9] == (buffer(7, 9).address, 7, WRITE, 0)
        assert entries[10].packed() == b"\xff" * 16
        assert made.driver.free == 7


@pytest.mark.parametrize(
    ("error", "add"),
    [
        (QueueFull, lambda driver: driver.add([buffer()] * 7, [buffer()], "too many")),
        (ValueError, lambda driver: driver.add([], [], "nothing")),
        (AddressError, lambda driver: driver.add([buffer()], [], "nowhere", GuestAddress(END))),
        (AddressError, lambda driver: driver.add([buffer()] * 3, [], "across", GuestAddress(SEAM - 32))),
        (struct.error, lambda driver: driver.add([Buffer(GuestAddress(0), 1 << 32)], [], "long")),
        (struct.error, lambda driver: driver.add([buffer(), Buffer(GuestAddress(0), -1)], [], "less")),
        (struct.error, lambda driver: driver.add([Buffer(GuestAddress(1 << 64), 1)], [], "far")),
        (
            struct.error,
            lambda driver: driver.add([buffer()], [buffer(1 << 32)], "long", GuestAddress(TABLES_AT)),
        ),
    ],
)
def test_a_chain_that_cannot_be_added_leaves_everything_as_it_was(
    error: type[Exception], add: Callable[[SplitDriverQueue[object]], object]
) -> None:
    with both() as made:
        driver, ring = made.driver, made.ring
        driver.add([buffer()], [], "first")
        for _ in range(3):
            with pytest.raises(error) as caught:
                add(driver)
            caught.value.__traceback__ = None
        assert (driver.free, driver.in_flight, ring.avail_idx) == (7, 1, 1)
        assert driver.add([buffer()] * 6, [buffer()], "the rest") == 1
        assert driver.free == 0
        made.use((1, 16), (0, 0))
        assert driver.reap() == [("the rest", 16), ("first", 0)]
        assert driver.free == 8


def test_a_new_ring_is_cleared_and_a_bad_one_refused() -> None:
    with memory_of((0, SEAM)) as memory:
        memory.write(GuestAddress(0), b"\xff" * SEAM)
        driver: SplitDriverQueue[int] = SplitDriverQueue(LAYOUT, memory, PLAIN)
        assert memory.read(LAYOUT.descriptors, 128) == bytes(128)
        assert memory.read(LAYOUT.available, 22) == bytes(22)
        assert memory.read(LAYOUT.used, 70) == bytes(70)
        assert memory.read(LAYOUT.end, 16) == b"\xff" * 16
        driver.release()
        bad = QueueLayout.contiguous(1, 8, GuestAddress(SEAM - 128))
        error = raised(lambda: SplitDriverQueue(bad, memory, PLAIN))
        assert isinstance(error, errors.QueueLayoutError) and error.part == "available ring"


def event_cases() -> Iterator[tuple[int, int]]:
    """Counts of chains and event indices; every index for one of the counts."""
    for chains in (1, 2, 3, 7):
        for event in range(0, 0x10000, 1 if chains == 3 else 509):
            yield chains, event


@pytest.mark.parametrize("start", [0, 1, 0x7FFE, 0xFFFB, 0xFFFF, 0x1_0000])
def test_s24_a_kick_is_due_if_and_only_if_the_event_was_passed(start: int) -> None:
    with both(WITH_EVENT) as made:
        driver = made.driver
        for chains, event in event_cases():
            driver._announced, driver._available = start, start + chains
            made.ring.avail_event = event
            passed = {position & 0xFFFF for position in range(start, start + chains)}
            assert driver.kick_needed() is (event in passed), (chains, event)
            assert not driver.kick_needed()


def test_s25_by_flag_or_by_event_and_never_by_both() -> None:
    for features in (PLAIN, WITH_EVENT):
        with both(features) as made:
            driver, ring = made.driver, made.ring
            for flags, event, by_flag, by_event in (
                (0, 0, True, True),
                (1, 0, False, True),
                (0, 1, True, False),
                (1, 1, False, False),
                (0xFFFE, 1, True, False),
            ):
                ring.used_flags, ring.avail_event = flags, ring.avail_idx + event
                driver.add([buffer()], [], 0)
                assert driver.kick_needed() is (by_flag if features == PLAIN else by_event)
            said = []
            for step in (driver.disable_interrupts, driver.enable_interrupts):
                step()
                said.append((ring.avail_flags, ring.used_event))
            assert said == ([(1, 0), (0, 0)] if features == PLAIN else [(0, 0xFFFF), (0, 0)])


def test_s22_enabling_interrupts_tells_of_what_came_meanwhile() -> None:
    for features in (PLAIN, WITH_EVENT):
        with both(features) as made:
            assert not made.driver.enable_interrupts()
            made.driver.add([buffer()], [], "token")
            made.use((0, 0))
            assert made.driver.enable_interrupts()
            assert made.driver.reap() == [("token", 0)]
            assert not made.driver.enable_interrupts()


# A device that cheats.


def test_used_index_ahead_of_what_is_in_flight() -> None:
    with both() as made:
        driver, ring = made.driver, made.ring
        for chains in range(4):
            for ahead in (chains + 1, 9, 0x7FFF, 0x8000, 0xFFFF):
                ring.used_idx = ahead
                for _ in range(2):
                    expected = {"queue": 6, "index": ahead, "last": 0}
                    assert refusal(raised(driver.reap)) == Refusal("UsedIndexError", expected)
            ring.used_idx = 0
            driver.add([buffer()], [], chains)
        assert (driver.in_flight, driver.free) == (4, 4)
        made.use((3, 0))
        assert driver.reap() == [(3, 0)]


@pytest.mark.parametrize("head", [1, 3, 8, 0xFFFF, 0x1_0000, 0xFFFF_FFFF])
def test_a_head_that_was_never_given_or_is_no_head(head: int) -> None:
    """Descriptor 1 is in a chain, but not its first."""
    with both() as made:
        driver = made.driver
        driver.add([buffer()], [buffer()], "two")
        driver.add([buffer()], [], "one")
        made.use((head, 0))
        assert refusal(raised(driver.reap)) == Refusal("NotInFlight", {"queue": 6, "head": head})
        assert driver.reap() == []
        made.use((2, 0), (0, 16))
        assert driver.reap() == [("one", 0), ("two", 16)]


def test_a_chain_used_twice() -> None:
    with both() as made:
        driver = made.driver
        for token in range(3):
            driver.add([buffer()], [], token)
        made.use((1, 0), (1, 0), (2, 0))
        assert driver.reap() == [(1, 0)]
        assert driver.enable_interrupts()
        driver.add([buffer()], [], "same descriptor")
        assert refusal(raised(driver.reap)) == Refusal("NotInFlight", {"queue": 6, "head": 1})
        assert driver.reap() == [(2, 0)]
        assert (driver.in_flight, driver.free) == (2, 6)


@pytest.mark.parametrize("written", [17, 32, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_s19_more_written_than_there_was_room_for(written: int) -> None:
    with both() as made:
        driver = made.driver
        driver.add([buffer(64)], [buffer(10, 1), buffer(6, 2)], "three")
        driver.add([buffer()], [], "none")
        made.use((0, written), (3, 1))
        expected = {"queue": 6, "head": 0, "length": written, "room": 16}
        assert refusal(raised(driver.reap)) == Refusal("UsedLengthError", expected)
        assert (driver.in_flight, driver.free) == (1, 7)
        expected = {"queue": 6, "head": 3, "length": 1, "room": 0}
        assert refusal(raised(driver.reap)) == Refusal("UsedLengthError", expected)
        assert (driver.in_flight, driver.free, driver.reap()) == (0, 8, [])


def test_cve_2022_26353_nothing_leaks_whatever_a_device_returns() -> None:
    """Good ones come first, each mistake is told once, and no descriptor is lost."""
    seed = 9
    random = Random(seed)
    with both() as made:
        driver = made.driver
        out: dict[int, int] = {}
        for turn in range(2000):
            while driver.free and random.random() < 0.7:
                out[driver.add([], [buffer(random.randrange(64))], turn)] = turn
            elements: list[tuple[int, int]] = []
            expected: list[object] = []
            for head in random.sample(sorted(out), random.randrange(len(out) + 1)):
                kind = random.randrange(8)
                if kind == 0:
                    elements.append((elements[-1][0] if elements else 99, 0))
                    expected.append("NotInFlight")
                    continue
                elements.append((head, 64 if kind == 1 else 0))
                expected.append("UsedLengthError" if kind == 1 else (out[head], 0))
                del out[head]
            made.use(*elements)
            found: list[object] = []
            while driver.enable_interrupts():
                try:
                    done = driver.reap()
                except errors.ChainError as error:
                    found.append(type(error).__name__)
                else:
                    assert done
                    found += done
            assert found == expected, (seed, turn)
            assert driver.in_flight == len(out) and driver.free == 8 - len(out)


# Both sides.


class Lane:
    """A part of guest memory that hands out buffers for one chain at a time."""

    def __init__(self, random: Random, start: int, size: int) -> None:
        self._random = random
        self._start = start
        self._size = size

    def buffers(self) -> tuple[list[Buffer], list[Buffer]]:
        random = self._random
        count = random.choice((1, 1, 2, 3, 3, 4))
        cuts = sorted(random.sample(range(1, self._size), 2 * count - 1))
        edges = [0, *cuts, self._size]
        pieces = [
            Buffer(GuestAddress(self._start + low), high - low) for low, high in zip(edges[::2], edges[1::2])
        ]
        split = random.randrange(count + 1)
        return pieces[:split], pieces[split:]


def transformed(data: bytes, length: int) -> bytes:
    """What the device answers to *data*, in *length* bytes."""
    return (bytes(byte ^ 0x5A for byte in data) + bytes(range(256)))[:length]


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("features", [PLAIN, WITH_EVENT], ids=["flags", "event index"])
@pytest.mark.parametrize("size", [8, 32])
def test_random_work_comes_back_whole_across_the_indices_end(
    features: int, indirect: bool, size: int
) -> None:
    """Each side acts when it has been woken; both asleep with work undone would be the end of it."""
    seed = features + indirect + size
    random = Random(seed)
    layout = QueueLayout.contiguous(0, size, GuestAddress(0x1000))
    features |= WITH_INDIRECT if indirect else 0
    lanes, lane_size = 32, 192
    start = SEAM - lanes * lane_size // 2
    with memory_of((0, SEAM), (SEAM, END - SEAM)) as memory:
        driver: SplitDriverQueue[int] = SplitDriverQueue(layout, memory, features)
        device = SplitDeviceQueue(layout, memory, features)
        run_to(0xFFFF - 200, driver, device)
        free = [Lane(random, start + lane_size * index, lane_size) for index in range(lanes)]
        tables = [GuestAddress(TABLES_AT + 64 * index) for index in range(lanes)]
        requests: dict[int, tuple[Lane, bytes, list[Buffer], GuestAddress]] = {}
        numbers = count()
        kicked = interrupted = True
        finished = kicks = interrupts = 0
        while finished < 1500:
            assert kicked or interrupted, (seed, finished, "both sleep")
            if kicked and (not interrupted or random.random() < 0.5):
                chains = device.pop_many(random.randrange(1, 20))
                random_order = list(chains)
                random.shuffle(random_order)
                for chain in random_order:
                    assert chain.readable_length == len(chain.read())
                    chain.written = chain.write(transformed(chain.read(), random.randrange(lane_size)))
                device.push_many(random_order)
                if device.should_interrupt():
                    interrupted = True
                    interrupts += 1
                if not chains:
                    kicked = device.enable_notifications()
                elif random.random() < 0.5:
                    device.disable_notifications()
            else:
                done = driver.reap()
                for number, written in done:
                    lane, data, writable, table = requests.pop(number)
                    answer = b"".join(memory.read(*piece) for piece in writable)
                    assert answer[:written] == transformed(data, written), (seed, number)
                    free.append(lane)
                    tables.append(table)
                    finished += 1
                added = 0
                while free and added < 6:
                    readable, writable = free[-1].buffers()
                    if driver.free < (1 if indirect else len(readable) + len(writable)):
                        break
                    lane, table, number, data = free.pop(), tables.pop(), next(numbers), b""
                    for piece in readable:
                        memory.write(piece.address, random.randbytes(piece.length))
                        data += memory.read(*piece)
                    driver.add(readable, writable, number, table if indirect else None)
                    requests[number] = (lane, data, writable, table)
                    added += 1
                if driver.kick_needed():
                    kicked = True
                    kicks += 1
                if not done and not added:
                    interrupted = driver.enable_interrupts()
                elif random.random() < 0.5:
                    driver.disable_interrupts()
        assert 0 < kicks < finished and 0 < interrupts < finished
        assert device.next_available < 0xFFFF - 200, "the indices have gone round"
        driver.release()
        device.release()


def run_to(index: int, driver: SplitDriverQueue[int], device: SplitDeviceQueue) -> None:
    """Turn the ring until its indices are at *index*."""
    done = 0
    while done < index:
        batch = min(driver.free, index - done)
        for _ in range(batch):
            driver.add([buffer(0)], [], 0)
        chains = device.pop_many()
        for chain in chains:
            chain.written = 0
        device.push_many(chains)
        driver.kick_needed()
        device.should_interrupt()
        done += len(driver.reap())
    assert device.next_available == index & 0xFFFF


@pytest.mark.parametrize("chains", [0x10000, 0x10001])
def test_s24_no_kick_is_lost_if_nobody_asks_for_65536_chains(chains: int) -> None:
    with both(WITH_EVENT) as made:
        driver, ring = made.driver, made.ring
        ring.avail_event = 0
        for _ in range(chains):
            made.use((driver.add([buffer()], [], None), 0))
            driver.reap()
        assert driver.kick_needed() and not driver.kick_needed()
