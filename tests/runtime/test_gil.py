"""Where threads of one interpreter meet."""

import os
import sys

import pytest

from lguestlib.runtime.gil import meeting_place


def test_meeting_places_are_spread_over_the_processors_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 2, 7})
    places = [meeting_place() for _ in range(6)]
    assert set(places[:3]) == {2, 5, 7} and places[3:] == places[:3]


def test_where_threads_need_not_take_turns_they_meet_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    assert meeting_place() is None
