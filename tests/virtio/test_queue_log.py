"""What a queue marks in the dirty log, and when."""

import os
from collections.abc import Iterable, Iterator
from functools import partial

import pytest
from virtio.arena import BUFFERS_AT, END, ISLAND, SEAM, VICTIM_AT, Arena
from virtio.packed_rings import PACKED, Packed, PackedRing
from virtio.rings import (
    PAGE,
    PLAIN,
    WITH_EVENT,
    WRITE,
    Descriptor,
    Ring,
    memory_of,
    nothing_left,
    raised,
    refusal,
)

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.dirty_log import DirtyLog
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.layout import QueueLayout, RingIndex
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.queue_log import QueueLog
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.split_device import SplitDeviceQueue

ALL = (ISLAND + PAGE) // PAGE // 8 + 1
"""Bytes of a log that covers the arena's memory."""

USED_AT = GuestAddress(0x7000)
"""Where writes to the used ring are logged, which is not where it is."""


class Log(DirtyLog):
    """A log of a file of its own, and the marks as they came, each with used.idx at that time."""

    def __init__(self, size: int = ALL) -> None:
        self._fd = os.memfd_create("log")
        os.ftruncate(self._fd, size)
        super().__init__(self._fd, size)
        self.story: list[tuple[list[tuple[int, int]], int | None]] = []
        self.ring: Ring | None = None

    def mark_all(self, ranges: Iterable[tuple[int, int]]) -> None:
        given = [(address, length) for address, length in ranges if length]
        if given:
            self.story.append((given, self.ring.used_idx if self.ring else None))
        super().mark_all(given)

    def taken(self) -> set[int]:
        """The pages marked since the last time."""
        data = os.pread(self._fd, self.size, 0)
        os.pwrite(self._fd, bytes(self.size), 0)
        return {8 * at + bit for at, byte in enumerate(data) for bit in range(8) if byte >> bit & 1}

    def close(self) -> None:
        super().close()
        os.close(self._fd)


@pytest.fixture
def log() -> Iterator[Log]:
    with nothing_left():
        made = Log()
        yield made
        made.close()


def pages(*ranges: tuple[int, int]) -> set[int]:
    return {page for start, length in ranges for page in range(start // PAGE, -(-(start + length) // PAGE))}


def logged(arena: Arena, log: QueueLog, features: int = PLAIN) -> SplitDeviceQueue:
    arena.device.release()
    arena.device = SplitDeviceQueue(arena.ring.layout, arena.memory, features, log=log)
    return arena.device


@pytest.mark.parametrize("several", [False, True], ids=["push", "push_many"])
def test_t16_every_page_the_device_may_have_written_is_marked(several: bool, log: Log) -> None:
    """A short answer writes its status at the end of the writable part: all of it counts."""
    with Arena() as arena:
        device = logged(arena, QueueLog(log, buffers=True))
        assert log.taken() == set()
        written = [(BUFFERS_AT + 5, 2 * PAGE), (SEAM - 8, 5000), (ISLAND + 100, 1)]
        descriptors = [Descriptor(address, length, WRITE) for address, length in written]
        arena.ring.chain(Descriptor(0x3000, 16), *descriptors)
        arena.ring.offer(0)
        [chain] = device.pop_many()
        assert log.taken() == set()
        if several:
            chain.written = 1
            device.push_many([chain])
        else:
            device.push(chain, 1)
        assert log.taken() == pages(*written)


def test_what_is_not_to_be_logged_is_not(log: Log) -> None:
    with Arena() as arena:
        for given in (QueueLog(log), QueueLog(log, used=USED_AT), QueueLog(log, buffers=True)):
            device = logged(arena, given)
            log.taken()
            arena.ring.chain(Descriptor(0x3000, 16), Descriptor(BUFFERS_AT, 16, WRITE))
            arena.ring.avail_idx = arena.ring.used_idx = 0
            arena.ring.offer(0)
            [chain] = device.pop_many()
            device.push(chain, 0)
            device.disable_notifications()
            device.enable_notifications()
            expected = pages((USED_AT, 1)) if given.used else set()
            assert log.taken() == expected | (pages((BUFFERS_AT, 1)) if given.buffers else set())
            arena.ring.used_idx = 0


@pytest.mark.parametrize("several", [False, True], ids=["push", "push_many"])
def test_t16_marks_come_after_the_writes_and_buffers_and_elements_before_the_index(
    several: bool, log: Log
) -> None:
    with Arena() as arena:
        device = logged(arena, QueueLog(log, True, USED_AT))
        log.ring = ring = arena.ring
        for head in range(2):
            ring.describe(head, Descriptor(BUFFERS_AT + 64 * head, 16, WRITE))
        ring.offer(1, 0)
        chains = device.pop_many()
        log.story.clear()
        if several:
            chains[0].written = chains[1].written = 3
            device.push_many(chains)
            assert log.story == [
                ([(BUFFERS_AT + 64, 16), (BUFFERS_AT, 16)], 0), ([(USED_AT + 4, 16)], 0),
                ([(USED_AT + 2, 2)], 2),
            ]  # fmt: skip
        else:
            device.push(chains[0], 3)
            assert log.story == [
                ([(BUFFERS_AT + 64, 16)], 0), ([(USED_AT + 4, 8)], 0), ([(USED_AT + 2, 2)], 1)
            ]  # fmt: skip
        assert ring.used(0) == (1, 3)


def test_the_used_rings_pages_are_marked_by_its_log_address(log: Log) -> None:
    """A ring of three pages: the element's page and the index's, and both ends of a batch that wraps."""
    size = 1024
    used_at = GuestAddress(0x9000 + 0x204)
    with memory_of((0, 0x10000)) as memory:
        layout = QueueLayout.contiguous(0, size, GuestAddress(0), 4096)
        ring = Ring(memory, layout, 700)
        ring.used_idx = 700
        device = SplitDeviceQueue(layout, memory, PLAIN, RingIndex(700), log=QueueLog(log, used=used_at))
        assert log.taken() == pages((used_at, 6 + 8 * size))
        for head in range(size):
            ring.describe(head, Descriptor(0xF000, 16, WRITE))
        ring.offer(0)
        device.push_many(device.pop_many())
        assert log.taken() == pages((used_at + 4 + 8 * 700, 8), (used_at, 4)) == {9, 10}
        ring.offer(*range(1, 324))
        while chains := device.pop_many():
            device.push_many(chains)
        log.taken()
        log.story.clear()
        assert ring.used_idx == size
        ring.avail_idx = ring.used_idx = size - 1
        device.release()
        device = SplitDeviceQueue(layout, memory, PLAIN, RingIndex(size - 1), log=QueueLog(log, used=used_at))
        log.story.clear()
        ring.offer(5, 6, 7)
        device.push_many(device.pop_many())
        assert [marks for marks, _ in log.story] == [
            [(used_at + 4 + 8 * (size - 1), 8)], [(used_at + 4, 16)], [(used_at + 2, 2)]
        ]  # fmt: skip
        log.story.clear()
        ring.offer(8)
        device.push_many(device.pop_many())
        assert [marks for marks, _ in log.story] == [[(used_at + 4 + 16, 8)], [(used_at + 2, 2)]]
        ring.release()
        device.release()


@pytest.mark.parametrize(("features", "at"), [(PLAIN, 0), (WITH_EVENT, 4 + 8 * 8)])
def test_the_flags_and_the_event_are_marked(features: int, at: int, log: Log) -> None:
    with Arena() as arena:
        device = logged(arena, QueueLog(log, used=USED_AT), features)
        log.story.clear()
        device.enable_notifications()
        assert [marks for marks, _ in log.story] == [[(USED_AT + at, 2)]]
        log.story.clear()
        device.disable_notifications()
        assert [marks for marks, _ in log.story] == ([[(USED_AT, 2)]] if features == PLAIN else [])


def test_of_chains_that_are_refused_and_those_after_them_none_is_returned(log: Log) -> None:
    with Arena() as arena:
        device, ring = logged(arena, QueueLog(log, True)), arena.ring
        for head in range(4):
            ring.describe(head, Descriptor(BUFFERS_AT + PAGE * head, 16, WRITE))
        for bad in (17, -1):
            start = ring.used_idx
            ring.offer(0, 1, 2)
            chains = list(device.pop_many())
            log.taken()
            for chain in chains:
                chain.written = 16
            chains[1].written = bad
            error = raised(lambda: device.push_many(chains))
            assert refusal(error) == ("UsedLengthError", {"queue": 3, "head": 1, "length": bad, "room": 16})
            assert ring.used_idx == start + 1 and log.taken() == pages((BUFFERS_AT, 1))
            error = raised(lambda: device.push(chains[0], 0))
            assert refusal(error) == ("NotInFlight", {"queue": 3, "head": 0})
            chains[1].written = 0
            twice: list[Chain] = [chains[1], chains[1], chains[2]]
            error = raised(lambda: device.push_many(twice))
            assert refusal(error) == ("NotInFlight", {"queue": 3, "head": 1})
            device.push_many(chains[2:])
            assert ring.used_idx == start + 3
            device.push_many([])
            assert ring.used_idx == start + 3


def test_t16_cve_2020_10722_a_log_too_small_for_what_is_logged_is_refused() -> None:
    """Every size of log: what it cannot hold is refused when the queue is made, and never met later."""
    used_size = 6 + 8 * 8
    with nothing_left(), Arena() as arena:
        layout = arena.ring.layout
        for size in [*range(1, 9), ISLAND // PAGE // 8, ALL]:
            log = Log(size)
            for given in (
                QueueLog(log, True), QueueLog(log, used=USED_AT), QueueLog(log, used=GuestAddress(VICTIM_AT)),
                QueueLog(log, used=GuestAddress(8 * size * PAGE - used_size)),
                QueueLog(log, used=GuestAddress(8 * size * PAGE - used_size + 1)),
                QueueLog(log, used=GuestAddress((1 << 64) - 1)),
            ):  # fmt: skip
                wanted = [(r.base, r.size) for r in arena.memory.regions] if given.buffers else []
                wanted += [(given.used, used_size)] if given.used is not None else []
                beyond = [(start, length) for start, length in wanted if start + length > 8 * size * PAGE]
                arena.ring.avail_idx = arena.ring.used_idx = 0
                if beyond:
                    error = raised(partial(SplitDeviceQueue, layout, arena.memory, PLAIN, log=given))
                    assert isinstance(error, errors.DirtyLogTooSmall)
                    assert vars(error) == {"queue": 3, "address": beyond[0][0], "length": beyond[0][1]}
                    assert log.taken() == set()
                    continue
                device = SplitDeviceQueue(layout, arena.memory, PLAIN, log=given)
                arena.ring.chain(Descriptor(END - PAGE, 1, WRITE), Descriptor(ISLAND + PAGE - 1, 1, WRITE))
                arena.ring.offer(0)
                device.push_many(device.pop_many())
                device.release()
                log.taken()
            log.close()


def test_t16_of_a_packed_ring_the_descriptors_written_over_are_marked_where_they_are(log: Log) -> None:
    """And the event structure by its log address; after the writes, and once more after the one that publishes."""
    event_at = GuestAddress(0x2_F000)
    with memory_of((0, 0x30000)) as memory:
        # Two pages of descriptors, the ring's end and its start.
        layout = QueueLayout.contiguous(0, 512, GuestAddress(0x4000))
        ring = PackedRing(memory, layout, 510)
        for index in range(512):
            ring.describe(index, Packed(0, 0, 1 << 7 | 1 << 15))
        state = QueueState(510 | 1 << 15, 510 | 1 << 15)
        device = PackedDeviceQueue(layout, memory, PACKED, state, log=QueueLog(log, True, event_at))
        assert log.taken() == pages((0x4000, 16 * 512), (event_at, 4))
        for number in range(4):
            ring.offer(Packed(0x1_0000 + 0x1000 * number, 16, 2), id=number)
        chains = device.pop_many()
        assert log.taken() == set()
        log.story.clear()
        for chain in chains:
            chain.written = 1
        device.push_many(chains)
        slots = [0x4000 + 16 * slot for slot in (510, 511, 0, 1)]
        buffers = [[(0x1_0000 + 0x1000 * number, 16)] for number in range(4)]
        marked = [ranges for ranges, _ in log.story]
        assert marked == [
            buffers[0], buffers[1], [(slots[1], 16)], buffers[2], [(slots[2], 16)], buffers[3], [(slots[3], 16)],
            [(slots[0], 16)], [(slots[0], 16)],
        ]  # fmt: skip
        assert log.taken() == pages((0x4000, 16), (0x5000, 0x1000), (0x1_0000, 0x4000))
        device.disable_notifications()
        device.enable_notifications()
        assert log.taken() == pages((event_at, 4))
        device.release()
        ring.release()


def test_of_a_packed_ring_too_what_is_not_to_be_logged_is_not(log: Log) -> None:
    with memory_of((0, 0x10000)) as memory:
        layout = QueueLayout.contiguous(0, 8, GuestAddress(0x4000))
        for buffers, used in ((False, USED_AT), (True, None), (False, None)):
            ring = PackedRing(memory, layout)
            device = PackedDeviceQueue(layout, memory, PACKED, log=QueueLog(log, buffers, used))
            log.taken()
            ring.offer(Packed(0x8000, 16, WRITE))
            device.push_many(device.pop_many())
            assert log.taken() == ({8} if buffers else set()) | ({4} if used else set())
            device.release()
            ring.release()
            memory.zero(GuestAddress(0x4000), PAGE)


def test_t16_a_log_too_small_for_a_packed_ring_is_refused() -> None:
    with nothing_left(), memory_of((0, 0x1_0000)) as memory:
        layout = QueueLayout.contiguous(0, 8, GuestAddress(0x9000))
        for used, buffers, good in (
            (0x7FFC, False, False), (0x8000, False, False), (0x7FFC, True, False), (None, False, True),
        ):  # fmt: skip
            # Eight pages: up to 0x8000.
            small = Log(1)
            given = QueueLog(small, buffers, None if used is None else GuestAddress(used))
            if good:
                PackedDeviceQueue(layout, memory, PACKED, log=given).release()
            else:
                error = raised(partial(PackedDeviceQueue, layout, memory, PACKED, log=given))
                assert isinstance(error, errors.DirtyLogTooSmall)
            small.close()
