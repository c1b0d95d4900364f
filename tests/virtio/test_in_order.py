"""IN_ORDER as a driver has it: one used element may stand for a batch (virtio 1.3, 2.7.9 and 2.8.8)."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

import pytest
from virtio.packed_rings import AVAIL, PACKED, USED, Packed, PackedRing, wrap_counter
from virtio.rings import NEXT, PLAIN, WITH_EVENT, WRITE, Ring, memory_of, raised

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device_queue import new_device_queue
from lguestlib.virtio.driver_queue import DriverQueue, new_driver_queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.split_driver import Buffer

IN_ORDER = int(Feature.IN_ORDER)
MEMORY = 1 << 20
NOISE = 0xFFFF_FFFF


def buffer(number: int, length: int = 16) -> Buffer:
    return Buffer(GuestAddress(0x10000 + 64 * number), length)


class Pair:
    """A driver, and a device that tells of batches by their last chain."""

    def __init__(self, memory: GuestMemory, size: int, features: int) -> None:
        self.layout = QueueLayout.contiguous(2, size, GuestAddress(0x1000))
        self.packed = bool(features & Feature.RING_PACKED)
        self.driver: DriverQueue[int] = new_driver_queue(self.layout, memory, features | IN_ORDER)
        self.split_ring, self.packed_ring = Ring(memory, self.layout), PackedRing(memory, self.layout)
        self.position = 0

    def use(self, last: int, written: int, chains: int = 1, slots: int | None = None) -> None:
        """Return so many *chains*, of so many *slots* in all, by the head or ID of the *last*."""
        if self.packed:
            size = self.layout.size
            marks = AVAIL | USED if wrap_counter(self.position, size) else 0
            self.packed_ring.describe(self.position % size, Packed(0, written, marks, last))
            self.position += chains if slots is None else slots
        else:
            ring = self.split_ring
            for skipped in range(chains):
                ring.set_used(ring.used_idx + skipped, *((NOISE, NOISE) if skipped else (last, written)))
            ring.used_idx += chains

    def release(self) -> None:
        self.driver.release()
        self.split_ring.release()
        self.packed_ring.release()


@contextmanager
def pair(features: int, size: int = 8) -> Iterator[Pair]:
    with memory_of((0, MEMORY)) as memory:
        made = Pair(memory, size, features)
        yield made
        made.release()


BOTH = pytest.mark.parametrize("features", [PLAIN, PACKED], ids=["split", "packed"])


@BOTH
def test_a_batch_is_told_of_by_its_last_chain_and_the_rest_was_used_whole(features: int) -> None:
    with pair(features) as made:
        driver = made.driver
        for lap in range(8):
            heads = [
                driver.add([buffer(0)], [buffer(1, 16)], lap), driver.add([buffer(2)], [buffer(3, 8)], lap + 100),
                driver.add([], [buffer(4, 4)], lap + 200),
            ]  # fmt: skip
            made.use(heads[2], 2, 3, 5)
            assert driver.reap() == [(lap, 16), (lap + 100, 8), (lap + 200, 2)]
            assert (driver.free, driver.in_flight) == (8, 0)


@BOTH
def test_batches_follow_each_other_where_their_first_chains_are(features: int) -> None:
    with pair(features) as made:
        driver = made.driver
        for lap in range(4):
            heads = [driver.add([], [buffer(number, 16)], number) for number in range(8)]
            made.use(heads[1], 5, 2)
            made.use(heads[2], 6)
            made.use(heads[6], 7, 4)
            assert driver.reap() == [(0, 16), (1, 5), (2, 6), (3, 16), (4, 16), (5, 16), (6, 7)]
            assert driver.in_flight == 1
            made.use(heads[7], 8)
            assert driver.reap() == [(7, 8)]


@BOTH
def test_a_device_that_makes_no_batches_is_as_any_other(features: int) -> None:
    with pair(features) as made:
        driver = made.driver
        for lap in range(4):
            heads = [driver.add([], [buffer(number, 16)], number) for number in range(5)]
            for number, head in enumerate(heads):
                made.use(head, number)
            assert driver.reap() == [(number, number) for number in range(5)]


def test_descriptors_are_used_in_the_order_of_the_table() -> None:
    random = Random(1)
    with pair(PLAIN) as made:
        driver, ring = made.driver, made.split_ring
        out: deque[tuple[int, int]] = deque()
        following = 0
        for turn in range(3000):
            parts = random.randrange(1, 4)
            if parts <= driver.free and random.random() < 0.6:
                head = driver.add([buffer(number) for number in range(parts)], [], turn)
                assert head == following
                for left in range(parts - 1, -1, -1):
                    following = (following + 1) % 8
                    descriptor = ring.described(following - 1 & 7)
                    assert descriptor.flags == (NEXT if left else 0) and descriptor.next == (following if left else 0)
                out.append((head, turn))
            elif out:
                done = [out.popleft() for _ in range(random.randrange(1, len(out) + 1))]
                made.use(done[-1][0], 0, len(done))
                assert driver.reap() == [(token, 0) for _, token in done]


def test_a_split_ring_shows_a_chain_that_comes_before_its_turn() -> None:
    with pair(PLAIN) as made:
        driver = made.driver
        first, second, third = (driver.add([], [buffer(number)], number) for number in range(3))
        made.use(first, 1)
        made.use(third, 3)
        assert driver.reap() == [(0, 1)]
        error = raised(driver.reap)
        assert isinstance(error, errors.UsedOutOfOrder) and (error.head, error.ahead) == (third, 1)
        assert driver.in_flight == 2 and driver.reap() == []
        made.use(second, 2)
        assert driver.reap() == [(1, 2)]


@BOTH
def test_what_was_never_given_is_no_batch(features: int) -> None:
    with pair(features) as made:
        driver = made.driver
        head, _, other = (driver.add([], [buffer(number)], number) for number in range(3))
        made.use(head, 1)
        made.use(7, 1)
        assert driver.reap() == [(0, 1)]
        error = raised(driver.reap)
        assert isinstance(error, errors.NotInFlight) and error.head == 7
        assert driver.in_flight == 2 and driver.reap() == []
        made.use(head, 1)
        assert isinstance(raised(driver.reap), errors.NotInFlight), "it was used already"
        made.use(other, 1)
        if features == PLAIN:
            assert isinstance(raised(driver.reap), errors.UsedOutOfOrder)
        else:
            assert driver.reap() == [(1, 16), (2, 1)]


@BOTH
def test_s19_of_a_batch_the_last_length_is_checked(features: int) -> None:
    with pair(features) as made:
        driver = made.driver
        heads = [driver.add([], [buffer(number, 4)], number) for number in range(3)]
        made.use(heads[1], 5, 2)
        made.use(heads[2], 4)
        assert driver.reap() == [(0, 4)]
        error = raised(driver.reap)
        assert isinstance(error, errors.UsedLengthError) and (error.length, error.room) == (5, 4)
        assert driver.reap() == [(2, 4)] and (driver.free, driver.in_flight) == (8, 0)


def batched(made: Pair, chains: Sequence[Chain], before: bytes, position: int, memory: GuestMemory) -> None:
    """Make what our device has told of each chain into what one that makes batches tells."""
    last, size = chains[-1], made.layout.size
    if made.packed:
        marks = AVAIL | USED if wrap_counter(position, size) else 0
        memory.write(made.layout.descriptors, before)
        used = Packed(0, last.written, marks | WRITE, last.head)
        made.packed_ring.describe(position % size, used)
    else:
        for skipped in range(len(chains)):
            element = (NOISE, NOISE) if skipped else (last.head, last.written)
            made.split_ring.set_used(position + skipped, *element)


@pytest.mark.parametrize("batches", [False, True], ids=["each", "batches"])
@pytest.mark.parametrize("features", [PLAIN, WITH_EVENT, PACKED, PACKED | WITH_EVENT])
@pytest.mark.parametrize("size", [1, 4, 32])
def test_random_work_comes_back_whole(size: int, features: int, batches: bool) -> None:
    random = Random(size)
    with memory_of((0, MEMORY)) as memory:
        made = Pair(memory, size, features)
        driver = made.driver
        device = new_device_queue(made.layout, memory, features | IN_ORDER)
        sent: deque[tuple[int, bytes, int]] = deque()
        number = done = position = 0
        for _ in range(3000):
            if random.random() < 0.5 and driver.free >= min(size, 2):
                data, room = random.randbytes(16), random.randrange(1, 17)
                memory.write(buffer(2 * (number % 64)).address, data)
                readable = [buffer(2 * (number % 64))] if size > 1 else []
                driver.add(readable, [buffer(2 * (number % 64) + 1, room)], number)
                sent.append((number, data, room))
                number += 1
            chains = device.pop_many(random.randrange(1, 9)) if random.random() < 0.3 else ()
            if chains:
                for chain in chains:
                    chain.written = chain.write((chain.read() or b"!" * 16)[: chain.writable_length])
                before = memory.read(made.layout.descriptors, 16 * size)
                device.push_many(chains)
                if batches:
                    batched(made, chains, before, position, memory)
                slots = 2 if size > 1 and made.packed else 1
                position += slots * len(chains)
            for token, written in driver.reap():
                expected, data, room = sent.popleft()
                assert (token, written) == (expected, room)
                found = memory.read(buffer(2 * (token % 64) + 1).address, room)
                assert found == (data if size > 1 else b"!" * 16)[:room]
                done += 1
        assert done > 300 and done + driver.in_flight == number
        device.release()
        made.release()
