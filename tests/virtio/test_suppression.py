"""No order of events loses a wake-up: the hand-shakes of notifications and of interrupts, explored whole.

A lost wake-up is an end in which a side sleeps though the other has something for
it.  That the exploration finds one where a line of a queue's class is left out shows
that it looks, and that the line is needed.
"""

import inspect
import sys
import textwrap
from collections.abc import Iterator

import pytest
from virtio.accesses import through
from virtio.interleavings import End, Exploration, Program, Side
from virtio.packed_rings import PACKED, PACKED_EVENT
from virtio.rings import PLAIN, WITH_EVENT

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.packed_driver import PackedDriverQueue
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue

CHAINS = 3
BUFFER = Buffer(GuestAddress(0x800), 16)
LAYOUT = QueueLayout.contiguous(0, 4, GuestAddress(0))

Driver = SplitDriverQueue[int] | PackedDriverQueue[int]
Device = SplitDeviceQueue | PackedDeviceQueue


class Pair:
    """What takes part: memory for each side (what they share is explored, not stored), and the features."""

    def __init__(self, features: int) -> None:
        self.features = features
        self.packed = features in (PACKED, PACKED_EVENT)
        self.chains = CHAINS
        self.driver_memory = GuestMemory.anonymous(4096)
        self.device_memory = GuestMemory.anonymous(4096)
        if self.packed:
            # Descriptors are not explored, and have their IDs from the start.
            for number in range(self.chains):
                id_at = GuestAddress(LAYOUT.descriptors + 16 * number + 12)
                self.device_memory.write(id_at, number.to_bytes(2, "little"))

    def driver(self, memory: GuestMemory) -> Driver:
        kind = PackedDriverQueue if self.packed else SplitDriverQueue
        return kind(LAYOUT, memory, self.features)

    def device(self) -> Device:
        kind = PackedDeviceQueue if self.packed else SplitDeviceQueue
        return kind(LAYOUT, self.device_memory, self.features)

    def driver_that_adds(self) -> Program:
        def run(side: Side) -> None:
            queue = self.driver(self.driver_memory)
            through(queue, side)
            for token in range(self.chains):
                queue.add([BUFFER], [], token)
                if queue.kick_needed():
                    side.signal()

        return run

    def device_that_takes(self) -> Program:
        def run(side: Side) -> None:
            queue = self.device()
            through(queue, side)
            taken = 0
            queue.disable_notifications()
            while True:
                if chains := queue.pop_many(2):
                    taken += len(chains)
                elif not queue.enable_notifications():
                    side.wait(taken)
                    queue.disable_notifications()

        return run

    def driver_that_reaps(self) -> Program:
        def run(side: Side) -> None:
            queue = self.driver(self.driver_memory)
            for token in range(self.chains):
                queue.add([BUFFER], [], token)
            through(queue, side)
            reaped = 0
            queue.disable_interrupts()
            while reaped < self.chains:
                if done := queue.reap():
                    reaped += len(done)
                elif not queue.enable_interrupts():
                    side.wait(reaped)
                    queue.disable_interrupts()

        return run

    def device_that_returns(self) -> Program:
        def run(side: Side) -> None:
            driver = self.driver(self.device_memory)
            for token in range(self.chains):
                driver.add([BUFFER], [], token)
            queue = self.device()
            chains = queue.pop_many()
            through(queue, side)
            for chain in chains:
                queue.push(chain, 0)
                if queue.should_interrupt():
                    side.signal()

        return run


@pytest.fixture(
    params=[PLAIN, WITH_EVENT, PACKED, PACKED_EVENT],
    ids=["by flag", "by event index", "packed, by flag", "packed, by position"],
)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.driver_memory.close()
    made.device_memory.close()


def notifications(pair: Pair, buffered: bool = True) -> Exploration:
    """A driver that adds and kicks, and a device that takes and sleeps."""
    return Exploration((pair.driver_that_adds(), pair.device_that_takes()), buffered)


def interrupts(pair: Pair, buffered: bool = True) -> Exploration:
    """A device that returns chains and interrupts, and a driver that takes them and sleeps."""
    return Exploration((pair.device_that_returns(), pair.driver_that_reaps()), buffered)


def lost(ends: set[End], chains: int = CHAINS) -> bool:
    """Whether there is an end in which the sleeper, side 1, has not had everything."""
    assert all(end.actions[0].kind == "end" for end in ends)
    asleep = [end.actions[1].value for end in ends if end.actions[1].kind == "wait"]
    return any(done < chains for done in asleep)


@pytest.mark.parametrize("buffered", [False, True], ids=["in order", "store buffers"])
def test_s22_no_notification_is_lost_in_any_order(pair: Pair, buffered: bool) -> None:
    exploration = notifications(pair, buffered=buffered)
    ends = exploration.run()
    assert not lost(ends)
    assert exploration.states > 500
    kicks = {end.sent[0] for end in ends}
    assert min(kicks) < CHAINS == max(kicks), "some are suppressed, and some orders need them all"


@pytest.mark.parametrize("buffered", [False, True], ids=["in order", "store buffers"])
def test_s21_no_interrupt_is_lost_in_any_order(pair: Pair, buffered: bool) -> None:
    exploration = interrupts(pair, buffered=buffered)
    ends = exploration.run()
    assert not lost(ends)
    assert exploration.states > 500
    sent = {end.sent[0] for end in ends}
    assert min(sent) < CHAINS == max(sent)


SECOND_LOOK = {
    SplitDeviceQueue: ("enable_notifications", "return self.has_available()", "return False"),
    SplitDriverQueue: ("enable_interrupts", "return used != self._used", "return False"),
    PackedDeviceQueue: ("enable_notifications", "return self.has_available()", "return False"),
    PackedDriverQueue: ("enable_interrupts", "return self._is_used()", "return False"),
}
"""What each class does before it sleeps, and what it would be without."""

ASLEEP = {kind: (method, "self._fence()", "pass") for kind, (method, _, _) in SECOND_LOOK.items()}
"""The fence between what asks to be told and the second look."""

AWAKE = {
    SplitDeviceQueue: ("should_interrupt", "self._fence()", "pass"),
    SplitDriverQueue: ("kick_needed", "self._fence()", "pass"),
    PackedDeviceQueue: ("should_interrupt", "self._fence()", "pass"),
    PackedDriverQueue: ("kick_needed", "self._fence()", "pass"),
}
"""The fence between what was done and the look at whether the other is to be told."""

Steps = dict[type, tuple[str, str, str]]


def leave_out(monkeypatch: pytest.MonkeyPatch, kind: type, steps: Steps) -> None:
    """Make the class *kind* what it would be if that line of its source were not there."""
    method, line, instead = steps[kind]
    source = textwrap.dedent(inspect.getsource(getattr(kind, method)))
    assert source.count(line) == 1, "the line to leave out"
    namespace = dict(vars(sys.modules[kind.__module__]))
    exec(source.replace(line, instead), namespace)
    monkeypatch.setattr(kind, method, namespace[method])


def sides(pair: Pair) -> tuple[type, type]:
    """The driver's class and the device's."""
    return (PackedDriverQueue, PackedDeviceQueue) if pair.packed else (SplitDriverQueue, SplitDeviceQueue)


@pytest.mark.parametrize("buffered", [False, True], ids=["in order", "store buffers"])
def test_s22_a_queue_without_the_second_look_loses_one_in_some_order(
    pair: Pair, buffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.chains = 2
    driver, device = sides(pair)
    leave_out(monkeypatch, device, SECOND_LOOK)
    assert lost(notifications(pair, buffered).run(), 2)
    assert not lost(interrupts(pair, buffered).run(), 2)
    monkeypatch.undo()
    leave_out(monkeypatch, driver, SECOND_LOOK)
    assert lost(interrupts(pair, buffered).run(), 2)


@pytest.mark.parametrize("steps", [ASLEEP, AWAKE], ids=["before the second look", "before the look at the other"])
def test_s21_s22_a_queue_without_its_fence_loses_one_where_there_are_store_buffers(
    pair: Pair, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.chains = 2
    driver, device = sides(pair)
    # Who sleeps is the device where notifications are concerned, and the driver where interrupts are.
    of_device, of_driver = (notifications, interrupts) if steps is ASLEEP else (interrupts, notifications)
    for kind, explore in ((device, of_device), (driver, of_driver)):
        leave_out(monkeypatch, kind, steps)
        assert lost(explore(pair).run(), 2), kind
        assert not lost(explore(pair, buffered=False).run(), 2), "in order nothing needs a fence"
        monkeypatch.undo()
