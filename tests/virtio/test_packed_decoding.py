"""Two ways to decode a packed ring's chain, one meaning: the queue's short cuts give what the readable way gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from random import Random

import pytest
from virtio.packed_rings import (
    AVAIL,
    PACKED,
    PACKED_INDIRECT,
    USED,
    Packed,
    PackedOracle,
    PackedRing,
    off_wrap,
    wrap_counter,
)
from virtio.places import BUFFERS_AT, FAR, HOME, HOME_END, NEXT_DOOR, PLACES, REGIONS, RING_AT, TABLES_AT, sample
from virtio.rings import INDIRECT, NEXT, WRITE, Refusal, Verdict, Where, memory_of, refusal, without_frames

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.queue_state import QueueState


class Comparison:
    """A ring, its device side, and the readable way beside it."""

    def __init__(self, memory: GuestMemory, size: int, features: int) -> None:
        self.ring = PackedRing(memory, QueueLayout.contiguous(5, size, GuestAddress(RING_AT)))
        self.memory = memory
        self.features = features
        self.device = PackedDeviceQueue(self.ring.layout, memory, features)
        self.oracle = PackedOracle(self.ring, features)
        self.where = Where(memory)
        self.chains = 0

    def agree(self, *descriptors: Packed) -> Verdict:
        """Make these available, as they are but for the marks, and hold what is popped against the oracle's."""
        ring, size = self.ring, self.ring.size
        first = ring.position
        for step in range(len(descriptors) - 1, -1, -1):
            ring.write(first + step, descriptors[step])
        expected, slots, number = self.oracle(first % size)
        self.chains += 1
        try:
            chain = self.device.pop()
        except errors.ChainError as error:
            found: Verdict = refusal(error)
            without_frames(error)
        else:
            assert chain is not None and (chain.head, chain.slots) == (number, slots)
            found = self.where.outcome(chain)
            # Not pushed: the descriptors stay as they are.
            self.device.put_back([chain])
        assert found == expected, (first, descriptors)
        if isinstance(found, Refusal):
            ring.position += slots
        where = off_wrap(ring.position, size)
        assert self.device.state.available == where
        if isinstance(found, Refusal) and self.chains % 64 == 0 and where:
            # What was gone past is never given back: begin anew, and not with zeros, which would be a new ring.
            self.device.release()
            self.device = PackedDeviceQueue(ring.layout, self.memory, self.features, QueueState(where, where))
        return found

    def begin_at(self, position: int) -> None:
        """Both sides go on there, if they are elsewhere."""
        where = off_wrap(position, self.ring.size)
        if self.device.state != QueueState(where, where):
            self.device.release()
            self.device = PackedDeviceQueue(
                self.ring.layout, self.memory, self.features, QueueState(where, where)
            )
        self.ring.position = position

    def agree_on_all(self, position: int, *descriptors: Packed) -> None:
        """A ring that holds just these, marks and all, from *position* on: what is popped is what the oracle says."""
        for index, descriptor in enumerate(descriptors):
            self.ring.describe(index, descriptor)
        self.begin_at(position)
        expected = self.oracle.all_from(position)
        self.chains += 1
        found: list[Verdict] = []
        taken: list[Chain] = []
        try:
            while chains := self.device.pop_many():
                taken += chains
                found += map(self.where.outcome, chains)
        except errors.ChainError as error:
            found.append(refusal(error))
            without_frames(error)
        assert found == expected, (position, descriptors)
        self.device.put_back(taken)

    def release(self) -> None:
        self.ring.release()
        self.device.release()
        self.oracle.release()


@contextmanager
def comparison(regions: str, size: int, features: int) -> Iterator[Comparison]:
    with memory_of(*REGIONS[regions]) as memory:
        compared = Comparison(memory, size, features)
        yield compared
        compared.release()


TABLE = [
    Packed(BUFFERS_AT + 64, 4),
    Packed(BUFFERS_AT + 128, 8, WRITE),
    Packed(BUFFERS_AT + 192, 1, WRITE),
]


@pytest.mark.parametrize("features", [PACKED, PACKED_INDIRECT], ids=["direct", "indirect"])
@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("size", [1, 2])
def test_every_chain_of_one_descriptor(size: int, regions: str, features: int) -> None:
    with comparison(regions, size, features) as compared:
        compared.ring.table(TABLES_AT, TABLE)
        for place, flags, number in product(PLACES, range(16), (0, size - 1, size, 0xFFFF)):
            compared.agree(Packed(*place, flags, number))


@pytest.mark.parametrize("features", [PACKED, PACKED_INDIRECT], ids=["direct", "indirect"])
def test_every_ring_of_two_descriptors(features: int) -> None:
    places = [PLACES[index] for index in (0, 1, 3, 4, 7, 9, 14, 15)]
    with comparison("neighbours", 2, features) as compared:
        compared.ring.table(TABLES_AT, TABLE)
        entries = [Packed(*place, flags, 1) for place, flags in product(places, range(8))]
        for first, second in product(entries, repeat=2):
            compared.agree(first, second)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_way_to_flag_three_descriptors_at_every_place_of_two_laps(size: int) -> None:
    buffers = [(BUFFERS_AT + 64 * index, 16 + 32 * (index == 2)) for index in range(3)]
    with comparison("one region", size, PACKED_INDIRECT) as compared:
        compared.ring.table(BUFFERS_AT, TABLE)
        ring = compared.ring
        for start in range(2 * size):
            for flags, number in product(product(range(8), repeat=3), (0, size - 1, size)):
                if start == size:
                    # All zeros would be a new ring.
                    ring.describe(size - 1, Packed(0, 0, AVAIL | USED))
                compared.begin_at(start)
                compared.agree(*[Packed(*buffer, flag, number) for buffer, flag in zip(buffers, flags)])


FLAGS = [shape | marks for shape in range(8) for marks in (0, AVAIL, USED, AVAIL | USED)]
"""All there are: NEXT, WRITE and INDIRECT, and AVAIL and USED."""
PLACES_OF_MARKED = [(BUFFERS_AT, 16), (TABLES_AT, 48), (HOME_END - 16, 17)]


def starts(size: int) -> list[int]:
    """The positions of two laps, but for the second one's first, which is a new ring's where no flag is set."""
    return [start for start in range(2 * size) if start != size]


def test_every_ring_of_one_descriptor_whatever_its_marks() -> None:
    with comparison("one region", 1, PACKED_INDIRECT) as compared:
        compared.ring.table(TABLES_AT, TABLE)
        for place, flags, number in product(PLACES, FLAGS, (0, 1, 0xFFFF)):
            compared.agree_on_all(0, Packed(*place, flags, number))
            if flags & USED:
                compared.agree_on_all(1, Packed(*place, flags, number))


def test_every_ring_of_two_descriptors_whatever_their_marks() -> None:
    with comparison("one region", 2, PACKED_INDIRECT) as compared:
        compared.ring.table(TABLES_AT, TABLE)
        for flags in product(FLAGS, repeat=2):
            for places in product(PLACES_OF_MARKED, repeat=2):
                compared.agree_on_all(0, *[
                    Packed(*place, flag, number) for number, (place, flag) in enumerate(zip(places, flags))
                ])
        for start in starts(2):
            for flags, numbers in product(product(FLAGS, repeat=2), ((1, 0), (1, 1))):
                compared.agree_on_all(start, *[
                    Packed(BUFFERS_AT, 16, flag, number) for number, flag in zip(numbers, flags)
                ])


@pytest.mark.parametrize("size", [3, 4])
def test_rings_of_three_and_of_four_descriptors_whatever_their_marks(size: int) -> None:
    """Of 32 flags, 3 places and 2 IDs for each, at each place of two laps: every so manyth, the same ones each time."""
    options = list(product(FLAGS, PLACES_OF_MARKED, (0, 1)))
    with comparison("one region", size, PACKED_INDIRECT) as compared:
        compared.ring.table(TABLES_AT, TABLE)
        for start in starts(size):
            for chosen in sample(options, size, 12_000 // len(starts(size)), start):
                compared.agree_on_all(start, *[
                    Packed(*place, flags, number + slot & size - 1) for slot, (flags, place, number) in enumerate(chosen)
                ])


def test_every_place_for_each_of_a_row_of_three() -> None:
    places = [PLACES[index] for index in (0, 1, 2, 3, 5, 6, 7, 8, 11)]
    with comparison("neighbours", 7, PACKED) as compared:
        for flags in product((0, WRITE), repeat=3):
            for one, two, three in product(places, repeat=3):
                compared.agree(
                    Packed(*one, flags[0] | NEXT), Packed(*two, flags[1] | NEXT), Packed(*three, flags[2], 3)
                )


def test_every_place_for_each_of_three_in_an_indirect_table() -> None:
    places = [PLACES[index] for index in (0, 1, 2, 3, 5, 6, 7, 8, 11)]
    with comparison("neighbours", 2, PACKED_INDIRECT) as compared:
        for at, flags in product((TABLES_AT, HOME_END - 24), product((0, WRITE), repeat=3)):
            for buffers in product(places, repeat=3):
                table = [Packed(*buffer, flag) for buffer, flag in zip(buffers, flags)]
                compared.agree(compared.ring.table(at, table))


@pytest.mark.parametrize("entries", [1, 2, 3, 4])
def test_every_way_to_flag_an_indirect_table(entries: int) -> None:
    with comparison("one region", 3, PACKED_INDIRECT) as compared:
        for flags in product((0, NEXT, WRITE, WRITE | NEXT, INDIRECT, WRITE | AVAIL, USED), repeat=min(entries, 3)):
            table = [Packed(BUFFERS_AT + 64 * index, 16, flag) for index, flag in enumerate(flags)]
            table += [Packed(BUFFERS_AT, 1, WRITE)] * (entries - len(flags))
            compared.agree(compared.ring.table(TABLES_AT, table))


REMEMBERED = {
    "one": [Packed(BUFFERS_AT, 16)],
    "one, writable": [Packed(BUFFERS_AT, 16, WRITE)],
    "two": [Packed(BUFFERS_AT, 16, NEXT), Packed(BUFFERS_AT + 64, 16, WRITE)],
    "three, one readable": [
        Packed(BUFFERS_AT + 64 * at, 16, (WRITE if at else 0) | NEXT * (at < 2)) for at in range(3)
    ],
    "three, two readable": [Packed(BUFFERS_AT + 64 * at, 16, WRITE if at == 2 else NEXT) for at in range(3)],
    "three, writable": [Packed(BUFFERS_AT + 64 * at, 16, WRITE | NEXT * (at < 2)) for at in range(3)],
    "three, elsewhere": [Packed(FAR + 64 * at, 16, (WRITE if at else 0) | NEXT * (at < 2)) for at in range(3)],
    "a table of three": [Packed(TABLES_AT, 48, INDIRECT)],
    "a table of two": [Packed(TABLES_AT, 32, INDIRECT)],
    "a table that is a buffer": [Packed(TABLES_AT, 48)],
    "bad": [Packed(HOME_END - 8, 1 << 20)],
    "bad third": [Packed(BUFFERS_AT, 16, NEXT), Packed(BUFFERS_AT, 16, NEXT | WRITE), Packed(HOME_END, 1, WRITE)],
}


@pytest.mark.parametrize("after", REMEMBERED)
@pytest.mark.parametrize("before", REMEMBERED)
def test_what_was_decoded_before_has_no_part_in_what_is_decoded_now(before: str, after: str) -> None:
    """Every order of shapes with one ID, then each descriptor of the later one changed by itself."""
    with comparison("neighbours", 12, PACKED_INDIRECT) as compared:
        ring = compared.ring
        ring.table(TABLES_AT, TABLE)
        for name in (before, after, before, before, after):
            compared.agree(*REMEMBERED[name])
        good = REMEMBERED[after]
        for index, kept in enumerate(good):
            for change in (
                kept._replace(address=kept.address + 8),
                kept._replace(length=kept.length + 1),
                kept._replace(length=0),
                kept._replace(flags=kept.flags ^ WRITE),
                kept._replace(flags=kept.flags ^ INDIRECT),
                kept._replace(address=HOME_END),
            ):
                compared.agree(*good)
                compared.agree(*good[:index], change, *good[index + 1 :])
                compared.agree(*good)
        for index, entry in enumerate(TABLE):
            ring.table(TABLES_AT + 16 * index, [entry._replace(address=entry.address + 8)])
            compared.agree(*good)


class Guest:
    """Random chains: mostly the shapes that drivers make, often with something wrong."""

    def __init__(self, random: Random, compared: Comparison) -> None:
        self.random = random
        self.ring = compared.ring
        self.size = compared.ring.size
        self.starts = [HOME, HOME_END - 64, HOME - 64, HOME_END, FAR, FAR + NEXT_DOOR - 64, 0, 1 << 63]

    def buffer(self) -> tuple[int, int]:
        random = self.random
        if random.random() < 0.97:
            return BUFFERS_AT + random.randrange(0x2000), random.choice((1, 16, 512, random.randrange(1, 2048)))
        return random.choice(self.starts) + random.randrange(64), random.choice((0, 1, 64, 128, 0xFFFF_FFFF))

    def pieces(self, count: int) -> list[Packed]:
        split = self.random.randrange(count + 1)
        return [Packed(*self.buffer(), WRITE if index >= split else 0) for index in range(count)]

    def spoil(self, descriptor: Packed) -> Packed:
        random = self.random
        address, length = self.buffer()
        return random.choice(
            (
                descriptor._replace(address=address),
                descriptor._replace(length=length),
                descriptor._replace(flags=descriptor.flags ^ random.choice((WRITE, INDIRECT, 8))),
                descriptor._replace(flags=random.choice((0, WRITE, INDIRECT))),
            )
        )

    def table(self) -> Packed:
        count = self.random.choice((1, 2, 3, 3, 3, 5, 12))
        return self.ring.table(TABLES_AT + 16 * self.random.randrange(0x100), self.pieces(count))

    def chain(self, room: int) -> list[Packed]:
        random = self.random
        count = min(room, random.choice((1, 1, 2, 3, 3, 3, 4, 7)))
        pieces = self.pieces(count)
        if random.random() < 0.3:
            pieces = [self.table()]
        if random.random() < 0.05:
            index = random.randrange(len(pieces))
            pieces[index] = self.spoil(pieces[index])
        return pieces


@pytest.mark.parametrize("size", [5, 16, 100, 256])
@pytest.mark.parametrize("regions", REGIONS)
def test_random_rings(regions: str, size: int) -> None:
    """Several chains out at a time, popped in batches, returned in an order of chance, through many laps."""
    seed = 100 * size + len(regions)
    random = Random(seed)
    chains = refused = 0
    with comparison(regions, size, PACKED_INDIRECT) as compared:
        ring, oracle, guest = compared.ring, compared.oracle, Guest(random, compared)
        offered: list[int] = []
        held: list[Chain] = []
        # Gone past, and never to be given back.
        lost = 0
        turn = 0
        while chains < 6_000:
            turn += 1
            room = size - lost - sum(chain.slots for chain in held)
            ids = [number for number in range(size) if all(chain.head != number for chain in held)]
            random.shuffle(ids)
            for _ in range(turn % 33):
                pieces = guest.chain(max(room, 1))
                if len(pieces) > room or not ids:
                    break
                room -= len(pieces)
                number = ids.pop() if random.random() < 0.97 else random.randrange(size + 2)
                offered.append(ring.offer(*pieces, id=number))
            while offered:
                limit = (1, 8, 64, 64)[random.randrange(4)]
                expected: list[Verdict] = []
                flying, free = [int(chain.head) for chain in held], size - sum(chain.slots for chain in held)
                at, taken = offered[0], 0
                for at in offered[:limit]:
                    verdict, slots, number = oracle(at % size, flying, free)
                    expected.append(verdict)
                    if isinstance(verdict, Refusal):
                        break
                    flying.append(number)
                    free -= slots
                try:
                    popped = compared.device.pop_many(limit)
                except errors.ChainError as error:
                    assert [refusal(error)] == expected[:1], (seed, turn)
                    without_frames(error)
                    lost += oracle(offered.pop(0) % size)[1]
                    refused += 1
                    continue
                good = [verdict for verdict in expected if not isinstance(verdict, Refusal)]
                found = [compared.where.outcome(chain) for chain in popped]
                assert found and found == good[: len(found)], (seed, turn)
                taken = len(popped)
                # It looks so far ahead and no further.
                assert taken == len(good) or sum(chain.slots for chain in popped) > 3 * limit
                back = random.randrange(taken + 1) if random.random() < 0.1 else taken
                compared.device.put_back(popped[back:])
                held += popped[:back]
                chains += back
                del offered[:back]
            if turn % 4:
                random.shuffle(held)
                for chain in held:
                    chain.written = chain.writable_length
                compared.device.push_many(held)
                held.clear()
            if lost > size // 3 and not held:
                # As if all had come back.
                for step in range(1, size + 1):
                    marks = AVAIL | USED if wrap_counter(ring.position - step, size) else 0
                    ring.describe((ring.position - step) % size, Packed(0, 0, marks))
                where = off_wrap(ring.position, size)
                compared.device.release()
                compared.device = PackedDeviceQueue(
                    ring.layout, compared.memory, compared.features, QueueState(where, where)
                )
                lost = 0
    assert refused > chains // 200
