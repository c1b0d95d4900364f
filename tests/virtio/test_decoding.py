"""Two ways to decode a chain, one meaning: what the queue's short cuts give is what `walk` gives."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from random import Random

import pytest
from virtio.places import (
    BUFFERS_AT,
    FAR,
    HOME,
    HOME_END,
    NEXT_DOOR,
    PLACES,
    REGIONS,
    RING_AT,
    TABLES_AT,
    sample,
)
from virtio.rings import (
    INDIRECT,
    NEXT,
    PLAIN,
    WITH_INDIRECT,
    WRITE,
    Descriptor,
    Oracle,
    Refusal,
    Ring,
    Verdict,
    Where,
    memory_of,
    refusal,
    without_frames,
)

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.split_device import SplitDeviceQueue


class Comparison:
    """A ring, its device side, and `walk` beside it."""

    def __init__(self, memory: GuestMemory, size: int, features: int) -> None:
        self.ring = Ring(memory, QueueLayout.contiguous(5, size, GuestAddress(RING_AT)))
        self.device = SplitDeviceQueue(self.ring.layout, memory, features)
        self.oracle = Oracle(self.ring, features)
        self.where = Where(memory)
        self.chains = 0

    def agree(self, head: int, note: object = None) -> Verdict:
        """Pop the chain at *head*, give it back, and hold it against the oracle's."""
        expected = self.oracle(head)
        self.ring.offer(head)
        self.chains += 1
        try:
            chain = self.device.pop()
        except errors.ChainError as error:
            found: Verdict = refusal(error)
            without_frames(error)
        else:
            assert chain is not None and chain.head == head
            found = self.where.outcome(chain)
            self.device.push(chain, 0)
        assert found == expected, (
            note,
            head,
            [self.ring.described(at) for at in range(self.ring.layout.size)],
        )
        return found

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


def kinds(verdicts: Iterable[Verdict]) -> set[str]:
    """Names of the errors among *verdicts*."""
    return {verdict.kind for verdict in verdicts if isinstance(verdict, Refusal)}


TABLE = [
    Descriptor(BUFFERS_AT + 64, 4, NEXT, 1),
    Descriptor(BUFFERS_AT + 128, 8, NEXT | WRITE, 2),
    Descriptor(BUFFERS_AT + 192, 1, WRITE),
]


@pytest.mark.parametrize("features", [PLAIN, WITH_INDIRECT], ids=["direct", "indirect"])
@pytest.mark.parametrize("regions", REGIONS)
def test_every_ring_of_one_descriptor(regions: str, features: int) -> None:
    with comparison(regions, 1, features) as compared:
        compared.ring.table(TABLES_AT, TABLE)
        verdicts = []
        for (address, length), flags, following in product(
            PLACES, (*range(8), 8, 0x8000, 0xFFF8, 0xFFFF), (0, 1, 2, 0xFFFF)
        ):
            compared.ring.describe(0, Descriptor(address, length, flags, following))
            verdicts.append(compared.agree(0))
        compared.agree(1)
        compared.agree(0xFFFF)
        expected = {"BadAddress", "NextOutOfRange", "DescriptorLoop"}
        indirect = {"IndirectWithNext", "IndirectLength"}
        if regions == "one region":
            assert kinds(verdicts) == expected | (
                indirect if features != PLAIN else {"IndirectNotNegotiated"}
            )


@pytest.mark.parametrize("features", [PLAIN, WITH_INDIRECT], ids=["direct", "indirect"])
def test_every_ring_of_two_descriptors(features: int) -> None:
    places = [PLACES[index] for index in (0, 1, 3, 4, 7, 9, 14, 15)]
    with comparison("neighbours", 2, features) as compared:
        compared.ring.table(TABLES_AT, TABLE)
        entries = [
            Descriptor(*place, flags, following)
            for place, flags in product(places, range(8))
            for following in ((0, 1, 2) if flags & NEXT else (0,))
        ]
        for first in entries:
            compared.ring.describe(0, first)
            for second in entries:
                compared.ring.describe(1, second)
                compared.agree(0)
                compared.agree(1)
        assert compared.chains == 2 * len(entries) ** 2


def linked(size: int) -> list[tuple[int, int]]:
    """All flags and nexts that mean different things in a table of *size*."""
    alone = [(0, 0), (WRITE, 0), (INDIRECT, 0), (INDIRECT | WRITE, 0)]
    # What is both indirect and chained is refused, wherever it would go on.
    both = [(INDIRECT | NEXT, 1), (INDIRECT | NEXT | WRITE, 1)]
    return alone + both + [(flags, following) for flags in (NEXT, NEXT | WRITE) for following in range(size + 1)]


def test_every_way_to_link_four_descriptors() -> None:
    """From head 0 all of them, from each of the others every third."""
    buffers = [(BUFFERS_AT + 64 * index, 16 + 32 * (index == 2)) for index in range(4)]
    with comparison("one region", 4, WITH_INDIRECT) as compared:
        before: tuple[tuple[int, int] | None, ...] = (None,) * 4
        for number, links in enumerate(product(linked(4), repeat=4)):
            for index, (buffer, link) in enumerate(zip(buffers, links)):
                if link != before[index]:
                    compared.ring.describe(index, Descriptor(*buffer, *link))
            before = links
            compared.agree(0)
            compared.agree(1 + number % 3)


def test_rings_of_four_descriptors_with_any_links_and_places() -> None:
    """Of all of them, which are many, every so manyth, the same ones each time."""
    places = [PLACES[index] for index in (0, 1, 3, 6, 14, 15)]
    options = list(product(places, linked(4)))
    with comparison("neighbours", 4, WITH_INDIRECT) as compared:
        compared.ring.table(TABLES_AT, TABLE)
        for number, descriptors in enumerate(sample(options, 4, 20_000)):
            for index, (place, link) in enumerate(descriptors):
                compared.ring.describe(index, Descriptor(*place, *link))
            compared.agree(number % 4)


@pytest.mark.parametrize("head", [0, 1, 2])
def test_every_place_for_each_of_a_row_of_three(head: int) -> None:
    """From heads 0 and 1 it is the short cut's row; from 2 it goes round the table's end."""
    places = [PLACES[index] for index in (0, 1, 2, 3, 5, 6, 7, 8, 11)]
    indices = [(head + step) % 4 for step in range(3)]
    with comparison("neighbours", 4, PLAIN) as compared:
        for flags in product((0, WRITE), repeat=3):
            for buffers in product(places, repeat=3):
                for step, (buffer, flag) in enumerate(zip(buffers, flags)):
                    more = NEXT if step < 2 else 0
                    compared.ring.describe(
                        indices[step], Descriptor(*buffer, flag | more, indices[(step + 1) % 3])
                    )
                compared.agree(head)


@pytest.mark.parametrize("entries", [1, 2, 3, 4])
def test_every_way_to_link_an_indirect_table(entries: int) -> None:
    with comparison("one region", 1, WITH_INDIRECT) as compared:
        for links in product(linked(entries), repeat=min(entries, 3)):
            table = [Descriptor(BUFFERS_AT + 64 * index, 16, *link) for index, link in enumerate(links)] + [
                Descriptor(BUFFERS_AT, 1, WRITE)
            ] * (entries - len(links))
            compared.ring.describe(0, compared.ring.table(TABLES_AT, table))
            compared.agree(0)


def test_every_place_for_each_of_three_in_an_indirect_table() -> None:
    places = [PLACES[index] for index in (0, 1, 2, 3, 5, 6, 7, 8, 11)]
    with comparison("neighbours", 2, WITH_INDIRECT) as compared:
        for at, (first, second) in product((TABLES_AT, HOME_END - 24), ((0, 0), (0, WRITE), (WRITE, WRITE))):
            for one, two, three in product(places, repeat=3):
                table = [
                    Descriptor(*one, first | NEXT, 1),
                    Descriptor(*two, second | NEXT, 2),
                    Descriptor(*three, WRITE),
                ]
                compared.ring.describe(1, compared.ring.table(at, table))
                compared.agree(1)


REMEMBERED = {
    "one": [Descriptor(BUFFERS_AT, 16)],
    "one, writable": [Descriptor(BUFFERS_AT, 16, WRITE)],
    "two": [Descriptor(BUFFERS_AT, 16), Descriptor(BUFFERS_AT + 64, 16, WRITE)],
    "three, one readable": [Descriptor(BUFFERS_AT + 64 * at, 16, WRITE if at else 0) for at in range(3)],
    "three, two readable": [Descriptor(BUFFERS_AT + 64 * at, 16, WRITE * (at == 2)) for at in range(3)],
    "three, elsewhere": [Descriptor(FAR + 64 * at, 16, WRITE if at else 0) for at in range(3)],
    "four": [Descriptor(BUFFERS_AT + 64 * at, 16, WRITE if at else 0) for at in range(4)],
    "a table of three": [Descriptor(TABLES_AT, 48, INDIRECT)],
    "a table of two": [Descriptor(TABLES_AT, 32, INDIRECT)],
    "a table that is a buffer": [Descriptor(TABLES_AT, 48)],
    "bad": [Descriptor(HOME_END - 8, 1 << 20)],
    "bad third": [Descriptor(BUFFERS_AT, 16, 0), *[Descriptor(HOME_END - 8, 1 << 20, WRITE)] * 2],
}


@pytest.mark.parametrize("after", REMEMBERED)
@pytest.mark.parametrize("before", REMEMBERED)
def test_what_was_decoded_before_has_no_part_in_what_is_decoded_now(before: str, after: str) -> None:
    """Every order of shapes at one head, then each descriptor of the later one changed by itself."""
    with comparison("neighbours", 8, WITH_INDIRECT) as compared:
        ring = compared.ring
        ring.table(TABLES_AT, TABLE)
        for name in (before, after, before, before, after):
            ring.chain(*REMEMBERED[name])
            compared.agree(0, name)
        for index in range(len(REMEMBERED[after])):
            ring.chain(*REMEMBERED[after])
            compared.agree(0)
            kept = ring.described(index)
            for change in (
                kept._replace(address=kept.address + 8),
                kept._replace(length=kept.length + 1),
                kept._replace(length=0),
                kept._replace(flags=kept.flags ^ WRITE),
                kept._replace(flags=kept.flags ^ NEXT),
                kept._replace(next=7),
                kept._replace(address=HOME_END),
            ):
                ring.describe(index, change)
                compared.agree(0, change)
                ring.describe(index, kept)
                compared.agree(0, kept)
        for index, entry in enumerate(TABLE):
            ring.table(TABLES_AT + 16 * index, [entry._replace(address=entry.address + 8)])
            compared.agree(0)


class Guest:
    """Random descriptors: mostly the shapes that drivers make, often with something wrong."""

    def __init__(self, random: Random, compared: Comparison) -> None:
        self.random = random
        self.ring = compared.ring
        self.size = compared.ring.layout.size
        self.starts = [HOME, HOME_END - 64, HOME - 64, HOME_END, FAR, FAR + NEXT_DOOR - 64, 0, 1 << 63]

    def buffer(self) -> tuple[int, int]:
        random = self.random
        if random.random() < 0.85:
            return BUFFERS_AT + random.randrange(0x2000), random.choice(
                (1, 16, 512, random.randrange(1, 2048))
            )
        return random.choice(self.starts) + random.randrange(64), random.choice((0, 1, 64, 128, 0xFFFF_FFFF))

    def piece(self, writable: bool) -> Descriptor:
        return Descriptor(*self.buffer(), WRITE if writable else 0)

    def pieces(self, count: int) -> list[Descriptor]:
        split = self.random.randrange(count + 1)
        return [self.piece(index >= split) for index in range(count)]

    def link(self, pieces: list[Descriptor], indices: list[int]) -> dict[int, Descriptor]:
        linked = {}
        for position, (index, piece) in enumerate(zip(indices, pieces)):
            if position + 1 < len(pieces):
                piece = piece._replace(flags=piece.flags | NEXT, next=indices[position + 1])
            linked[index] = piece
        return linked

    def spoil(self, descriptor: Descriptor, size: int) -> Descriptor:
        random = self.random
        address, length = self.buffer()
        return random.choice(
            (
                descriptor._replace(address=address),
                descriptor._replace(length=length),
                descriptor._replace(flags=descriptor.flags ^ random.choice((NEXT, WRITE, INDIRECT, 8))),
                descriptor._replace(next=random.randrange(size + 2)),
                descriptor._replace(flags=random.randrange(8)),
            )
        )

    def table(self) -> Descriptor:
        count = self.random.choice((1, 2, 3, 3, 3, 5, 12))
        at = TABLES_AT + 16 * self.random.randrange(0x100)
        if self.random.random() < 0.05:
            at = HOME_END - 16 * self.random.randrange(1, 4)
            if not self.ring.memory.contains(GuestAddress(at), 16 * count):
                return Descriptor(at, 16 * count, INDIRECT)
        entries = list(self.link(self.pieces(count), list(range(count))).values())
        if self.random.random() < 0.2:
            index = self.random.randrange(count)
            entries[index] = self.spoil(entries[index], count)
        return self.ring.table(at, entries)

    def change(self) -> None:
        """Write a new chain, or spoil a descriptor of an old one."""
        random = self.random
        kind = random.random()
        if kind < 0.25:
            index = random.randrange(self.size)
            self.ring.describe(index, self.spoil(self.ring.described(index), self.size))
            return
        count = random.choice((1, 1, 2, 3, 3, 3, 4, 7))
        start = random.randrange(self.size)
        if kind < 0.85:
            indices = [(start + step) % self.size for step in range(count)]
        else:
            indices = random.sample(range(self.size), count)
        pieces = self.pieces(count)
        if random.random() < 0.25:
            pieces[-1] = self.table()
        for index, descriptor in self.link(pieces, indices).items():
            self.ring.describe(index, descriptor)


class Model:
    """Which chains `pop_many` is to give or refuse, by the oracle."""

    def __init__(self, compared: Comparison) -> None:
        self.compared = compared
        self.offered: list[int] = []
        self.in_flight: set[int] = set()
        self.fault: Refusal | None = None

    def judge(self, head: int) -> Verdict:
        if head in self.in_flight:
            return Refusal("HeadInFlight", {"queue": 5, "head": head})
        return self.compared.oracle(head)

    def pop_many(self, limit: int) -> list[Verdict] | Refusal:
        given: list[Verdict] = []
        if self.fault:
            fault, self.fault = self.fault, None
            self.offered.pop(0)
            return fault
        for head in self.offered[:limit]:
            verdict = self.judge(head)
            if isinstance(verdict, Refusal):
                if not given:
                    self.offered.pop(0)
                    return verdict
                self.fault = verdict
                break
            given.append(verdict)
            self.in_flight.add(head)
        del self.offered[: len(given)]
        return given


@pytest.mark.parametrize("size", [8, 16, 64, 256])
@pytest.mark.parametrize("regions", REGIONS)
def test_random_rings(regions: str, size: int) -> None:
    seed = 100 * size + len(regions)
    random = Random(seed)
    chains = refused = 0
    with comparison(regions, size, WITH_INDIRECT) as compared:
        guest, model, out = Guest(random, compared), Model(compared), list[Chain]()
        for _ in range(4 * size):
            guest.change()
        turn = 0
        while chains < 8_000:
            turn += 1
            for _ in range(turn % 3):
                guest.change()
            heads = random.choices(range(size), k=min(size - len(model.offered), turn % 33))
            if turn % 20 == 0 and heads:
                heads[-1] = random.choice((size, 0xFFFF))
            model.offered += heads
            compared.ring.offer(*heads)
            limit = (1, 8, 64, 64)[turn % 4]
            expected = model.pop_many(limit)
            try:
                popped = compared.device.pop_many(limit)
            except errors.ChainError as error:
                assert refusal(error) == expected, (seed, turn)
                without_frames(error)
                refused += 1
            else:
                assert [compared.where.outcome(chain) for chain in popped] == expected, (seed, turn)
                out += popped
                chains += len(popped)
            if turn % 5:
                compared.device.push_many(out)
                out.clear()
                model.in_flight.clear()
        assert compared.device.next_available == (compared.ring.avail_idx - len(model.offered)) & 0xFFFF
    assert refused > chains // 100
