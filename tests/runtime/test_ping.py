"""Pings apart and drawn, from calls made up here and from real ones."""

import pytest

from lguestlib.runtime import namespace
from lguestlib.runtime.options import MachineOptions
from lguestlib.runtime.ping import RECEIVE_THREAD, TRANSMIT_THREAD, Ping, percentile, run_pings, split_by_ping
from lguestlib.runtime.sequence import SEED_CALLS, calls_by_kind, compare, draw
from lguestlib.runtime.trace import Call, OpenCall, Tracer


def ping_at(start: int, awake: bool = False) -> list[Call]:
    """The seed's calls of one ping, in nanoseconds, whose transmit thread wakes at *start*."""
    woken = [] if awake else [Call(TRANSMIT_THREAD, "read", "kick", 8, start - 900_000, start)]
    return woken + [
        Call(TRANSMIT_THREAD, "writev", "tap", 110, start + 1_000, start + 9_000),
        Call(RECEIVE_THREAD, "readv", "tap", 110, start - 800_000, start + 20_000),
        Call(RECEIVE_THREAD, "write", "interrupt", 8, start + 25_000, start + 27_000),
    ]


def test_calls_are_parted_where_the_transmit_thread_wakes() -> None:
    pings = [ping_at(1_000_000), ping_at(2_000_000), ping_at(3_000_000)]
    calls = [call for ping in pings for call in ping]
    assert split_by_ping(reversed(calls), 3) == pings


def test_a_transmit_thread_that_was_awake_has_no_read_and_its_ping_begins_with_the_writev() -> None:
    pings = [ping_at(1_000_000), ping_at(2_000_000, awake=True), ping_at(3_000_000)]
    assert split_by_ping([call for ping in pings for call in ping], 3) == pings


def test_frames_that_are_no_pings_belong_to_the_ping_they_are_next_to() -> None:
    stray = [Call(TRANSMIT_THREAD, "read", "kick", 8, 0, 10), Call(TRANSMIT_THREAD, "writev", "tap", 54, 20, 30)]
    parts = split_by_ping([*stray, *ping_at(1_000_000), *ping_at(2_000_000)], 2)
    assert parts == [[*stray, *ping_at(1_000_000)], ping_at(2_000_000)]


def test_no_calls_make_pings_without_calls() -> None:
    assert split_by_ping([], 2) == [[], []]


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1.0), (0.01, 1.0), (0.5, 50.0), (0.501, 51.0), (0.99, 99.0), (1.0, 100.0)]
)
def test_percentiles_are_values_that_were_seen(share: float, value: float) -> None:
    assert percentile([float(number) for number in range(1, 101)], share) == value
    assert percentile([7.0], share) == 7.0


def test_a_ping_is_drawn_with_a_lane_for_each_thread_and_a_row_for_each_call() -> None:
    asleep = (OpenCall(TRANSMIT_THREAD, "read", "kick", 0), OpenCall(RECEIVE_THREAD, "readv", "tap", 0))
    head, rule, *rows = draw(Ping(80.0, tuple(ping_at(1_000_000))), asleep).splitlines()
    receive = head.index(RECEIVE_THREAD)
    assert head.index(TRANSMIT_THREAD) < receive and rule[receive] == "-"
    assert [row.split() for row in rows] == [
        ["0.0", "read(kick)", "=", "8", "<-", "wakes"],
        ["9.0", "writev(tap)", "=", "110", "8.0", "us"],
        ["20.0", "readv(tap)", "=", "110", "<-", "wakes"],
        ["27.0", "write(interrupt)", "=", "8", "2.0", "us"],
        ["read(kick)", "...", "->", "sleeps"],
        ["readv(tap)", "...", "->", "sleeps"],
    ]
    assert [row.index("(") > receive for row in rows] == [False, False, True, True, False, True]


def test_the_comparison_counts_by_kind_beside_the_seed() -> None:
    text = compare(Ping(80.0, tuple(ping_at(1_000_000))))
    rows = {row.split()[0]: row.split()[1:] for row in text.splitlines()}
    assert rows["writev(tap)"] == ["1", "1"]
    assert rows["write(interrupt)"] == ["1", "2"]
    assert rows["total"] == ["4", str(sum(SEED_CALLS.values()))] == ["4", "5"]


def test_a_guest_in_this_process_pings_with_the_seeds_calls_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise PermissionError(1, "not in a test")

    # The process the tests run in stays in its network namespace: a responder answers.
    monkeypatch.setattr(namespace, "enter_network_namespace", refuse)
    said: list[str] = []
    done: list[int] = []
    report = run_pings(MachineOptions("inprocess"), 20, said.append, Tracer(), done.append)
    assert report.hypervisor == "inprocess"
    assert (len(report.pings), len(report.round_trips), done) == (20, 20, [20])
    counts = calls_by_kind(report.pings)
    assert set(counts) <= {"read(kick)", "writev(responder)", "readv(responder)", "write(interrupt)"}
    assert counts["writev(responder)"] == counts["readv(responder)"] == 20
    assert 20 <= counts["write(interrupt)"] <= 40
    assert sorted((sleep.thread, sleep.call) for sleep in report.asleep) == [
        (RECEIVE_THREAD, "readv"), (TRANSMIT_THREAD, "read"),
    ]  # fmt: skip
