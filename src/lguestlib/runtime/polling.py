"""Looking for work a while before sleeping: it saves the driver's kick and the wake-up."""

import time
from collections.abc import Callable

FIRST = 4_000
"""Nanoseconds to look at first, once a sleep was short enough for looking to have paid."""


class AdaptivePoll:
    """Looks for up to *longest* nanoseconds, and for none where that would not have paid.

    As Linux does for halted virtual CPUs (Documentation/virt/kvm/halt-polling.rst):
    the time doubles while the wait ends in a sleep that *longest* would have
    covered, and is given up when it ends in a longer one.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.patience = 0
        """Nanoseconds to look before the next sleep."""
        self._since = 0

    def look(self, found: Callable[[], bool]) -> bool:
        """Ask *found* again and again, from the beginning of a wait, until it says so or patience is at its end."""
        self._since = now = time.monotonic_ns()
        end = now + self.patience
        while not found():
            if time.monotonic_ns() >= end:
                return False
        return True

    def woken(self) -> None:
        """The wait that `look` began has ended in a sleep, now over."""
        if time.monotonic_ns() - self._since > self.longest:
            self.patience = 0
        else:
            self.patience = min(max(2 * self.patience, FIRST), self.longest)
