"""A PC's clock in its CMOS memory, as a register model (Motorola MC146818): the time of day in UTC, and no alarm."""

from collections.abc import Callable
from datetime import datetime, timezone

PORT = 0x70
"""The register's number goes here, its value to the port behind it."""
LINE = 8

_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR = 0, 2, 4, 6, 7, 8, 9
_A, _B, _C, _D = 0xA, 0xB, 0xC, 0xD
_CENTURY = 0x32
_HOURS_24 = 0x2
_OSCILLATOR_ON = 0x26
_BATTERY_GOOD = 0x80
_SIZE = 128


def _utc() -> datetime:
    return datetime.now(timezone.utc)


class CmosClock:
    """Tells the time that *now* gives, in BCD and 24 hours; what is not the clock's is memory."""

    def __init__(self, now: Callable[[], datetime] = _utc) -> None:
        self._now = now
        self._selected = 0
        self._memory = bytearray(_SIZE)

    def read(self, port: int) -> int:
        """The byte the processor reads from *port*, 0 or 1 counted from `PORT`; the first cannot be read."""
        if port == 0:
            return 0xFF
        fixed = {_A: _OSCILLATOR_ON, _B: _HOURS_24, _C: 0, _D: _BATTERY_GOOD}
        if self._selected in fixed:
            return fixed[self._selected]
        now = self._now()
        times = {
            _SECONDS: now.second, _MINUTES: now.minute, _HOURS: now.hour, _WEEKDAY: now.isoweekday() % 7 + 1,
            _DAY: now.day, _MONTH: now.month, _YEAR: now.year % 100, _CENTURY: now.year // 100,
        }  # fmt: skip
        if self._selected in times:
            tens, ones = divmod(times[self._selected], 10)
            return tens << 4 | ones
        return self._memory[self._selected]

    def write(self, port: int, value: int) -> None:
        """The processor writes the byte *value*; the host's clock is not to be set."""
        if port == 0:
            # The highest bit masks NMIs, of which there are none.
            self._selected = value % _SIZE
        else:
            self._memory[self._selected] = value
