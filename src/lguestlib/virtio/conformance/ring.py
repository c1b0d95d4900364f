"""Runs a ring's case against this library's own queue, without a thread or a descriptor.

The device behind it is a real one on a back-end of a few lines, so that a chain is served as
it is anywhere else.
"""

from collections.abc import Callable, Mapping, Sequence

from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain, part
from lguestlib.virtio.conformance.case import (
    READ_ONLY,
    Applies,
    At,
    Content,
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
    Rewrite,
    RingCase,
    RingStep,
    Sectors,
    Served,
    Take,
    Told,
)
from lguestlib.virtio.conformance.place import Place, new_memory
from lguestlib.virtio.conformance.split_cases import GOT, READ, REQUEST, linked
from lguestlib.virtio.device import Device
from lguestlib.virtio.device_queue import DeviceQueue
from lguestlib.virtio.devices.block import SECTOR, Block
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.net import Net
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import RingIndex
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.split_device import SplitDeviceQueue

DISK_SECTORS = 128
"""The sectors that cases look at, from the first on."""

_POPS_MAX = 1 << 16


def pattern(sector: int) -> bytes:
    """What is in a sector of a disk made for cases."""
    return sector.to_bytes(4, "little") * (SECTOR // 4)


class MemoryDisk:
    """A disk of `DISK_SECTORS` in this process, each with its `pattern`."""

    block_size = SECTOR
    identity = b"conformance"

    def __init__(self, read_only: bool = False) -> None:
        self.read_only = read_only
        self.data = bytearray(b"".join(map(pattern, range(DISK_SECTORS))))

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        start = offset
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)
        return offset - start

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        start = offset
        for buffer in buffers:
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)
        return offset - start

    def flush(self) -> None:
        """There is nothing to wait for."""

    def discard(self, offset: int, length: int) -> None:
        """What is there may stay."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.data[offset : offset + length] = bytes(length)


class _Silence:
    """A network that takes every frame and has none."""

    offloads = 0

    def activate(self, features: int) -> None:
        """All is allowed."""

    def send(self, buffers: Sequence[memoryview]) -> int:
        return sum(map(len, buffers))

    def receive(self, buffers: Sequence[memoryview]) -> int:
        raise InterruptedError


class _Sevens:
    """Random enough."""

    def fill(self, buffers: Sequence[memoryview]) -> int:
        for buffer in buffers:
            buffer[:] = b"\7" * len(buffer)
        return sum(map(len, buffers))


def attacked_queue(kind: str) -> int:
    """The queue of a device of that *kind* that cases are played on: the one that the driver makes requests on."""
    return 1 if kind in ("net", "console") else 0


def device_for(applies: Applies) -> Device:
    """A device of the kind that a case is about, a disk for one that is about any."""
    match applies.device:
        case "net":
            return Net(_Silence(), bytes(6))
        case "rng":
            return Entropy(_Sevens())
        case _:
            return Block(MemoryDisk(read_only=bool(applies.feature & READ_ONLY.feature)))


class _Run:
    """What a split and a packed ring's case have in common: a queue and a device that are told what to do."""

    _place: Place
    _queue: DeviceQueue

    def __init__(self, case: RingCase | PackedCase) -> None:
        self.events: list[Event] = []
        self.problems: list[str] = []
        self._expected = case.events
        self._told = False
        self._held: list[Chain] = []
        device = device_for(case.applies)
        index = attacked_queue(case.applies.device)
        self._service = device.queues()[index].service
        self.features = int(Feature.VERSION_1) | case.features

    def run(self) -> list[str]:
        """Play it; what was wrong, which is nothing as a rule."""
        with new_memory() as memory:
            self._run(memory)
        return self.problems

    def _run(self, memory: GuestMemory) -> None:
        raise NotImplementedError

    def _happened(self, event: Event) -> None:
        self.events.append(event)

    def _look(self, rings: bool = False) -> None:
        touched = self._place.touched(rings)
        if touched:
            self.problems.append(str(touched))

    def _driver(self, writes: Callable[[], None]) -> None:
        """The driver's turn to write: what the device has written by then is looked at before."""
        self._look()
        writes()
        self._place.remember()

    def _take(self) -> bool:
        """Take one chain in hand; False if there was none to take, or never will be."""
        try:
            chain = self._queue.pop()
        except errors.QueueError as error:
            # Its frames would keep views of memory alive.
            error.__traceback__ = error.__context__ = None
            self._happened(Fault(type(error)))
            return isinstance(error, errors.ChainError)
        if chain is not None:
            self._held.append(chain)
        return chain is not None

    def _kick(self) -> None:
        """Serve all there is, as a queue's thread does."""
        for _ in range(_POPS_MAX):
            for chain in self._held:
                self._serve(chain)
            self._held.clear()
            if not self._take():
                break
        else:
            self.problems.append("the ring never runs dry")
        self._queue.enable_notifications()

    def _serve(self, chain: Chain) -> None:
        written = self._service(chain)
        self._queue.push(chain, written)
        self._happened(Served(int(chain.head), written))
        self._told |= self._queue.should_interrupt()

    def _heard(self, expected: bool | None) -> None:
        if expected is not None and self._told is not expected:
            self.problems.append("not interrupted" if expected else "interrupted against the driver's wish")
        self._told = False

    def _judge_events(self) -> None:
        expected = self._expected
        if len(self.events) != len(expected) or not all(map(agrees, self.events, expected)):
            self.problems.append(f"{self.events}, not {list(expected)}")


class RingRun(_Run):
    """A split ring's case, played on a queue and a device of this library."""

    def __init__(self, case: RingCase) -> None:
        super().__init__(case)
        self.case = case

    def _run(self, memory: GuestMemory) -> None:
        case = self.case
        self._place = place = Place(memory, 0, case.size, case.base)
        place.lay_out(case)
        place.misplace(case.misplaced)
        try:
            self._queue = SplitDeviceQueue(place.layout, memory, self.features, RingIndex(case.base))
        except errors.QueueLayoutError as error:
            self._happened(Fault(type(error)))
            self._judge_events()
            return
        try:
            place.remember()
            for step in case.steps:
                self._play(step)
            self._judge_events()
            self.problems += wrong_content(place, case.after, pattern)
            self._look()
        finally:
            self._held.clear()
            self._queue.release()

    def _play(self, step: RingStep) -> None:
        place = self._place
        match step:
            case Publish():
                self._driver(lambda: place.publish(step))
            case Kick():
                self._kick()
            case Take(count):
                for _ in range(count):
                    self._take()
            case Rewrite(index, descriptor):
                self._driver(lambda: place.describe(index, descriptor))
            case Flicker():
                self._flicker(step)
            case Interrupts():
                self._driver(lambda: place.ask(step))
            case Told(expected):
                self._heard(expected)
            case Restart(base):
                at = self._queue.state.base
                if base is not None and at != base:
                    self.problems.append(f"stopped at {at}, not {base}")
                self._queue.release()
                self._queue = SplitDeviceQueue(place.layout, place.memory, self.features, RingIndex(at))
            case Load(requests):
                self._load(requests)

    def _flicker(self, step: Flicker) -> None:
        place, index = self._place, step.index
        entries = self.case.table[index], step.other
        place.allow(entries)
        for number in range(step.rounds):
            place.publish(Publish((0,)))
            place.describe(index, entries[number % 2])
            self._take()
            place.describe(index, entries[1 - number % 2])
            self._kick()
        self._look(rings=True)
        place.remember()
        if any(isinstance(event, Fault) for event in self.events) or len(self.events) != step.rounds:
            self.problems.append(f"of {step.rounds} chains came {self.events}")
        self.events.clear()

    def _load(self, requests: int) -> None:
        place, table = self._place, linked(*REQUEST)

        def prepare() -> None:
            place.put_all(READ)
            for index, descriptor in table.items():
                place.describe(index, descriptor)
            place.allow(table.values())

        self._driver(prepare)
        for _ in range(requests):
            place.publish(Publish((0,)))
            place.ask(Interrupts())
            self._kick()
            if not self._told:
                self.problems.append("an interrupt was lost")
            self._told = False
        self._look(rings=True)
        place.remember()
        self.problems += wrong_content(place, GOT, pattern)
        if self.events != [Served(0, SECTOR + 1)] * requests:
            self.problems.append("a request was lost")
        self.events.clear()



class PackedRun(_Run):
    """A packed ring's case, as `RingRun`."""

    def __init__(self, case: PackedCase) -> None:
        super().__init__(case)
        self.case = case
        self.features |= Feature.RING_PACKED

    def _run(self, memory: GuestMemory) -> None:
        case = self.case
        self._place = place = Place(memory, 0, case.size, packed=True)
        place.lay_out_packed(case)
        try:
            self._queue = self._new_queue(case.base)
        except errors.QueueError as error:
            self._happened(Fault(type(error)))
            self._judge_events()
            return
        try:
            place.remember()
            for step in case.steps:
                self._play(step)
            self._judge_events()
            self.problems += wrong_content(place, case.after, pattern)
            self._look()
        finally:
            self._held.clear()
            self._queue.release()

    def _new_queue(self, base: int | None) -> PackedDeviceQueue:
        state = None if base is None else QueueState.from_base(base)
        return PackedDeviceQueue(self._place.layout, self._place.memory, self.features, state)

    def _play(self, step: PackedStep) -> None:
        place = self._place
        match step:
            case Fill():
                self._driver(lambda: place.fill(step))
            case Kick():
                self._kick()
            case Take(count):
                for _ in range(count):
                    self._take()
            case DriverEvent():
                self._driver(lambda: place.ask_by_event(step))
            case Told(expected):
                self._heard(expected)
            case Restart(base):
                at = self._queue.state.base
                if base is not None and at != base:
                    self.problems.append(f"stopped at {at:#x}, not {base:#x}")
                self._queue.release()
                self._queue = self._new_queue(at)


def agrees(seen: Event, expected: Event) -> bool:
    """Whether what was *seen* is what was *expected*, as far as that says."""
    if isinstance(seen, Served) and isinstance(expected, Served) and expected.written is None:
        return seen.head == expected.head
    return seen == expected


def wrong_content(place: Place, after: Mapping[At, Content], sector: Callable[[int], bytes]) -> list[str]:
    """Where memory does not hold what it has to *after* a case; *sector* tells what the disk has."""
    wrong = []
    for at, expected in after.items():
        if isinstance(expected, Sectors):
            expected = b"".join(map(sector, range(expected.first, expected.first + expected.count)))
        found = place.content(at, len(expected))
        if found != expected:
            differing = next(n for n, (one, other) in enumerate(zip(found, expected)) if one != other)
            wrong.append(f"wrong data at {at + differing}: {found[differing]:#04x}, not {expected[differing]:#04x}")
    return wrong
