"""In what order each side touches what both share: the entries, then their index, or the other way round."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from virtio.accesses import Place, through
from virtio.packed_rings import PACKED, PACKED_EVENT
from virtio.rings import PLAIN, WITH_EVENT, Descriptor, Ring, memory_of

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio import packed_device, packed_driver, split_device, split_driver
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.inflight import InflightRecord, area_size, part_of
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.device_queue import DeviceQueue, new_device_queue
from lguestlib.virtio.driver_queue import DriverQueue, new_driver_queue
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.packed_driver import PackedDriverQueue
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue

BUFFER = Buffer(GuestAddress(0x800), 16)
LAYOUT = QueueLayout.contiguous(0, 4, GuestAddress(0))


class Recorder:
    """Fields of its own, and the story of all accesses to them."""

    def __init__(self) -> None:
        self.fields: defaultdict[Place, int] = defaultdict(int)
        self.story: list[str] = []

    def load(self, place: Place) -> int:
        self.story.append(f"load {place[0]}")
        return self.fields[place]

    def store(self, place: Place, value: int) -> None:
        self.story.append(f"store {place[0]}")
        self.fields[place] = value

    def fence(self) -> None:
        self.story.append("fence")

    def order(self) -> None:
        self.story.append("order")

    def told(self, call: Callable[[], object]) -> list[str]:
        """What *call* did."""
        self.story.clear()
        call()
        return self.story.copy()


class Side:
    def __init__(self, memory: GuestMemory, features: int, ordered: bool) -> None:
        self.memory = memory
        self.recorder = Recorder()
        self.device = SplitDeviceQueue(LAYOUT, memory, features)
        self.driver: SplitDriverQueue[int] = SplitDriverQueue(LAYOUT, memory, features)
        through(self.device, self.recorder, ordered)
        through(self.driver, self.recorder, ordered)


@contextmanager
def side(features: int, ordered: bool) -> Iterator[Side]:
    with memory_of((0, 4096)) as memory:
        made = Side(memory, features, ordered)
        yield made
        made.driver.release()
        made.device.release()


def steps(story: str, ordered: bool) -> list[str]:
    return [step for step in story.split(", ") if ordered or step != "order"]


@pytest.mark.parametrize("ordered", [False, True], ids=["x86", "weakly ordered"])
def test_s20_s23_entries_are_published_before_their_index_and_read_after_it(ordered: bool) -> None:
    with side(PLAIN, ordered) as both:
        driver, device, told = both.driver, both.device, both.recorder.told
        add = steps("store avail_ring, order, store avail_idx", ordered)
        assert told(lambda: driver.add([BUFFER], [], 0)) == add
        assert told(lambda: driver.add([], [BUFFER], 1)) == add
        chains: list[Chain] = []
        for _ in range(2):
            pop = told(lambda: chains.extend(device.pop_many(1)))
            assert pop == steps("load avail_idx, order, load avail_ring", ordered)
        assert told(device.pop_many) == ["load avail_idx"]
        used = steps("store used_ring, store used_ring, order, store used_idx", ordered)
        assert told(lambda: device.push(chains[0], 0)) == used
        assert told(lambda: device.push_many(chains[1:])) == used
        assert told(driver.reap) == steps("load used_idx, order" + 4 * ", load used_ring", ordered)
        assert told(driver.reap) == ["load used_idx"]
        for token in range(3):
            driver.add([BUFFER], [], token)
        several = steps("load avail_idx, order, load avail_ring, load avail_ring, load avail_ring", ordered)
        assert told(lambda: chains.extend(device.pop_many())) == several
        pushed = told(lambda: device.push_many(chains[2:]))
        assert pushed == steps(6 * "store used_ring, " + "order, store used_idx", ordered)


@pytest.mark.parametrize("ordered", [False, True], ids=["x86", "weakly ordered"])
def test_s20_entries_are_published_before_their_index_where_a_record_is_kept(ordered: bool) -> None:
    with memory_of((0, 4096)) as memory:
        record = InflightRecord(0, part_of(memoryview(bytearray(area_size(1, 4))), 0, 4), 4)
        driver: SplitDriverQueue[int] = SplitDriverQueue(LAYOUT, memory, PLAIN)
        for token in range(3):
            driver.add([BUFFER], [], token)
        device = SplitDeviceQueue(LAYOUT, memory, PLAIN, inflight=record)
        chains = device.pop_many()
        recorder = Recorder()
        through(device, recorder, ordered)
        used = steps("store used_ring, store used_ring, order, store used_idx", ordered)
        assert recorder.told(lambda: device.push(chains[0], 0)) == used
        pushed = recorder.told(lambda: device.push_many(chains[1:]))
        assert pushed == steps(4 * "store used_ring, " + "order, store used_idx", ordered)
        driver.release()
        device.release()


@pytest.mark.parametrize("features", [PLAIN, WITH_EVENT])
def test_s21_s22_a_fence_stands_between_what_is_said_and_what_is_heard(features: int) -> None:
    with side(features, False) as both:
        driver, device, told = both.driver, both.device, both.recorder.told
        events = features == WITH_EVENT
        said = "store avail_event" if events else "store used_flags"
        assert told(device.enable_notifications) == [said, "fence", "load avail_idx"]
        said = "store used_event" if events else "store avail_flags"
        assert told(driver.enable_interrupts) == [said, "fence", "load used_idx"]
        driver.add([BUFFER], [], 0)
        assert told(driver.kick_needed) == ["fence", "load avail_event" if events else "load used_flags"]
        assert told(driver.kick_needed) == []
        [chain] = device.pop_many()
        device.push(chain, 0)
        assert told(device.should_interrupt) == ["fence", "load used_event" if events else "load avail_flags"]
        assert told(device.should_interrupt) == []


def test_s23_both_sides_ask_what_their_processor_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for module in (split_device, split_driver):
        monkeypatch.setattr(module, "new_acquire", lambda: lambda: asked.append("order"))
    with memory_of((0, 4096)) as memory:
        driver: SplitDriverQueue[int] = SplitDriverQueue(LAYOUT, memory, PLAIN)
        device = SplitDeviceQueue(LAYOUT, memory, PLAIN)
        for expected, call in (
            (1, lambda: driver.add([BUFFER], [], 0)), (1, lambda: driver.add([BUFFER], [], 0)),
            (2, lambda: device.push_many(device.pop_many())), (1, driver.reap), (0, driver.reap),
        ):  # fmt: skip
            asked.clear()
            call()
            assert len(asked) == expected
        driver.release()
        device.release()


def test_what_the_recorder_sees_is_what_happens_in_memory() -> None:
    """The same steps on a ring in memory leave it as the recorded ones left the recorder's fields."""
    with side(PLAIN, False) as both, memory_of((0, 4096)) as memory:
        driver: SplitDriverQueue[int] = SplitDriverQueue(LAYOUT, memory, PLAIN)
        device = SplitDeviceQueue(LAYOUT, memory, PLAIN)
        ring = Ring(memory, LAYOUT)
        for one, other in ((both.driver, both.device), (driver, device)):
            for token in range(3):
                one.add([], [BUFFER], token)
                one.kick_needed()
            chains = other.pop_many()
            for chain in chains:
                chain.written = 5
            other.push_many(chains)
            other.disable_notifications()
            one.disable_interrupts()
        fields = both.recorder.fields
        assert (ring.avail_idx, ring.used_idx) == (fields["avail_idx", 0], fields["used_idx", 0]) == (3, 3)
        assert (
            (ring.avail_flags, ring.used_flags)
            == (fields["avail_flags", 0], fields["used_flags", 0])
            == (1, 1)
        )
        recorded = [(fields["used_ring", 2 * at], fields["used_ring", 2 * at + 1]) for at in range(3)]
        assert [ring.used(at) for at in range(3)] == recorded == [(0, 5), (1, 5), (2, 5)]
        assert ring.described(0) == Descriptor(0x800, 16, 2)
        for view in (driver, device, ring):
            view.release()


class PackedSide:
    """As `Side`.  What is read of descriptors but the first one's flags is in memory: lengths of 0, and these IDs."""

    def __init__(self, memory: GuestMemory, features: int, ordered: bool) -> None:
        self.recorder = Recorder()
        self.driver: PackedDriverQueue[int] = PackedDriverQueue(LAYOUT, memory, features)
        self.device = PackedDeviceQueue(LAYOUT, memory, features)
        for number in range(4):
            memory.write(GuestAddress(16 * number + 12), number.to_bytes(2, "little"))
        through(self.device, self.recorder, ordered)
        through(self.driver, self.recorder, ordered)


@contextmanager
def packed_side(features: int, ordered: bool) -> Iterator[PackedSide]:
    with memory_of((0, 4096)) as memory:
        made = PackedSide(memory, features, ordered)
        yield made
        made.driver.release()
        made.device.release()


@pytest.mark.parametrize("ordered", [False, True], ids=["x86", "weakly ordered"])
def test_p3_flags_are_read_first_and_the_first_ones_written_last(ordered: bool) -> None:
    with packed_side(PACKED, ordered) as both:
        driver, device, told = both.driver, both.device, both.recorder.told
        add = steps("store lengths, store ids, order, store flags", ordered)
        assert told(lambda: driver.add([BUFFER], [], 0)) == add
        chains: list[Chain] = []
        assert told(lambda: chains.extend(device.pop_many(1))) == steps("load flags, order", ordered)
        assert told(device.pop_many) == ["load flags"]
        used = steps("store ids, store lengths, order, store flags", ordered)
        assert told(lambda: device.push(chains[0], 0)) == used
        reaped = steps("load flags, order, load ids, load lengths, load flags", ordered)
        assert told(driver.reap) == reaped
        assert told(driver.reap) == ["load flags"]
        # Of two descriptors, and of two used elements, the first one's flags are last.
        two = steps(
            "store lengths, store ids, store lengths, store ids, store flags, order, store flags", ordered
        )
        assert told(lambda: driver.add([BUFFER], [BUFFER], 1)) == two
    with packed_side(PACKED, ordered) as both:
        driver, device, told = both.driver, both.device, both.recorder.told
        for token in range(3):
            driver.add([BUFFER], [], token)
        chains = []
        several = told(lambda: chains.extend(device.pop_many()))
        # All of the flags, then what they announce.
        assert several == [*["load flags"] * (len(several) - ordered), *["order"] * ordered]
        pushed = told(lambda: device.push_many(chains))
        first, other = "store ids, store lengths, ", "store ids, store lengths, store flags, "
        assert pushed == steps(first + 2 * other + "order, store flags", ordered)


@pytest.mark.parametrize("ordered", [False, True], ids=["x86", "weakly ordered"])
@pytest.mark.parametrize("features", [PACKED, PACKED_EVENT])
def test_s21_s22_a_fence_stands_between_what_is_said_and_what_is_heard_of_packed_rings(
    features: int, ordered: bool
) -> None:
    with packed_side(features, ordered) as both:
        driver, device, told = both.driver, both.device, both.recorder.told
        events = features == PACKED_EVENT
        for mine, ask in (("device_event", device.enable_notifications), ("driver_event", driver.enable_interrupts)):
            position = f"store {mine}, order, " if events else ""
            assert told(ask) == steps(f"{position}store {mine}, fence, load flags", ordered)
        driver.add([BUFFER], [], 0)
        position = ", order, load {}" if events else ""
        heard = "fence, load {}" + position
        assert told(driver.kick_needed) == steps(heard.format(*["device_event"] * 2), ordered)
        assert told(driver.kick_needed) == []
        [chain] = device.pop_many()
        device.push(chain, 0)
        assert told(device.should_interrupt) == steps(heard.format(*["driver_event"] * 2), ordered)
        assert told(device.should_interrupt) == []


def test_s23_both_sides_of_a_packed_ring_ask_what_their_processor_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for module in (packed_device, packed_driver):
        monkeypatch.setattr(module, "new_acquire", lambda: lambda: asked.append("order"))
    with memory_of((0, 4096)) as memory:
        driver: DriverQueue[int] = new_driver_queue(LAYOUT, memory, PACKED)
        device: DeviceQueue = new_device_queue(LAYOUT, memory, PACKED)
        for expected, call in (
            (1, lambda: driver.add([BUFFER], [], 0)), (1, lambda: driver.add([BUFFER], [], 0)),
            (2, lambda: device.push_many(device.pop_many())), (2, driver.reap), (0, driver.reap),
        ):  # fmt: skip
            asked.clear()
            call()
            assert len(asked) == expected
        driver.release()
        device.release()
