"""A virtqueue is a thread: it sleeps in one blocking call, works, and interrupts the guest itself."""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from lguestlib.abi.signals import install_interrupt_handler
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.ending import call_out, end_thread, wake_thread
from lguestlib.runtime.interrupt import Interrupt
from lguestlib.runtime.kick import Kick
from lguestlib.runtime.naming import name_this_thread
from lguestlib.runtime.polling import AdaptivePoll
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Queue, SourceEnded
from lguestlib.virtio.device_queue import DeviceQueue
from lguestlib.virtio.queue_state import QueueState

AT_ONCE = 32
"""Chains taken, served and returned before the driver is told, at most; and no more than half of what it has out."""

MERGED_AT_ONCE = 16
"""Chains taken at a time until there is room enough for merging."""


class QueueEnds(NamedTuple):
    """What a queue's thread works on: its ring, and its ways to be woken and to interrupt."""

    ring: DeviceQueue
    kick: Kick
    interrupt: Interrupt


class QueueThread:
    """Serves *ring* with *queue*'s service function until stopped, or until it fails.

    It sleeps on *kick*, or inside a service that waits for the outside; on
    *processor*, if not None, whenever it runs.  With *poll* it first looks for work
    a while, and holds the interpreter meanwhile: right for one busy queue alone.
    *on_failure* is called on the thread, as its last act, with the exception
    that ended it.
    """

    def __init__(
        self,
        name: str,
        queue: Queue,
        ring: DeviceQueue,
        kick: Kick,
        interrupt: Interrupt,
        counters: QueueCounters,
        on_failure: Callable[["QueueThread", Exception], None],
        processor: int | None = None,
        poll: AdaptivePoll | None = None,
    ) -> None:
        self.name = name
        self.counters = counters
        self._service = queue.service
        self._ring = ring
        self._kick = kick
        self._interrupt = interrupt
        self._on_failure = on_failure
        self._processor = processor
        self._poll = poll
        # Attention: to stop, or to make the change.
        self._attention = self._stopping = self._finishing = False
        self._change: tuple[Callable[[QueueEnds], QueueEnds], threading.Event] | None = None
        # A received packet is told of before the next one is waited for.
        self._at_once = 1 if queue.from_outside else AT_ONCE
        self._merging = queue.merging
        self._room = queue.merging.room if queue.merging else 0
        # Popped for merging, and none of them begun.
        self._held: list[Chain] = []
        self._held_room = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start serving: the ring is looked at once without a kick (T8)."""
        install_interrupt_handler()
        self._thread.start()

    def request_stop(self) -> None:
        """Ask the thread to stop and return at once.  Any thread may, this one included."""
        self._stopping = self._attention = True
        self._knock()
        # Out of a wait for the outside, too: what comes there is not this thread's any more.
        call_out(self._thread)

    def request_finish(self) -> None:
        """Ask the thread to end as soon as its ring is empty, and return at once."""
        self._finishing = True
        self._kick.signal()

    def join(self, seconds: float) -> bool:
        """Wait for the thread to end, at most so many *seconds*; True if it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> QueueState:
        """Stop the thread; return when it has let go of the ring, with the state to go on from.

        What it has begun is finished and returned to the driver; what it has not
        goes back to the available ring.
        """
        self.request_stop()
        end_thread(self._thread, self._unblock)
        state = self._ring.state
        self._ring.release()
        return state

    def exchange(self, change: Callable[[QueueEnds], QueueEnds]) -> bool:
        """Let *change*, on the queue's thread and between two chains, tell what to go on with (T10, T12).

        True when the thread no longer uses what was changed, and has released the
        ring if it was; False when it has ended without, and `stop` has to let go of
        everything: it was to stop, or failed, of what *change* raised perhaps.
        One thread at a time may call this.
        """
        changed = threading.Event()
        self._change = change, changed
        self._attention = True
        self._knock()
        wake_thread(self._thread, self._unblock, changed.wait)
        return changed.is_set()

    def _knock(self) -> None:
        """Kick; where that fails it is done again, by who waits for the thread."""
        with suppress(OSError):
            self._kick.signal()

    def _unblock(self) -> None:
        self._knock()
        with suppress(OSError):
            self._interrupt.unblock()

    def _run(self) -> None:
        name_this_thread(self.name)
        try:
            if self._processor is not None:
                with suppress(OSError):
                    os.sched_setaffinity(0, [self._processor])
            try:
                while not self._stopping:
                    self._make_change()
                    if self._serve():
                        break
            finally:
                self._put_back_held()
        except Exception as error:
            self.counters.errors += 1
            self._on_failure(self, error)

    def _make_change(self) -> None:
        """Go on with other ends, if that was asked for."""
        # Before the look: what is asked for after it finds the thread attentive again.
        self._attention = False
        if self._stopping:
            self._attention = True
        wanted, self._change = self._change, None
        if wanted is None:
            return
        change, changed = wanted
        self._put_back_held()
        before = QueueEnds(self._ring, self._kick, self._interrupt)
        self._ring, self._kick, self._interrupt = change(before)
        if self._ring is not before.ring:
            before.ring.release()
        changed.set()
        if self._interrupt is not before.interrupt:
            # What went to the one before may not have been heard: a spurious one is safe (T10).
            self._interrupt.signal()
            self.counters.interrupts += 1

    def _serve(self) -> bool:
        """Serve until there is something else to see to, or until all is served when that is the end."""
        ring, kick, counters = self._ring, self._kick, self.counters
        serve_available = self.serve_merging if self._room else self.serve_available
        ring.disable_notifications()
        # What was returned before this thread began may never have been told of (T8, S24).
        self._signal(0)
        poll = self._poll
        while not self._attention:
            if serve_available():
                continue
            if poll and not self._finishing and poll.look(self._has_work):
                continue
            if ring.enable_notifications():
                continue
            if self._finishing:
                return True
            kicks = kick.wait()
            if poll:
                poll.woken()
            if self._attention or self._finishing:
                continue
            counters.kicks += kicks
            counters.wakeups += 1
            ring.disable_notifications()
        return False

    def _has_work(self) -> bool:
        return self._attention or self._finishing or self._ring.has_available()

    def serve_available(self) -> bool:
        """Serve the next chains, a few at most, on the calling thread; False if there were none.

        Those it has begun are returned to the driver, which is told of them; the
        others go back to the available ring.
        """
        ring, service = self._ring, self._service
        chains = ring.pop_many(self._at_once, half=True)
        if not chains:
            return False
        served = moved = 0
        source_ended = False
        try:
            for chain in chains:
                if self._attention:
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
            self._return(chains, moved)
        if source_ended:
            self._rest()
        return True

    def serve_merging(self) -> bool:
        """As `serve_available`, with one piece of work over as many chains as it takes.

        Chains that it does not take are kept for the next one.
        """
        assert self._merging is not None
        held = self._held
        while self._held_room < self._room and (chains := self._ring.pop_many(MERGED_AT_ONCE)):
            held += chains
            self._held_room += sum([chain.writable_length for chain in chains])
        if not held:
            return False
        try:
            taken = 0 if self._attention else self._merging.serve(held, len(held) == self._ring.size)
        except InterruptedError:
            return True
        except SourceEnded:
            self._rest()
            return True
        if not taken:
            # What has come needs more chains than there are: sleep until there are.
            return False
        chains, self._held = held[:taken], held[taken:]
        self._held_room -= sum([chain.writable_length for chain in chains])
        self._return(chains, sum([chain.readable_length + chain.written for chain in chains]))
        return True

    def _put_back_held(self) -> None:
        held, self._held, self._held_room = self._held, [], 0
        self._ring.put_back(held)

    def _return(self, chains: Sequence[Chain], moved: int) -> None:
        """Return *chains*, in which *moved* bytes went to or fro, to the driver, and tell it."""
        self._ring.push_many(chains)
        self._signal(len(chains))
        counters = self.counters
        counters.chains += len(chains)
        counters.bytes += moved

    def _signal(self, returned: int) -> None:
        """Interrupt the guest if it wants to be told of the chains that were *returned* to it."""
        if self._ring.should_interrupt():
            self._interrupt.signal()
            self.counters.interrupts += 1
        elif returned:
            self.counters.suppressed += 1

    def _rest(self) -> None:
        """Nothing more will come from outside: sleep until there is something else to see to."""
        while not self._attention:
            self._kick.wait()
