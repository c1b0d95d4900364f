"""The end of a thread that may be asleep in a system call."""

import threading
from collections.abc import Callable

from lguestlib.abi.signals import interrupt_thread

_RETRY_SECONDS = 0.001
_RETRY_SECONDS_MAX = 0.02


def end_thread(thread: threading.Thread, ask: Callable[[], None]) -> None:
    """Return when *thread*, which has been told to end, has.

    It is woken by a signal, repeated until it is gone, because one that comes
    just before its system call is lost; *ask* goes before each.
    """
    patience = _RETRY_SECONDS
    while thread.is_alive():
        ask()
        if thread.native_id is not None:
            interrupt_thread(thread.native_id)
        thread.join(patience)
        patience = min(2 * patience, _RETRY_SECONDS_MAX)
