"""A ring in guest memory with a driver on one side and a queue's thread on the other."""

import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.failure import without_frames
from lguestlib.runtime.interrupt import EventfdInterrupt
from lguestlib.runtime.kick import EventfdKick
from lguestlib.runtime.polling import AdaptivePoll
from lguestlib.runtime.queue_thread import QueueThread
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.chain import part
from lguestlib.virtio.device import Queue
from lguestlib.virtio.device_queue import new_device_queue
from lguestlib.virtio.driver_queue import DriverQueue, new_driver_queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.split_driver import Buffer

FEATURES = int(Feature.VERSION_1 | Feature.RING_EVENT_IDX | Feature.RING_INDIRECT_DESC)
BUFFERS_AT = 0x10_0000
PATIENCE = 10.0
"""Seconds until what does not come is a failure."""


def eventually(happened: Callable[[], bool], what: str) -> None:
    """Wait until *happened*, or fail."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        time.sleep(0.0005)


def write_all(write: Callable[[Sequence[memoryview]], int], *pieces: bytes) -> None:
    """Write *pieces* out, in as many calls of *write* as it takes."""
    buffers = tuple(memoryview(bytearray(piece)) for piece in pieces)
    done, length = 0, sum(map(len, buffers))
    while done < length:
        done += write(part(buffers, done, length - done))


def buffer(number: int = 0, length: int = 64) -> Buffer:
    """The buffer of that *number*, each in its own 4 KiB."""
    return Buffer(GuestAddress(BUFFERS_AT + 4096 * number), length)


def open_descriptors() -> set[str]:
    """This process's open file descriptors, but for the one that lists them."""
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


@contextmanager
def nothing_left() -> Iterator[None]:
    """Whatever runs inside gives back the threads and descriptors it has used."""
    descriptors, threads = open_descriptors(), threading.active_count()
    yield
    eventually(lambda: threading.active_count() <= threads, "the threads' end")
    left = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in open_descriptors() - descriptors}
    assert not left, left


class Rig:
    """One queue, served by a thread from `start` on; what *queue* does is the test's."""

    def __init__(
        self,
        queue: Queue,
        size: int = 64,
        features: int = FEATURES,
        tracer: Tracer | None = None,
        on_failure: Callable[[QueueThread, Exception], None] | None = None,
        poll: AdaptivePoll | None = None,
    ) -> None:
        self.memory = GuestMemory.anonymous(16 << 20)
        self.layout = QueueLayout.contiguous(0, size, GuestAddress(0x1000))
        self.features = features
        self.driver: DriverQueue[int] = new_driver_queue(self.layout, self.memory, features)
        self.tracer = tracer or Tracer()
        self.kick = EventfdKick(tracer=tracer)
        self.interrupt = EventfdInterrupt(lambda: None, tracer=tracer)
        self.counters = QueueCounters()
        self.failures: list[Exception] = []
        self._queue = queue
        self._poll = poll
        self._on_failure = on_failure or self._failed
        self.ring = new_device_queue(self.layout, self.memory, features)
        self.thread = self._new_thread()

    def _new_thread(self) -> QueueThread:
        return QueueThread(
            self._queue.name, self._queue, self.ring, self.kick, self.interrupt, self.counters, self._on_failure,
            poll=self._poll,
        )  # fmt: skip

    def renew(self) -> None:
        """A new thread, to go on where the stopped one was."""
        self.ring = new_device_queue(self.layout, self.memory, self.features, self.ring.state)
        self.thread = self._new_thread()

    def _failed(self, thread: QueueThread, error: Exception) -> None:
        self.failures.append(without_frames(error))

    def start(self) -> None:
        self.thread.start()

    def submit(self, token: int, readable: int = 64, writable: int = 0) -> None:
        """Make one chain available and kick if the device asks for it."""
        parts = [buffer(token % 1024, readable)] if readable else []
        room = [buffer(1024 + token % 1024, writable)] if writable else []
        self.driver.add(parts, room, token)
        if self.driver.kick_needed():
            self.kick.signal()

    def collect(self, count: int) -> list[tuple[int, int]]:
        """Sleep on the interrupt until *count* chains have come back."""
        done: list[tuple[int, int]] = []
        waiting = select.poll()
        waiting.register(self.interrupt.fd, select.POLLIN)
        while True:
            done += self.driver.reap()
            if len(done) >= count:
                return done
            if not self.driver.enable_interrupts():
                assert waiting.poll(PATIENCE * 1000), f"{len(done)} of {count} chains came back"
                os.read(self.interrupt.fd, 8)

    def close(self) -> None:
        self.thread.stop()
        self.driver.release()
        self.kick.close()
        self.interrupt.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
