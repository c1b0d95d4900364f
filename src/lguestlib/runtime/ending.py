"""Waking a thread that may be asleep in a system call, until it has done what it was told."""

import threading
from collections.abc import Callable

from lguestlib.abi.signals import interrupt_thread

_RETRY_SECONDS = 0.001
_RETRY_SECONDS_MAX = 0.02


def call_out(thread: threading.Thread) -> None:
    """Call *thread* out of a system call, if it is in one now."""
    if thread.native_id is not None and thread.is_alive():
        interrupt_thread(thread.native_id)


def end_thread(thread: threading.Thread, ask: Callable[[], None]) -> None:
    """Return when *thread*, which has been told to end, has; *ask* goes before each attempt to wake it."""
    wake_thread(thread, ask, thread.join)


def wake_thread(thread: threading.Thread, ask: Callable[[], None], wait: Callable[[float], object]) -> None:
    """Wake *thread* by a signal until *wait*, for some seconds at a time, returns true, or it has ended.

    Again and again, because a signal that comes just before its system call is
    lost; *ask* goes before each.
    """
    patience = _RETRY_SECONDS
    while thread.is_alive():
        ask()
        call_out(thread)
        if wait(patience):
            return
        patience = min(2 * patience, _RETRY_SECONDS_MAX)
