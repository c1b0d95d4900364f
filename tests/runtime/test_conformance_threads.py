"""Every ring case against a live queue's thread, and after each the five assertions.

Bounded steps, bounded memory, as many descriptors and threads as before, the
neighbours go on working, and a typed error is recorded.
"""

import select
import time
import tracemalloc

import pytest
from runtime.rigs import PATIENCE, nothing_left

from lguestlib.abi.eventfd import BYTES
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.failure import without_frames
from lguestlib.runtime.interrupt import EventfdInterrupt
from lguestlib.runtime.kick import EventfdKick
from lguestlib.runtime.queue_thread import QueueThread
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.conformance.case import (
    Event,
    Fault,
    Flicker,
    Interrupts,
    Kick,
    Load,
    Publish,
    Restart,
    RingCase,
    RingStep,
    Served,
    Told,
)
from lguestlib.virtio.conformance.catalogue import CASES
from lguestlib.virtio.conformance.place import PLAIN, Place, new_memory
from lguestlib.virtio.conformance.ring import agrees, attacked_queue, device_for, pattern, wrong_content
from lguestlib.virtio.conformance.split_cases import GOT, READ, REQUEST
from lguestlib.virtio.device import Queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout, RingIndex
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue

CASES_HERE = [case for case in CASES if isinstance(case, RingCase) and "thread" in case.runners]

ALLOCATED_MAX = 32 << 20
"""Bytes: the runner itself looks at the whole of memory, several times."""

CPU_SECONDS_MAX = 2.0
"""Processor time of a whole case, this side of it included."""

NEIGHBOUR = 2


class Threaded:
    """A queue's thread with all that belongs to it."""

    def __init__(
        self, queue: Queue, layout: QueueLayout, memory: GuestMemory, features: int, base: int = 0
    ) -> None:
        self.failures: list[Exception] = []
        ring = SplitDeviceQueue(layout, memory, features, RingIndex(base))
        self.kick, self.interrupt = EventfdKick(), EventfdInterrupt(lambda: None)
        self.thread = QueueThread(
            queue.name, queue, ring, self.kick, self.interrupt, QueueCounters(),
            lambda thread, error: self.failures.append(without_frames(error)),
        )  # fmt: skip
        self.thread.start()

    def interrupted(self, seconds: float) -> bool:
        """Whether the driver is interrupted within so many *seconds*."""
        waiting = select.poll()
        waiting.register(self.interrupt.fd, select.POLLIN)
        if not waiting.poll(seconds * 1000):
            return False
        with open(self.interrupt.fd, "rb", buffering=0, closefd=False) as counter:
            counter.read(BYTES)
        return True

    def end(self) -> int:
        """Stop it and give everything back; the avail index to go on from."""
        state = self.thread.stop()
        self.kick.close()
        self.interrupt.close()
        return state.base


class Course:
    """*case* on a thread of its own, with a neighbour in the same memory."""

    def __init__(self, case: RingCase, memory: GuestMemory) -> None:
        self.case = case
        self.events: list[Event] = []
        self._place = place = Place(memory, 0, case.size, case.base)
        place.lay_out(case)
        place.misplace(case.misplaced)
        self._features = int(Feature.VERSION_1) | case.features
        self._queue = device_for(case.applies).queues()[attacked_queue(case.applies.device)]
        self._layout = QueueLayout.contiguous(NEIGHBOUR, 8, GuestAddress(0x10_8000))
        self._driver: SplitDriverQueue[str] = SplitDriverQueue(self._layout, memory, self._features)
        echo = Queue("neighbour", lambda chain: chain.write(chain.read()))
        self._neighbour = Threaded(echo, self._layout, memory, self._features)
        self._attacked: Threaded | None = None
        self._seen = case.base
        self._out = 0

    @property
    def failures(self) -> list[Exception]:
        return self._attacked.failures if self._attacked else []

    def play(self) -> None:
        """All steps, up to the first failure."""
        try:
            self._attacked = self._new(self.case.base)
        except errors.QueueLayoutError as error:
            self.events.append(Fault(type(error)))
            return
        # A thread that begins with a ring in use says so once (S24).
        self._attacked.interrupted(0.02 if self.case.base else 0)
        self._place.remember()
        for step in self.case.steps:
            if self.failures:
                break
            self._step(step)
        self.events += [Fault(type(error)) for error in self.failures if isinstance(error, errors.QueueError)]

    def _new(self, base: int) -> Threaded:
        return Threaded(self._queue, self._place.layout, self._place.memory, self._features, base)

    def _step(self, step: RingStep) -> None:
        place, attacked = self._place, self._attacked
        assert attacked is not None
        match step:
            case Publish(heads, ahead):
                self._out += len(heads)
                place.publish(step)
            case Kick():
                attacked.kick.signal()
                self._collect(attacked)
            case Interrupts():
                place.ask(step)
            case Told(expected):
                assert expected is None or attacked.interrupted(PATIENCE if expected else 0.02) is expected
            case Restart(base):
                at = attacked.end()
                assert base is None or at == base
                self._attacked = self._new(at)
            case Flicker():
                self._flicker(step, attacked)
            case Load(requests):
                self._load(requests, attacked)
            case _:
                raise AssertionError(step)

    def _collect(self, attacked: Threaded) -> None:
        """What comes back until all that is out has, or the thread has failed."""
        place, deadline = self._place, time.monotonic() + PATIENCE
        hopeless = not self._out
        while (self._out or hopeless) and not attacked.failures:
            assert time.monotonic() < deadline, f"{self._out} chains do not come back"
            time.sleep(0.0002)
            self._take()
        if attacked.failures:
            attacked.thread.join(PATIENCE)
        self._take()
        assert self._seen & 0xFFFF == place.used_index or self.case.is_hostile

    def _take(self) -> None:
        place = self._place
        while self._seen & 0xFFFF != place.used_index and self._out:
            self.events.append(Served(*place.used(self._seen)))
            self._seen += 1
            self._out -= 1

    def _flicker(self, step: Flicker, attacked: Threaded) -> None:
        place = self._place
        entries = self.case.table[step.index], step.other
        place.allow(entries)
        for _ in range(step.rounds):
            self._out += 1
            place.publish(Publish((0,)))
            attacked.kick.signal()
            for turn in range(10):
                place.describe(step.index, entries[turn % 2])
            self._collect(attacked)
            if attacked.failures:
                break
        # A descriptor written in pieces may be read in between: then it is refused, and nothing else.
        assert all(isinstance(error, errors.ChainError) for error in attacked.failures)
        self.events.clear()

    def _load(self, requests: int, attacked: Threaded) -> None:
        place = self._place
        place.put_all(READ)
        place.allow(REQUEST)
        for index, descriptor in enumerate(REQUEST):
            place.describe(index, type(descriptor)(
                descriptor.address, descriptor.length, descriptor.flags | (index < 2), (index + 1) % 3
            ))  # fmt: skip
        place.remember()
        for _ in range(requests):
            place.ask(Interrupts())
            place.publish(Publish((0,)))
            attacked.kick.signal()
            assert attacked.interrupted(PATIENCE), "an interrupt is lost"
        self._seen = self.case.base + requests
        assert place.used_index == self._seen & 0xFFFF and wrong_content(place, GOT, pattern) == []

    def neighbour_works(self) -> None:
        """The other queue serves a request, as it did before."""
        source, room = Buffer(GuestAddress(PLAIN), 64), Buffer(GuestAddress(PLAIN + 64), 64)
        self._place.memory.write(source.address, b"neighbour".ljust(64, b"!"))
        self._driver.add([source], [room], "echo")
        self._neighbour.kick.signal()
        deadline = time.monotonic() + PATIENCE
        while not (done := self._driver.reap()):
            assert time.monotonic() < deadline, "the neighbour does not answer"
            time.sleep(0.0002)
        assert done == [("echo", 64)] and not self._neighbour.failures
        assert self._place.memory.read(room.address, 64) == b"neighbour".ljust(64, b"!")

    def judge(self) -> None:
        """What has come of it is what the case says, up to the first fault: that ends a thread."""
        case, place = self.case, self._place
        expected: list[Event] = []
        for event in case.events:
            expected.append(event)
            if isinstance(event, Fault):
                break
        faulty = bool(expected) and isinstance(expected[-1], Fault)
        assert len(self.events) == len(expected), (self.events, expected)
        assert all(map(agrees, self.events, expected)), (self.events, expected)
        if not faulty:
            assert wrong_content(place, case.after, pattern) == []
        touched = place.touched(rings=True)
        assert touched is None, touched

    def close(self) -> None:
        if self._attacked:
            self._attacked.end()
        self._neighbour.end()
        self._driver.release()


@pytest.mark.parametrize("case", CASES_HERE, ids=lambda case: case.name)
def test_a_ring_case_against_a_live_thread_ends_in_the_five_assertions(case: RingCase) -> None:
    with nothing_left():
        tracemalloc.start()
        try:
            begun = time.process_time()
            with new_memory() as memory:
                course = Course(case, memory)
                try:
                    course.neighbour_works()
                    course.play()
                    course.judge()
                    course.neighbour_works()
                finally:
                    course.close()
            used, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < ALLOCATED_MAX
    assert used < CPU_SECONDS_MAX
    for error in course.failures:
        assert isinstance(error, errors.QueueError) and error.queue == 0 and "queue 0: " in str(error)


def test_every_kind_of_chain_error_is_among_the_cases() -> None:
    raised = {event.error for case in CASES_HERE for event in case.events if isinstance(event, Fault)}
    assert raised >= {
        errors.AvailIndexError, errors.HeadOutOfRange, errors.NextOutOfRange, errors.DescriptorLoop,
        errors.IndirectNotNegotiated, errors.NestedIndirect, errors.IndirectWithNext, errors.IndirectLength,
        errors.ReadableAfterWritable, errors.ChainTooLong, errors.BadAddress, errors.QueueLayoutError,
    }  # fmt: skip


def test_a_thread_that_does_not_serve_is_found() -> None:
    (case,) = [each for each in CASES_HERE if each.title == "a read fills its buffers and says so"]

    def refuse(chain: Chain) -> int:
        raise ValueError("not this one")

    with nothing_left(), new_memory() as memory:
        course = Course(case, memory)
        course._queue = Queue("refusing", refuse)
        try:
            course.play()
            with pytest.raises(AssertionError):
                course.judge()
        finally:
            course.close()
