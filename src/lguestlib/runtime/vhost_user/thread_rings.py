"""Rings served by threads of this process, each asleep on its kick."""

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from lguestlib.abi.eventfd import is_eventfd
from lguestlib.memory.dirty_log import DirtyLog
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.mapping import MappingLost, check_held, map_shared
from lguestlib.memory.region import Region
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.failure import describe, without_frames
from lguestlib.runtime.gil import meeting_place
from lguestlib.runtime.interrupt import CallInterrupt, Interrupt, NoInterrupt, has_room
from lguestlib.runtime.kick import EventfdKick
from lguestlib.runtime.polling import AdaptivePoll
from lguestlib.runtime.queue_thread import QueueEnds, QueueThread
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.transfer_thread import TransferThread
from lguestlib.runtime.vhost_user.rings import OnFailure
from lguestlib.virtio.device import Queue
from lguestlib.virtio.device_queue import DeviceQueue, inflight_record, new_device_queue
from lguestlib.virtio.errors import MemoryGone
from lguestlib.virtio.queue_log import QueueLog
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.vhost_user.backend import (
    LOG_ALL,
    Area,
    MapInflight,
    MapLog,
    MapMemory,
    QueueSetup,
)
from lguestlib.virtio.vhost_user.memory_table import MemoryRegion
from lguestlib.virtio.vhost_user.message import Message, ProtocolError


class _SharedKick(EventfdKick):
    """A kick whose counter the front-end may have filled: then nobody sleeps on it, and no more is needed."""

    def signal(self) -> None:
        if has_room(self.fd):
            with suppress(BlockingIOError):
                super().signal()


class _ThreadRing:
    """A ring that *thread* serves on what *rings* has."""

    def __init__(self, rings: "ThreadRings", thread: QueueThread) -> None:
        self._rings = rings
        self._thread = thread

    def exchange(self, before: QueueSetup, setup: QueueSetup) -> None:
        self._thread.exchange(lambda ends: self._rings.exchanged(ends, before, setup))

    def request_stop(self) -> None:
        self._thread.request_stop()

    def stop(self) -> QueueState:
        state = self._thread.stop()
        self._rings.stopped(self._thread)
        return state


def _memory_gone(error: Exception) -> bool:
    return isinstance(error, MemoryGone) or isinstance(error, OSError) and error.errno == errno.EFAULT


class ThreadRings:
    """Serves *queues* of the device *name* from a thread each.

    *counters* has one entry for each of *queues*.  Before it sleeps a thread looks
    for work for up to *poll* nanoseconds.
    """

    def __init__(
        self,
        name: str,
        queues: Sequence[Queue],
        counters: Sequence[QueueCounters],
        tracer: Tracer | None = None,
        poll: int = 0,
    ) -> None:
        self._name = name
        self._queues = queues
        self._counters = counters
        self._tracer = tracer
        self._poll = poll
        self._regions: dict[MemoryRegion, Region] = {}
        self._memory: GuestMemory | None = None
        self._log: DirtyLog | None = None
        self._inflight: tuple[mmap.mmap, int, int] | None = None
        self._replaced: list[Region | DirtyLog] = []
        self._threads: list[QueueThread] = []
        self._on_lost: Callable[[], None] = lambda: None
        self.loss: MappingLost | None = None
        meet = any(queue.from_outside for queue in queues)
        self._processors = [meeting_place(queue.party) if meet else None for queue in queues]

    def open(self, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost

    def _lose(self, loss: MappingLost) -> None:
        """Nothing more is begun: what is read from now on may be zeros, and what is written gone.

        On the thread that has found out, at any place.
        """
        if self.loss is None:
            self.loss = loss
            for thread in self._threads:
                thread.request_stop()
            self._on_lost()

    def take(self, effect: MapMemory | MapLog | MapInflight, message: Message) -> None:
        match effect:
            case MapMemory():
                self._map(effect)
            case MapLog(area):
                before, self._log = self._log, DirtyLog(area.fd, area.size, area.offset, self._lose)
                if before:
                    self._replaced.append(before)
            case MapInflight(area, length, size, _):
                self._record_in(area, length, size)

    def _map(self, change: MapMemory) -> None:
        """Exchange the guest's memory: threads take it between two chains; the old goes when none uses it (T12)."""
        regions: dict[MemoryRegion, Region] = {}
        try:
            for told in change.table.regions:
                if told in change.files:
                    regions[told] = Region.from_fd(
                        told.guest, told.size, change.files[told], told.offset, self._lose
                    )
                else:
                    regions[told] = self._regions[told]
            memory = GuestMemory(regions.values()) if regions else None
        except BaseException:
            for told in change.files.keys() & regions.keys():
                regions[told].close()
            raise
        self._replaced += [
            region for told, region in self._regions.items() if regions.get(told) is not region
        ]
        self._regions, self._memory = regions, memory

    def _record_in(self, area: Area, length: int, size: int) -> None:
        before = self._inflight
        check_held(area.fd, area.size, area.offset)
        # Not all of the area, whose length is the front-end's.
        mapping, skip = map_shared(area.fd, length, area.offset, "inflight record: ", self._lose)
        self._inflight = mapping, skip, size
        if before:
            before[0].close()

    def let_go(self) -> None:
        replaced, self._replaced = self._replaced, []
        for each in replaced:
            each.close()

    def forget_inflight(self) -> None:
        if self._inflight:
            mapping, skip, _ = self._inflight
            with memoryview(mapping) as whole, whole[skip:] as area:
                area[:] = bytes(len(area))

    def start(self, index: int, setup: QueueSetup, on_failure: OnFailure) -> _ThreadRing:
        queue, ring = self._queues[index], self._ring(setup, setup.base)
        kind = TransferThread if queue.transfers else QueueThread
        thread = kind(
            f"{self._name} {queue.name}", queue, ring, self._kick(setup),
            self._interrupt(setup), self._counters[index],
            lambda thread, error: self._failed(thread, error, on_failure), self._processors[index],
            AdaptivePoll(self._poll) if self._poll else None,
        )  # fmt: skip
        try:
            thread.start()
        except BaseException:
            # There may be no more threads.
            ring.release()
            raise
        self._threads.append(thread)
        if self.loss:
            # Found out meanwhile, by another, which did not know of this one.
            thread.request_stop()
        return _ThreadRing(self, thread)

    def _failed(self, thread: QueueThread, error: Exception, on_failure: OnFailure) -> None:
        if _memory_gone(error):
            self._lose(MappingLost(describe(error)))
        on_failure(f"{thread.name}: {describe(without_frames(error))}")

    def stopped(self, thread: QueueThread) -> None:
        """*thread* has let go of its ring."""
        # Another list: who loses something may be going through this one.
        self._threads = [each for each in self._threads if each is not thread]

    def exchanged(self, ends: QueueEnds, before: QueueSetup, setup: QueueSetup) -> QueueEnds:
        """On the queue's thread: the ends for *setup*, with what has not changed kept."""
        kick = ends.kick if setup.kick == before.kick else self._kick(setup)
        interrupt = ends.interrupt if setup.call == before.call else self._interrupt(setup)
        ring = ends.ring
        if (setup.generation, setup.features, setup.layout, setup.log_used) != (
            before.generation, before.features, before.layout, before.log_used,
        ):  # fmt: skip
            ring = self._ring(setup, ends.ring.state)
        return QueueEnds(ring, kick, interrupt)

    def _ring(self, setup: QueueSetup, state: QueueState) -> DeviceQueue:
        if self._memory is None:
            raise ProtocolError("the guest has no memory")
        index, record, log = setup.layout.index, None, None
        if self._inflight:
            mapping, skip, size = self._inflight
            with memoryview(mapping) as whole, whole[skip:] as area:
                record = inflight_record(index, area, size, setup.features)
        if self._log and (setup.features & LOG_ALL or setup.log_used is not None):
            log = QueueLog(self._log, bool(setup.features & LOG_ALL), setup.log_used)
        try:
            return new_device_queue(
                setup.layout, self._memory, setup.features, state, inflight=record, log=log
            )
        except BaseException:
            if record:
                record.release()
            raise

    def _kick(self, setup: QueueSetup) -> EventfdKick:
        return _SharedKick(setup.kick, self._tracer)

    def _interrupt(self, setup: QueueSetup) -> Interrupt:
        if setup.call >= 0 and not is_eventfd(setup.call):
            # Its two ends are not non-blocking together, and a full one could not be emptied from here.
            os.set_blocking(setup.call, False)
        return CallInterrupt(setup.call, self._tracer) if setup.call >= 0 else NoInterrupt()

    def close(self) -> None:
        self.let_go()
        for region in self._regions.values():
            region.close()
        if self._log:
            self._log.close()
        if self._inflight:
            self._inflight[0].close()
