"""Random cases, from the same seeds each time: a million malformed rings, and all else that the other side can send."""

import pytest

from fuzz import runs
from fuzz.runs import TARGETS, replay, run

COUNTS = {
    "rings": 700_000, "packed": 300_000, "registers": 100_000, "pci": 30_000, "lguest": 3000, "requests": 36_000,
    "transcripts": 10_000, "images": 1000,
}  # fmt: skip
"""How many things to try."""


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_random_hangs_or_raises_what_it_should_not(target: str) -> None:
    tried = seed = 0
    while tried < COUNTS[target]:
        tried += run(target, seed)
        seed += 1


def test_what_is_found_comes_with_the_command_that_makes_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(seed: int) -> int:
        raise KeyError(seed)

    monkeypatch.setitem(TARGETS, "rings", broken)
    with pytest.raises(AssertionError) as found:
        run("rings", 77)
    assert replay("rings", 77) in str(found.value) and "KeyError" in str(found.value)


def test_a_case_that_does_not_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(seed: int) -> int:
        while True:
            pass

    monkeypatch.setitem(TARGETS, "rings", endless)
    monkeypatch.setattr(runs, "CASE_SECONDS", 1)
    with pytest.raises(AssertionError, match="Hang: no end after 1 s"):
        run("rings", 1)
