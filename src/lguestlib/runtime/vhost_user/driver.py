"""A driver in this process for the device of any vhost-user back-end."""

import os
import select
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.region import Region
from lguestlib.runtime.vhost_user.frontend import REPLY_SECONDS, BackEndError, FrontEnd
from lguestlib.virtio.device import RING_FEATURES
from lguestlib.virtio.driver_queue import DriverQueue, new_driver_queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.split_driver import Buffer

MEMORY_AT = GuestAddress(0x10_0000)
MEMORY = 16 << 20
QUEUE_SIZE = 64
_ALIGNMENT = 64


class Done(NamedTuple):
    """A request the device has returned, by its number, and the bytes it wrote."""

    number: int
    written: int


class VhostUserQueue:
    """One virtqueue, for one thread at a time; made by `VhostUserDevice`."""

    def __init__(self, layout: QueueLayout, memory: GuestMemory, features: int, front_end: FrontEnd) -> None:
        self.layout = layout
        self.ring: DriverQueue[int] = new_driver_queue(layout, memory, features)
        self._front_end = front_end
        self._requests = 0
        self._kick = self._call = -1
        self._served = False

    def start(self) -> None:
        """Have the back-end serve it."""
        self._kick = eventfd()
        self._call = eventfd()
        self._front_end.start_queue(self.layout, self._kick, self._call)
        self._served = True

    def stop(self) -> None:
        """The back-end lets go of it; what it has not begun it never will.  Raises BackEndError."""
        if self._served:
            self._served = False
            self._front_end.stop_queue(self.layout)

    def close(self) -> None:
        """Give back descriptors and views."""
        for fd in (self._kick, self._call):
            if fd >= 0:
                os.close(fd)
        self._kick = self._call = -1
        self.ring.release()

    def submit(
        self, readable: Sequence[Buffer], writable: Sequence[Buffer], table: GuestAddress | None = None
    ) -> int:
        """Make a chain available, notify the device if it wants to be, and return the request's number.

        Raises as `DriverQueue.add`.
        """
        number = self._requests
        self.ring.add(readable, writable, number, table)
        self._requests += 1
        if self.ring.kick_needed():
            os.write(self._kick, SIGNAL)
        return number

    def reap(self) -> list[Done]:
        """What the device has returned since the last time.  Raises QueueError for what cannot be."""
        return [Done(number, written) for number, written in self.ring.reap()]

    def wait(self, seconds: float | None = REPLY_SECONDS) -> list[Done]:
        """Sleep until the device has returned something, and take it.

        Raises BackEndError where that does not come within so many *seconds*, or
        never will; QueueError.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            done = self.reap()
            if done:
                return done
            if not self.ring.enable_interrupts():
                self._sleep(deadline)

    def _sleep(self, deadline: float | None) -> None:
        waiting = select.poll()
        waiting.register(self._call, select.POLLIN)
        waiting.register(self._front_end.connection_fd, select.POLLRDHUP)
        waiting.register(self._front_end.error_fd, select.POLLIN)
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = {fd for fd, _ in waiting.poll(left)}
        if self._call in ready:
            try:
                os.read(self._call, BYTES)
            except BlockingIOError:
                return
        elif ready:
            gone = self._front_end.connection_fd in ready
            reason = "the back-end has closed the connection" if gone else "the device has failed"
            raise BackEndError(self._front_end.path, f"{reason} (it may have said why)")
        else:
            raise BackEndError(
                self._front_end.path, f"ring {self.layout.index}: the device has not answered in time"
            )

    def request(
        self, readable: Sequence[Buffer], writable: Sequence[Buffer], seconds: float | None = REPLY_SECONDS
    ) -> int:
        """One request from start to end, none other being in flight; return the bytes the device wrote.

        Raises as `submit` and `wait`.
        """
        number = self.submit(readable, writable)
        (done,) = self.wait(seconds)
        if done.number != number:
            raise ValueError(f"request {done.number} was in flight already")
        return done.written


class VhostUserDevice:
    """The device of the back-end in *front_end*, up and running; it owns the conversation.

    With so many *queues* of *queue_size* descriptors, in shared memory of *memory*
    bytes, of which `buffer` hands out the rest; and, of the device's features,
    those *wanted* that are offered, RING_PACKED for packed rings.  Raises BackEndError, ValueError for more than
    the memory holds.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        queues: int = 1,
        wanted: int = 0,
        queue_size: int = QUEUE_SIZE,
        memory: int = MEMORY,
    ) -> None:
        self.front_end = front_end
        self.features = front_end.features & (wanted | RING_FEATURES | Feature.IN_ORDER)
        """The features negotiated."""
        self.queues: list[VhostUserQueue] = []
        with ExitStack() as opened:
            opened.callback(front_end.close)
            if not self.features & Feature.VERSION_1:
                raise BackEndError(front_end.path, "it does not offer VERSION_1, and is too old for this")
            if 0 < front_end.rings_max < queues:
                raise BackEndError(front_end.path, f"it has {front_end.rings_max} queues, not {queues}")
            self.memory = opened.enter_context(GuestMemory([Region.memfd(MEMORY_AT, memory)]))
            """What is shared with the back-end."""
            self._next = int(MEMORY_AT)
            front_end.share(self.memory, self.features)
            for index in range(queues):
                size = QueueLayout.contiguous(index, queue_size, GuestAddress(0)).end
                layout = QueueLayout.contiguous(index, queue_size, self.buffer(size).address)
                queue = VhostUserQueue(layout, self.memory, self.features, front_end)
                opened.callback(queue.close)
                self.queues.append(queue)
                queue.start()
            self._opened = opened.pop_all()

    @classmethod
    def connect(cls, path: str, queues: int = 1, wanted: int = 0, seconds: float = REPLY_SECONDS) -> Self:
        """The device of the back-end that listens at *path*, whose replies may take so many *seconds*."""
        return cls(FrontEnd.connect(path, seconds), queues, wanted)

    def buffer(self, size: int, data: bytes = b"") -> Buffer:
        """*size* bytes of the shared memory, to keep, with *data* at their start.

        Raises ValueError where there are no more, or *data* is longer.
        """
        if not 0 < size <= self.memory.regions[0].end - self._next or len(data) > size:
            raise ValueError(f"no buffer of {size} bytes for {len(data)}: make the device's memory larger")
        buffer = Buffer(GuestAddress(self._next), size)
        self._next = min(-(-(self._next + size) // _ALIGNMENT) * _ALIGNMENT, self.memory.regions[0].end)
        self.memory.write(buffer.address, data)
        return buffer

    def read(self, buffer: Buffer, size: int | None = None) -> bytes:
        """The bytes in *buffer*, or so many from its start."""
        return self.memory.read(buffer.address, buffer.length if size is None else size)

    def config(self, offset: int, size: int) -> bytes:
        """*size* bytes of the config space at *offset*.  Raises BackEndError."""
        return self.front_end.config(offset, size)

    def close(self) -> None:
        """Stop the queues, as far as the back-end still listens, and give everything back."""
        with self._opened:
            try:
                for queue in self.queues:
                    queue.stop()
                self.front_end.reset()
            except BackEndError:
                # It has gone, and with it all it might still do.
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
