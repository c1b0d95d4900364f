"""Whether this interpreter's threads take turns, and where it is best that they do."""

import os
import sys
from collections.abc import Callable
from itertools import count

# Cards of one process take turns, and those of many processes do not all begin with the same.
_turns = count(os.getpid())


def gil_enabled() -> bool:
    """Whether one thread at a time runs Python: always, but on a free-threaded build with the GIL off."""
    look: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
    return look()


def meeting_place() -> int | None:
    """The processor for threads that wake each other, or None for wherever the kernel has them.

    Under the GIL a thread that is woken on another processor while its waker
    still has Python to run waits for it twice, in futex(2); on one processor it
    runs when the waker sleeps.  Each call gives another one: all that meet on a
    processor share it.
    """
    if not gil_enabled():
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[next(_turns) % len(allowed)]
