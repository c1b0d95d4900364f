"""Packed rings at work: under a queue's thread, under io_uring, and behind a vhost-user socket."""

import dataclasses
import os
import random
import select
from collections.abc import Iterator
from functools import partial

import pytest
from runtime.rigs import Rig, eventually, nothing_left
from runtime.test_transfer_thread import Line, TransferRig
from runtime.test_vhost_user_driver import Slow, behind, header
from uring import uring_or_skip

from lguestlib.abi import virtio_blk as blk
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.mmio_runner import MmioDeviceRunner
from lguestlib.runtime.inprocess.driver import GuestDevice, GuestQueue, Pages
from lguestlib.runtime.queue_thread import QueueEnds
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import RING_FEATURES, Queue
from lguestlib.virtio.device_queue import new_device_queue
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.features import Feature
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.packed_driver import PackedDriverQueue
from lguestlib.virtio.queue_state import WRAP, QueueState
from lguestlib.virtio.split_driver import Buffer

PACKED = int(Feature.VERSION_1 | Feature.RING_PACKED)
PACKED_EVENT = PACKED | int(Feature.RING_EVENT_IDX)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


def answering(chain: Chain) -> int:
    return chain.write(chain.read())


@pytest.mark.parametrize("features", [PACKED, PACKED_EVENT], ids=["flags", "events"])
@pytest.mark.parametrize("size", [3, 64, 100])
def test_a_thread_serves_a_packed_ring_of_any_size_through_many_laps(size: int, features: int) -> None:
    with Rig(Queue("q", answering), size, features) as rig:
        assert isinstance(rig.ring, PackedDeviceQueue)
        rig.start()
        token = 0
        for _ in range(60):
            sent: list[tuple[int, int]] = []
            while rig.driver.free >= 2 and len(sent) < 20:
                rig.submit(token, 32, 64)
                sent.append((token, 32))
                token += 1
            # In the driver's order.
            assert rig.collect(len(sent)) == sent
        eventually(lambda: rig.counters.chains == token, "all chains' return")
        assert not rig.failures


def test_t9_a_stopped_thread_tells_where_to_go_on_and_another_does() -> None:
    with Rig(Queue("q", answering), 5, PACKED_EVENT) as rig:
        for turn in range(12):
            rig.start()
            rig.submit(turn, 8, 8)
            assert rig.collect(1) == [(turn, 8)]
            where = 2 * (turn + 1) % 10
            position = where | WRAP if where < 5 else where - 5
            assert rig.thread.stop() == QueueState(position, position) == rig.ring.state
            # Nobody listens, and it is there when somebody does (T8).
            rig.renew()


def test_t12_the_ring_is_exchanged_between_two_chains() -> None:
    with Rig(Queue("q", answering), 7, PACKED_EVENT) as rig:

        def change(ends: QueueEnds) -> QueueEnds:
            rig.ring = new_device_queue(rig.layout, rig.memory, rig.features, ends.ring.state)
            return ends._replace(ring=rig.ring)

        rig.start()
        done: list[tuple[int, int]] = []
        for token in range(200):
            while rig.driver.free < 2:
                done += rig.collect(1)
            rig.submit(token, 8, 8)
            if token % 5 == 0:
                assert rig.thread.exchange(change)
        done += rig.collect(200 - len(done))
        assert done == [(token, 8) for token in range(200)]


def test_a_malformed_chain_fails_the_thread_behind_the_good_ones() -> None:
    with Rig(Queue("q", answering), 8, PACKED) as rig:
        rig.submit(0, 8, 8)
        rig.submit(1, 8, 0)
        # Its address, before anybody looks.
        rig.memory.write(GuestAddress(rig.layout.descriptors + 16 * 2), b"\xff" * 8)
        rig.start()
        assert rig.collect(1) == [(0, 8)]
        eventually(lambda: bool(rig.failures), "the failure")
        assert isinstance(rig.failures[0], errors.BadAddress)


@pytest.mark.parametrize("features", [PACKED, PACKED_EVENT], ids=["flags", "events"])
def test_requests_that_come_back_in_another_order_are_told_apart(features: int) -> None:
    """io_uring has them all in hand: those that need no transfer overtake those that wait."""
    uring_or_skip()
    line = Line()
    with TransferRig(line.queue, 48, features) as rig:
        rig.start()
        for token in range(100):
            rig.wait_for(token)
            rig.submit(1000 + token, 8, 8)
            assert rig.collect(1) == [(1000 + token, 8)]
            line.far.send(bytes(8))
            assert rig.collect(1) == [(token, 8)]
        for token in range(8):
            rig.wait_for(token)
        rig.submit(20, 8, 8)
        assert rig.collect(1) == [(20, 8)]
        line.far.send(bytes(64))
        assert sorted(rig.collect(8)) == [(token, 8) for token in range(8)]
        assert not rig.failures
    line.close()


@pytest.mark.parametrize(
    "wanted", [PACKED, PACKED | int(Feature.IN_ORDER), PACKED_EVENT | int(Feature.RING_INDIRECT_DESC)]
)
def test_a_front_end_of_ours_has_packed_rings_where_it_wants_them(wanted: int) -> None:
    slow = Slow()
    slow.withheld = int(RING_FEATURES | Feature.IN_ORDER) & ~wanted
    slow.go.set()
    with behind(slow, queues=2, wanted=wanted) as driven:
        assert driven.features == wanted
        room, said = driven.buffer(16), driven.buffer(16)
        for turn in range(100):
            for queue in driven.queues:
                assert isinstance(queue.ring, PackedDriverQueue)
                text = b"%d %d" % (queue.layout.index, turn)
                driven.memory.write(said.address, text)
                assert queue.request([said._replace(length=len(text))], [room]) == len(text)
                assert driven.read(room, len(text)) == text


def test_a_disk_with_a_packed_ring() -> None:
    disk = FileDisk.scratch(1 << 20)
    device = Block(disk)
    device.withheld = 0
    with behind(device, wanted=1 << blk.VIRTIO_BLK_F_FLUSH | int(Feature.RING_PACKED)) as driven:
        assert driven.features & Feature.RING_PACKED
        queue, status = driven.queues[0], driven.buffer(1)
        room, written = driven.buffer(8192), driven.buffer(8192)
        out, into = driven.buffer(16), driven.buffer(16)
        for turn in range(50):
            data = random.Random(turn).randbytes(8192)
            driven.memory.write(written.address, data)
            driven.memory.write(out.address, header(blk.VIRTIO_BLK_T_OUT, 16 * (turn % 8)))
            driven.memory.write(into.address, header(blk.VIRTIO_BLK_T_IN, 16 * (turn % 8)))
            assert queue.request([out, written], [status]) == 1
            assert queue.request([into], [room, status]) == 8193
            assert driven.read(room) == data
    disk.close()


@pytest.mark.parametrize("size", [64, 5])
def test_a_driver_on_virtio_mmio_has_a_packed_ring_of_any_size_where_it_is_offered(size: int) -> None:
    slow, lines = Slow(), list[str]()
    slow.go.set()
    slow.withheld = 0
    memory = GuestMemory.anonymous(1 << 20)
    runner = MmioDeviceRunner(slow, memory, lines.append)
    guest = GuestDevice("slow", runner, memory, Pages(GuestAddress(0x1000)), int(Feature.RING_PACKED))
    for queue in guest.queues:
        queue.layout = dataclasses.replace(queue.layout, size=size)
    said, room = Buffer(GuestAddress(0x8_0000), 8), Buffer(GuestAddress(0x9_0000), 8)
    waiting = select.poll()
    waiting.register(runner.interrupt.fd, select.POLLIN)
    for _ in range(3):
        guest.start()
        assert guest.features & Feature.RING_PACKED
        for turn in range(3 * size):
            memory.write(said.address, turn.to_bytes(8, "little"))
            queue = guest.queues[turn % 2]
            queue.submit([said], [room], room)
            while not (used := queue.reap()):
                if not queue.ring.enable_interrupts():
                    assert waiting.poll(10_000)
                    os.read(runner.interrupt.fd, 8)
                    guest.interrupted()
            assert [written for _, written in used] == [8]
            assert memory.read(room.address, 8) == turn.to_bytes(8, "little")
    guest.stop()
    runner.close()
    memory.close()
    assert lines == []


def test_packed_rings_are_offered_where_somebody_chooses_and_else_nowhere() -> None:
    device = Slow()
    assert not device.offered & Feature.RING_PACKED
    device.withheld = 0
    assert device.offered & Feature.RING_PACKED


def test_chains_are_said_to_come_back_in_order_only_where_no_transfer_overtakes_another() -> None:
    device = Slow()
    assert not device.offered & Feature.IN_ORDER
    device.withheld = 0
    assert device.offered & Feature.IN_ORDER
    disk = FileDisk.scratch(1 << 20)
    one_by_one = Block(disk)
    one_by_one.withheld = 0
    assert one_by_one.offered & Feature.IN_ORDER
    line = Line()

    class Overtaking(Slow):
        def queues(self) -> tuple[Queue, ...]:
            return (Queue("requests", self.serve), line.queue)

    overtaking = Overtaking()
    overtaking.withheld = 0
    assert not overtaking.offered & Feature.IN_ORDER
    line.close()
    disk.close()


def _reaped(queue: GuestQueue) -> bool:
    return bool(queue.reap())


@pytest.mark.parametrize("kind", [0, int(Feature.RING_PACKED)], ids=["split", "packed"])
def test_t4_a_queue_begins_anew_while_the_other_goes_on(kind: int) -> None:
    slow, lines = Slow(), list[str]()
    slow.go.set()
    slow.withheld = 0
    memory = GuestMemory.anonymous(1 << 20)
    runner = MmioDeviceRunner(slow, memory, lines.append)
    guest = GuestDevice("slow", runner, memory, Pages(GuestAddress(0x1000)), kind | int(Feature.RING_RESET))
    guest.start()
    assert guest.features & Feature.RING_RESET and guest.features & Feature.RING_PACKED == kind
    said, room = Buffer(GuestAddress(0x8_0000), 8), Buffer(GuestAddress(0x9_0000), 8)
    for turn in range(10):
        for queue in guest.queues:
            queue.submit([said], [room], room)
            eventually(partial(_reaped, queue), "the answer")
        # Its thread ends, the ring is cleared, and another thread begins at its start.
        queue = guest.queues[turn % 2]
        guest.driver.reset_queue(queue.layout.index)
        queue.start(memory, guest.features)
        guest.driver.enable_queue(queue.layout)
    guest.stop()
    runner.close()
    memory.close()
    assert lines == []
