"""The inflight record of packed rings: its bytes, and that nothing is lost or done twice when its device is killed."""

import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple, cast

import pytest
from virtio.packed_rings import AVAIL, PACKED, USED, Packed, PackedRing, off_wrap
from virtio.rings import NEXT, WRITE, memory_of, nothing_left, raised

from lguestlib.memory.address import GuestAddress
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.inflight_packed import PackedInflightRecord, packed_area_size, packed_part_of
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.queue_state import QueueState

BUFFERS_AT = 0x4000


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


class Entry(NamedTuple):
    """A `DescStatePacked`."""

    inflight: int = 0
    next: int = 0
    last: int = 0
    num: int = 0
    counter: int = 0
    id: int = 0
    flags: int = 0
    len: int = 0
    addr: int = 0


class Header(NamedTuple):
    """What stands before the entries of a `QueueRegionPacked`."""

    features: int = 0
    version: int = 1
    desc_num: int = 0
    free_head: int = 0
    old_free_head: int = 0
    used_idx: int = 0
    old_used_idx: int = 0
    used_wrap_counter: int = 1
    old_used_wrap_counter: int = 1


class World:
    """A ring of *size* in guest memory and a record beside it, which outlive the device."""

    def __init__(self, size: int = 4, start: int = 0, record: bytes | None = None) -> None:
        self.size = size
        self.memory = memory_of((0, 0x10000))
        self.ring = PackedRing(self.memory, QueueLayout.contiguous(3, size, GuestAddress(0x1000)), start)
        for back in range(1, size + 1):
            if start:
                marks = AVAIL | USED if (start - back) // size % 2 == 0 else 0
                self.ring.describe((start - back) % size, Packed(0, 0, marks))
        self.start = start
        self.area = bytearray(record or bytes(packed_area_size(1, size)))

    def record(self) -> PackedInflightRecord:
        return PackedInflightRecord(3, packed_part_of(memoryview(self.area), 0, self.size), self.size)

    def device(self, record: PackedInflightRecord | None = None) -> PackedDeviceQueue:
        """A device that has just been started, and told what is wrong but for a new record."""
        where = off_wrap(self.start, self.size)
        return PackedDeviceQueue(
            self.ring.layout, self.memory, PACKED, QueueState(where, where), inflight=record or self.record()
        )

    @property
    def header(self) -> Header:
        return Header(*struct.unpack_from("<QHHHHHHBB", self.area))

    @header.setter
    def header(self, header: Header) -> None:
        struct.pack_into("<QHHHHHHBB", self.area, 0, *header)

    def entry(self, index: int) -> Entry:
        return Entry(*struct.unpack_from("<BxHHHQHHIQ", self.area, 32 + 32 * index))

    def set_entry(self, index: int, entry: Entry) -> None:
        struct.pack_into("<BxHHHQHHIQ", self.area, 32 + 32 * index, *entry)

    def refused(self) -> errors.QueueError:
        """What a device that is started ends in, having changed nothing and kept nothing."""
        before, record = bytes(self.area), self.record()
        error = raised(lambda: self.device(record))
        assert self.area == before
        record.release()
        return error

    def close(self) -> None:
        """Give all back, which shows that nothing has kept a view (Y4)."""
        self.ring.release()
        self.memory.close()
        self.area.append(0)


@pytest.mark.parametrize(("size", "expected"), [(1, 64), (2, 128), (3, 128), (4, 192), (128, 4160)])
def test_a_part_is_its_header_and_an_entry_for_each_descriptor_to_the_next_64_bytes(
    size: int, expected: int
) -> None:
    assert packed_area_size(1, size) == expected and packed_area_size(5, size) == 5 * expected
    area = memoryview(bytearray(range(256)) * (expected * 3 // 256 + 1))[: 3 * expected]
    for index in range(3):
        assert packed_part_of(area, index, size) == area[index * expected : (index + 1) * expected]
    for index, entries in ((3, size), (-1, size), (2, size + 4), (0, 0)):
        with pytest.raises(ValueError, match="inflight record"):
            packed_part_of(area, index, entries)


def test_what_lies_behind_the_last_entry_is_neither_read_nor_written() -> None:
    world = World(4, record=bytes(160) + b"\xff" * 32)
    for _ in range(2):
        device = world.device()
        world.ring.offer(Packed(BUFFERS_AT, 8), id=3)
        chains = device.pop_many()
        assert [chain.head for chain in chains] == [3] and world.area[160:] == b"\xff" * 32
        device.push_many(chains)
        device.release()
    world.close()


def test_the_record_is_byte_for_byte_the_specifications() -> None:
    world = World(start=3)
    device = world.device()
    assert world.header == Header(desc_num=4, used_idx=3, old_used_idx=3)
    assert [world.entry(index).next for index in range(4)] == [1, 2, 3, 4]
    world.ring.offer(Packed(0x4000, 8), Packed(0x5000, 16, WRITE), id=2)
    world.ring.offer(Packed(0x6000, 4), id=1)
    two, one = device.pop_many()
    assert world.header == Header(desc_num=4, free_head=3, old_free_head=3, used_idx=3, old_used_idx=3)
    # The first one is at the end of the lap whose wrap counter is 1.
    assert world.entry(0) == Entry(1, 1, 1, 2, 0, 2, AVAIL | NEXT, 8, 0x4000)
    assert world.entry(1) == Entry(0, 2, 0, 0, 0, 2, USED | WRITE, 16, 0x5000)
    assert world.entry(2) == Entry(1, 3, 2, 1, 1, 1, USED, 4, 0x6000)
    device.push(one, 0)
    assert world.header == Header(0, 1, 4, 2, 2, 0, 0, 0, 0)
    assert world.entry(2)[:4] == (0, 3, 2, 1)
    device.push(two, 16)
    assert world.header == Header(0, 1, 4, 0, 0, 2, 2, 0, 0)
    assert world.entry(0)[:2] == (0, 1) and world.entry(1).next == 2
    world.ring.offer(Packed(0x6000, 4), id=3)
    [chain] = device.pop_many()
    assert world.entry(0) == Entry(1, 1, 0, 1, 2, 3, USED, 4, 0x6000)
    device.put_back([chain])
    assert world.header.free_head == world.header.old_free_head == 0 and not world.entry(0).inflight
    device.release()
    world.close()


def test_what_was_in_flight_comes_first_and_can_be_put_back() -> None:
    world = World()
    device = world.device()
    for number in (3, 1, 2):
        world.ring.offer(Packed(BUFFERS_AT + 64 * number, 8), id=number)
    chains = device.pop_many()
    # The last one first: its used element lies over the first one's descriptor.
    device.push(chains[2], 0)
    device.release()
    world.ring.offer(Packed(BUFFERS_AT, 8), id=0)
    device = world.device()
    assert device.has_available() and device.enable_notifications()
    [first] = device.pop_many(1)
    device.put_back([first])
    assert [chain.head for chain in device.pop_many()] == [3, 1]
    assert [chain.head for chain in device.pop_many()] == [0]
    assert device.pop_many() == () and not device.has_available()
    device.release()
    again = world.device()
    assert [chain.head for chain in again.pop_many(4)] == [3, 1, 0]
    again.release()
    world.close()


def test_no_more_are_taken_and_recorded_than_were_asked_for() -> None:
    world = World(8)
    device = world.device()
    for number in range(5):
        world.ring.offer(Packed(BUFFERS_AT, 8), id=number)
    for limit, expected in ((2, [0, 1]), (1, [2]), (64, [3, 4])):
        assert [chain.head for chain in device.pop_many(limit)] == expected
        assert sum(world.entry(index).inflight for index in range(8)) == expected[-1] + 1
    device.release()
    world.close()


def test_a_malformed_chain_stays_the_next_in_turn() -> None:
    world = World()
    device = world.device()
    world.ring.offer(Packed(BUFFERS_AT, 8), id=0)
    world.ring.offer(Packed(1 << 40, 8), id=1)
    [good] = device.pop_many()
    for _ in range(3):
        assert isinstance(raised(device.pop_many), errors.BadAddress)
    device.push(good, 0)
    device.release()
    again = world.device()
    assert isinstance(raised(again.pop_many), errors.BadAddress)
    again.release()
    world.close()


def test_cve_2026_86565_a_record_that_cannot_be_is_refused_and_left_as_it_was() -> None:
    def world() -> World:
        made = World()
        device = made.device()
        made.ring.offer(Packed(BUFFERS_AT, 8), Packed(BUFFERS_AT, 8, WRITE), id=1)
        made.ring.offer(Packed(BUFFERS_AT, 8), id=0)
        assert len(device.pop_many()) == 2
        device.release()
        return made

    headers: list[dict[str, int]] = [
        {"features": 1}, {"version": 2}, {"desc_num": 3}, {"desc_num": 8}, {"old_free_head": 5},
        {"old_free_head": 0xFFFF}, {"old_used_idx": 4}, {"used_idx": 4}, {"used_wrap_counter": 2},
        {"old_used_wrap_counter": 0xFF},
    ]  # fmt: skip
    for change in headers:
        made = world()
        made.header = made.header._replace(**change)
        error = made.refused()
        assert isinstance(error, errors.InflightRecordError), change
        made.close()
    entries: list[tuple[int, dict[str, int]]] = [
        (0, {"inflight": 2}), (0, {"num": 0}), (0, {"num": 3}), (0, {"num": 5}), (0, {"last": 0}),
        (0, {"next": 0}), (0, {"next": 2}), (0, {"next": 9}), (0, {"counter": 1 << 63}), (1, {"id": 0}),
        (0, {"next": 0, "last": 0}), (0, {"next": 0, "last": 0, "num": 0xFFFF}), (3, {"next": 3}), (3, {"next": 0xFFFF}),
    ]  # fmt: skip
    for index, change in entries:
        made = world()
        made.set_entry(index, made.entry(index)._replace(**change))
        error = made.refused()
        assert isinstance(error, errors.InflightRecordError), (index, change)
        made.close()
    small = world()
    layout = QueueLayout.contiguous(3, 8, GuestAddress(0x1000))
    record = small.record()
    error = raised(lambda: PackedDeviceQueue(layout, small.memory, PACKED, None, inflight=record))
    assert isinstance(error, errors.InflightRecordError)
    record.release()
    small.close()


def test_more_descriptors_in_flight_than_the_ring_has_cannot_be_in_a_record_that_has_room_for_them() -> None:
    world = World(8)
    device = world.device()
    for number in range(5):
        world.ring.offer(Packed(BUFFERS_AT, 8), id=number)
    assert len(device.pop_many()) == 5
    device.release()
    for size, refused in ((4, True), (5, False)):
        # A smaller ring on the record of a larger one.
        record = world.record()
        layout = QueueLayout.contiguous(3, size, GuestAddress(0x2000))
        if refused:
            error = raised(lambda: PackedDeviceQueue(layout, world.memory, PACKED, None, inflight=record))
            assert isinstance(error, errors.InflightRecordError) and (error.field, error.value) == ("num", 5)
            record.release()
        else:
            smaller = PackedDeviceQueue(layout, world.memory, PACKED, None, inflight=record)
            assert len(smaller.pop_many()) == 5
            smaller.release()
    world.close()


def test_s19_of_several_chains_those_before_a_refused_one_are_returned_and_recorded() -> None:
    world = World(8)
    device = world.device()
    for number in range(4):
        world.ring.offer(Packed(BUFFERS_AT, 8, WRITE), id=number)
    chains = device.pop_many()
    for chain, written in zip(chains, (1, 0, 9, 1)):
        chain.written = written
    assert isinstance(raised(lambda: device.push_many(chains)), errors.UsedLengthError)
    assert [world.entry(index).inflight for index in range(4)] == [0, 0, 1, 1]
    assert (world.header.used_idx, world.ring.used(0), world.ring.used(2)) == (2, (0, 1, AVAIL | USED | WRITE), None)
    for again in ([chains[0]], [chains[2]] * 2):
        chains[2].written = 8
        assert isinstance(raised(lambda: device.push_many(again)), errors.NotInFlight)
    assert [world.entry(index).inflight for index in range(4)] == [0, 0, 0, 1] and world.header.used_idx == 3
    chains[3].written = -1
    assert isinstance(raised(lambda: device.push_many(chains[3:])), errors.UsedLengthError)
    assert world.header.used_idx == 3
    chains[3].written = 8
    device.push_many(chains[3:])
    assert world.header.used_idx == 4
    device.release()
    world.close()


def test_a_record_of_noise_ends_in_a_typed_error_or_in_a_device() -> None:
    random = Random(7)
    outcomes = {"refused": 0, "served": 0}
    for _ in range(1500):
        world = World()
        device = world.device()
        for number in range(3):
            world.ring.offer(Packed(BUFFERS_AT, 8), id=number)
        device.push_many(list(device.pop_many(2))[: random.randrange(3)])
        device.release()
        for _ in range(random.randrange(1, 4)):
            world.area[random.randrange(len(world.area))] = random.choice((0, 1, 2, 3, 255))
        record = world.record()
        try:
            device = world.device(record)
        except errors.InflightRecordError as error:
            error.__traceback__ = None
            record.release()
            outcomes["refused"] += 1
        else:
            outcomes["served"] += 1
            for _ in range(10):
                try:
                    device.push_many(device.pop_many())
                except errors.ChainError as error:
                    error.__traceback__ = None
            device.release()
        world.close()
    assert min(outcomes.values()) > 100, outcomes


class Killed(BaseException):
    """The device is gone, between two stores."""


class Life:
    """Counts a device's stores to the record and to the ring, and ends it at one of them."""

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


class Driver:
    """Offers requests, as many as the ring has room for, and checks what comes back.

    A request is a number, in one descriptor, or two, or three; its answer is three times that.
    """

    def __init__(self, size: int, start: int) -> None:
        self.world = World(size, start)
        self._ids = list(range(size))
        self._used = start
        self.requests = 0
        self.outstanding: dict[int, tuple[int, int]] = {}
        """The request of each buffer ID and its length in descriptors, in the order they were offered."""
        self.completed: list[int] = []

    def offer(self, count: int) -> None:
        for _ in range(count):
            length = 2 + self.requests % 2
            if len(self._ids) == 0 or sum(slots for _, slots in self.outstanding.values()) + length > self.world.size:
                return
            number = self._ids.pop(0)
            question = BUFFERS_AT + 64 * number
            self.world.memory.write(GuestAddress(question), self.requests.to_bytes(16, "little"))
            parts = [Packed(question, 4), Packed(question + 4, 4)] if length == 3 else [Packed(question, 8)]
            self.world.ring.offer(*parts, Packed(question + 32, 8, WRITE), id=number)
            self.outstanding[number] = self.requests, length
            self.requests += 1

    def collect(self) -> None:
        """Take what was used: each ID that comes is out, and its answer is there."""
        while (element := self.world.ring.used(self._used)) is not None:
            request, slots = self.outstanding.pop(element.id)
            answer = self.world.memory.read(GuestAddress(BUFFERS_AT + 64 * element.id + 32), 8)
            assert element.length == 8 and int.from_bytes(answer, "little") == 3 * request
            self.completed.append(request)
            self._ids.append(element.id)
            self._used += slots

    def device(self, life: Life) -> PackedDeviceQueue:
        """A device whose stores are counted, those of its recovery too."""
        record = self.world.record()
        watched(record, life, "_bytes", "_words", "_halves", "_quads")
        recover = record.recover

        def counted(size: int, used: int, flags: memoryview) -> tuple[int, int] | None:
            return recover(size, used, cast(memoryview, Cells(flags, life)))

        setattr(record, "recover", counted)
        try:
            device = self.world.device(record)
        except Killed:
            record.release()
            raise
        watched(device, life, "_flags", "_ids", "_lengths")
        return device


@pytest.mark.parametrize("start", [1, 3, 5, 7])
def test_t17_a_batch_of_which_the_driver_has_seen_nothing_is_undone_round_the_rings_end_too(start: int) -> None:
    world = World(4, start)
    device, life = world.device(), Life(1)
    for number in (0, 1):
        world.ring.offer(Packed(BUFFERS_AT, 8), id=number)
    chains = device.pop_many()
    watched(device, life, "_flags")
    with pytest.raises(Killed):
        device.push_many(chains)
    assert world.ring.used(start) is None and world.ring.used(start + 1) is not None
    device.release()
    # Behind the wrap counters: what is there says nothing.
    world.area[22:24] = b"\xff\xff"
    device = world.device()
    assert world.ring.used(start) is world.ring.used(start + 1) is None
    assert [chain.head for chain in device.pop_many()] == [0, 1]
    device.release()
    world.close()


def request_of(chain: Chain) -> int:
    return int.from_bytes(chain.read(), "little")


def work(chain: Chain) -> None:
    chain.written = chain.write((3 * request_of(chain)).to_bytes(8, "little"))


def live(driver: Driver, life: Life, seed: int, steps: int) -> None:
    """Serve for a while: batches, single ones, out of order, some put back; until *life* ends."""
    random = Random(seed)
    device: PackedDeviceQueue | None = None
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
            device.push_many(out[:count])
            del out[:count]
            driver.collect()
    except Killed:
        pass
    finally:
        if device is not None:
            device.release()
    # The driver goes on while there is no device: what was used comes again.
    driver.collect()
    driver.offer(2)


def finish(driver: Driver) -> None:
    """The last device: it finds exactly what is outstanding, in the driver's order, and completes it."""
    device = driver.device(Life(None))
    popped: list[Chain] = []
    while chains := device.pop_many(3):
        popped += chains
    assert [request_of(chain) for chain in popped] == [request for request, _ in driver.outstanding.values()]
    for chain in popped:
        work(chain)
    device.push_many(popped[::-1])
    driver.collect()
    end = off_wrap(driver.world.ring.position, driver.world.size)
    assert device.state == QueueState(end, end)
    device.release()
    assert sorted(driver.completed) == list(range(driver.requests)) and not driver.outstanding
    assert not any(driver.world.entry(index).inflight for index in range(driver.world.size))
    driver.world.close()


STEPS = 20
SIZE, START = 7, 5


def stores_of(call: Callable[[Driver, Life], None]) -> int:
    """How many stores a life takes that is not cut short."""
    driver, life = Driver(SIZE, START), Life(None)
    call(driver, life)
    finish(driver)
    return life.stores


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_t17_killed_at_every_store_and_started_again_each_request_is_completed_once(seed: int) -> None:
    stores = stores_of(lambda driver, life: live(driver, life, seed, STEPS))
    assert stores > 200
    for at in range(stores):
        driver = Driver(SIZE, START)
        live(driver, Life(at), seed, STEPS)
        finish(driver)


@pytest.mark.parametrize("seed", [4, 5])
def test_t17_killed_again_while_it_recovers_and_after(seed: int) -> None:
    stores = stores_of(lambda driver, life: live(driver, life, seed, 6))
    for at in range(stores):
        for again in range(16):
            driver = Driver(SIZE, START)
            live(driver, Life(at), seed, 6)
            live(driver, Life(again), seed + 10, 6)
            live(driver, Life(30), seed + 20, 6)
            finish(driver)
