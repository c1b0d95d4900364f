"""The device status field, over everything a driver can find and write."""

from collections.abc import Iterator

import pytest
from virtio.statuses import RUNGS, STATES

from lguestlib.virtio.status import LADDER, Status, advance

STUCK = Status.FAILED | Status.NEEDS_RESET


def every_write() -> Iterator[tuple[Status, int, bool]]:
    for current in STATES:
        for written in (*range(1, 256), 0x100, 0xFFFF_FFFF, 0xFFFF_FF00, 0x8000_0003):
            for acceptable in (False, True):
                yield current, written, acceptable


def test_t1_whatever_is_written_the_status_is_one_the_specification_knows() -> None:
    for current, written, acceptable in every_write():
        after = advance(current, written, lambda: acceptable)
        assert after in STATES, (current, written)
        assert after & current == current, "no bit goes but by a reset"
        assert not after & ~(current | written), "no bit comes that was not written"


def test_t1_features_ok_comes_with_acceptable_features_only() -> None:
    for current, written, acceptable in every_write():
        after = advance(current, written, lambda: acceptable)
        if not current & Status.FEATURES_OK and not acceptable:
            assert not after & (Status.FEATURES_OK | Status.DRIVER_OK)


def test_t1_after_failed_or_needs_reset_there_is_no_going_on() -> None:
    for current, written, acceptable in every_write():
        if current & STUCK or written & Status.FAILED:
            assert advance(current, written, lambda: acceptable) == current | written & Status.FAILED


def test_t1_a_driver_that_keeps_the_order_arrives() -> None:
    status = Status(0)
    for bit in LADDER:
        assert advance(status, int(bit), lambda: True) == status | bit, "bits need not be repeated"
        status = advance(status, int(status | bit), lambda: True)
        assert advance(status, int(status), lambda: True) == status
    assert status == RUNGS[-1]


@pytest.mark.parametrize("bit", LADDER[1:])
def test_t1_a_bit_waits_for_those_below_it(bit: Status) -> None:
    below = LADDER[: LADDER.index(bit)]
    for missing in below:
        current = Status(sum(below[: below.index(missing)]))
        assert advance(current, int(bit), lambda: True) == current


def test_features_are_looked_at_only_when_they_matter() -> None:
    asked = []

    def acceptable() -> bool:
        asked.append(True)
        return True

    for written in (1, 3, 3 | 4):
        advance(Status(0), written, acceptable)
    advance(RUNGS[4], 0x0F, acceptable)
    assert asked == []
    advance(RUNGS[2], 0x0B, acceptable)
    assert asked == [True]
