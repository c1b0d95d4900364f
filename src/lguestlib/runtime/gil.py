"""Whether this interpreter's threads take turns, and where it is best that they do."""

import os
import sys
from collections.abc import Callable

SWITCH_INTERVAL = 10e-6
"""Seconds a queue's thread waits for the GIL before it asks for it: the default is 5 ms."""

# Drawn, since processes in containers often have one and the same number.
_place = int.from_bytes(os.urandom(4), sys.byteorder)


def gil_enabled() -> bool:
    """Whether one thread at a time runs Python: always, but on a free-threaded build with the GIL off."""
    look: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
    return look()


def meeting_place(party: int = 0) -> int | None:
    """The processor for threads that wake each other, or None for wherever the kernel has them.

    Under the GIL a thread that is woken on another processor while its waker
    still has Python to run waits for it twice, in futex(2); on one processor it
    runs when the waker sleeps.  A process has one such place for each
    *party* of threads, next to that of the party before, and not every process the same.
    """
    if not gil_enabled():
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[(_place + party) % len(allowed)]
