"""No order of events loses a wake-up: the hand-shakes of notifications and of interrupts, explored whole.

A lost wake-up is an end in which a side sleeps though the other has something for
it.  That the exploration finds one where a step is left out shows that it looks.
"""

from collections.abc import Callable, Iterator

import pytest
from virtio.accesses import Port, through
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


class Unfenced:
    """*side*, for a queue that has no fence."""

    def __init__(self, side: Side) -> None:
        self.load = side.load
        self.store = side.store
        self.order = side.order

    def fence(self) -> None:
        """None."""


def fenced(side: Side) -> Port:
    return side


Dress = Callable[[Side], Port]


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

    def driver_that_adds(self, dress: Dress) -> Program:
        def run(side: Side) -> None:
            queue = self.driver(self.driver_memory)
            through(queue, dress(side))
            for token in range(self.chains):
                queue.add([BUFFER], [], token)
                if queue.kick_needed():
                    side.signal()

        return run

    def device_that_takes(self, dress: Dress, forgetful: bool) -> Program:
        def run(side: Side) -> None:
            queue = self.device()
            through(queue, dress(side))
            taken = 0
            queue.disable_notifications()
            while True:
                if chains := queue.pop_many(2):
                    taken += len(chains)
                elif not queue.enable_notifications() or forgetful:
                    side.wait(taken)
                    queue.disable_notifications()

        return run

    def driver_that_reaps(self, dress: Dress, forgetful: bool) -> Program:
        def run(side: Side) -> None:
            queue = self.driver(self.driver_memory)
            for token in range(self.chains):
                queue.add([BUFFER], [], token)
            through(queue, dress(side))
            reaped = 0
            queue.disable_interrupts()
            while reaped < self.chains:
                if done := queue.reap():
                    reaped += len(done)
                elif not queue.enable_interrupts() or forgetful:
                    side.wait(reaped)
                    queue.disable_interrupts()

        return run

    def device_that_returns(self, dress: Dress) -> Program:
        def run(side: Side) -> None:
            driver = self.driver(self.device_memory)
            for token in range(self.chains):
                driver.add([BUFFER], [], token)
            queue = self.device()
            chains = queue.pop_many()
            through(queue, dress(side))
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


def notifications(
    pair: Pair,
    driver: Dress = fenced,
    device: Dress = fenced,
    forgetful: bool = False,
    buffered: bool = True,
) -> Exploration:
    """A driver that adds and kicks, and a device that takes and sleeps."""
    programs = pair.driver_that_adds(driver), pair.device_that_takes(device, forgetful)
    return Exploration(programs, buffered)


def interrupts(
    pair: Pair,
    driver: Dress = fenced,
    device: Dress = fenced,
    forgetful: bool = False,
    buffered: bool = True,
) -> Exploration:
    """A device that returns chains and interrupts, and a driver that takes them and sleeps."""
    programs = pair.device_that_returns(device), pair.driver_that_reaps(driver, forgetful)
    return Exploration(programs, buffered)


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


@pytest.mark.parametrize("buffered", [False, True], ids=["in order", "store buffers"])
def test_s22_without_the_second_look_some_order_loses_one(pair: Pair, buffered: bool) -> None:
    assert lost(notifications(pair, forgetful=True, buffered=buffered).run())
    assert lost(interrupts(pair, forgetful=True, buffered=buffered).run())


def test_s21_s22_without_its_fence_either_side_loses_one(pair: Pair) -> None:
    pair.chains = 2
    for explore in (notifications, interrupts):
        assert lost(explore(pair, driver=Unfenced).run(), 2)
        assert lost(explore(pair, device=Unfenced).run(), 2)
        assert not lost(explore(pair, driver=Unfenced, device=Unfenced, buffered=False).run(), 2)
