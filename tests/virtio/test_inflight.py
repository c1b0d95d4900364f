"""The inflight record: its bytes, and that whenever its device is killed nothing is lost or done twice."""

import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple, cast

import pytest
from virtio.arena import BUFFERS_AT, Arena
from virtio.rings import PLAIN, WRITE, Descriptor, Ring, memory_of, nothing_left, raised, refusal

from lguestlib.memory.address import GuestAddress
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.inflight import InflightRecord, area_size, part_of
from lguestlib.virtio.layout import QueueLayout, RingIndex
from lguestlib.virtio.split_device import SplitDeviceQueue

SIZE = 8
TOP = 1 << 64


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


class Entry(NamedTuple):
    """A `DescStateSplit`."""

    inflight: int = 0
    next: int = 0
    counter: int = 0


def packed(
    entries: dict[int, Entry],
    last_batch_head: int = 0,
    used_idx: int = 0,
    desc_num: int = SIZE,
    version: int = 1,
    features: int = 0,
) -> bytes:
    """A `QueueRegionSplit` of `SIZE` entries, written out from the specification's C."""
    record = struct.pack("<QHHHH", features, version, desc_num, last_batch_head, used_idx)
    for head in range(SIZE):
        record += struct.pack("<B5xHQ", *entries.get(head, Entry()))
    return record.ljust(192, b"\0")


class World:
    """A ring of `SIZE` in guest memory and a record beside it, which outlive the device."""

    def __init__(self, start: int = 0, record: bytes = bytes(192)) -> None:
        self.memory = memory_of((0, 0x10000))
        layout = QueueLayout.contiguous(3, SIZE, GuestAddress(0x1000))
        self.ring = Ring(self.memory, layout, start)
        self.ring.used_idx = start
        self.area = bytearray(record)
        for head in range(SIZE):
            self.ring.describe(head, Descriptor(BUFFERS_AT + 64 * head, 64, WRITE))

    def record(self) -> InflightRecord:
        return InflightRecord(3, part_of(memoryview(self.area), 0, SIZE), SIZE)

    def device(self, next_available: int = 0, record: InflightRecord | None = None) -> SplitDeviceQueue:
        """A device that has just been started."""
        return SplitDeviceQueue(
            self.ring.layout, self.memory, PLAIN, RingIndex(next_available), inflight=record or self.record()
        )

    def refused(self) -> errors.QueueError:
        """What a device that is started ends in, having changed nothing and kept nothing."""
        before, record = bytes(self.area), self.record()
        error = raised(lambda: self.device(record=record))
        assert self.area == before
        record.release()
        return error

    def close(self) -> None:
        """Give all back, which shows that nothing has kept a view (Y4)."""
        self.ring.release()
        self.memory.close()
        self.area.append(0)


def heads(chains: object) -> list[int]:
    return [int(chain.head) for chain in cast(list[Chain], chains)]


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 64), (2, 64), (3, 64), (4, 128), (8, 192), (128, 2112), (256, 4160)]
)
def test_a_part_is_its_header_and_an_entry_for_each_descriptor_to_the_next_64_bytes(
    size: int, expected: int
) -> None:
    assert area_size(1, size) == expected and area_size(5, size) == 5 * expected
    area = memoryview(bytearray(range(256)) * (expected * 3 // 256 + 1))[: 3 * expected]
    for index in range(3):
        part = part_of(area, index, size)
        assert len(part) == expected and part == area[index * expected : (index + 1) * expected]
    for index, entries in ((3, size), (-1, size), (2, size + 4), (0, 0), (0, -1), (0, 1 << 20)):
        with pytest.raises(ValueError, match="inflight record"):
            part_of(area, index, entries)


def test_the_record_is_byte_for_byte_the_specifications() -> None:
    world = World(start=0xFFFE)
    device = world.device(0xFFFE)
    assert world.area == packed({}, used_idx=0xFFFE)
    world.ring.offer(5, 2, 7)
    chains = list(device.pop_many())
    taken = {5: Entry(1, 0, 0), 2: Entry(1, 0, 1), 7: Entry(1, 0, 2)}
    assert heads(chains) == [5, 2, 7]
    assert world.area == packed(taken, used_idx=0xFFFE)
    for chain in chains:
        chain.written = 1
    device.push_many([chains[2], chains[0]])
    assert world.area == packed(
        {5: Entry(0, 7, 0), 2: Entry(1, 0, 1), 7: Entry(0, 0, 2)}, last_batch_head=5, used_idx=0
    )
    device.push(chains[1], 9)
    done = {5: Entry(0, 7, 0), 2: Entry(0, 5, 1), 7: Entry(0, 0, 2)}
    assert world.area == packed(done, last_batch_head=2, used_idx=1)
    world.ring.offer(7, 1)
    chains = list(device.pop_many())
    done |= {7: Entry(1, 0, 3), 1: Entry(1, 0, 4)}
    assert world.area == packed(done, last_batch_head=2, used_idx=1)
    device.put_back(chains)
    done |= {7: Entry(0, 0, 3), 1: Entry(0, 0, 4)}
    assert world.area == packed(done, last_batch_head=2, used_idx=1)
    assert device.next_available == 1
    device.release()
    world.close()


def test_a_record_not_begun_starts_where_the_ring_is_and_forgets_what_lay_there() -> None:
    world = World(500, packed({1: Entry(1, 9, 77), 2: Entry(255)}, 5, 6, desc_num=99, version=0, features=3))
    device = world.device(500)
    assert world.area == packed({1: Entry(0, 9, 77)}, 0, 500)
    assert device.next_available == 500 and device.pop_many() == ()
    device.release()
    world.close()


def test_t17_heads_in_flight_come_first_in_the_order_of_their_counters() -> None:
    """As another back-end left them: far apart, out of order, with stale counters of others above them."""
    entries = {1: Entry(1, 0, 1 << 40), 6: Entry(1, 3, 7), 3: Entry(1, 6, 8), 0: Entry(0, 0, (1 << 64) - 1)}
    world = World(0xFFFF, packed(entries, last_batch_head=3, used_idx=0xFFFF))
    world.ring.avail_idx = 2
    world.ring.offer(4, 0)
    device = world.device()
    assert device.next_available == 2
    assert device.enable_notifications()
    chains = [*device.pop_many(2), *device.pop_many(), *device.pop_many(1), *device.pop_many()]
    assert heads(chains) == [6, 3, 1, 4, 0]
    assert world.area == packed(
        entries | {4: Entry(1, 0, (1 << 40) + 1), 0: Entry(1, 0, (1 << 40) + 2)}, 3, 0xFFFF
    )
    assert device.next_available == 4 and not device.enable_notifications()
    device.release()
    world.close()


def test_t17_what_was_resumed_stays_marked_and_first_when_it_is_put_back() -> None:
    entries = {6: Entry(1, 0, 3), 2: Entry(1, 0, 5)}
    world = World(0, packed(entries))
    world.ring.avail_idx = 2
    world.ring.offer(1, 4)
    device = world.device()
    chains = [*device.pop_many(), *device.pop_many()]
    assert heads(chains) == [6, 2, 1, 4]
    device.put_back(chains[1:])
    assert world.area == packed(entries | {1: Entry(0, 0, 6), 4: Entry(0, 0, 7)})
    assert device.next_available == 2 and device.enable_notifications()
    device.push(chains[0], 0)
    assert heads(device.pop_many()) == [2] and heads(device.pop_many(1)) == [1]
    device.release()
    device = world.device()
    assert device.next_available == 3
    assert heads(device.pop_many()) == [2, 1] and heads(device.pop_many()) == [4]
    device.release()
    world.close()


def test_t17_what_was_resumed_comes_before_what_still_waits_when_it_is_put_back() -> None:
    world = World(0, packed({head: Entry(1, 0, head) for head in range(5)}))
    world.ring.avail_idx = 5
    device = world.device()
    device.put_back(device.pop_many(3)[1:])
    assert heads(device.pop_many(3)) == [1, 2, 3] and heads(device.pop_many(3)) == [4]
    assert device.next_available == 5 and device.pop_many() == ()
    device.release()
    world.close()


def test_t17_a_head_that_was_resumed_is_an_ordinary_one_when_it_comes_again() -> None:
    world = World(0, packed({6: Entry(1, 0, 3)}))
    world.ring.avail_idx = 1
    device = world.device()
    device.push_many(device.pop_many())
    world.ring.offer(6)
    chains = device.pop_many()
    device.put_back(chains)
    assert device.next_available == 1 and world.area == packed({6: Entry(0, 0, 4)}, 6, 1)
    device.release()
    world.close()


@pytest.mark.parametrize("cleared", range(4))
def test_t17_a_batch_whose_return_was_cut_short_is_brought_to_its_end(cleared: int) -> None:
    """Heads 4, 1 and 7 were used, and some of their marks are gone; 2 is in flight; 5 was used long ago."""
    entries = {4: Entry(1, 5, 0), 1: Entry(1, 4, 2), 7: Entry(1, 1, 1), 2: Entry(1, 0, 3), 5: Entry(0, 7, 9)}
    expected = {head: entry._replace(inflight=int(head == 2)) for head, entry in entries.items()}
    for head in (4, 1, 7)[:cleared]:
        entries[head] = entries[head]._replace(inflight=0)
    world = World(1, packed(entries, last_batch_head=7, used_idx=0xFFFE))
    device = world.device()
    assert world.area == packed(expected, last_batch_head=7, used_idx=1)
    assert device.next_available == 2
    [chain] = device.pop_many()
    device.push(chain, 0)
    expected[2] = Entry(0, 7, 3)
    assert world.area == packed(expected, last_batch_head=2, used_idx=2)
    device.release()
    world.close()


IMPOSSIBLE: list[tuple[bytes, int, str, int]] = [
    (packed({}, version=2), 0, "version", 2),
    (packed({}, version=0xFFFF), 0, "version", 0xFFFF),
    (packed({}, features=1), 0, "features", 1),
    (packed({}, features=1 << 63), 0, "features", 1 << 63),
    (packed({}, desc_num=0), 0, "desc_num", 0),
    (packed({}, desc_num=7), 0, "desc_num", 7),
    (packed({}, desc_num=9), 0, "desc_num", 9),
    (packed({}, desc_num=0xFFFF), 0, "desc_num", 0xFFFF),
    (packed({}, used_idx=1), 0, "used_idx", 1),
    (packed({}, used_idx=0), 9, "used_idx", 0),
    (packed({}, used_idx=0xFFF0), 0, "used_idx", 0xFFF0),
    (packed({}, last_batch_head=8), 1, "last_batch_head", 8),
    (packed({}, last_batch_head=0xFFFF), 1, "last_batch_head", 0xFFFF),
    (packed({3: Entry(1, 8, 0)}, last_batch_head=3), 2, "desc[3].next", 8),
    (packed({3: Entry(1, 0xFFFF, 0)}, last_batch_head=3), 2, "desc[3].next", 0xFFFF),
    (packed({3: Entry(1, 3, 0)}, last_batch_head=3), 2, "desc[3].next", 3),
    (packed({3: Entry(1, 5, 0), 5: Entry(1, 3, 1)}, last_batch_head=3), 8, "desc[5].next", 3),
    (packed({2: Entry(2, 0, 0)}), 0, "desc[2].inflight", 2),
    (packed({7: Entry(255, 0, 0)}), 0, "desc[7].inflight", 255),
    (packed({7: Entry(1, 0, 1 << 63)}), 0, "desc[7].counter", 1 << 63),
    (packed({7: Entry(1, 0, TOP - 1)}), 0, "desc[7].counter", TOP - 1),
]


@pytest.mark.parametrize(("record", "used", "field", "value"), IMPOSSIBLE)
def test_t17_a_record_that_cannot_be_is_refused_and_nothing_is_changed(
    record: bytes, used: int, field: str, value: int
) -> None:
    world = World(used, record)
    error = world.refused()
    assert (type(error), vars(error)) == (
        errors.InflightRecordError, {"queue": 3, "field": field, "value": value}
    )  # fmt: skip
    assert field in str(error)
    world.close()


def test_what_an_honest_record_may_hold_is_not_refused() -> None:
    """The links of batches of long ago, and a counter as large as one may be."""
    entries = {3: Entry(0, 0xFFFF, TOP - 1), 4: Entry(1, 3, 0), 5: Entry(1, 0xFFFF, (1 << 63) - 1)}
    world = World(1, packed(entries, last_batch_head=4, used_idx=0))
    world.ring.avail_idx = 2
    world.ring.offer(0)
    device = world.device()
    assert heads([*device.pop_many(), *device.pop_many()]) == [5, 0]
    assert struct.unpack_from("<Q", world.area, 16 + 8)[0] == 1 << 63
    device.release()
    world.close()


@pytest.mark.parametrize("record", [bytes(144), packed({})[:144]], ids=["not begun", "begun"])
def test_what_lies_behind_the_last_entry_is_neither_read_nor_written(record: bytes) -> None:
    world = World(record=record + b"\xff" * 48)
    device = world.device()
    world.ring.offer(7)
    assert heads(device.pop_many()) == [7] and world.area[144:] == b"\xff" * 48
    device.release()
    world.close()


def test_cve_2026_86565_a_record_for_a_smaller_queue_is_refused_and_one_for_a_larger_serves() -> None:
    with Arena(16) as arena:
        arena.device.release()
        area = bytearray(packed({}, version=0))
        record = InflightRecord(3, part_of(memoryview(area), 0, SIZE), SIZE)
        error = raised(lambda: SplitDeviceQueue(arena.ring.layout, arena.memory, PLAIN, inflight=record))
        assert refusal(error) == ("InflightRecordError", {"queue": 3, "field": "desc_num", "value": 8})
        assert area == packed({}, version=0)
        record.release()
    with Arena(4) as arena:
        arena.device.release()
        layout = arena.ring.layout
        for entry, refused in ((3, False), (4, True), (7, True)):
            area = bytearray(packed({entry: Entry(1)}))
            record = InflightRecord(3, part_of(memoryview(area), 0, SIZE), SIZE)
            arena.ring.describe(3, Descriptor(BUFFERS_AT, 4))
            if refused:
                error = raised(lambda: SplitDeviceQueue(layout, arena.memory, PLAIN, inflight=record))
                assert vars(error) == {"queue": 3, "field": f"desc[{entry}].inflight", "value": 1}
                record.release()
            else:
                device = SplitDeviceQueue(layout, arena.memory, PLAIN, inflight=record)
                assert heads(device.pop_many()) == [3]
                device.release()


def test_s27_with_a_record_a_malformed_chain_stays_the_next_in_turn() -> None:
    """The record has no place for it: gone past, it would shift where the next device goes on."""
    world = World()
    device = world.device()
    world.ring.describe(1, Descriptor(0xFFFF_0000, 16))
    world.ring.offer(0, 1, 2)
    for _ in range(3):
        [chain] = device.pop_many()
        assert chain.head == 0
        for _ in range(3):
            error = raised(device.pop_many)
            assert refusal(error) == (
                "BadAddress", {"queue": 3, "head": 1, "address": 0xFFFF_0000, "length": 16}
            )  # fmt: skip
        assert device.next_available == 1
        device.put_back([chain])
        assert device.next_available == 0
    [chain] = device.pop_many()
    device.release()
    # The next device has it in flight, and meets the same.
    device = world.device()
    assert device.next_available == 1 and heads(device.pop_many()) == [0]
    raised(device.pop_many)
    # A driver may put it right.
    world.ring.describe(1, Descriptor(BUFFERS_AT, 16))
    assert heads(device.pop_many()) == [1, 2]
    device.release()
    world.close()


def test_a_head_that_waits_to_be_resumed_may_have_become_malformed() -> None:
    world = World(0, packed({5: Entry(1, 0, 0), 6: Entry(1, 0, 1), 7: Entry(1, 0, 2)}))
    world.ring.avail_idx = 3
    world.ring.describe(6, Descriptor(0xFFFF_0000, 16))
    device = world.device()
    assert device.next_available == world.ring.avail_idx and device.enable_notifications()
    assert heads(device.pop_many()) == [5]
    for _ in range(2):
        assert isinstance(raised(device.pop_many), errors.BadAddress)
    world.ring.describe(6, Descriptor(BUFFERS_AT, 16))
    assert heads(device.pop_many()) == [6, 7]
    device.release()
    world.close()


def test_s29_a_head_that_was_resumed_is_in_flight_and_refused_when_it_is_made_available_again() -> None:
    world = World(0, packed({5: Entry(1, 0, 0)}))
    world.ring.avail_idx = 1
    world.ring.offer(5)
    device = world.device()
    [chain] = device.pop_many()
    assert isinstance(raised(device.pop_many), errors.HeadInFlight)
    device.put_back([chain])
    [chain] = device.pop_many()
    assert isinstance(raised(device.pop_many), errors.HeadInFlight)
    assert world.area == packed({5: Entry(1, 0, 0)})
    device.push(chain, 0)
    assert heads(device.pop_many()) == [5]
    device.release()
    world.close()


def test_s19_of_several_chains_those_before_a_refused_one_are_returned_and_recorded() -> None:
    world = World()
    device = world.device()
    world.ring.offer(0, 1, 2, 3)
    chains = device.pop_many()
    for chain, written in zip(chains, (1, 2, 65, 4)):
        chain.written = written
    assert isinstance(raised(lambda: device.push_many(chains)), errors.UsedLengthError)
    assert (world.ring.used_idx, world.area[16:80:16].hex()) == (2, "00000101")
    chains[2].written, chains[3].written = 64, -1
    for again, error in (
        ([chains[0]], errors.NotInFlight), ([chains[2]] * 2, errors.NotInFlight),
        ([chains[3]], errors.UsedLengthError),
    ):  # fmt: skip
        assert isinstance(raised(lambda: device.push_many(again)), error)
    assert isinstance(raised(lambda: device.push(chains[3], 65)), errors.UsedLengthError)
    assert (world.ring.used_idx, world.area[16:80:16].hex()) == (3, "00000001")
    device.push(chains[3], 4)
    assert [world.ring.used(position) for position in range(4)] == [(0, 1), (1, 2), (2, 64), (3, 4)]
    assert (world.ring.used_idx, world.area[16:80:16].hex()) == (4, "00000000")
    device.release()
    world.close()


def test_t17_random_records_are_refused_or_give_each_head_once() -> None:
    seed = 20260103
    random = Random(seed)
    outcomes = {"refused": 0, "served": 0}
    for turn in range(1500):
        flags, links, top = ((0, 1), range(8), 1 << 63) if turn % 2 else ((0, 0, 1, 1, 2), range(9), TOP)
        entries = {
            head: Entry(random.choice(flags), random.choice(links), random.randrange(random.choice((9, top))))
            for head in range(SIZE)
        }
        used = random.randrange(1 << 16)
        record = packed(entries, random.randrange(9), used - random.choice([0, 0, 1, 2, 5, 9]) & 0xFFFF)
        world = World(used, record)
        before = bytes(world.area)
        area = world.record()
        try:
            device = world.device(record=area)
        except errors.InflightRecordError as error:
            error.__traceback__ = None
            area.release()
            outcomes["refused"] += 1
            assert world.area == before, (seed, turn)
        else:
            outcomes["served"] += 1
            marked = [head for head in range(SIZE) if world.area[16 + 16 * head]]
            world.ring.avail_idx = used + len(marked)
            found: list[int] = []
            while chains := device.pop_many(3):
                found += heads(chains)
            counters = [entries[head].counter for head in found]
            assert sorted(found) == marked and counters == sorted(counters), (seed, turn)
            device.release()
        world.close()
    assert min(outcomes.values()) > 100, outcomes


class Killed(BaseException):
    """The device is gone, between two stores."""


class Life:
    """Counts a device's stores to the record and to the used ring, and ends it at one of them."""

    def __init__(self, stores: int | None) -> None:
        self.limit = stores
        self.stores = 0

    def store(self) -> None:
        if self.stores == self.limit:
            raise Killed
        self.stores += 1


class Cells:
    """In place of a cast memoryview."""

    def __init__(self, view: memoryview, life: Life) -> None:
        self._view = view
        self._life = life

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, index: int | slice) -> object:
        return self._view[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._life.store()
        self._view[index] = value

    def release(self) -> None:
        self._view.release()


def watched(owner: object, life: Life, *names: str) -> None:
    """Send *owner*'s stores through *life*."""
    for name in names:
        view = getattr(owner, name)
        assert isinstance(view, memoryview)
        setattr(owner, name, Cells(view, life))


def test_t17_the_stores_are_in_the_specifications_order() -> None:
    story: list[str] = []

    class Told(Cells):
        def __init__(self, view: memoryview, name: str) -> None:
            super().__init__(view, Life(None))
            self._name = name

        def __setitem__(self, index: int, value: int) -> None:
            super().__setitem__(index, value)
            story.append(f"{self._name}{index} = {value}")

    world = World()
    record = world.record()
    device = world.device(record=record)
    for owner, name, short in (
        (record, "_bytes", "byte "), (record, "_words", "word "), (record, "_counters", "quad "),
        (device, "_used_ring", "ring "), (device, "_used_idx", "index "),
    ):  # fmt: skip
        setattr(owner, name, Told(getattr(owner, name), short))
    world.ring.offer(4, 1)
    chains = list(device.pop_many())
    # Of each: the counter, then inflight.
    assert story == ["quad 11 = 0", "byte 80 = 1", "quad 5 = 1", "byte 32 = 1"]
    story.clear()
    device.push_many(chains)
    assert story == [
        "word 43 = 0", "word 6 = 4",  # next and last_batch_head
        "word 19 = 4", "word 6 = 1",
        "ring 0 = 4", "ring 1 = 0", "ring 2 = 1", "ring 3 = 0",
        "index 0 = 2",
        "byte 80 = 0", "byte 32 = 0",
        "word 7 = 2",  # used_idx
    ]  # fmt: skip
    device.release()
    world.close()


class Driver:
    """Offers requests, as many as the ring has room for, and checks what comes back.

    A request is a number; its answer is three times that.
    """

    def __init__(self, start: int) -> None:
        self.world = World(start)
        self._free = list(range(SIZE // 2))
        self._used = start
        self.requests = 0
        self.outstanding: dict[int, int] = {}
        """The request of each head, in the order they were offered."""
        self.completed: list[int] = []

    @staticmethod
    def addresses(head: int) -> tuple[int, int]:
        return BUFFERS_AT + 64 * head, BUFFERS_AT + 64 * head + 32

    def offer(self, count: int) -> None:
        for _ in range(min(count, len(self._free))):
            head = self._free.pop(0)
            question, answer = self.addresses(head)
            self.world.ring.chain(Descriptor(question, 8), Descriptor(answer, 8, WRITE), at=2 * head)
            self.world.memory.write(GuestAddress(question), self.requests.to_bytes(16, "little"))
            self.outstanding[2 * head] = self.requests
            self.world.ring.offer(2 * head)
            self.requests += 1

    def collect(self) -> None:
        """Take what was used: each head that comes is out, and its answer is there."""
        ring = self.world.ring
        while self._used != ring.used_idx:
            head, length = ring.used(self._used)
            request = self.outstanding.pop(head)
            answer = self.world.memory.read(GuestAddress(self.addresses(head // 2)[1]), 8)
            assert length == 8 and int.from_bytes(answer, "little") == 3 * request
            self.completed.append(request)
            self._free.append(head // 2)
            self._used = self._used + 1 & 0xFFFF

    def device(self, life: Life) -> SplitDeviceQueue:
        """A device whose stores are counted, those of its recovery too."""
        record = self.world.record()
        watched(record, life, "_bytes", "_words", "_counters")
        try:
            device = self.world.device(self._used, record)
        except Killed:
            record.release()
            raise
        watched(device, life, "_used_ring", "_used_idx")
        return device


def request_of(chain: Chain) -> int:
    return int.from_bytes(chain.read(), "little")


def work(chain: Chain) -> None:
    chain.written = chain.write((3 * request_of(chain)).to_bytes(8, "little"))


def live(driver: Driver, life: Life, seed: int, steps: int) -> None:
    """Serve for a while: batches, single ones, out of order, some put back; until *life* ends."""
    random = Random(seed)
    device: SplitDeviceQueue | None = None
    try:
        device = driver.device(life)
        out: list[Chain] = []
        for _ in range(steps):
            driver.offer(random.randrange(4))
            chains = list(device.pop_many(random.randrange(1, 4)))
            if chains and random.randrange(3) == 0:
                back = random.randrange(len(chains))
                device.put_back(chains[back:])
                chains = chains[:back]
            out += chains
            for chain in chains:
                work(chain)
            random.shuffle(out)
            count = random.randrange(len(out) + 1)
            if count == 1:
                device.push(out[0], out[0].written)
            else:
                device.push_many(out[:count])
            del out[:count]
            driver.collect()
    except Killed:
        pass
    finally:
        if device is not None:
            device.release()
    # The driver goes on while there is no device: heads that were used come again.
    driver.collect()
    driver.offer(2)


def finish(driver: Driver) -> None:
    """The last device: it finds exactly what is outstanding, in the driver's order, and completes it."""
    device = driver.device(Life(None))
    popped: list[Chain] = []
    while chains := device.pop_many(3):
        popped += chains
    assert [request_of(chain) for chain in popped] == list(driver.outstanding.values())
    for chain in popped:
        work(chain)
    device.push_many(popped[::-1])
    driver.collect()
    assert device.next_available == driver.world.ring.avail_idx == driver.world.ring.used_idx
    device.release()
    assert sorted(driver.completed) == list(range(driver.requests))
    flags = [driver.world.area[16 + 16 * head] for head in range(SIZE)]
    assert flags == [0] * SIZE and not driver.outstanding
    driver.world.close()


STEPS = 20


def stores_of(call: Callable[[Driver, Life], None]) -> int:
    """How many stores a life takes that is not cut short."""
    driver, life = Driver(0xFFFC), Life(None)
    call(driver, life)
    finish(driver)
    return life.stores


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_t17_killed_at_every_store_and_started_again_each_request_is_completed_once(seed: int) -> None:
    stores = stores_of(lambda driver, life: live(driver, life, seed, STEPS))
    assert stores > 100
    for at in range(stores):
        driver = Driver(0xFFFC)
        live(driver, Life(at), seed, STEPS)
        finish(driver)


@pytest.mark.parametrize("seed", [4, 5])
def test_t17_killed_again_while_it_recovers_and_after(seed: int) -> None:
    stores = stores_of(lambda driver, life: live(driver, life, seed, 6))
    for at in range(stores):
        for again in range(12):
            driver = Driver(0xFFFC)
            live(driver, Life(at), seed, 6)
            live(driver, Life(again), seed + 10, 6)
            live(driver, Life(20), seed + 20, 6)
            finish(driver)
