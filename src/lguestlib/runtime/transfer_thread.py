"""A queue's thread with many requests in hand, which the kernel carries out side by side."""

import errno
import os
import time
from collections.abc import Callable, Sequence

from lguestlib.abi.eventfd import BYTES
from lguestlib.abi.libc import failure
from lguestlib.runtime.backend.uring import Completion, Uring
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.interrupt import Interrupt
from lguestlib.runtime.kick import Kick
from lguestlib.runtime.polling import AdaptivePoll
from lguestlib.runtime.queue_thread import QueueThread
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Queue
from lguestlib.virtio.device_queue import DeviceQueue
from lguestlib.virtio.split_device import BATCH
from lguestlib.virtio.transfer import Operation, Transfer

AT_ONCE = 8
"""Completions returned before the driver is told, when there are more."""

ALONE = 32
"""Chains that have come one at a time, each when the one before was done, until such are simply served."""

STUCK_SECONDS = 30.0
"""How long a thread that is to stop waits for a request before it reports it and gives it up."""

# Numbers in the ring beside the chains' heads, which have 16 bits.
_KICK, _CANCEL = 1 << 16, 1 << 17
_OTHERS = 2

# A member of an enumeration is found slowly through its class.
_READ, _WRITE = Operation.READ, Operation.WRITE


class TransferThread(QueueThread):
    """Serves *queue* by its *transfers*, on an io_uring of its own.

    While requests are in flight it sleeps in io_uring_enter(2) alone, which submits
    what there is and waits for what is complete and for the kick, and chains go
    back in the order of their completion.  A driver that asks for one thing at a
    time is served as by any queue's thread: that is two calls less for each.

    When it stops, or exchanges its ends, it first waits for what is in flight:
    nothing reaches the guest's memory afterwards.  A request that does not come
    back is reported like a failure; then the kernel is asked to end it early.
    It does not *poll*: what it waits for comes from the kernel.
    """

    def __init__(
        self,
        name: str,
        queue: Queue,
        ring: DeviceQueue,
        kick: Kick,
        interrupt: Interrupt,
        counters: QueueCounters,
        on_failure: Callable[[QueueThread, Exception], None],
        processor: int | None = None,
        poll: AdaptivePoll | None = None,
    ) -> None:
        super().__init__(name, queue, ring, kick, interrupt, counters, on_failure, processor, poll)
        if queue.transfers is None:
            raise ValueError(f"{name}: a queue without transfers")
        self._file = queue.transfers.file
        self._begin = queue.transfers.begin
        self._finish = queue.transfers.finish
        self._in_flight: dict[int, Transfer] = {}
        self._kicks = memoryview(bytearray(BYTES))
        self._kick_awaited = False
        self._alone = 0

    def _serve(self) -> bool:
        with Uring(self._ring.size + _OTHERS, self._kick.tracer) as uring:
            try:
                return self._serve_with(uring)
            finally:
                self._drain(uring)

    def _serve_with(self, uring: Uring) -> bool:
        ring = self._ring
        ring.disable_notifications()
        # What was returned before this thread began may never have been told of (T8, S24).
        self._signal(0)
        while not self._attention:
            wait = not self._begin_available(uring) and not ring.enable_notifications()
            if wait and self._finishing:
                return True
            if self._in_flight or self._kick_awaited:
                self._await_kick(uring)
                self._complete(uring, uring.enter(wait))
            elif wait:
                self._woken(self._kick.wait())
            if wait:
                ring.disable_notifications()
        return False

    def _begin_available(self, uring: Uring) -> bool:
        """Begin the next chains, or serve what needs no transfer; whether there may be more."""
        chains = self._ring.pop_many(BATCH)
        if not chains:
            return False
        self._alone = 0 if self._in_flight or len(chains) > 1 else self._alone + 1
        if self._alone > ALONE:
            return self._serve_alone(chains[0])
        served: list[Chain] = []
        begun = 0
        try:
            for chain in chains:
                if self._attention:
                    break
                transfer = self._begin(chain)
                if transfer is None:
                    served.append(chain)
                else:
                    self._in_flight[chain.head] = transfer
                    self._submit(uring, transfer)
                begun += 1
        except InterruptedError:
            pass
        finally:
            if begun < len(chains):
                self._ring.put_back(chains[begun:])
            if served:
                self._give_back(served)
        return len(chains) == BATCH

    def _serve_alone(self, chain: Chain) -> bool:
        """Serve *chain*, the only one there is; as `_begin_available`."""
        try:
            chain.written = self._service(chain)
        except BaseException as error:
            self._ring.put_back([chain])
            if isinstance(error, InterruptedError):
                return True
            raise
        try:
            # Before the driver sees this one done, and answers it with the next.
            company = self._ring.pop_many(1)
            self._ring.put_back(company)
        finally:
            self._give_back([chain])
        if company:
            self._alone = 0
        return True

    def _submit(self, uring: Uring, transfer: Transfer) -> None:
        if transfer.operation is _READ:
            uring.read(self._file, transfer.buffers, transfer.offset, transfer.chain.head)
        elif transfer.operation is _WRITE:
            uring.write(self._file, transfer.buffers, transfer.offset, transfer.chain.head)
        else:
            uring.flush(self._file, transfer.chain.head)

    def _complete(self, uring: Uring, completions: Sequence[Completion]) -> None:
        """Finish what is complete, return it to the driver and tell it, a few at a time."""
        done: list[Chain] = []
        try:
            for number, result in completions:
                if number < _KICK:
                    transfer = self._in_flight[number]
                    if not self._finish(transfer, result):
                        self._submit(uring, transfer)
                        continue
                    del self._in_flight[number]
                    done.append(transfer.chain)
                    if len(done) == AT_ONCE:
                        returned, done = done, []
                        self._give_back(returned)
                elif number == _KICK:
                    self._kicked(result)
        finally:
            if done:
                self._give_back(done)

    def _await_kick(self, uring: Uring) -> None:
        if not self._kick_awaited:
            uring.read(self._kick.fd, [self._kicks], 0, _KICK)
            self._kick_awaited = True

    def _kicked(self, result: int) -> None:
        self._kick_awaited = False
        if result == -errno.EAGAIN:
            # Whoever shares the descriptor has made it non-blocking, for all.
            os.set_blocking(self._kick.fd, True)
        elif result < 0 and result not in (-errno.ECANCELED, -errno.EINTR):
            raise failure(-result, "read", self._kick.fd)
        elif result > 0:
            self._woken(int.from_bytes(self._kicks, "little"))

    def _woken(self, kicks: int) -> None:
        if not self._attention and not self._finishing:
            self.counters.kicks += kicks
            self.counters.wakeups += 1

    def _give_back(self, chains: Sequence[Chain]) -> None:
        self._return(chains, sum([chain.readable_length + chain.written for chain in chains]))

    def _drain(self, uring: Uring) -> None:
        """Return when nothing is left in the kernel; raise what went wrong on the way."""
        wrong: Exception | None = None
        patience = time.monotonic() + STUCK_SECONDS
        given_up = False
        if self._kick_awaited:
            uring.cancel(_KICK, _CANCEL)
        while uring.outstanding:
            completions = uring.enter(True, STUCK_SECONDS)
            try:
                self._complete(uring, completions)
            except Exception as error:
                wrong = wrong or error
            if uring.outstanding and not given_up and time.monotonic() > patience:
                given_up = True
                self._give_up(uring)
        self._in_flight.clear()
        if wrong:
            raise wrong

    def _give_up(self, uring: Uring) -> None:
        """Tell of what does not come back, and ask the kernel to end it early."""
        what = f"{len(self._in_flight)} requests have not come back for {STUCK_SECONDS:g} s and are given up"
        for number in self._in_flight:
            uring.cancel(number, _CANCEL)
        self._on_failure(self, OSError(errno.ETIMEDOUT, what))
