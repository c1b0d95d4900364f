"""Where threads of one interpreter meet."""

import os
import sys

import pytest

from lguestlib.runtime import gil
from lguestlib.runtime.gil import meeting_place


def test_a_process_has_one_meeting_place_for_each_party_and_not_every_process_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 2, 7})
    assert meeting_place() == meeting_place()
    assert {meeting_place(party) for party in range(3)} == {2, 5, 7} and meeting_place(3) == meeting_place()
    places: set[int | None] = set()
    for drawn in range(1000, 1003):
        monkeypatch.setattr(gil, "_place", drawn)
        places.add(meeting_place())
    assert places == {2, 5, 7}


def test_where_threads_need_not_take_turns_they_meet_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    assert meeting_place() is None
