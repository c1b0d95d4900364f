"""One front-end's connection: its messages on one thread, a thread for each of its rings."""

import mmap
import os
import socket
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lguestlib.abi import memfd, uio
from lguestlib.abi import vhost_user as abi
from lguestlib.abi.eventfd import SIGNAL, is_eventfd
from lguestlib.memory.dirty_log import DirtyLog
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.mapping import check_held, map_shared
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
from lguestlib.runtime.vhost_user.stream import MessageStream, close_all
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.errors import VirtioError
from lguestlib.virtio.inflight import InflightRecord, area_size, part_of
from lguestlib.virtio.layout import RingIndex
from lguestlib.virtio.queue_log import QueueLog
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.vhost_user.backend import (
    LOG_ALL,
    PROTOCOL_FEATURES,
    Area,
    Arrange,
    BackEnd,
    Effect,
    MapInflight,
    MapLog,
    MapMemory,
    NewInflight,
    QueueSetup,
    Reset,
    StopQueue,
)
from lguestlib.virtio.vhost_user.memory_table import MemoryRegion
from lguestlib.virtio.vhost_user.message import Message, ProtocolError

_INTERRUPTS = (abi.VHOST_USER_SET_VRING_CALL, abi.VHOST_USER_SET_VRING_ERR)


class _SharedKick(EventfdKick):
    """A kick whose counter the front-end may have filled: then nobody sleeps on it, and no more is needed."""

    def signal(self) -> None:
        if has_room(self.fd):
            with suppress(BlockingIOError):
                super().signal()


@dataclass
class _Served:
    """A ring that a thread serves, as it was set up."""

    setup: QueueSetup
    thread: QueueThread


class Conversation:
    """Serves *device* to the front-end on *stream*, from its first message to its last.

    *counters* has one entry for each of *queues*, the device's.  *report* is
    given lines for people.  Before it sleeps a queue's thread looks for work for up
    to *poll* nanoseconds.
    """

    def __init__(
        self,
        device: Device,
        queues: Sequence[Queue],
        counters: Sequence[QueueCounters],
        stream: MessageStream,
        report: Callable[[str], None],
        tracer: Tracer | None = None,
        poll: int = 0,
    ) -> None:
        self._device = device
        self._queues = queues
        self._counters = counters
        self._stream = stream
        self._report = report
        self._tracer = tracer
        self._poll = poll
        self._backend = BackEnd(device)
        self._served: dict[int, _Served] = {}
        self._regions: dict[MemoryRegion, Region] = {}
        self._memory: GuestMemory | None = None
        self._log: DirtyLog | None = None
        self._inflight: tuple[mmap.mmap, int, int] | None = None
        self._ending = False
        self._active = False
        self._failure: Exception | None = None
        # Held by whoever lets the device fail, and by whoever closes descriptors that are used for it.
        self._lock = threading.Lock()
        self._processor = meeting_place() if any(queue.from_outside for queue in queues) else None
        # Held for a moment by whoever sends on the channel or replaces it.
        self._channel_lock = threading.Lock()
        self._channel: MessageStream | None = None
        self._channel_fd = -1

    def run(self) -> None:
        """Answer messages until there are no more, or one that breaks the protocol; then give everything back."""
        self._device.on_config_change = self._config_changed
        try:
            while (message := self._stream.receive()) is not None:
                self._handle(message)
        except ConnectionError:
            # It is gone without waiting for its last answer.
            pass
        except Exception as error:
            if not self._ending:
                self._report(f"{self._device.name}: the front-end is cut off: {describe(error)}")
        finally:
            self._close()

    def end(self) -> None:
        """Make `run` return soon; any thread may call this."""
        self._ending = True
        self._stream.end()

    def _handle(self, message: Message) -> None:
        backend = self._backend
        result, failure = 0, None
        effect = backend.receive(message)
        for fd in message.fds:
            self._check(message, fd)
        if effect is not None:
            try:
                result = self._apply(effect)
            except (OSError, ValueError) as error:
                failure = error
        discarded, backend.discarded = backend.discarded, []
        with self._lock:
            close_all(discarded)
        self._follow_channel()
        reply = backend.finish(result, failure)
        if reply is not None:
            try:
                self._stream.send(reply)
            finally:
                close_all(reply.fds)

    @staticmethod
    def _check(message: Message, fd: int) -> None:
        """Raise ProtocolError unless *fd* is of the kind that *message* is to bring."""
        if message.request == abi.VHOST_USER_SET_VRING_KICK:
            # One sleeps in a read of it.
            good, wanted = is_eventfd(fd), "an eventfd"
        elif message.request in _INTERRUPTS:
            # User-mode Linux has a pair of sockets.
            kind = os.fstat(fd).st_mode
            good = is_eventfd(fd) or stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)
            wanted = "an eventfd, a pipe or a socket"
        elif message.request == abi.VHOST_USER_SET_BACKEND_REQ_FD:
            good, wanted = stat.S_ISSOCK(os.fstat(fd).st_mode), "a socket"
        else:
            return
        if not good:
            raise ProtocolError(f"{message.name}: the descriptor is not {wanted}")

    def _apply(self, effect: Effect) -> int:
        match effect:
            case MapMemory():
                self._map(effect)
            case Arrange(indices):
                for index in indices:
                    self._arrange(index)
            case StopQueue(index):
                return self._stop_queue(index)
            case Reset():
                self._stop_all()
                self._recovered()
                self._deactivate()
                self._forget_inflight()
            case MapLog(area):
                self._log_to(area)
            case NewInflight(queues, size):
                return memfd.memfd("vhost-user-inflight", area_size(queues, size))
            case MapInflight(area, queues, size):
                self._record_in(area, queues, size)
        return 0

    def _map(self, change: MapMemory) -> None:
        """Exchange the guest's memory: threads take it between two chains; the old goes when none uses it (T12)."""
        regions: dict[MemoryRegion, Region] = {}
        try:
            for told in change.table.regions:
                if told in change.files:
                    regions[told] = Region.from_fd(told.guest, told.size, change.files[told], told.offset)
                else:
                    regions[told] = self._regions[told]
            memory = GuestMemory(regions.values()) if regions else None
        except BaseException:
            for told in change.files.keys() & regions.keys():
                regions[told].close()
            raise
        gone = [region for told, region in self._regions.items() if regions.get(told) is not region]
        self._regions, self._memory = regions, memory
        self._arrange_served()
        for region in gone:
            region.close()

    def _log_to(self, area: Area) -> None:
        before, self._log = self._log, DirtyLog(area.fd, area.size, area.offset)
        self._arrange_served()
        if before:
            before.close()

    def _record_in(self, area: Area, queues: int, size: int) -> None:
        before = self._inflight
        check_held(area.fd, area.size, area.offset)
        # Not all of the area, whose length is the front-end's.
        mapping, skip = map_shared(area.fd, area_size(queues, size), area.offset)
        self._inflight = mapping, skip, size
        if before:
            before[0].close()

    def _forget_inflight(self) -> None:
        """The driver begins its rings anew, and so does the record of them."""
        if self._inflight:
            mapping, skip, _ = self._inflight
            with memoryview(mapping) as whole, whole[skip:] as area:
                area[:] = bytes(len(area))

    def _arrange_served(self) -> None:
        for index in list(self._served):
            self._arrange(index)

    def _arrange(self, index: int) -> None:
        """Make ring *index* as its setup says; where the device has failed, stop it."""
        served = self._served.get(index)
        setup = None
        try:
            setup = self._backend.setup(index)
            if setup is None or self._failure:
                pass
            elif served is None:
                self._start(index, setup)
            elif setup != served.setup:
                before, served.setup = served.setup, setup
                served.thread.exchange(lambda ends: self._exchanged(ends, before, setup))
        except VirtioError as error:
            self._fail(index, self._name(index), error)
        if setup is None or self._failure:
            # Whatever it has used is let go of, since it may go now.
            self._stop_ring(index)

    def _start(self, index: int, setup: QueueSetup) -> None:
        if not self._active:
            try:
                self._device.activate(setup.features & ~(LOG_ALL | PROTOCOL_FEATURES))
            except Exception as error:
                self._fail(index, self._device.name, error)
                return
            self._active = True
        kind = TransferThread if self._queues[index].transfers else QueueThread
        thread = kind(
            self._name(index), self._queues[index], self._ring(setup, setup.base), self._kick(setup),
            self._interrupt(setup), self._counters[index],
            lambda thread, error: self._fail(index, thread.name, error), self._processor,
            AdaptivePoll(self._poll) if self._poll else None,
        )  # fmt: skip
        self._served[index] = _Served(setup, thread)
        thread.start()

    def _exchanged(self, ends: QueueEnds, before: QueueSetup, setup: QueueSetup) -> QueueEnds:
        """On the queue's thread: the ends for *setup*, with what has not changed kept."""
        kick = ends.kick if setup.kick == before.kick else self._kick(setup)
        interrupt = ends.interrupt if setup.call == before.call else self._interrupt(setup)
        ring = ends.ring
        if (setup.generation, setup.features, setup.layout, setup.log_used) != (
            before.generation, before.features, before.layout, before.log_used,
        ):  # fmt: skip
            ring = self._ring(setup, ends.ring.next_available)
        return QueueEnds(ring, kick, interrupt)

    def _ring(self, setup: QueueSetup, next_available: RingIndex) -> SplitDeviceQueue:
        if self._memory is None:
            raise ProtocolError("the guest has no memory")
        index, record, log = setup.layout.index, None, None
        if self._inflight:
            mapping, skip, size = self._inflight
            with memoryview(mapping) as whole, whole[skip:] as area:
                record = InflightRecord(index, part_of(area, index, size), size)
        if self._log and (setup.features & LOG_ALL or setup.log_used is not None):
            log = QueueLog(self._log, bool(setup.features & LOG_ALL), setup.log_used)
        try:
            return SplitDeviceQueue(
                setup.layout, self._memory, setup.features, next_available, inflight=record, log=log
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

    def _name(self, index: int) -> str:
        return f"{self._device.name} {self._queues[index].name}"

    def _stop_queue(self, index: int) -> int:
        self._stop_ring(index)
        if self._backend.idle:
            self._recovered()
            self._deactivate()
        return self._backend.rings[index].base

    def _stop_ring(self, index: int) -> None:
        served = self._served.pop(index, None)
        if served:
            self._backend.stopped(index, served.thread.stop())

    def _stop_all(self) -> None:
        for served in self._served.values():
            served.thread.request_stop()
        while self._served:
            self._served.popitem()[1].thread.stop()

    def _fail(self, index: int, where: str, error: Exception) -> None:
        """The device stops working until it is reset, or all its rings have been stopped."""
        with self._lock:
            if self._failure:
                return
            self._failure = without_frames(error)
            self._backend.failed = True
            for served in list(self._served.values()):
                served.thread.request_stop()
            told = self._backend.rings[index].error
            if told >= 0 and has_room(told):
                # It may be a pipe that nobody reads any more.
                with suppress(OSError):
                    uio.write(told, SIGNAL)
        self._report(f"{where}: {describe(error)}; the device has stopped until it is reset")

    def _recovered(self) -> None:
        self._failure = None
        self._backend.failed = False

    def _deactivate(self) -> None:
        if self._active:
            self._active = False
            try:
                self._device.deactivate()
            except Exception as error:
                self._report(f"{self._device.name}: {describe(error)}")

    def _follow_channel(self) -> None:
        """Have the channel for requests of our own that the front-end has given last."""
        fd = self._backend.channel
        if fd == self._channel_fd:
            return
        with self._channel_lock:
            if self._channel:
                self._channel.close()
            self._channel_fd = fd
            self._channel = MessageStream(socket.socket(fileno=os.dup(fd))) if fd >= 0 else None

    def _config_changed(self, device: Device) -> None:
        message = self._backend.config_change()
        with self._channel_lock:
            if message is not None and self._channel:
                # Without waiting for a front-end that does not read: who has not read the last one is told.
                with suppress(OSError):
                    self._channel.send(message, socket.MSG_DONTWAIT)

    def _close(self) -> None:
        self._device.on_config_change = lambda device: None
        self._stop_all()
        close_all(self._backend.close())
        self._follow_channel()
        self._deactivate()
        for region in self._regions.values():
            region.close()
        if self._log:
            self._log.close()
        if self._inflight:
            self._inflight[0].close()
        # Others may have the socket open, too.
        self._stream.end()
        self._stream.close()
