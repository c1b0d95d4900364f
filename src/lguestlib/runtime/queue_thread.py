"""A virtqueue is a thread: it sleeps in one blocking call, works, and interrupts the guest itself."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from lguestlib.abi.prctl import name_thread
from lguestlib.abi.signals import install_interrupt_handler
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.ending import end_thread
from lguestlib.runtime.interrupt import Interrupt
from lguestlib.runtime.kick import Kick
from lguestlib.virtio.device import Queue, SourceEnded
from lguestlib.virtio.split_device import SplitDeviceQueue

AT_ONCE = 8
"""Chains taken, served and returned before the driver is told, while more wait: cheaper than each, and steadier."""


class QueueThread:
    """Serves *ring* with *queue*'s service function until stopped, or until it fails.

    It sleeps on *kick*, or inside a service that waits for the outside; on
    *processor*, if not None, whenever it runs.
    *on_failure* is called on the thread, as its last act, with the exception
    that ended it.
    """

    def __init__(
        self,
        name: str,
        queue: Queue,
        ring: SplitDeviceQueue,
        kick: Kick,
        interrupt: Interrupt,
        counters: QueueCounters,
        on_failure: Callable[["QueueThread", Exception], None],
        processor: int | None = None,
    ) -> None:
        self.name = name
        self.counters = counters
        self._service = queue.service
        self._ring = ring
        self._kick = kick
        self._interrupt = interrupt
        self._on_failure = on_failure
        self._processor = processor
        self._stopping = self._finishing = False
        # A received packet is told of before the next one is waited for.
        self._at_once = 1 if queue.from_outside else AT_ONCE
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start serving: the ring is looked at once without a kick (T8)."""
        install_interrupt_handler()
        self._thread.start()

    def request_stop(self) -> None:
        """Ask the thread to stop and return at once.  Any thread may, this one included."""
        self._stopping = True
        self._kick.signal()

    def request_finish(self) -> None:
        """Ask the thread to end as soon as its ring is empty, and return at once."""
        self._finishing = True
        self._kick.signal()

    def join(self, seconds: float) -> bool:
        """Wait for the thread to end, at most so many *seconds*; True if it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stop the thread and return when it has let go of the ring.

        What it has begun is finished and returned to the driver; what it has not
        goes back to the available ring.
        """
        self.request_stop()
        end_thread(self._thread, lambda: None)
        self._ring.release()

    def _run(self) -> None:
        name_thread(self.name)
        try:
            if self._processor is not None:
                with suppress(OSError):
                    os.sched_setaffinity(0, [self._processor])
            self._serve()
        except Exception as error:
            self.counters.errors += 1
            self._on_failure(self, error)

    def _serve(self) -> None:
        ring, kick, counters = self._ring, self._kick, self.counters
        ring.disable_notifications()
        # What was returned before this thread began may never have been told of (T8, S24).
        self._signal(0)
        while not self._stopping:
            if self.serve_available() or ring.enable_notifications():
                continue
            if self._finishing:
                return
            kicks = kick.wait()
            if self._stopping or self._finishing:
                continue
            counters.kicks += kicks
            counters.wakeups += 1
            ring.disable_notifications()

    def serve_available(self) -> bool:
        """Serve the next chains, a few at most, on the calling thread; False if there were none.

        Those it has begun are returned to the driver, which is told of them; the
        others go back to the available ring.
        """
        ring, service = self._ring, self._service
        chains = ring.pop_many(self._at_once)
        if not chains:
            return False
        served = moved = 0
        source_ended = False
        try:
            for chain in chains:
                if self._stopping:
                    break
                chain.written = written = service(chain)
                moved += chain.readable_length + written
                served += 1
        except InterruptedError:
            pass
        except SourceEnded:
            source_ended = True
        finally:
            if served < len(chains):
                ring.put_back(chains[served:])
                chains = chains[:served]
            ring.push_many(chains)
            self._signal(served)
            counters = self.counters
            counters.chains += served
            counters.bytes += moved
        if source_ended:
            self._rest()
        return True

    def _signal(self, returned: int) -> None:
        """Interrupt the guest if it wants to be told of the chains that were *returned* to it."""
        if self._ring.should_interrupt():
            self._interrupt.signal()
            self.counters.interrupts += 1
        elif returned:
            self.counters.suppressed += 1

    def _rest(self) -> None:
        """Nothing more will come from outside: sleep until stopped."""
        while not self._stopping:
            self._kick.wait()
