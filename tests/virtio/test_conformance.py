"""The catalogue of cases: complete, well-formed, and what of it needs no thread and no descriptor is run."""

import ast
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from virtio.rings import cost, nothing_left

from lguestlib.memory.address import GuestAddress
from lguestlib.virtio import errors
from lguestlib.virtio.conformance.case import (
    Anchor,
    At,
    Case,
    ConversationCase,
    Fault,
    Kick,
    Load,
    PackedCase,
    Publish,
    RegisterCase,
    RingCase,
    Served,
    Take,
    WatchedCase,
)
from lguestlib.virtio.conformance.catalogue import CASES, ids, select
from lguestlib.virtio.conformance.place import BUFFERS, END, ISLAND, START, Place, new_memory
from lguestlib.virtio.conformance.registers import run_registers
from lguestlib.virtio.conformance.ring import PackedRun, RingRun
from lguestlib.virtio.features import Feature

ROOT = Path(__file__).parents[2]

ROWS = {
    *(f"S{number}" for number in range(1, 35)),
    *(f"P{number}" for number in range(1, 9)),
    *(f"T{number}" for number in range(1, 25)),
    *(f"Y{number}" for number in range(1, 12)),
}
CVES = {
    f"CVE-{number}"
    for number in (
        "2011-2512", "2013-4150", "2014-0150", "2016-5403", "2016-6490", "2016-7422", "2017-17381", "2018-1059",
        "2019-3900", "2019-14818", "2019-14835", "2020-10722", "2020-10723", "2020-10725", "2020-10726",
        "2020-14375", "2021-3748", "2022-0669", "2022-2132", "2022-26353", "2022-26354", "2023-5158", "2023-6693",
        "2024-3446", "2024-4693", "2024-8612", "2024-11614", "2026-27211", "2026-45782", "2026-86565",
        "2026-93683",
    )
}  # fmt: skip

RINGS = [case for case in CASES if isinstance(case, RingCase)]
PACKED = [case for case in CASES if isinstance(case, PackedCase)]
REGISTERS = [case for case in CASES if isinstance(case, RegisterCase)]

STEPS_MAX = 2_000_000
"""Lines of Python that a case may take: the longest fills an indirect table of 4096 by hand."""

ALLOCATED_MAX = 32 << 20
"""Bytes: memory is looked at as a whole, three times."""


def test_every_row_and_every_cve_is_a_case() -> None:
    assert set(ids()) == ROWS | CVES


def test_no_two_cases_have_one_name_and_each_says_where_it_comes_from() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.clause and case.title and case.ids[0] in ROWS, case.name
        assert case.title[0].islower() or case.title.split()[0].isupper() or "_" in case.title, case.name


def test_cases_come_in_the_order_of_their_rows() -> None:
    rows = list(dict.fromkeys(case.ids[0] for case in CASES))
    assert rows == sorted(rows, key=lambda row: ("SPTY".index(row[0]), int(row[1:])))
    assert len(rows) == len(ROWS)


def test_cases_are_selected_by_row_by_cve_and_by_name() -> None:
    assert list(select([])) == list(CASES)
    assert {case.ids[0] for case in select(["s8"])} == {"S8"}
    assert {case.ids[0] for case in select(["cve-2022-2132"])} == {"S33"}
    assert [case.name for case in select(["S4 a loop of one"])] == ["S4 a loop of one"]
    assert list(select(["S99"])) == []


def test_a_case_either_breaks_a_rule_or_demands_something() -> None:
    for case in RINGS:
        if case.demanded:
            assert not any(isinstance(event, Fault) for event in case.events), case.name
            assert case.events or any(isinstance(step, Load) for step in case.steps), case.name
        assert any(isinstance(step, (Kick, Take, Load)) for step in case.steps) or not case.events, case.name


def test_a_ring_case_needs_what_it_uses_and_no_more() -> None:
    assert ring("S3 head just past the table").needs == 0
    assert ring("S9 a table of nothing").needs == Feature.RING_INDIRECT_DESC
    assert ring("S5 an indirect table that was not negotiated").needs == 0
    assert ring("S24 an event just met is told of").needs == Feature.RING_EVENT_IDX
    assert ring("S25 without it the flag is heeded").needs == 0
    assert ring("S26 notify on empty overrides the flag").needs == Feature.NOTIFY_ON_EMPTY


def test_a_conversation_has_steps_and_what_has_to_be_served_is_asked_for() -> None:
    conversations = [case for case in CASES if isinstance(case, ConversationCase)]
    assert len(conversations) > 80
    for case in conversations:
        assert case.steps, case.name
        assert not (case.served and case.refused), case.name


@cache
def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case, WatchedCase)], ids=lambda case: case.name)
def test_what_a_case_says_runs_it_is_there(case: WatchedCase) -> None:
    assert case.tests
    for node in case.tests:
        path, _, name = node.partition("::")
        assert name in _functions(ROOT / path), node


@pytest.mark.parametrize("case", RINGS, ids=lambda case: case.name)
def test_a_ring_case_comes_out_as_it_says(case: RingCase) -> None:
    with nothing_left():
        assert RingRun(case).run() == []


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_a_packed_rings_case_comes_out_as_it_says(case: PackedCase) -> None:
    with nothing_left():
        assert PackedRun(case).run() == []


@pytest.mark.parametrize("case", [case for case in RINGS if case.is_hostile], ids=lambda case: case.name)
def test_a_hostile_case_takes_bounded_steps_and_memory(case: RingCase) -> None:
    steps, memory = cost(lambda: RingRun(case).run())
    assert steps < STEPS_MAX and memory < ALLOCATED_MAX, (steps, memory)


@pytest.mark.parametrize("case", REGISTERS, ids=lambda case: case.name)
def test_a_register_case_comes_out_as_it_says(case: RegisterCase) -> None:
    assert run_registers(case) == []


# The runner finds what is wrong.


def one(name: str) -> Case:
    (found,) = select([name])
    return found


def ring(name: str) -> RingCase:
    case = one(name)
    assert isinstance(case, RingCase)
    return case


READ = "S19 a read fills its buffers and says so"


def test_another_outcome_than_the_case_says_is_found() -> None:
    case = ring(READ)
    assert RingRun(replace(case, events=(Fault(errors.DescriptorLoop),))).run() != []
    assert RingRun(replace(case, events=(Served(0, 512),))).run() != []
    assert RingRun(replace(case, events=())).run() != []
    assert RingRun(replace(case, events=(*case.events, Served(1, 0)))).run() != []


def test_wrong_data_is_found() -> None:
    (problem,) = RingRun(replace(ring(READ), after={At(Anchor.BUFFERS, 0x1000): b"x"})).run()
    assert problem.startswith("wrong data at BUFFERS+0x1000")


def test_an_interrupt_that_does_not_come_is_found() -> None:
    case = ring("S24 an event just met is told of")
    (problem,) = RingRun(replace(case, steps=case.steps[1:-1] + case.steps[-1:] * 2)).run()
    assert problem == "not interrupted"


def test_a_byte_outside_the_buffers_is_found_and_one_inside_is_not() -> None:
    case = ring(READ)
    with new_memory() as memory:
        place = Place(memory)
        place.lay_out(case)
        place.remember()
        for inside in (BUFFERS + 0x1000, BUFFERS + 0x11FF, BUFFERS + 0x8000, place.layout.used, place.layout.used + 69):
            memory.write(GuestAddress(inside), b"\1")
            assert place.touched() is None
        for outside in (START, BUFFERS, BUFFERS + 0xFFF, BUFFERS + 0x1200, BUFFERS + 0x8001, END - 1, ISLAND):
            place.lay_out(case)
            place.remember()
            memory.write(GuestAddress(outside), b"\1")
            found = place.touched()
            assert found is not None and found.address == outside


def test_a_chain_has_the_room_that_walking_it_finds() -> None:
    case = ring(READ)
    with new_memory() as memory:
        place = Place(memory)
        place.lay_out(case)
        place.publish(Publish((0,)))
        assert place.room(0, case.features) == 513
        place.lay_out(ring("S4 a loop of one"))
        assert place.room(0, case.features) is None
