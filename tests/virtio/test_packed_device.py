"""The device's side of the packed ring, against drivers that keep to the rules and drivers that do not."""

from collections.abc import Iterator
from itertools import product
from random import Random

import pytest
from virtio.arena import BUFFERS_AT, END, ISLAND, NEIGHBOUR_AT, SEAM, TABLES_AT, VICTIM_AT, PackedArena
from virtio.packed_rings import (
    AVAIL,
    DESC,
    DISABLE,
    ENABLE,
    PACKED,
    PACKED_ALL,
    PACKED_EVENT,
    PACKED_INDIRECT,
    USED,
    Packed,
    PackedRing,
    Used,
    off_wrap,
    wrap_counter,
)
from virtio.rings import (
    INDIRECT,
    NEXT,
    WRITE,
    Refusal,
    Where,
    cost,
    memory_of,
    nothing_left,
    raised,
    refusal,
    without_frames,
)

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.region import Region
from lguestlib.virtio import errors
from lguestlib.virtio.chain import INDIRECT_MAX, Chain
from lguestlib.virtio.device_queue import new_device_queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.split_device import BATCH, SplitDeviceQueue

STEPS_MAX = 400
"""Lines of Python that judging one chain of a ring of eight may take."""

ALLOCATED_MAX = 64 << 10
"""Bytes it may allocate for that."""

TOP = 1 << 64


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


def d(address: int = BUFFERS_AT, length: int = 16, flags: int = 0) -> Packed:
    return Packed(address, length, flags)


def table_at(address: int = TABLES_AT, length: int = 16, flags: int = INDIRECT) -> Packed:
    return Packed(address, length, flags)


BIG = END - SEAM
"""Bytes of the largest region."""


class Hostile:
    """A chain of *descriptors* that breaks a rule, and the error it must end in.

    *indirect* maps addresses to tables; *position* is where the chain begins.
    """

    def __init__(
        self,
        row: str,
        error: type[errors.ChainError],
        numbers: dict[str, int],
        descriptors: list[Packed],
        indirect: dict[int, list[Packed]] | None = None,
        id: int = 0,
        features: int = PACKED_INDIRECT,
    ) -> None:
        self.row = row
        self.error = error
        self.numbers = numbers
        self.descriptors = descriptors
        self.indirect = indirect or {}
        self.id = id
        self.features = features

    def expected(self, position: int) -> Refusal:
        return Refusal(self.error.__name__, {"queue": 3, "head": position % 8, **self.numbers})

    def set_up(self, arena: PackedArena) -> int:
        """Make it available; return its position."""
        for address, descriptors in self.indirect.items():
            arena.ring.table(address, descriptors)
        return arena.ring.offer(*self.descriptors, id=self.id)


HOSTILE = [
    Hostile("p4 s3 id just past the ring", errors.BufferIdOutOfRange, {"id": 8, "size": 8}, [d()], id=8),
    Hostile("p4 s3 id as large as can be", errors.BufferIdOutOfRange, {"id": 0xFFFF, "size": 8}, [d(), d()], id=0xFFFF),
    Hostile(
        "p4 s3 id of a row of three", errors.BufferIdOutOfRange, {"id": 9, "size": 8},
        [d(), d(), d(flags=WRITE)], id=9,
    ),
    Hostile(
        "p4 s3 id of a table", errors.BufferIdOutOfRange, {"id": 8, "size": 8}, [table_at()], {TABLES_AT: [d()]}, 8
    ),
    Hostile("s4 no end", errors.DescriptorLoop, {"seen": 9}, [d()] * 7 + [d(flags=NEXT)]),
    Hostile("s5 indirect not negotiated", errors.IndirectNotNegotiated, {}, [table_at()], features=PACKED),
    Hostile(
        "s5 indirect not negotiated behind a direct one", errors.IndirectNotNegotiated, {}, [d(), table_at()],
        features=PACKED,
    ),
    Hostile("s7 indirect with next", errors.IndirectWithNext, {}, [table_at(), d()]),
    Hostile("s7 s8 indirect behind a direct one", errors.IndirectWithNext, {}, [d(), table_at()], {TABLES_AT: [d()]}),
    Hostile(
        "s7 s8 indirect at the end of three", errors.IndirectWithNext, {}, [d(), d(flags=WRITE), table_at()],
        {TABLES_AT: [d()]},
    ),
    Hostile("s9 indirect table of no bytes", errors.IndirectLength, {"length": 0}, [table_at(length=0)]),
    Hostile("s9 indirect table of part of a descriptor", errors.IndirectLength, {"length": 15}, [table_at(length=15)]),
    Hostile(
        "s9 indirect table of three and a byte", errors.IndirectLength, {"length": 49}, [table_at(length=49)]
    ),
    Hostile(
        "s11 indirect table runs into a hole", errors.BadAddress, {"address": END - 16, "length": 32},
        [table_at(END - 16, 32)],
    ),
    Hostile(
        "s11 indirect table of three runs into a hole", errors.BadAddress, {"address": END - 32, "length": 48},
        [table_at(END - 32, 48)],
    ),
    Hostile(
        "s11 indirect table nowhere", errors.BadAddress, {"address": ISLAND - 16, "length": 16},
        [table_at(ISLAND - 16)],
    ),
    Hostile(
        "s12 indirect table over the cap", errors.IndirectLength, {"length": 16 * (INDIRECT_MAX + 1)},
        [table_at(SEAM, 16 * (INDIRECT_MAX + 1))],
    ),
    Hostile(
        "s12 indirect table as long as can be", errors.IndirectLength, {"length": 0xFFFF_FFF0},
        [table_at(SEAM, 0xFFFF_FFF0)],
    ),
    Hostile("s13 readable after writable", errors.ReadableAfterWritable, {}, [d(flags=WRITE), d()]),
    Hostile(
        "s13 readable after writable in a row of three", errors.ReadableAfterWritable, {},
        [d(), d(flags=WRITE), d()],
    ),
    Hostile(
        "s13 writable first of a row of three", errors.ReadableAfterWritable, {}, [d(flags=WRITE), d(), d(flags=WRITE)]
    ),
    Hostile(
        "s13 readable after writable in a table", errors.ReadableAfterWritable, {}, [table_at(length=32)],
        {TABLES_AT: [d(flags=WRITE), d()]},
    ),
    Hostile(
        "s13 readable of no bytes after a writable of none", errors.ReadableAfterWritable, {},
        [d(length=0, flags=WRITE), d(length=0)],
    ),
    Hostile(
        "s14 cve-2020-10725 zero length at a bad address", errors.BadAddress, {"address": END + 1, "length": 0},
        [d(END + 1, 0)],
    ),
    Hostile("s14 cve-2023-5158 nothing without end", errors.DescriptorLoop, {"seen": 9},
            [d(length=0)] * 7 + [d(length=0, flags=NEXT)]),
    Hostile("s16 one byte over the end", errors.BadAddress, {"address": END - 16, "length": 17}, [d(END - 16, 17)]),
    Hostile(
        "s16 one byte before the beginning", errors.BadAddress, {"address": ISLAND - 1, "length": 2},
        [d(ISLAND - 1, 2)],
    ),
    Hostile("s16 address and length wrap", errors.BadAddress, {"address": TOP - 8, "length": 16}, [d(TOP - 8, 16)]),
    Hostile("s16 ends at the top", errors.BadAddress, {"address": TOP - 16, "length": 16}, [d(TOP - 16, 16)]),
    Hostile(
        "s16 cve-2016-7422 the longest length", errors.BadAddress, {"address": BUFFERS_AT, "length": 0xFFFF_FFFF},
        [d(length=0xFFFF_FFFF, flags=WRITE)],
    ),
    Hostile(
        "s16 bad third of a row of three", errors.BadAddress, {"address": END, "length": 1},
        [d(SEAM), d(SEAM, 16, WRITE), d(END, 1, WRITE)],
    ),
    Hostile(
        "s16 bad second of three in a table", errors.BadAddress, {"address": END - 8, "length": 16},
        [table_at(SEAM, 48)], {SEAM: [d(SEAM), d(END - 8, 16, WRITE), d(SEAM, 1, WRITE)]},
    ),
    Hostile(
        "s17 buffer crosses into a hole", errors.BadAddress, {"address": SEAM - 4, "length": BIG + 5},
        [d(SEAM - 4, BIG + 5)],
    ),
    Hostile(
        "s30 cve-2024-3446 a device's own registers", errors.BadAddress, {"address": 0xD000_0000, "length": 4},
        [d(0xD000_0000, 4, WRITE)],
    ),
    Hostile(
        "s30 cve-2021-3748 no memory at all", errors.BadAddress, {"address": 0, "length": 1 << 31}, [d(0, 1 << 31)]
    ),
]  # fmt: skip


def meet(arena: PackedArena, expected: Refusal) -> None:
    """The next chain is refused as *expected*, cheaply, with nothing touched, and life goes on."""
    before, caught = arena.content(), []
    used = cost(lambda: caught.append(raised(arena.device.pop)))
    assert [refusal(error) for error in caught] == [expected]
    assert str(caught[0]).startswith("queue 3: ")
    assert used.steps <= STEPS_MAX and used.memory <= ALLOCATED_MAX, used
    assert arena.content() == before
    arena.neighbour_works()
    arena.margins_hold()


def taken(device: PackedDeviceQueue) -> Chain:
    chain = device.pop()
    assert chain is not None
    return chain


@pytest.mark.parametrize("start", [0, 3, 7, 8, 13], ids="from {}".format)
@pytest.mark.parametrize("case", HOSTILE, ids=[case.row for case in HOSTILE])
def test_s27_a_malformed_chain_is_an_error_the_ring_goes_past_by_its_whole_length(case: Hostile, start: int) -> None:
    with PackedArena(features=case.features, position=start) as arena:
        expected = case.expected(case.set_up(arena))
        meet(arena, expected)
        assert arena.device.pop() is None and not arena.device.has_available()
        after = arena.ring.offer(d(), id=5)
        chain = taken(arena.device)
        assert chain.head == 5
        arena.device.push(chain, 0)
        # What was not returned is not passed over by what is.
        assert arena.ring.used(start) == Used(5, 0, (AVAIL | USED) * wrap_counter(start, 8))
        assert arena.device.state == QueueState(off_wrap(after + 1, 8), off_wrap(start + 1, 8))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.row) for case in HOSTILE if len(case.descriptors) < 8])
def test_s29_good_chains_before_a_malformed_one_come_first(case: Hostile) -> None:
    with PackedArena(features=case.features, position=6) as arena:
        device = arena.device
        arena.ring.offer(d(flags=WRITE), id=6)
        position = case.set_up(arena)
        [good] = device.pop_many()
        assert good.head == 6 and device.has_available()
        # What is put back comes again, and so does the error behind it.
        device.put_back([good])
        [good] = device.pop_many()
        meet(arena, case.expected(position))
        assert device.pop_many() == ()
        device.push(good, 16)
        assert arena.ring.used(6) == Used(6, 16, AVAIL | USED | WRITE)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_p1_available_means_avail_is_the_wrap_counter_and_used_is_not(size: int) -> None:
    """All four marks at each position of three laps."""
    for position in range(3 * size):
        for marks in (0, AVAIL, USED, AVAIL | USED):
            with PackedArena(size, PACKED, position) as arena:
                arena.ring.describe(position % size, d(flags=marks))
                available = AVAIL if wrap_counter(position, size) else USED
                assert arena.device.has_available() is (marks == available)
                assert arena.device.enable_notifications() is (marks == available)
                assert len(arena.device.pop_many()) == (marks == available)


def compositions(total: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut *total* into chains."""
    if total == 0:
        yield ()
    for first in range(1, total + 1):
        for rest in compositions(total - first):
            yield first, *rest


def laps(size: int, lengths: tuple[int, ...], rounds: int, random: Random) -> None:
    """Chains of these *lengths* at a time, so many *rounds*, returned in an order of chance."""
    with PackedArena(size, PACKED_EVENT) as arena:
        ring, device = arena.ring, arena.device
        used = 0
        for turn in range(rounds):
            sent = {}
            ids = random.sample(range(size), len(lengths))
            for number, length in zip(ids, lengths):
                at = ring.offer(*[d(BUFFERS_AT + 32 * step, 1 + step, WRITE) for step in range(length)], id=number)
                sent[number] = at, length
            chains = list(device.pop_many())
            assert [chain.head for chain in chains] == ids
            assert [len(chain.writable) for chain in chains] == list(lengths)
            if turn % 3 == 2:
                device.put_back(chains[len(chains) // 2 :])
                chains = chains[: len(chains) // 2] + list(device.pop_many())
            assert not device.has_available()
            random.shuffle(chains)
            for chain in chains:
                chain.written = random.randrange(chain.writable_length + 1)
            if turn % 2:
                device.push_many(chains)
            else:
                for chain in chains:
                    device.push(chain, chain.written)
            for chain in chains:
                marks = (AVAIL | USED if wrap_counter(used, size) else 0) | WRITE * (chain.written > 0)
                assert ring.used(used) == Used(chain.head, chain.written, marks), (size, lengths, turn)
                used += sent[chain.head][1]
            assert used == ring.position
            assert device.state == QueueState(off_wrap(used, size), off_wrap(used, size))


@pytest.mark.parametrize("size", range(1, 17))
def test_p2_p5_every_size_and_every_way_to_cut_a_lap_into_chains(size: int) -> None:
    """All ways for the small sizes; of the others some, and others that do not fill a lap."""
    random = Random(size)
    ways = list(compositions(size)) if size <= 6 else random.sample(list(compositions(size)), 24)
    if size > 1:
        ways += random.sample([way for part in range(1, size) for way in compositions(part)], min(16, size - 1))
    for lengths in ways:
        laps(size, lengths, 2 * size if size < 5 else 7, random)


def test_p2_a_chain_goes_round_the_end_at_every_place() -> None:
    for size, length, start in product(range(1, 8), range(1, 8), range(16)):
        if length <= size and start < 2 * size:
            with PackedArena(size, PACKED, start) as arena:
                where = Where(arena.memory)
                buffers = [(BUFFERS_AT + 64 * step, 8 + step) for step in range(length)]
                arena.ring.offer(*[d(*buffer) for buffer in buffers], id=size - 1)
                chain = taken(arena.device)
                assert where.outcome(chain).readable == tuple(buffers)
                arena.device.push(chain, 0)
                end = off_wrap(start + length, size)
                assert arena.device.state == QueueState(end, end)


def test_p4_the_id_is_the_last_descriptors() -> None:
    for length in range(1, 6):
        with PackedArena() as arena:
            ring = arena.ring
            ring.offer(*[d()] * length, id=3)
            for step in range(length - 1):
                ring.describe(step, ring.described(step)._replace(id=0xFFFF - step))
            chain = taken(arena.device)
            assert chain.head == 3
            arena.device.push(chain, 0)
            assert ring.used(0) == Used(3, 0, AVAIL | USED)


def test_p5_chains_that_come_back_in_another_order_are_told_from_the_first_place_on() -> None:
    with PackedArena() as arena:
        ring, device = arena.ring, arena.device
        for number, length in ((4, 3), (2, 1), (7, 2)):
            ring.offer(*[d(flags=WRITE)] * length, id=number)
        three, one, two = device.pop_many()
        device.push(two, 5)
        assert ring.used(0) == Used(7, 5, AVAIL | USED | WRITE)
        one.written, three.written = 0, 48
        device.push_many([one, three])
        assert ring.used(2) == Used(2, 0, AVAIL | USED)
        assert ring.used(3) == Used(4, 48, AVAIL | USED | WRITE)
        assert device.state == QueueState(6 | 1 << 15, 6 | 1 << 15)


EVENT_FLAGS = (ENABLE, DISABLE, DESC, 3, 4, 0x8000, 0xFFFF)


@pytest.mark.parametrize("features", [PACKED, PACKED_EVENT], ids=["flags", "events"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_p6_s24_an_interrupt_is_due_if_and_only_if_the_driver_has_asked_or_talks_nonsense(
    size: int, features: int
) -> None:
    """Every event structure, at every position, after every number of descriptors up to three laps."""
    offsets = [off | wrap for off in (*range(size + 2), 0x7FFF) for wrap in (0, 1 << 15)]
    for start, moved in product(range(2 * size), range(1, 3 * size + 1)):
        with PackedArena(size, features, start) as arena:
            ring, device = arena.ring, arena.device
            device.should_interrupt()
            for event in product(offsets, EVENT_FLAGS):
                begin = ring.position
                while ring.position < begin + moved:
                    ring.offer(d())
                    device.push(taken(device), 0)
                ring.driver_event = event
                passed = event[0] in {off_wrap(at, size) for at in range(begin, begin + moved)}
                nonsense = event[1] > DESC or event[1] == DESC and (
                    features == PACKED or event[0] & 0x7FFF >= size
                )  # fmt: skip
                due = event[1] == ENABLE or nonsense or event[1] == DESC and passed
                assert device.should_interrupt() is due, (begin, moved, event)
                assert not device.should_interrupt()


def test_p6_the_device_asks_by_position_where_it_may_and_by_flag_else() -> None:
    for position in range(16):
        for features in (PACKED, PACKED_EVENT):
            with PackedArena(features=features, position=position) as arena:
                ring, device = arena.ring, arena.device
                ring.device_event = (0x1234, 0x5678)
                device.disable_notifications()
                assert ring.device_event == (0x1234, DISABLE)
                assert not device.enable_notifications()
                asked = (off_wrap(position, 8), DESC) if features == PACKED_EVENT else (0x1234, ENABLE)
                assert ring.device_event == asked


def test_s22_enabling_notifications_tells_of_what_came_meanwhile() -> None:
    for position in (0, 7, 8, 15):
        with PackedArena(position=position) as arena:
            assert not arena.device.enable_notifications()
            arena.ring.offer(d())
            assert arena.device.enable_notifications()


def test_s24_after_a_restore_the_driver_is_told_once_whatever_it_asked() -> None:
    with PackedArena() as arena:
        arena.ring.driver_event = (0, DISABLE)
        assert not arena.device.should_interrupt()
        for state in (QueueState(1 << 15, 1 << 15), QueueState(5, 5)):
            arena.device.release()
            arena.device = PackedDeviceQueue(arena.ring.layout, arena.memory, PACKED_ALL, state)
            assert [arena.device.should_interrupt() for _ in range(3)] == [True, False, False]


def test_p7_the_entries_of_an_indirect_table_follow_each_other_whatever_their_flags() -> None:
    """Only WRITE means anything there, and nothing on the descriptor that names the table (S6, S10)."""
    for count, noise in product(range(1, 6), (0, NEXT, INDIRECT, AVAIL, USED, 0xFFFD)):
        with PackedArena() as arena:
            entries = [
                Packed(BUFFERS_AT + 64 * step, 8 + step, noise | WRITE * (step > 0), 0xFFF0 | step)
                for step in range(count)
            ]
            table = arena.ring.table(TABLES_AT, entries)
            arena.ring.offer(table._replace(flags=INDIRECT | WRITE * (count % 2)), id=6)
            chain = taken(arena.device)
            found = Where(arena.memory).outcome(chain)
            assert found.readable + found.writable == tuple((entry.address, entry.length) for entry in entries)
            assert len(found.readable) == 1
            arena.device.push(chain, 0)
            assert arena.device.state == QueueState(1 | 1 << 15, 1 | 1 << 15)


@pytest.mark.parametrize("entries", [64, 515, INDIRECT_MAX])
def test_s12_an_indirect_table_longer_than_the_ring(entries: int) -> None:
    with PackedArena() as arena:
        arena.ring.offer(arena.ring.table(SEAM, [d(length=1)] * entries))
        assert taken(arena.device).readable_length == entries


def test_s11_s17_a_table_and_a_buffer_across_two_regions() -> None:
    with PackedArena() as arena:
        arena.ring.offer(arena.ring.table(SEAM - 24, [d(SEAM - 4, 8), d(SEAM, 8, WRITE), d(SEAM, 1, WRITE)]))
        found = Where(arena.memory).outcome(taken(arena.device))
        assert found.readable == ((SEAM - 4, 4), (SEAM, 4)) and found.writable == ((SEAM, 8), (SEAM, 1))


def test_s14_descriptors_of_no_length_are_skipped_but_counted() -> None:
    with PackedArena() as arena:
        arena.ring.offer(*[d(length=0)] * 7, d(length=3), id=1)
        chain = taken(arena.device)
        assert [len(view) for view in chain.readable] == [3]
        arena.device.push(chain, 0)
        assert arena.device.state == QueueState(0, 0)


@pytest.mark.parametrize("indirect", [False, True])
def test_s15_lengths_may_add_up_to_what_a_used_length_can_tell_and_no_more(indirect: bool) -> None:
    third = 0x5555_5555
    with GuestMemory([Region.memfd(GuestAddress(0), 0x6000_0000)]) as memory:
        layout = QueueLayout.contiguous(3, 8, GuestAddress(VICTIM_AT))
        ring = PackedRing(memory, layout)
        device = PackedDeviceQueue(layout, memory, PACKED_INDIRECT)
        for extra in (0, 1):
            row = [d(0, third), d(0, third, WRITE), d(0, third + extra, WRITE)]
            at = ring.offer(*([ring.table(TABLES_AT, row)] if indirect else row), id=2)
            if extra:
                expected = {"queue": 3, "head": at, "length": 1 << 32}
                assert refusal(raised(device.pop)) == ("ChainTooLong", expected)
            else:
                chain = taken(device)
                assert (chain.readable_length, chain.writable_length) == (third, 2 * third)
                device.push(chain, 0)
        ring.release()
        device.release()


def test_s16_the_exact_end_is_legal() -> None:
    with PackedArena() as arena:
        arena.ring.offer(d(END - 16, 16), d(ISLAND, 16, WRITE))
        assert taken(arena.device).readable_length == 16


IN_A_ROW = [d(SEAM), d(SEAM, flags=WRITE), d(SEAM, 1, WRITE)]
"""In the largest region, which the short cuts are for."""


@pytest.mark.parametrize(
    ("descriptors", "number"),
    [([d()], 2), ([d(), d(flags=WRITE)], 2), ([d(), d(), d(flags=WRITE)], 2), ([d(SEAM)], 2), (IN_A_ROW, 2)],
)
def test_s29_p4_an_id_made_available_while_in_flight(descriptors: list[Packed], number: int) -> None:
    with PackedArena() as arena:
        arena.ring.offer(d(flags=WRITE), id=number)
        chain = taken(arena.device)
        at = arena.ring.offer(*descriptors, id=number)
        meet(arena, Refusal("BufferIdInFlight", {"queue": 3, "head": at, "id": number}))
        assert chain.in_flight and chain.writable_length == 16
        arena.device.push(chain, 1)
        arena.ring.offer(d(), id=number)
        assert taken(arena.device) is chain


@pytest.mark.parametrize("address", [BUFFERS_AT, SEAM], ids=["", "in the largest region"])
@pytest.mark.parametrize("returned", [False, True], ids=["", "returned"])
def test_s29_an_id_twice_in_one_batch(returned: bool, address: int) -> None:
    """Whether or not it was returned meanwhile: it was in flight when it was looked at."""
    with PackedArena() as arena:
        for number in (1, 2, 1, 3):
            arena.ring.offer(d(address), id=number)
        chains = arena.device.pop_many()
        assert [chain.head for chain in chains] == [1, 2]
        if returned:
            arena.device.push_many(chains)
        meet(arena, Refusal("BufferIdInFlight", {"queue": 3, "head": 2, "id": 1}))
        assert [chain.head for chain in arena.device.pop_many()] == [3]


def test_p7_a_table_that_a_short_cut_would_take_is_refused_where_it_is_not_negotiated_or_is_chained() -> None:
    for features, flags, refusal_ in (
        (PACKED, INDIRECT, Refusal("IndirectNotNegotiated", {"queue": 3, "head": 0})),
        (PACKED_INDIRECT, INDIRECT | NEXT, Refusal("IndirectWithNext", {"queue": 3, "head": 0})),
    ):
        with PackedArena(features=features) as arena:
            arena.ring.table(SEAM + 0x100, IN_A_ROW)
            row = [table_at(SEAM + 0x100, 48, flags), d(SEAM)][: 1 + bool(flags & NEXT)]
            arena.ring.offer(*row, id=7)
            meet(arena, refusal_)


@pytest.mark.parametrize("indirect", [False, True])
def test_s28_nor_can_those_that_a_short_cut_would_take(indirect: bool) -> None:
    free = 0 if indirect else 2
    with PackedArena(8, position=4) as arena:
        for number in range(4 - free // 2):
            arena.ring.offer(d(SEAM), d(SEAM), id=number)
        assert len(arena.device.pop_many()) == 4 - free // 2
        descriptors = [arena.ring.table(SEAM + 0x100, IN_A_ROW)] if indirect else IN_A_ROW
        at = arena.ring.offer(*descriptors, id=7) % 8
        meet(arena, Refusal("RingOverrun", {"queue": 3, "head": at, "slots": len(descriptors), "free": free}))


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_s28_descriptors_that_are_in_flight_cannot_be_available(length: int) -> None:
    """A ring that says so is told, once for each chain, and never spins."""
    with PackedArena(6, PACKED) as arena:
        arena.ring.offer(d(), d(), id=0)
        arena.ring.offer(d(), d(), id=1)
        held = arena.device.pop_many()
        assert len(held) == 2
        at = arena.ring.offer(*[d()] * length, id=2)
        if length <= 2:
            assert taken(arena.device).head == 2
        else:
            meet(arena, Refusal("RingOverrun", {"queue": 3, "head": at, "slots": length, "free": 2}))
            assert arena.device.pop() is None
        # A ring all in flight.
        for number in (3, 4, 5):
            arena.ring.offer(d(), id=number)
        while True:
            try:
                if not arena.device.pop_many():
                    break
            except errors.RingOverrun as error:
                without_frames(error)
        assert not arena.device.has_available()


def test_s28_cve_2016_5403_no_more_is_ever_in_flight_than_the_ring_is_long() -> None:
    random = Random(28)
    with PackedArena(5, PACKED) as arena:
        held: list[Chain] = []
        for _ in range(500):
            arena.ring.offer(*[d()] * random.randrange(1, 4), id=random.randrange(5))
            try:
                held += arena.device.pop_many()
            except errors.ChainError as error:
                without_frames(error)
            assert sum(chain.slots for chain in held) <= 5
            if random.random() < 0.2 and held:
                arena.device.push(held.pop(random.randrange(len(held))), 0)


def test_s34_cve_2019_3900_an_endless_supply_is_taken_in_batches() -> None:
    with PackedArena(220, PACKED) as arena:
        for number in range(200):
            arena.ring.offer(d(), id=number)
        batches = []
        while chains := arena.device.pop_many():
            batches.append(len(chains))
        assert batches == [BATCH, BATCH, BATCH, 200 - 3 * BATCH]


def test_s34_how_far_is_looked_is_by_how_many_are_asked_for() -> None:
    size = 8192
    with memory_of((0, 0x40000)) as memory:
        layout = QueueLayout.contiguous(3, size, GuestAddress(0))
        ring = PackedRing(memory, layout)
        for number in range(size):
            ring.offer(d(0x30000), id=number)
        device = PackedDeviceQueue(layout, memory, PACKED)
        assert cost(lambda: device.pop_many(2)).memory < size
        assert device.state == QueueState(1 << 15 | 2, 1 << 15)
        device.release()
        ring.release()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_half_of_what_the_driver_has_out_can_be_asked_for_the_last_half_included(length: int) -> None:
    """It has 32 out, and sends again what came back while the device is at the other half."""
    with PackedArena(100, PACKED) as arena:
        ring, device = arena.ring, arena.device
        for number in range(32):
            ring.offer(*[d()] * length, id=number)
        first = device.pop_many(64, half=True)
        assert len(first) == 16
        for _ in range(20):
            device.push_many(first)
            second = device.pop_many(64, half=True)
            assert len(second) == 16
            for chain in first:
                ring.offer(*[d()] * length, id=chain.head)
            first = second
        device.push_many(first)
        left = []
        while chains := device.pop_many(64, half=True):
            left.append(len(chains))
        assert left == [16]
        ring.offer(*[d()] * length, id=50)
        assert len(device.pop_many(64, half=True)) == 1


def test_s19_cve_2024_8612_no_more_is_reported_used_than_was_offered() -> None:
    with PackedArena() as arena:
        ring, device = arena.ring, arena.device
        for number in range(4):
            ring.offer(d(length=1, flags=WRITE), id=number)
        chains = device.pop_many()
        for written in (-1, 2, 1 << 32, 1 << 64):
            before = arena.content()
            assert isinstance(raised(lambda: device.push(chains[0], written)), errors.UsedLengthError)
            assert arena.content() == before and chains[0].in_flight
        for chain, written in zip(chains, (1, 0, 2, 1)):
            chain.written = written
        assert isinstance(raised(lambda: device.push_many(chains)), errors.UsedLengthError)
        assert ring.used(0) == Used(0, 1, AVAIL | USED | WRITE) and ring.used(1) == Used(1, 0, AVAIL | USED)
        assert ring.used(2) is None
        assert isinstance(raised(lambda: device.push(chains[0], 0)), errors.NotInFlight)
        chains[2].written = 1
        device.push_many(chains[2:])
        assert ring.used(3) == Used(3, 1, AVAIL | USED | WRITE)


def test_s30_buffers_in_the_ring_are_the_drivers_own_loss() -> None:
    with PackedArena() as arena:
        arena.ring.offer(d(VICTIM_AT, 256, WRITE))
        chain = taken(arena.device)
        chain.write(b"\xff" * 256)
        arena.device.push(chain, 256)
        arena.neighbour_works()
        arena.ring.offer(d(NEIGHBOUR_AT - 16, 16))


def test_s32_a_ring_that_cannot_be_is_refused_and_nothing_kept() -> None:
    good = QueueLayout(0, 7, GuestAddress(0x1000), GuestAddress(0x2000), GuestAddress(0x3000))
    with GuestMemory.anonymous(0x10000) as memory:
        PackedDeviceQueue(good, memory, PACKED).release()
        for bad, part in (
            (good.__class__(0, 0, *_places(good)), "size"),
            (good.__class__(0, 32769, *_places(good)), "size"),
            (good.__class__(0, 7, GuestAddress(0x1008), good.available, good.used), "descriptor ring"),
            (good.__class__(0, 7, GuestAddress(0xFFA0), good.available, good.used), "descriptor ring"),
            (good.__class__(0, 7, good.descriptors, GuestAddress(0x2002), good.used), "driver event structure"),
            (good.__class__(0, 7, good.descriptors, GuestAddress(0x10000), good.used), "driver event structure"),
            (good.__class__(0, 7, good.descriptors, good.available, GuestAddress(0x3001)), "device event structure"),
            (good.__class__(0, 7, good.descriptors, good.available, GuestAddress(1 << 30)), "device event structure"),
        ):
            error = raised(lambda: PackedDeviceQueue(bad, memory, PACKED))
            assert isinstance(error, errors.QueueLayoutError) and error.part == part


def _places(layout: QueueLayout) -> tuple[GuestAddress, GuestAddress, GuestAddress]:
    return layout.descriptors, layout.available, layout.used


@pytest.mark.parametrize("size", [1, 5, 8, 32768])
def test_p8_t15_the_state_is_two_positions_and_one_the_ring_has_not_is_refused(size: int) -> None:
    layout = QueueLayout.contiguous(0, size, GuestAddress(0))
    with GuestMemory.anonymous(1 << 20) as memory:
        for available, used in product({0, size - 1, min(size, 0x7FFF), 0x7FFF}, repeat=2):
            for wraps in product((0, 1 << 15), repeat=2):
                state = QueueState(available | wraps[0], used | wraps[1])
                if max(available, used) >= size:
                    error = raised(lambda: PackedDeviceQueue(layout, memory, PACKED, state))
                    assert isinstance(error, errors.QueueStateError)
                    continue
                memory.write(GuestAddress(14), USED.to_bytes(2, "little"))
                device = PackedDeviceQueue(layout, memory, PACKED, state)
                assert device.state == state
                base = device.state.base
                assert base == available | wraps[0] | (used | wraps[1]) << 16
                assert QueueState.from_base(base) == state
                device.release()


def test_p8_zeros_for_a_ring_that_was_never_used_are_a_new_ring() -> None:
    """User-mode Linux begins every ring at base 0.  A ring in use has, at that place, a used element somewhere."""
    for size in range(1, 6):
        for lengths in compositions(size):
            with PackedArena(size, PACKED) as arena:
                ring = arena.ring
                for number, length in enumerate(lengths):
                    ring.offer(*[d()] * length, id=number)
                arena.device.release()
                # Not served yet: the chains are there when the device comes.
                zeros = QueueState.from_base(0)
                device = arena.device = PackedDeviceQueue(ring.layout, arena.memory, PACKED, zeros)
                chains = device.pop_many()
                assert len(chains) == len(lengths)
                device.push_many(chains)
                assert device.state == zeros
                device.release()
                again = arena.device = PackedDeviceQueue(ring.layout, arena.memory, PACKED, zeros)
                assert not again.has_available()
                for number, length in enumerate(lengths):
                    ring.offer(*[d()] * length, id=number)
                assert len(again.pop_many()) == len(lengths)
                again.release()
                once = arena.device = PackedDeviceQueue(ring.layout, arena.memory, PACKED, zeros)
                assert len(once.pop_many()) == len(lengths)


def test_a_queue_goes_on_from_the_state_of_another_at_any_moment() -> None:
    random = Random(8)
    for size in (1, 3, 4, 7):
        with PackedArena(size, PACKED_ALL) as arena:
            ring = arena.ring
            done = 0
            free = list(range(size))
            for turn in range(200):
                room = size - (ring.position - done)
                length = random.randrange(1, 3)
                if length <= room:
                    ring.offer(*[d()] * length, id=free.pop())
                chains = list(arena.device.pop_many(random.randrange(1, 4)))
                kept = random.randrange(len(chains) + 1)
                arena.device.put_back(chains[kept:])
                arena.device.push_many(chains[:kept])
                for chain in chains[:kept]:
                    element = ring.used(done)
                    assert element is not None and element.id == chain.head
                    done += chain.slots
                    free.append(chain.head)
                state = arena.device.state
                arena.device.release()
                arena.device = PackedDeviceQueue(ring.layout, arena.memory, PACKED_ALL, state)
            assert done > 50


def test_the_features_say_which_ring_it_is() -> None:
    layout = QueueLayout.contiguous(0, 8, GuestAddress(0))
    with GuestMemory.anonymous(4096) as memory:
        for features, kind in ((0, SplitDeviceQueue), (Feature.RING_PACKED, PackedDeviceQueue)):
            queue = new_device_queue(layout, memory, int(features))
            assert type(queue) is kind and queue.state == QueueState.start(features)
            queue.release()
        error = raised(lambda: new_device_queue(layout, memory, 0, QueueState(0, 1)))
        assert isinstance(error, errors.QueueStateError)


def test_y4_a_released_queue_keeps_no_view_though_it_has_an_error_to_tell() -> None:
    with PackedArena() as arena:
        arena.ring.offer(d())
        arena.ring.offer(d(END, 1), id=1)
        assert len(arena.device.pop_many()) == 1


def test_random_bytes_end_in_typed_errors_after_bounded_work() -> None:
    """A ring of noise, again and again: chains, or errors that name them, and never a ring that stands still."""
    random = Random(9)
    seen = set()
    for _ in range(400):
        size = random.randrange(1, 12)
        with PackedArena(size, PACKED_ALL, random.randrange(2 * size)) as arena:
            device = arena.device
            arena.memory.write(GuestAddress(VICTIM_AT), random.randbytes(16 * size))
            for index in range(size):
                if random.random() < 0.7:
                    flags = random.choice((0, NEXT, WRITE, INDIRECT, NEXT | WRITE)) | random.choice((AVAIL, USED))
                    place = BUFFERS_AT + random.randrange(64), random.choice((0, 16, 48))
                    arena.ring.describe(index, Packed(*place, flags, random.randrange(size + 1)))
            arena.ring.driver_event = random.randrange(1 << 16), random.randrange(4)
            chains: list[Chain] = []
            # Each answer goes past a descriptor at least, and the marks are right for one lap only.
            for _ in range(3 * size + 1):
                try:
                    found = device.pop_many(random.randrange(1, 5), half=random.random() < 0.5)
                    if not found:
                        break
                    chains += found
                except errors.ChainError as error:
                    seen.add(type(error).__name__)
                    without_frames(error)
            else:
                raise AssertionError("it goes on for ever")
            for chain in chains:
                chain.written = chain.writable_length
            device.push_many(chains)
            assert device.should_interrupt() in (True, False)
            arena.neighbour_works()
            arena.margins_hold()
    assert seen >= {
        "BadAddress", "DescriptorLoop", "BufferIdOutOfRange", "BufferIdInFlight", "IndirectWithNext",
        "ReadableAfterWritable",
    }  # fmt: skip
