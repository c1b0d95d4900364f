"""The device's side of the split ring, against drivers that keep to the rules and drivers that do not."""

import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from types import FrameType
from typing import Any

import pytest
from virtio.arena import BUFFERS_AT, END, ISLAND, NEIGHBOUR_AT, SEAM, TABLES_AT, VICTIM_AT, Arena
from virtio.rings import (
    ALL_FEATURES,
    INDIRECT,
    NEXT,
    PAGE,
    PLAIN,
    WITH_EVENT,
    WITH_INDIRECT,
    WRITE,
    Descriptor,
    Oracle,
    Outcome,
    Refusal,
    Ring,
    Verdict,
    Where,
    cost,
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
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
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


def d(address: int = BUFFERS_AT, length: int = 16, flags: int = 0, following: int = 0) -> Descriptor:
    return Descriptor(address, length, flags, following)


BIG = END - SEAM
"""Bytes of the largest region."""


class Hostile:
    """A chain that breaks a rule, and the error it must end in.

    *table* maps indices to descriptors, *indirect* addresses to tables.
    """

    def __init__(
        self,
        row: str,
        error: type[errors.ChainError],
        numbers: dict[str, int],
        table: dict[int, Descriptor],
        head: int = 0,
        indirect: dict[int, list[Descriptor]] | None = None,
        features: int = WITH_INDIRECT,
    ) -> None:
        self.row = row
        self.expected = Refusal(error.__name__, {"queue": 3, "head": head, **numbers})
        self.table = table
        self.head = head
        self.indirect = indirect or {}
        self.features = features

    def set_up(self, arena: Arena) -> None:
        for index, descriptor in self.table.items():
            arena.ring.describe(index, descriptor)
        for address, descriptors in self.indirect.items():
            arena.ring.table(address, descriptors)


def table_at(
    address: int = TABLES_AT, length: int = 16, flags: int = INDIRECT, following: int = 0
) -> Descriptor:
    return Descriptor(address, length, flags, following)


LOOP_OF_SEVEN = {index: d(flags=NEXT, following=(index + 1) % 7) for index in range(7)}

GOOD = 7
"""The index that no hostile chain uses."""

HOSTILE = [
    Hostile("s3 head just past the table", errors.HeadOutOfRange, {"size": 8}, {}, head=8),
    Hostile("s3 head as large as can be", errors.HeadOutOfRange, {"size": 8}, {}, head=0xFFFF),
    Hostile(
        "s3 next just past the table",
        errors.NextOutOfRange,
        {"next": 8, "size": 8},
        {0: d(flags=NEXT, following=8)},
    ),
    Hostile(
        "s3 next as large as can be",
        errors.NextOutOfRange,
        {"next": 0xFFFF, "size": 8},
        {5: d(flags=NEXT, following=6), 6: d(flags=NEXT, following=0xFFFF)},
        head=5,
    ),
    Hostile(
        "s3 next past the indirect table but not past the ring",
        errors.NextOutOfRange,
        {"next": 2, "size": 2},
        {1: table_at(length=32)},
        1,
        {TABLES_AT: [d(flags=NEXT, following=1), d(flags=NEXT, following=2)]},
    ),
    Hostile("s4 loop of one", errors.DescriptorLoop, {"seen": 9}, {0: d(flags=NEXT)}),
    Hostile("s4 loop of many", errors.DescriptorLoop, {"seen": 9}, LOOP_OF_SEVEN, head=3),
    Hostile(
        "s4 loop behind a good start",
        errors.DescriptorLoop,
        {"seen": 9},
        {0: d(flags=NEXT, following=1), 1: d(flags=NEXT, following=2), 2: d(flags=NEXT, following=1)},
    ),
    Hostile(
        "s4 loop in an indirect table counts its entries",
        errors.DescriptorLoop,
        {"seen": 3},
        {0: table_at(length=32)},
        0,
        {TABLES_AT: [d(flags=NEXT, following=1), d(flags=NEXT, following=0)]},
    ),
    Hostile("s5 indirect not negotiated", errors.IndirectNotNegotiated, {}, {0: table_at()}, features=PLAIN),
    Hostile(
        "s5 indirect not negotiated behind a direct one",
        errors.IndirectNotNegotiated,
        {},
        {0: d(flags=NEXT, following=1), 1: table_at()},
        features=PLAIN,
    ),
    Hostile(
        "s6 indirect inside indirect",
        errors.NestedIndirect,
        {},
        {0: table_at()},
        0,
        {TABLES_AT: [table_at(TABLES_AT + 64)], TABLES_AT + 64: [d()]},
    ),
    Hostile(
        "s6 an indirect table that names itself",
        errors.NestedIndirect,
        {},
        {0: table_at()},
        0,
        {TABLES_AT: [table_at()]},
    ),
    Hostile(
        "s7 indirect with next",
        errors.IndirectWithNext,
        {},
        {0: table_at(flags=INDIRECT | NEXT, following=1)},
    ),
    Hostile("s9 indirect table of no bytes", errors.IndirectLength, {"length": 0}, {0: table_at(length=0)}),
    Hostile(
        "s9 indirect table of part of a descriptor",
        errors.IndirectLength,
        {"length": 15},
        {0: table_at(length=15)},
    ),
    Hostile(
        "s9 indirect table of a descriptor and a byte",
        errors.IndirectLength,
        {"length": 17},
        {0: table_at(length=17)},
    ),
    Hostile(
        "s11 indirect table runs into a hole",
        errors.BadAddress,
        {"address": END - 16, "length": 32},
        {0: table_at(END - 16, 32)},
    ),
    Hostile(
        "s11 indirect table nowhere",
        errors.BadAddress,
        {"address": ISLAND - 16, "length": 16},
        {0: table_at(ISLAND - 16)},
    ),
    Hostile(
        "s12 indirect table over the cap",
        errors.IndirectLength,
        {"length": 16 * (INDIRECT_MAX + 1)},
        {0: table_at(SEAM, 16 * (INDIRECT_MAX + 1))},
    ),
    Hostile(
        "s12 indirect table as long as can be",
        errors.IndirectLength,
        {"length": 0xFFFF_FFF0},
        {0: table_at(SEAM, 0xFFFF_FFF0)},
    ),
    Hostile(
        "s13 readable after writable",
        errors.ReadableAfterWritable,
        {},
        {0: d(flags=WRITE | NEXT, following=1), 1: d()},
    ),
    Hostile(
        "s13 readable after writable in a row of three",
        errors.ReadableAfterWritable,
        {},
        {0: d(flags=NEXT, following=1), 1: d(flags=WRITE | NEXT, following=2), 2: d()},
    ),
    Hostile(
        "s13 readable in a table after a direct writable",
        errors.ReadableAfterWritable,
        {},
        {0: d(flags=WRITE | NEXT, following=1), 1: table_at()},
        0,
        {TABLES_AT: [d()]},
    ),
    Hostile(
        "s13 readable of no bytes after a writable of none",
        errors.ReadableAfterWritable,
        {},
        {0: d(length=0, flags=WRITE | NEXT, following=1), 1: d(length=0)},
    ),
    Hostile(
        "s14 cve-2020-10725 zero length at a bad address",
        errors.BadAddress,
        {"address": END + 1, "length": 0},
        {0: d(END + 1, 0)},
    ),
    Hostile(
        "s14 cve-2016-6490 cve-2023-5158 a loop of nothing",
        errors.DescriptorLoop,
        {"seen": 9},
        {0: d(length=0, flags=NEXT | WRITE, following=0)},
    ),
    Hostile(
        "s14 cve-2023-5158 a loop of nothing in an indirect table",
        errors.DescriptorLoop,
        {"seen": 2},
        {0: table_at()},
        0,
        {TABLES_AT: [d(length=0, flags=NEXT)]},
    ),
    Hostile(
        "s16 one byte over the end",
        errors.BadAddress,
        {"address": END - 16, "length": 17},
        {0: d(END - 16, 17)},
    ),
    Hostile(
        "s16 one byte before the beginning",
        errors.BadAddress,
        {"address": ISLAND - 1, "length": 2},
        {0: d(ISLAND - 1, 2)},
    ),
    Hostile(
        "s16 address and length wrap",
        errors.BadAddress,
        {"address": TOP - 8, "length": 16},
        {0: d(TOP - 8, 16)},
    ),
    Hostile(
        "s16 ends at the top", errors.BadAddress, {"address": TOP - 16, "length": 16}, {0: d(TOP - 16, 16)}
    ),
    Hostile(
        "s16 cve-2016-7422 the longest length",
        errors.BadAddress,
        {"address": BUFFERS_AT, "length": 0xFFFF_FFFF},
        {0: d(length=0xFFFF_FFFF, flags=WRITE)},
    ),
    Hostile(
        "s16 bad third of a row of three",
        errors.BadAddress,
        {"address": END, "length": 1},
        {0: d(SEAM, 16, NEXT, 1), 1: d(SEAM, 16, NEXT | WRITE, 2), 2: d(END, 1, WRITE)},
    ),
    Hostile(
        "s16 bad second of a row of three in a table",
        errors.BadAddress,
        {"address": END - 8, "length": 16},
        {0: table_at(SEAM, 48)},
        0,
        {SEAM: [d(SEAM, 16, NEXT, 1), d(END - 8, 16, NEXT | WRITE, 2), d(SEAM, 1, WRITE)]},
    ),
    Hostile(
        "s17 buffer crosses into a hole",
        errors.BadAddress,
        {"address": SEAM - 4, "length": BIG + 5},
        {0: d(SEAM - 4, BIG + 5)},
    ),
    Hostile(
        "s30 cve-2024-3446 a device's own registers",
        errors.BadAddress,
        {"address": 0xD000_0000, "length": 4},
        {0: d(0xD000_0000, 4, WRITE)},
    ),
    Hostile(
        "s30 cve-2021-3748 no memory at all",
        errors.BadAddress,
        {"address": 0, "length": 1 << 31},
        {0: d(0, 1 << 31)},
    ),
]


def meet(arena: Arena, expected: Refusal) -> None:
    """The next chain is refused as *expected*, cheaply, with nothing touched, and life goes on."""
    before, caught = arena.content(), []
    used = cost(lambda: caught.append(raised(arena.device.pop)))
    assert [refusal(error) for error in caught] == [expected]
    assert str(caught[0]).startswith("queue 3: ")
    assert used.steps <= STEPS_MAX and used.memory <= ALLOCATED_MAX, used
    assert arena.content() == before
    arena.neighbour_works()
    arena.margins_hold()


@pytest.mark.parametrize("behind", [False, True], ids=["alone", "behind a good one"])
@pytest.mark.parametrize("case", HOSTILE, ids=[case.row for case in HOSTILE])
def test_s27_a_malformed_chain_is_an_error_the_ring_goes_past(case: Hostile, behind: bool) -> None:
    with Arena(features=case.features) as arena:
        ring, device = arena.ring, arena.device
        case.set_up(arena)
        ring.describe(GOOD, d(length=5, flags=WRITE))
        if behind:
            ring.offer(GOOD, case.head)
            chains = device.pop_many()
            assert [chain.head for chain in chains] == [GOOD]
            device.push(chains[0], 0)
        else:
            ring.offer(case.head)
        meet(arena, case.expected)
        assert device.next_available == ring.avail_idx
        assert not device.enable_notifications() and not device.pop_many()
        ring.offer(GOOD)
        chain = device.pop()
        assert chain is not None and chain.writable_length == 5
        device.push(chain, 5)
        assert ring.used(ring.used_idx - 1) == (GOOD, 5)


def test_s27_a_ring_full_of_malformed_chains_is_as_many_errors_and_then_empty() -> None:
    with Arena() as arena:
        arena.ring.offer(*range(100, 108))
        for head in range(100, 108):
            meet(arena, Refusal("HeadOutOfRange", {"queue": 3, "head": head, "size": 8}))
        assert arena.device.pop_many() == ()


@pytest.mark.parametrize("size", [1, 2, 8, 128])
def test_s1_indices_run_past_65535(size: int) -> None:
    start = 0xFFFF - size // 2
    with Arena(size, next_available=start) as arena:
        ring, device = arena.ring, arena.device
        ring.used_idx = 0xFFFE
        device.release()
        device = arena.device = arena.new_device(ALL_FEATURES, start)
        for head in range(size):
            ring.describe(head, d(flags=WRITE, length=head + 1))
        used = 0xFFFE
        for turn in range(5):
            heads = [(7 * turn + head) % size for head in range(size)]
            ring.offer(*heads)
            popped = [chain for limit in (size // 2, size) for chain in device.pop_many(limit)]
            assert [chain.head for chain in popped] == heads
            for chain in popped:
                chain.written = chain.writable_length
            device.push_many(popped[:1])
            device.push_many(popped[1:])
            assert [ring.used(used + index) for index in range(size)] == [(head, head + 1) for head in heads]
            used += size
            assert ring.used_idx == used & 0xFFFF
        assert device.next_available == ring.avail_idx == start + 5 * size & 0xFFFF


@pytest.mark.parametrize("start", [0, 5, 0xFFFC])
@pytest.mark.parametrize("ahead", [9, 10, 0x7FFF, 0x8000, 0xFFFF])
def test_s2_s28_cve_2016_5403_an_impossible_avail_index_breaks_the_queue_for_good(
    start: int, ahead: int
) -> None:
    with Arena(next_available=start) as arena:
        ring, device = arena.ring, arena.device
        ring.describe(0, d())
        for _ in range(3):
            ring.avail_idx = start + ahead
            expected = {"queue": 3, "index": start + ahead & 0xFFFF, "last": start, "size": 8}
            meet(arena, Refusal("AvailIndexError", expected))
            for believable in (start, start + 1, start + 8):
                ring.avail_idx = believable
                meet(arena, Refusal("AvailIndexError", expected))
        assert device.next_available == start and ring.used_idx == 0


def test_s2_the_whole_queue_at_once_is_possible() -> None:
    with Arena(next_available=0xFFFC) as arena:
        for head in range(8):
            arena.ring.describe(head, d())
        arena.ring.offer(*range(8))
        assert [chain.head for chain in arena.device.pop_many()] == list(range(8))


def test_half_of_what_the_driver_has_out_can_be_asked_for_the_last_half_included() -> None:
    with Arena(next_available=0xFFFC) as arena:
        device = arena.device

        def popped() -> list[int]:
            return [chain.head for chain in device.pop_many(half=True)]

        for head in range(8):
            arena.ring.describe(head, d())
        arena.ring.offer(*range(7))
        assert popped() == [0, 1, 2, 3]
        # The others are the other half: nothing is made smaller and smaller.
        assert popped() == [4, 5, 6]
        assert popped() == []
        arena.ring.offer(7)
        assert popped() == [7]


def test_a_half_is_of_what_there_is_alone_when_the_ring_has_been_empty() -> None:
    with Arena(next_available=0) as arena:
        for head in range(8):
            arena.ring.describe(head, d())
        arena.ring.offer(0, 1, 2, 3)
        assert len(arena.device.pop_many(half=True)) == 2
        assert len(arena.device.pop_many(half=True)) == 2
        assert not arena.device.pop_many(half=True)
        arena.ring.offer(4, 5, 6, 7)
        assert len(arena.device.pop_many(1, half=True)) == 1
        assert len(arena.device.pop_many(half=True)) == 2


def test_a_look_finds_what_a_pop_would() -> None:
    with Arena(next_available=0xFFFF) as arena:
        assert not arena.device.has_available()
        arena.ring.describe(0, d())
        arena.ring.offer(0)
        assert arena.device.has_available()
        arena.device.pop()
        assert not arena.device.has_available()
        arena.ring.avail_idx = 100
        assert arena.device.has_available()


def test_s2_a_broken_queue_costs_the_same_each_time_it_is_asked() -> None:
    with Arena() as arena:
        arena.ring.avail_idx = 1000
        depths = set()
        for _ in range(50):
            try:
                arena.device.pop()
            except errors.AvailIndexError as error:
                depths.add(len(traceback.extract_tb(error.__traceback__)))
        assert len(depths) == 1


def popped(arena: Arena, head: int = 0) -> Outcome:
    """What the chain at *head* gives, made available, popped and given back."""
    arena.ring.offer(head)
    chain = arena.device.pop()
    assert chain is not None and chain.head == head
    outcome = Where(arena.memory).outcome(chain)
    arena.device.push(chain, 0)
    return outcome


def test_s4_a_chain_as_long_as_its_table_is_no_loop() -> None:
    with Arena() as arena:
        pieces = [d(BUFFERS_AT + 64 * index) for index in range(8)]
        expected = tuple((piece.address, 16) for piece in pieces)
        assert popped(arena, arena.ring.chain(*pieces)).readable == expected
        table = [piece._replace(flags=NEXT, next=index + 1) for index, piece in enumerate(pieces)]
        table[-1] = table[-1]._replace(flags=0)
        arena.ring.describe(2, arena.ring.table(TABLES_AT, table))
        assert popped(arena, 2).readable == expected


def test_s8_an_indirect_table_after_direct_descriptors() -> None:
    with Arena() as arena:
        for direct in range(8):
            pieces = [d(BUFFERS_AT + 64 * index) for index in range(direct)]
            names = arena.ring.table(
                TABLES_AT, [d(BUFFERS_AT + 0x800, 8, NEXT, 1), d(BUFFERS_AT + 0x900, 24, WRITE)]
            )
            outcome = popped(arena, arena.ring.chain(*pieces, names))
            readable = (*((piece.address, 16) for piece in pieces), (BUFFERS_AT + 0x800, 8))
            assert outcome == (readable, ((BUFFERS_AT + 0x900, 24),), 16 * direct + 8, 24)


@pytest.mark.parametrize("entries", [1, 3])
def test_s10_write_on_the_descriptor_that_names_a_table_means_nothing(entries: int) -> None:
    with Arena() as arena:
        table = [d(BUFFERS_AT + 64 * index, 16, NEXT, index + 1) for index in range(entries)]
        table[-1] = table[-1]._replace(flags=WRITE)
        names = arena.ring.table(TABLES_AT, table)
        arena.ring.describe(0, names)
        arena.ring.describe(1, names._replace(flags=INDIRECT | WRITE))
        assert popped(arena, 0) == popped(arena, 1)


def test_s11_an_indirect_table_across_two_regions() -> None:
    with Arena() as arena:
        for before in (1, 8, 15, 16, 17, 33, 47):
            table = [d(BUFFERS_AT + index, 1, NEXT, index + 1) for index in range(2)] + [
                d(length=3, flags=WRITE)
            ]
            arena.ring.describe(0, arena.ring.table(SEAM - before, table))
            assert popped(arena) == (((BUFFERS_AT, 1), (BUFFERS_AT + 1, 1)), ((BUFFERS_AT, 3),), 2, 3)


@pytest.mark.parametrize("entries", [9, 515, INDIRECT_MAX])
def test_s12_an_indirect_table_longer_than_the_ring(entries: int) -> None:
    with Arena() as arena:
        table = [d(BUFFERS_AT + index % 64, 1, NEXT, index + 1) for index in range(entries)]
        table[-1] = table[-1]._replace(flags=0)
        arena.ring.describe(0, arena.ring.table(SEAM, table))
        outcome = popped(arena)
        assert outcome.readable_length == entries == len(outcome.readable)
        assert outcome.readable == tuple((descriptor.address, 1) for descriptor in table)


def test_s12_the_longest_table_of_nothing_is_still_little_work() -> None:
    with Arena() as arena:
        table = [
            d(length=0, flags=NEXT, following=(index + 1) % INDIRECT_MAX) for index in range(INDIRECT_MAX)
        ]
        arena.ring.describe(0, arena.ring.table(SEAM, table))
        arena.ring.offer(0)

        used = cost(lambda: raised(arena.device.pop))
        assert used.steps < 100 * INDIRECT_MAX and used.memory < 1 << 20, used


def test_s14_descriptors_of_no_length_are_skipped_but_counted() -> None:
    with Arena() as arena:
        ring = arena.ring
        outcome = popped(
            arena, ring.chain(d(length=0), d(), d(length=0), d(END, 0, WRITE), d(flags=WRITE, length=2))
        )
        assert outcome == (((BUFFERS_AT, 16),), ((BUFFERS_AT, 2),), 16, 2)
        assert popped(arena, ring.chain(*[d(length=0)] * 8)) == ((), (), 0, 0)
        assert popped(arena, ring.chain(d(length=0, flags=WRITE))) == ((), (), 0, 0)


def test_s16_the_exact_end_is_legal() -> None:
    with Arena() as arena:
        for address, length in ((END - 16, 16), (END - 1, 1), (ISLAND, PAGE), (SEAM, BIG), (0, PAGE)):
            assert popped(arena, arena.ring.chain(d(address, length))).readable == ((address, length),)


def test_s17_cve_2018_1059_a_buffer_across_regions_is_a_view_of_each() -> None:
    with Arena() as arena:
        arena.ring.offer(arena.ring.chain(d(SEAM - 6, 10), d(SEAM - 3, 8, WRITE)))
        arena.memory.write(GuestAddress(SEAM - 6), b"across the seam")
        chain = arena.device.pop()
        assert chain is not None
        assert Where(arena.memory).outcome(chain) == (
            ((SEAM - 6, 6), (SEAM, 4)), ((SEAM - 3, 3), (SEAM, 5)), 10, 8,
        )  # fmt: skip
        assert chain.read() == b"across the"
        assert chain.write(b"from the device") == 8
        assert arena.memory.read(GuestAddress(SEAM - 3), 8) == b"from the"
        arena.device.push(chain, 8)


def test_s30_buffers_in_the_rings_are_the_drivers_own_loss() -> None:
    with Arena() as arena:
        layout = arena.ring.layout
        arena.ring.offer(arena.ring.chain(d(layout.descriptors, 128), d(layout.used, 70, WRITE)))
        chain = arena.device.pop()
        assert chain is not None
        assert chain.write(b"\xff" * 70) == 70
        arena.device.push(chain, 70)
        assert (arena.ring.used_idx, arena.ring.used(0)) == (1, (0, 70))
        arena.ring.offer(arena.ring.chain(d(layout.available, 4, WRITE), at=2))
        chain = arena.device.pop()
        assert chain is not None
        assert chain.write(b"\xff\xff\xff\x80") == 4
        arena.device.push(chain, 4)
        meet(arena, Refusal("AvailIndexError", {"queue": 3, "index": 0x80FF, "last": 2, "size": 8}))


def test_s30_two_queues_may_share_a_buffer_but_never_a_fate() -> None:
    with Arena() as arena:
        arena.ring.offer(arena.ring.chain(d(NEIGHBOUR_AT, 64, WRITE), d(VICTIM_AT, 16, WRITE)))
        chain = arena.device.pop()
        assert chain is not None
        arena.device.push(chain, 0)
        arena.neighbour_works()


@pytest.mark.parametrize("at_once", [False, True])
def test_s29_cve_2022_26353_a_head_made_available_while_in_flight(at_once: bool) -> None:
    """Whether or not it was returned meanwhile: it was in flight when it was looked at."""
    with Arena() as arena:
        ring, device = arena.ring, arena.device
        for head in (0, 1, 2):
            ring.describe(head, d(flags=WRITE, length=head + 1))
        ring.offer(*((1, 1, 2) if at_once else (1,)))
        [chain] = device.pop_many()
        assert chain.head == 1
        if at_once:
            device.push(chain, 1)
        else:
            ring.offer(1, 2)
        meet(arena, Refusal("HeadInFlight", {"queue": 3, "head": 1}))
        if not at_once:
            device.push(chain, 1)
        [chain] = device.pop_many()
        assert chain.head == 2
        device.push(chain, 2)
        assert [ring.used(0), ring.used(1), ring.used_idx] == [(1, 1), (2, 2), 2]
        ring.offer(1)
        [chain] = device.pop_many()
        assert chain.head == 1


def test_s28_no_more_is_ever_in_flight_than_the_queue_is_long() -> None:
    with Arena() as arena:
        for head in range(8):
            arena.ring.describe(head, d())
        arena.ring.offer(*range(8))
        assert len(arena.device.pop_many()) == 8
        for head in (*range(8), 3, 3):
            arena.ring.offer(head)
            meet(arena, Refusal("HeadInFlight", {"queue": 3, "head": head}))


@pytest.mark.parametrize("start", [0, 0xFFFE])
def test_what_is_put_back_comes_again_and_so_does_the_error_behind_it(start: int) -> None:
    with Arena(next_available=start) as arena:
        ring, device = arena.ring, arena.device
        for head in (0, 1, 2):
            ring.describe(head, d(length=head + 1))
        ring.offer(2, 0, 1, 9, 0)
        chains = device.pop_many()
        assert [chain.head for chain in chains] == [2, 0, 1]
        device.push_many(chains[:1])
        device.put_back(chains[1:])
        assert device.next_available == start + 1 & 0xFFFF
        assert [chain.head for chain in device.pop_many(1)] == [0]
        assert [chain.head for chain in device.pop_many()] == [1]
        meet(arena, Refusal("HeadOutOfRange", {"queue": 3, "head": 9, "size": 8}))
        meet(arena, Refusal("HeadInFlight", {"queue": 3, "head": 0}))
        assert device.pop_many() == ()


@pytest.mark.parametrize("start", [0, 0xFFFE])
def test_what_was_found_behind_good_chains_is_told_once_and_gone_past(start: int) -> None:
    with Arena(next_available=start) as arena:
        ring, device = arena.ring, arena.device
        for head in (0, 1):
            ring.describe(head, d(length=head + 1))
        ring.offer(0, 9, 1)
        assert [chain.head for chain in device.pop_many()] == [0]
        assert isinstance(raised(device.pop_many), errors.HeadOutOfRange)
        assert device.next_available == start + 2 & 0xFFFF
        assert [chain.head for chain in device.pop_many()] == [1]
        assert device.next_available == start + 3 & 0xFFFF and device.pop_many() == ()


def test_s34_cve_2019_3900_an_endless_supply_is_taken_in_batches() -> None:
    with Arena(128) as arena:
        ring, device = arena.ring, arena.device
        for head in range(128):
            ring.describe(head, d())
        ring.offer(*range(128))
        for limit, expected in ((3, 3), (0, 0), (BATCH, BATCH), (BATCH, 128 - BATCH - 3)):
            chains = device.pop_many(limit)
            assert len(chains) == expected
            device.push_many(chains)
        ring.offer(*range(128))
        assert len(device.pop_many()) == BATCH


LARGE = 0x6000_0000
"""Bytes of a memory in which three buffers can add up to too much; none of it is ever touched."""


@pytest.fixture
def large() -> Iterator[tuple[GuestMemory, Ring, SplitDeviceQueue]]:
    memory = GuestMemory([Region.memfd(GuestAddress(0), LARGE)])
    ring = Ring(memory, QueueLayout.contiguous(3, 8, GuestAddress(VICTIM_AT)))
    device = SplitDeviceQueue(ring.layout, memory, WITH_INDIRECT)
    yield memory, ring, device
    ring.release()
    device.release()
    memory.close()


@pytest.mark.parametrize("shape", ["direct", "indirect", "long"])
def test_s15_lengths_may_add_up_to_what_used_len_can_tell_and_no_more(
    large: tuple[GuestMemory, Ring, SplitDeviceQueue], shape: str
) -> None:
    memory, ring, device = large
    third = 0x5555_5555
    for extra, legal in ((0, True), (1, False)):
        lengths = [third, third, third + extra]
        if shape == "long":
            lengths = [0x1000_0000] * 15 + [0x0FFF_FFFF + extra]
        pieces = [d(0, length, WRITE if index else 0) for index, length in enumerate(lengths)]
        if shape == "direct":
            ring.chain(*pieces)
        else:
            table = [piece._replace(flags=piece.flags | NEXT, next=at) for at, piece in enumerate(pieces, 1)]
            table[-1] = table[-1]._replace(flags=WRITE)
            ring.describe(0, ring.table(TABLES_AT, table))
        ring.offer(0)
        if legal:
            chain = device.pop()
            assert chain is not None
            assert chain.readable_length + chain.writable_length == 0xFFFF_FFFF
            device.push(chain, chain.writable_length)
            assert ring.used(0) == (0, 0xFFFF_FFFF - lengths[0])
        else:
            expected = {"queue": 3, "head": 0, "length": 1 << 32}
            assert refusal(raised(device.pop)) == ("ChainTooLong", expected)


def test_s31_cve_2016_7422_a_huge_length_costs_no_memory(
    large: tuple[GuestMemory, Ring, SplitDeviceQueue],
) -> None:
    memory, ring, device = large
    chains: list[Chain] = []
    ring.offer(ring.chain(d(0, LARGE), d(0, LARGE, WRITE)))

    def serve() -> None:
        chain = device.pop()
        assert chain is not None
        chains.append(chain)
        assert len(chain.read()) == 65536
        assert len(chain.read(100)) == 100
        assert chain.write(b"short") == 5
        device.push(chain, 5)

    assert cost(serve).memory < 1 << 20
    assert (chains[0].readable_length, chains[0].writable_length) == (LARGE, LARGE)


def during(line: int, change: Callable[[], None], call: Callable[[], None]) -> bool:
    """Run *call*, with *change* made before its *line*th line of Python; False if it has fewer."""
    lines = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == line:
                change()
        return count

    tracing = sys.gettrace()
    sys.settrace(count)
    try:
        call()
    finally:
        sys.settrace(tracing)
    return lines >= line


ROW = {0: d(SEAM, 16, NEXT, 1), 1: d(SEAM + 64, 32, NEXT | WRITE, 2), 2: d(SEAM + 256, 1, WRITE)}

FLIPS = {
    "one, moved": ({0: d(SEAM)}, 0, d(SEAM + 8, 24)),
    "one, turned round": ({0: d(SEAM)}, 0, d(SEAM, 16, WRITE)),
    "one, gone bad": ({0: d(SEAM)}, 0, d(END, 16)),
    "one, made a loop": ({0: d(SEAM)}, 0, d(SEAM, 16, NEXT, 0)),
    "one, made three": ({**ROW, 0: d(SEAM)}, 0, ROW[0]),
    "one, made a table": ({0: d(SEAM)}, 0, table_at(TABLES_AT, 48)),
    "three, first moved": (ROW, 0, d(SEAM + 8, 24, NEXT, 1)),
    "three, first alone": (ROW, 0, d(SEAM, 16)),
    "three, first gone bad": (ROW, 0, d(END, 16, NEXT, 1)),
    "three, second moved": (ROW, 1, d(SEAM + 72, 40, NEXT | WRITE, 2)),
    "three, second gone bad": (ROW, 1, d(END - 4, 40, NEXT | WRITE, 2)),
    "three, second the end": (ROW, 1, d(SEAM + 64, 32, WRITE)),
    "three, third moved": (ROW, 2, d(SEAM + 300, 7, WRITE)),
    "three, third readable": (ROW, 2, d(SEAM + 256, 1)),
    "three, third goes on": (ROW, 2, d(SEAM + 256, 1, WRITE | NEXT, 9)),
    "a table, elsewhere": ({0: table_at(TABLES_AT, 48)}, 0, table_at(TABLES_AT + 64, 48)),
    "a table, gone": ({0: table_at(TABLES_AT, 48)}, 0, table_at(END - 16, 48)),
    "a table, shorter": ({0: table_at(TABLES_AT, 48)}, 0, table_at(TABLES_AT, 32)),
}


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("name", FLIPS)
def test_s18_cve_2020_14375_cve_2026_93683_a_descriptor_changed_at_any_moment_is_the_old_or_the_new(
    name: str, known: bool
) -> None:
    table, index, changed = FLIPS[name]
    with Arena() as arena:
        ring, device = arena.ring, arena.device
        ring.table(TABLES_AT, [ROW[at] for at in range(3)])
        ring.table(TABLES_AT + 64, [ROW[at]._replace(length=5) for at in range(3)])
        oracle, where = Oracle(ring, ALL_FEATURES), Where(arena.memory)
        seen: list[Verdict] = []

        def pop() -> None:
            try:
                chain = device.pop()
            except errors.ChainError as error:
                seen.append(refusal(error))
                without_frames(error)
                return
            assert chain is not None
            seen.append(where.outcome(chain))
            device.push(chain, 0)

        def restore() -> None:
            for at, descriptor in table.items():
                ring.describe(at, descriptor)

        restore()
        allowed = [oracle(0)]
        ring.describe(index, changed)
        allowed.append(oracle(0))
        line = 1
        while True:
            restore()
            if known:
                ring.offer(0)
                pop()
            ring.offer(0)
            if not during(line, lambda: ring.describe(index, changed), pop):
                break
            assert seen[-1] in allowed, line
            line += 1
        assert line > 10
        assert all(verdict in seen for verdict in allowed)
        oracle.release()


def test_s19_cve_2024_8612_no_more_is_reported_used_than_was_offered() -> None:
    with Arena() as arena:
        ring, device = arena.ring, arena.device
        ring.offer(ring.chain(d(length=100), d(length=7, flags=WRITE)))
        chain = device.pop()
        assert chain is not None
        for written in (8, 107, 1 << 32, -1):
            for push in (lambda: device.push(chain, written), lambda: device.push_many([chain])):
                chain.written = written
                expected = {"queue": 3, "head": 0, "length": written, "room": 7}
                assert refusal(raised(push)) == ("UsedLengthError", expected)
        assert ring.used_idx == 0
        device.push(chain, 7)
        assert (ring.used_idx, ring.used(0)) == (1, (0, 7))
        for push in (lambda: device.push(chain, 0), lambda: device.push_many([chain])):
            chain.written = 0
            assert refusal(raised(push)) == ("NotInFlight", {"queue": 3, "head": 0})
        assert ring.used_idx == 1


def test_s19_of_several_chains_those_before_a_refused_one_are_returned() -> None:
    with Arena() as arena:
        ring, device = arena.ring, arena.device
        for head in range(4):
            ring.describe(head, d(length=1, flags=WRITE))
        ring.offer(*range(4))
        chains = device.pop_many()
        for chain, written in zip(chains, (1, 0, 2, 1)):
            chain.written = written
        assert isinstance(raised(lambda: device.push_many(chains)), errors.UsedLengthError)
        assert (ring.used_idx, ring.used(0), ring.used(1)) == (2, (0, 1), (1, 0))
        chains[2].written = 1
        device.push_many(chains[2:])
        assert (ring.used_idx, ring.used(2), ring.used(3)) == (4, (2, 1), (3, 1))
        assert [chain.in_flight for chain in chains] == [False] * 4


def interrupts(arena: Arena, count: int) -> bool:
    """Whether the driver is to be told after *count* more chains."""
    for _ in range(count):
        arena.ring.offer(0)
        chain = arena.device.pop()
        assert chain is not None
        arena.device.push(chain, 0)
    return arena.device.should_interrupt()


@pytest.mark.parametrize("start", [0, 1, 0x7FFE, 0xFFFB, 0xFFFF])
def test_s24_an_interrupt_is_due_if_and_only_if_the_event_was_passed(start: int) -> None:
    """Exhaustive over event indices, for a few chains at a time, across 65535."""
    with Arena(features=WITH_EVENT, next_available=start) as arena:
        ring = arena.ring
        ring.used_idx = start
        ring.describe(0, d())
        arena.device.release()
        device = arena.device = arena.new_device(WITH_EVENT, start)
        interrupts(arena, 1)
        for count in (1, 2, 3, 5):
            for event in range(0, 0x10000, 1 if count == 3 else 251):
                old = device._used
                device._signalled = old - count
                ring.used_event = event
                passed = {position & 0xFFFF for position in range(old - count, old)}
                assert device.should_interrupt() is (event in passed), (old, count, event)
                assert not device.should_interrupt()


def test_s24_after_a_restore_the_driver_is_told_once_whatever_it_asked() -> None:
    for used, next_available, once in ((0, 0, False), (7, 7, True), (0, 3, True), (9, 0, True)):
        for features in (PLAIN, WITH_EVENT):
            with Arena(features=features, next_available=next_available) as arena:
                arena.device.release()
                arena.ring.used_idx = used
                arena.ring.avail_flags, arena.ring.used_event = 1, used + 1000
                arena.device = arena.new_device(features, next_available)
                assert [arena.device.should_interrupt() for _ in range(3)] == [once, False, False]


@pytest.mark.parametrize("chains", [0x10000, 0x10001])
def test_s24_no_event_is_lost_if_nobody_asks_for_65536_chains(chains: int) -> None:
    with Arena(features=WITH_EVENT) as arena:
        arena.ring.describe(0, d())
        arena.ring.used_event = 5
        assert interrupts(arena, chains)
        assert not arena.device.should_interrupt()


def test_s25_with_event_indices_flags_mean_nothing_and_without_events_do() -> None:
    for features in (PLAIN, WITH_EVENT):
        with Arena(features=features) as arena:
            ring = arena.ring
            ring.describe(0, d())
            for flags, event, by_flag, by_event in (
                (0, 0, True, True), (1, 0, False, True), (0, 1, True, False), (1, 1, False, False),
                (0xFFFE, 1, True, False), (0xFFFF, 0, False, True),
            ):  # fmt: skip
                ring.avail_flags, ring.used_event = flags, ring.used_idx + event
                assert interrupts(arena, 1) is (by_flag if features == PLAIN else by_event)


def test_s25_the_device_says_it_by_flag_or_by_event_and_never_by_both() -> None:
    for features in (PLAIN, WITH_EVENT):
        with Arena(features=features, next_available=7) as arena:
            ring = arena.ring
            arena.device.release()
            ring.used_flags, ring.avail_event = 0xFFFF, 0x1234
            device = arena.device = arena.new_device(features, 7)
            said = []
            for step in (
                device.disable_notifications,
                device.enable_notifications,
                device.disable_notifications,
            ):
                step()
                said.append((ring.used_flags, ring.avail_event))
            flags = [(1, 0x1234), (0, 0x1234), (1, 0x1234)]
            assert said == (flags if features == PLAIN else [(0, 0x1234), (0, 7), (0, 7)])


def test_s22_enabling_notifications_tells_of_what_came_meanwhile() -> None:
    for features in (PLAIN, WITH_EVENT):
        with Arena(features=features, next_available=0xFFFF) as arena:
            arena.ring.describe(0, d())
            assert not arena.device.enable_notifications()
            arena.ring.offer(0)
            assert arena.device.enable_notifications()
            assert arena.device.pop() is not None
            assert not arena.device.enable_notifications()


def test_s26_notify_on_empty_overrides_suppression_where_negotiated() -> None:
    for features in (PLAIN, WITH_EVENT):
        for negotiated in (False, True):
            with Arena(features=features | (Feature.NOTIFY_ON_EMPTY if negotiated else 0)) as arena:
                ring = arena.ring
                ring.describe(0, d())
                ring.describe(1, d())
                ring.avail_flags, ring.used_event = 1, 1000
                assert interrupts(arena, 1) is negotiated
                ring.offer(0, 1)
                chain = arena.device.pop()
                assert chain is not None
                arena.device.push(chain, 0)
                assert not arena.device.should_interrupt()


PARTS = {"descriptors": "descriptor table", "available": "available ring", "used": "used ring"}


@pytest.mark.parametrize("part", PARTS)
def test_s32_a_ring_that_cannot_be_is_refused_and_nothing_kept(part: str) -> None:
    with Arena() as arena:
        for address in (END, ISLAND + PAGE - 8, SEAM - 16, TOP - 16, ISLAND + 1, 0x7FFF_FFFF_FFFF_FFF0):
            layout = replace(arena.ring.layout, **{part: GuestAddress(address)})
            before = arena.content()
            error = raised(lambda: SplitDeviceQueue(layout, arena.memory, ALL_FEATURES))
            numbers = {"queue": 3, "size": 8, "address": address, "part": PARTS[part]}
            assert refusal(error) == ("QueueLayoutError", numbers)
            assert arena.content() == before
        arena.neighbour_works()


def test_the_ring_may_be_in_any_region_and_be_unlike_its_buffers() -> None:
    with Arena() as arena:
        layout = QueueLayout.contiguous(9, 16, GuestAddress(ISLAND))
        ring, device = Ring(arena.memory, layout), SplitDeviceQueue(layout, arena.memory, ALL_FEATURES)
        ring.offer(ring.chain(d(SEAM - 8), d(flags=WRITE)))
        chain = device.pop()
        assert chain is not None and [len(view) for view in chain.readable] == [8, 8]
        device.push(chain, 1)
        assert ring.used(0) == (0, 1)
        ring.release()
        device.release()


def test_y4_a_released_queue_keeps_no_view_though_it_has_an_error_to_tell() -> None:
    """`Arena.close` fails if it does."""
    with Arena() as arena:
        ring = arena.ring
        ring.describe(0, d(SEAM - 8, 16))
        ring.describe(1, d(SEAM - 8, 64, NEXT, 2))
        ring.describe(2, d(END, 1))
        ring.offer(0, 1)
        assert [chain.head for chain in arena.device.pop_many()] == [0]


def test_t3_cve_2026_45782_a_completion_that_comes_after_the_queues_end_touches_nothing() -> None:
    with Arena() as arena:
        ring, device = arena.ring, arena.device
        ring.offer(ring.chain(d(length=8, flags=WRITE)), 7)
        [chain] = device.pop_many(1)
        device.release()
        before = arena.content()
        assert (chain.readable, chain.writable) == ((), ())
        late: list[Callable[[], object]] = [
            lambda: device.push(chain, 8), lambda: device.push_many([chain]), device.pop_many,
            device.enable_notifications,
        ]  # fmt: skip
        for call in late:
            with pytest.raises(ValueError, match="released"):
                call()
        assert arena.content() == before


def test_random_use_keeps_every_promise() -> None:
    """Pops, pushes out of order and puts back at random: what is taken is out once and comes back once."""
    seed = 20260101
    random = Random(seed)
    with Arena(32, features=WITH_EVENT, next_available=0xFFF0) as arena:
        ring, device = arena.ring, arena.device
        for head in range(32):
            ring.describe(head, d(length=head + 1, flags=WRITE))
        free, offered = list(range(32)), list[int]()
        out: list[Chain] = []
        for turn in range(4000):
            action = random.randrange(4)
            if action == 0:
                for _ in range(random.randrange(len(free) + 1)):
                    offered.append(free.pop(random.randrange(len(free))))
                    ring.offer(offered[-1])
            elif action == 1:
                limit = random.randrange(1, 12)
                chains = device.pop_many(limit)
                assert [chain.head for chain in chains] == offered[:limit], (seed, turn)
                if random.randrange(3):
                    out += chains
                    del offered[:limit]
                else:
                    back = random.randrange(len(chains) + 1)
                    device.put_back(chains[back:])
                    out += chains[:back]
                    del offered[:back]
            elif out:
                random.shuffle(out)
                done = [out.pop() for _ in range(random.randrange(1, len(out) + 1))]
                before = ring.used_idx
                for chain in done:
                    chain.written = random.randrange(chain.writable_length + 1)
                device.push_many(done)
                used = [ring.used(before + index) for index in range(len(done))]
                assert used == [(chain.head, chain.written) for chain in done], (seed, turn)
                free += [int(chain.head) for chain in done]
            assert len(free) + len(offered) + len(out) == 32
