"""The CMOS clock, as Linux's mach_get_cmos_time reads it."""

from datetime import datetime, timezone

from lguestlib.runtime.pc.clock import CmosClock

WHEN = datetime(2026, 11, 25, 13, 7, 59, tzinfo=timezone.utc)


def value(clock: CmosClock, register: int) -> int:
    clock.write(0, register)
    return clock.read(1)


def test_the_time_is_told_in_bcd() -> None:
    clock = CmosClock(lambda: WHEN)
    read = [value(clock, register) for register in (0, 2, 4, 7, 8, 9, 0x32)]
    assert read == [0x59, 0x07, 0x13, 0x25, 0x11, 0x26, 0x20]
    assert value(clock, 6) == 4, "Sunday is 1, and that was a Wednesday"


def test_it_is_never_being_updated_counts_24_hours_and_has_a_battery() -> None:
    clock = CmosClock(lambda: WHEN)
    assert value(clock, 0xA) & 0x80 == 0
    assert value(clock, 0xB) == 0x02
    assert (value(clock, 0xC), value(clock, 0xD)) == (0, 0x80)


def test_the_clock_is_not_set_and_the_memory_is_kept() -> None:
    clock = CmosClock(lambda: WHEN)
    clock.write(0, 0x80 | 2)
    clock.write(1, 0x30)
    assert value(clock, 2) == 0x07
    clock.write(0, 0x0F)
    clock.write(1, 0x0A)
    assert value(clock, 0x0F) == value(clock, 0x8F) == 0x0A
    assert clock.read(0) == 0xFF


def test_it_goes_by_the_hosts_clock() -> None:
    before = datetime.now(timezone.utc)
    year = value(CmosClock(), 0x09)
    after = datetime.now(timezone.utc)
    assert year in {int(str(when.year % 100), 16) for when in (before, after)}
