"""Looking for work before sleeping: as long as it pays, and no longer."""

import time

import pytest

from lguestlib.runtime import polling
from lguestlib.runtime.polling import FIRST, AdaptivePoll
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Queue
from runtime.rigs import PATIENCE, Rig, eventually


class Clock:
    """Stands in for time(2): *now* moves by *step* nanoseconds at each look."""

    def __init__(self, step: int = 100) -> None:
        self.now = 0
        self._step = step

    def monotonic_ns(self) -> int:
        self.now += self._step
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(polling, "time", clock)
    return clock


def waited(poll: AdaptivePoll, clock: Clock, sleep: int) -> None:
    """A wait in which nothing is found, and that ends after *sleep* nanoseconds more."""
    assert not poll.look(lambda: False)
    clock.now += sleep
    poll.woken()


def test_the_time_doubles_while_sleeps_are_short_and_ends_at_the_longest(clock: Clock) -> None:
    poll = AdaptivePoll(10 * FIRST)
    patience = []
    for _ in range(5):
        waited(poll, clock, 1000)
        patience.append(poll.patience)
    assert patience == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST, 10 * FIRST]


def test_a_long_sleep_ends_the_looking_and_a_short_one_brings_it_back(clock: Clock) -> None:
    poll = AdaptivePoll(10 * FIRST)
    waited(poll, clock, 1000)
    waited(poll, clock, 11 * FIRST)
    assert poll.patience == 0
    waited(poll, clock, 1000)
    assert poll.patience == FIRST


def test_a_wait_that_has_been_looked_for_leaves_the_time_as_it_is(clock: Clock) -> None:
    poll = AdaptivePoll(10 * FIRST)
    waited(poll, clock, 1000)
    looks = iter([False, False, True])
    assert poll.look(lambda: next(looks))
    assert poll.patience == FIRST


def test_it_looks_once_with_no_patience_and_no_longer_than_its_patience(clock: Clock) -> None:
    poll = AdaptivePoll(10 * FIRST)
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        return False

    assert not poll.look(look)
    assert looks == 1
    poll.patience = FIRST
    looks, began = 0, clock.now
    assert not poll.look(look)
    assert looks > 1 and FIRST <= clock.now - began <= FIRST + 300


def served(chain: Chain) -> int:
    return 0


def test_a_chain_is_found_without_a_kick_and_the_driver_saves_it() -> None:
    with Rig(Queue("q", served), poll=AdaptivePoll(10**9)) as rig:
        rig.start()
        # The first sleep is short, so that the next wait is a look.
        for token in range(200):
            rig.submit(token)
            rig.collect(1)
        eventually(lambda: rig.counters.chains == 200, "the last one counted")
        assert rig.counters.kicks < 100


def test_a_thread_that_looks_stops_and_finishes_at_once() -> None:
    for end in ("stop", "finish"):
        poll = AdaptivePoll(10**12)
        poll.patience = 10**12
        with Rig(Queue("q", served), poll=poll) as rig:
            rig.start()
            time.sleep(0.02)
            began = time.monotonic()
            if end == "stop":
                rig.thread.stop()
            else:
                rig.thread.request_finish()
                assert rig.thread.join(PATIENCE)
            assert time.monotonic() - began < 0.1


def test_a_thread_sleeps_when_there_is_nothing_for_a_while() -> None:
    with Rig(Queue("q", served), poll=AdaptivePoll(1000)) as rig:
        rig.start()
        for token in range(3):
            time.sleep(0.02)
            rig.submit(token)
            rig.collect(1)
        assert rig.counters.kicks == 3
