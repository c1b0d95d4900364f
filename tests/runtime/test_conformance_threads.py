"""Every ring case, split and packed, against a live queue's thread, and after each the five assertions.

Bounded steps, bounded memory, as many descriptors and threads as before, the
neighbours go on working, and a typed error is recorded.
"""

import select
import time
import tracemalloc
from collections.abc import Sequence

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
    DriverEvent,
    Event,
    Fault,
    Fill,
    Flicker,
    Interrupts,
    Kick,
    Load,
    PackedCase,
    PackedStep,
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
from lguestlib.virtio.device_queue import new_device_queue
from lguestlib.virtio.driver_queue import DriverQueue, new_driver_queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.queue_state import WRAP, QueueState
from lguestlib.virtio.split_driver import Buffer

SPLIT_CASES = [case for case in CASES if isinstance(case, RingCase) and "thread" in case.runners]
PACKED_CASES = [case for case in CASES if isinstance(case, PackedCase) and "thread" in case.runners]

ALLOCATED_MAX = 32 << 20
"""Bytes: the runner itself looks at the whole of memory, several times."""

CPU_SECONDS_MAX = 2.0
"""Processor time of a whole case, this side of it included."""

NEIGHBOUR = 2

NOTHING_SECONDS = 0.02
"""Where nothing is to come, so long it does not."""


class Threaded:
    """A queue's thread with all that belongs to it."""

    def __init__(
        self, queue: Queue, layout: QueueLayout, memory: GuestMemory, features: int, state: QueueState | None = None
    ) -> None:
        self.failures: list[Exception] = []
        ring = new_device_queue(layout, memory, features, state)
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
        """Stop it and give everything back; where to go on from, as GET_VRING_BASE has it."""
        state = self.thread.stop()
        self.kick.close()
        self.interrupt.close()
        return state.base


class Course:
    """A case on a thread of its own, with a neighbour in the same memory."""

    def __init__(self, case: RingCase | PackedCase, place: Place, features: int, state: QueueState | None) -> None:
        self.events: list[Event] = []
        self._demands = case
        self._place = place
        self._state = state
        self._features = int(Feature.VERSION_1) | case.features | features
        self._queue = device_for(case.applies).queues()[attacked_queue(case.applies.device)]
        layout = QueueLayout.contiguous(NEIGHBOUR, 8, GuestAddress(0x10_8000))
        self._driver: DriverQueue[str] = new_driver_queue(layout, place.memory, self._features)
        echo = Queue("neighbour", lambda chain: chain.write(chain.read()))
        self._neighbour = Threaded(echo, layout, place.memory, self._features)
        self._attacked: Threaded | None = None
        self._out = 0

    @property
    def failures(self) -> list[Exception]:
        return self._attacked.failures if self._attacked else []

    @property
    def attacked(self) -> Threaded:
        assert self._attacked is not None
        return self._attacked

    def _play(self) -> None:
        """All steps, up to the first failure."""
        raise NotImplementedError

    def play(self) -> None:
        """The whole case."""
        try:
            self._attacked = self._new(self._state)
        except errors.QueueError as error:
            without_frames(error)
            self.events.append(Fault(type(error)))
            return
        # A thread that begins with a ring in use says so once (S24).
        self.attacked.interrupted(0.02 if self._state else 0)
        self._place.remember()
        self._play()
        self.events += [Fault(type(error)) for error in self.failures if isinstance(error, errors.QueueError)]

    def _new(self, state: QueueState | None) -> Threaded:
        return Threaded(self._queue, self._place.layout, self._place.memory, self._features, state)

    def _told(self, expected: bool | None) -> None:
        assert expected is None or self.attacked.interrupted(PATIENCE if expected else 0.02) is expected

    def _restart(self, base: int | None) -> None:
        at = self.attacked.end()
        assert base is None or at == base
        self._attacked = self._new(QueueState.from_base(at))

    def _collect(self, forever: bool = False) -> None:
        """What comes back until all that is out has, or the thread has failed; *forever* it is to fail."""
        deadline = time.monotonic() + PATIENCE
        while (self._out or forever) and not self.failures:
            assert time.monotonic() < deadline, f"{self._out} chains do not come back"
            time.sleep(0.0002)
            self._take()
        if self.failures:
            self.attacked.thread.join(PATIENCE)
        self._take()

    def _take(self) -> None:
        """What has come back."""
        raise NotImplementedError

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
        case, place = self._demands, self._place
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


class SplitCourse(Course):
    """Of a split ring's case."""

    def __init__(self, case: RingCase, memory: GuestMemory) -> None:
        place = Place(memory, 0, case.size, case.base)
        place.lay_out(case)
        place.misplace(case.misplaced)
        super().__init__(case, place, 0, QueueState.from_base(case.base) if case.base else None)
        self.case = case
        self._seen = case.base

    def _play(self) -> None:
        for step in self.case.steps:
            if self.failures:
                break
            self._step(step)

    def _step(self, step: RingStep) -> None:
        place = self._place
        match step:
            case Publish(heads):
                self._out += len(heads)
                place.publish(step)
            case Kick():
                self.attacked.kick.signal()
                self._collect(forever=not self._out)
                assert self._seen & 0xFFFF == place.used_index or self.case.is_hostile
            case Interrupts():
                place.ask(step)
            case Told(expected):
                self._told(expected)
            case Restart(base):
                self._restart(base)
            case Flicker():
                self._flicker(step)
            case Load(requests):
                self._load(requests)
            case _:
                raise AssertionError(step)

    def _take(self) -> None:
        place = self._place
        while self._seen & 0xFFFF != place.used_index and self._out:
            self.events.append(Served(*place.used(self._seen)))
            self._seen += 1
            self._out -= 1

    def _flicker(self, step: Flicker) -> None:
        place = self._place
        entries = self.case.table[step.index], step.other
        place.allow(entries)
        for _ in range(step.rounds):
            self._out += 1
            place.publish(Publish((0,)))
            self.attacked.kick.signal()
            for turn in range(10):
                place.describe(step.index, entries[turn % 2])
            self._collect()
            if self.failures:
                break
        # A descriptor written in pieces may be read in between: then it is refused, and nothing else.
        assert all(isinstance(error, errors.ChainError) for error in self.failures)
        self.events.clear()

    def _load(self, requests: int) -> None:
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
            self.attacked.kick.signal()
            assert self.attacked.interrupted(PATIENCE), "an interrupt is lost"
        self._seen = self.case.base + requests
        assert place.used_index == self._seen & 0xFFFF and wrong_content(place, GOT, pattern) == []


class PackedCourse(Course):
    """Of a packed ring's case."""

    def __init__(self, case: PackedCase, memory: GuestMemory) -> None:
        place = Place(memory, 0, case.size, packed=True)
        place.lay_out_packed(case)
        state = None if case.base is None else QueueState.from_base(case.base)
        super().__init__(case, place, int(Feature.RING_PACKED), state)
        self.case = case
        # Descriptors that the chain of each buffer ID has, and where the next used element is.
        self._slots: dict[int, int] = {}
        used = WRAP if state is None else state.used
        self._next, self._wrap = used & ~WRAP, bool(used & WRAP)

    def _play(self) -> None:
        for step in self.case.steps:
            if self.failures:
                break
            self._step(step)

    def _step(self, step: PackedStep) -> None:
        place = self._place
        match step:
            case Fill(descriptors=descriptors, available=available):
                if available:
                    self._out += 1
                    self._slots[descriptors[-1].id] = len(descriptors)
                place.fill(step)
            case Kick():
                self.attacked.kick.signal()
                if not self._out:
                    time.sleep(NOTHING_SECONDS)
                self._collect()
            case DriverEvent():
                place.ask_by_event(step)
            case Told(expected):
                self._told(expected)
            case Restart(base):
                self._restart(base)
            case _:
                raise AssertionError(step)

    def _take(self) -> None:
        # With nothing out, what is there may look like a used element, and is the driver's own.
        while self._out and (found := self._place.packed_used(self._next, self._wrap)):
            number, written = found
            self.events.append(Served(number, written))
            self._out -= 1
            laps, self._next = divmod(self._next + self._slots[number], self._place.layout.size)
            self._wrap ^= bool(laps)


def course_of(case: RingCase | PackedCase, memory: GuestMemory) -> Course:
    """The one for its kind of ring."""
    return SplitCourse(case, memory) if isinstance(case, RingCase) else PackedCourse(case, memory)


@pytest.mark.parametrize("case", [*SPLIT_CASES, *PACKED_CASES], ids=lambda case: case.name)
def test_a_ring_case_against_a_live_thread_ends_in_the_five_assertions(case: RingCase | PackedCase) -> None:
    with nothing_left():
        tracemalloc.start()
        try:
            begun = time.process_time()
            with new_memory() as memory:
                course = course_of(case, memory)
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


def faults(cases: Sequence[RingCase | PackedCase]) -> set[type[errors.QueueError]]:
    return {event.error for case in cases for event in case.events if isinstance(event, Fault)}


def test_every_kind_of_chain_error_is_among_the_cases() -> None:
    assert faults(SPLIT_CASES) >= {
        errors.AvailIndexError, errors.HeadOutOfRange, errors.NextOutOfRange, errors.DescriptorLoop,
        errors.IndirectNotNegotiated, errors.NestedIndirect, errors.IndirectWithNext, errors.IndirectLength,
        errors.ReadableAfterWritable, errors.ChainTooLong, errors.BadAddress, errors.QueueLayoutError,
    }  # fmt: skip
    # The others are for a ring with a chain in hand, and go without a thread.
    assert faults(PACKED_CASES) >= {
        errors.BufferIdOutOfRange, errors.DescriptorLoop, errors.IndirectNotNegotiated, errors.IndirectWithNext,
        errors.IndirectLength, errors.ReadableAfterWritable, errors.BadAddress, errors.QueueLayoutError,
        errors.QueueStateError,
    }  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        *(case for case in SPLIT_CASES if case.title == "a read fills its buffers and says so"),
        *(case for case in PACKED_CASES if case.title == "available by AVAIL set and USED clear"),
    ],
    ids=["split", "packed"],
)
def test_a_thread_that_does_not_serve_is_found(case: RingCase | PackedCase) -> None:

    def refuse(chain: Chain) -> int:
        raise ValueError("not this one")

    with nothing_left(), new_memory() as memory:
        course = course_of(case, memory)
        course._queue = Queue("refusing", refuse)
        try:
            course.play()
            with pytest.raises(AssertionError):
                course.judge()
        finally:
            course.close()
