"""Waiting for a first kick by eventfds that have no other reader."""

import os
import select
import threading
from collections.abc import Sequence

from lguestlib.abi.eventfd import SIGNAL, eventfd
from lguestlib.runtime.ending import wake_thread
from lguestlib.runtime.kick import EventfdKick


class FirstKick:
    """Waits for one of *kicks*, on a thread of its own, and calls the thread *guest* out of its sleep then.

    For a device that a first kick starts, when what took its kicks before still does:
    a kernel before 3.1 has unbound its driver and binds it again.  The calling goes on
    until `end`.
    """

    def __init__(self, kicks: Sequence[EventfdKick], guest: threading.Thread) -> None:
        self.came = False
        """Whether a kick has."""
        self._guest = guest
        self._over = threading.Event()
        self._wake = eventfd()
        self._waiting = select.poll()
        for fd in (self._wake, *(kick.fd for kick in kicks)):
            self._waiting.register(fd, select.POLLIN)
        self._thread = threading.Thread(target=self._wait, name="first kick", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        self._waiting.poll()
        if not self._over.is_set():
            self.came = True
            wake_thread(self._guest, lambda: None, self._over.wait)

    def end(self) -> None:
        """Wait no longer."""
        self._over.set()
        os.write(self._wake, SIGNAL)
        self._thread.join()
        os.close(self._wake)
