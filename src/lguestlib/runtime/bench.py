"""How fast the library is on this host, each figure beside a primitive measured in turns with it.

Absolute times swing with the machine; the ratio, taken as the median over many
short turns of both, holds.
"""

import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from typing import NamedTuple

from lguestlib.abi import virtio_blk
from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.interrupt import EventfdInterrupt
from lguestlib.runtime.kick import EventfdKick
from lguestlib.runtime.namespace import private_tap
from lguestlib.runtime.options import DEFAULT_NETWORK
from lguestlib.runtime.queue_thread import QueueThread
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Queue
from lguestlib.virtio.devices.block import SECTOR, Block
from lguestlib.virtio.devices.net import HEADER_SIZE, Net
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.split_device import BATCH, SplitDeviceQueue
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue

FEATURES = Feature.VERSION_1 | Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX
QUEUE_SIZE = 1024
TURNS = 41
RING_CHAINS = 4 * BATCH

MEMORY_SIZE = 32 << 20
RING_AT = GuestAddress(0x1000)
TABLES_AT = GuestAddress(0x1_0000)
BUFFERS_AT = 0x10_0000

BLOCK_SIZE = 4096
BLOCK_DEPTH = 32
DISK_SIZE = 128 << 20
FRAME_SIZE = 1500


class Figure(NamedTuple):
    """One result: nanoseconds of the work and of the primitive, and the ratio, all medians."""

    name: str
    nanoseconds: float
    primitive: str
    primitive_nanoseconds: float
    ratio: float

    def __str__(self) -> str:
        return (
            f"{self.name:<42}{self.nanoseconds:>9.0f} ns {self.ratio:>7.2f} x"
            f" {self.primitive} ({self.primitive_nanoseconds:.0f} ns)"
        )


Turn = Callable[[], float]
"""Does its work once, or several times, and returns the nanoseconds each took."""


def in_turns(name: str, work: Turn, primitive_name: str, primitive: Turn) -> Figure:
    """Measure both, one after the other, again and again."""
    for turn in (work, primitive) * 3:
        turn()
    pairs = [(work(), primitive()) for _ in range(TURNS)]
    return Figure(
        name,
        statistics.median(took for took, _ in pairs),
        primitive_name,
        statistics.median(took for _, took in pairs),
        statistics.median(took / base for took, base in pairs),
    )


class _Bench:
    """A ring in memory with both of its sides, and a queue thread, not started, that serves it."""

    def __init__(self, queue: Queue) -> None:
        self.memory = GuestMemory.anonymous(MEMORY_SIZE)
        layout = QueueLayout.contiguous(0, QUEUE_SIZE, RING_AT)
        self.driver: SplitDriverQueue[None] = SplitDriverQueue(layout, self.memory, int(FEATURES))
        self.ring = SplitDeviceQueue(layout, self.memory, int(FEATURES))
        self.kick = EventfdKick()
        self.interrupt = EventfdInterrupt(lambda: None)
        self.thread = QueueThread(
            queue.name, queue, self.ring, self.kick, self.interrupt, QueueCounters(), lambda thread, error: None
        )  # fmt: skip

    def serve_all(self) -> None:
        while self.thread.serve_available():
            continue

    def close(self) -> None:
        self.thread.stop()
        self.driver.release()
        self.kick.close()
        self.interrupt.close()
        self.memory.close()


def _nothing(chain: Chain) -> int:
    return 0


def _repeated(call: Callable[..., object], *arguments: object, times: int = 200) -> Turn:
    def turn() -> float:
        start = time.perf_counter_ns()
        for _ in range(times):
            call(*arguments)
        return (time.perf_counter_ns() - start) / times

    return turn


def bench_ring() -> Iterator[Figure]:
    """Popping, checking and completing chains: of buffers used before, or of ones never where they were."""
    shapes: tuple[tuple[str, list[int], list[int], bool, int], ...] = (
        ("1 descriptor", [], [512], False, 0),
        ("1 descriptor, moved", [], [512], False, 1040),
        ("3 descriptors", [16], [512, 1], False, 0),
        ("3 descriptors, moved", [16], [512, 1], False, 1040),
        ("3 descriptors, moved, indirect", [16], [512, 1], True, 1040),
    )
    with ExitStack() as opened:
        bench = _Bench(Queue("ring", _nothing))
        opened.callback(bench.close)
        signalled = eventfd()
        opened.callback(os.close, signalled)
        for name, readable, writable, indirect, step in shapes:
            yield in_turns(
                f"ring: {name}", _ring_turn(bench, readable, writable, indirect, step),
                "write(eventfd)", _repeated(os.write, signalled, SIGNAL),
            )  # fmt: skip


def _ring_turn(
    bench: _Bench, readable: Sequence[int], writable: Sequence[int], indirect: bool, step: int
) -> Turn:
    driver, ring = bench.driver, bench.ring
    addresses = count(0, step)

    def buffer(length: int) -> Buffer:
        return Buffer(GuestAddress(BUFFERS_AT + next(addresses) % (MEMORY_SIZE - BUFFERS_AT - 1024)), length)

    def turn() -> float:
        for number in range(RING_CHAINS):
            table = GuestAddress(TABLES_AT + 64 * number) if indirect else None
            driver.add([buffer(size) for size in readable], [buffer(size) for size in writable], None, table)
        start = time.perf_counter_ns()
        while chains := ring.pop_many():
            for chain in chains:
                chain.written = chain.writable_length
            ring.push_many(chains)
            ring.should_interrupt()
        took = time.perf_counter_ns() - start
        driver.reap()
        return took / RING_CHAINS

    return turn


def bench_wake() -> Iterator[Figure]:
    """From the driver's kick to the interrupt it gets, through a queue's thread.

    The driver is this thread, on another processor where there are two, as a
    guest is; the primitive is an eventfd back and forth between it and a bare
    thread.
    """
    processors = sorted(os.sched_getaffinity(0))

    with ExitStack() as opened:
        bench = _Bench(Queue("wake", _nothing))
        opened.callback(bench.close)
        # A new thread is where its parent is.
        os.sched_setaffinity(0, processors[-1:])
        opened.callback(os.sched_setaffinity, 0, processors)
        bench.thread.start()
        there, back = eventfd(), eventfd()
        opened.callback(os.close, there)
        opened.callback(os.close, back)
        echo = threading.Thread(target=_echo, args=(there, back), daemon=True)
        echo.start()
        opened.callback(echo.join)
        opened.callback(os.write, there, _STOP)
        os.sched_setaffinity(0, processors[:1])
        driver = bench.driver

        def through_thread() -> float:
            driver.enable_interrupts()
            driver.add([Buffer(GuestAddress(BUFFERS_AT), 64)], [], None)
            took = _round_trip(bench.kick.fd, bench.interrupt.fd)
            driver.reap()
            return took

        yield in_turns(
            "wake: kick to interrupt", _median_of(through_thread),
            "two wake-ups of bare threads", _median_of(lambda: _round_trip(there, back)),
        )  # fmt: skip


_STOP = (1 << 32).to_bytes(8, "little")


def _echo(there: int, back: int) -> None:
    while os.read(there, BYTES) != _STOP:
        os.write(back, SIGNAL)


def _round_trip(there: int, back: int) -> float:
    # The other side has to have gone to sleep, as in life.
    time.sleep(0.0001)
    start = time.perf_counter_ns()
    os.write(there, SIGNAL)
    os.read(back, BYTES)
    return time.perf_counter_ns() - start


def _median_of(turn: Turn, times: int = 25) -> Turn:
    return lambda: statistics.median(turn() for _ in range(times))


def bench_block() -> Iterator[Figure]:
    """Random 4 KiB reads of a disk in memory, as a queue's thread serves them."""
    with ExitStack() as opened:
        disk = FileDisk.scratch(DISK_SIZE)
        opened.callback(disk.close)
        disk.write_zeroes(0, DISK_SIZE, unmap=False)
        bench = _Bench(Block(disk).queues()[0])
        opened.callback(bench.close)
        views = bench.memory.views()
        opened.callback(views.release)
        headers, statuses = 0x8000, 0x9000
        buffers = [GuestAddress(BUFFERS_AT + BLOCK_SIZE * number) for number in range(BLOCK_DEPTH)]
        requests = [
            ([Buffer(GuestAddress(headers + 16 * number), 16)],
             [Buffer(buffer, BLOCK_SIZE), Buffer(GuestAddress(statuses + number), 1)])
            for number, buffer in enumerate(buffers)
        ]  # fmt: skip
        targets = [views.slices(buffer, BLOCK_SIZE) for buffer in buffers]
        opened.callback(targets.clear)
        choose = random.Random(1)

        def random_blocks() -> list[int]:
            return [choose.randrange(DISK_SIZE // BLOCK_SIZE) for _ in buffers]

        def through_ring() -> float:
            for number, block in enumerate(random_blocks()):
                header = virtio_blk.virtio_blk_outhdr(
                    type=virtio_blk.VIRTIO_BLK_T_IN, sector=block * (BLOCK_SIZE // SECTOR)
                )
                bench.memory.write(GuestAddress(headers + 16 * number), bytes(header))
            for readable, writable in requests:
                bench.driver.add(readable, writable, None)
            start = time.perf_counter_ns()
            bench.serve_all()
            took = time.perf_counter_ns() - start
            bench.driver.reap()
            return took / BLOCK_DEPTH

        def bare() -> float:
            reads = [(target, BLOCK_SIZE * block) for target, block in zip(targets, random_blocks())]
            start = time.perf_counter_ns()
            for target, offset in reads:
                os.preadv(disk.fd, target, offset)
            return (time.perf_counter_ns() - start) / BLOCK_DEPTH

        yield in_turns("block: 4 KiB read at depth 32", through_ring, "preadv of such blocks", bare)


def bench_net() -> Iterator[Figure]:
    """Frames of 1500 bytes into a TAP device, as a queue's thread sends them."""
    with ExitStack() as opened:
        network, name = _network()
        opened.callback(network.close)
        bench = _Bench(Net(network, bytes(6)).queues()[1])
        opened.callback(bench.close)
        views = bench.memory.views()
        opened.callback(views.release)
        packet = Buffer(GuestAddress(BUFFERS_AT), HEADER_SIZE + FRAME_SIZE)
        # To a station that is not there: the kernel takes the frame and drops it.
        bench.memory.write(GuestAddress(BUFFERS_AT + HEADER_SIZE), bytes.fromhex("02000000000902000000000a88b5"))

        def through_ring() -> float:
            for _ in range(BATCH):
                bench.driver.add([packet], [], None)
            start = time.perf_counter_ns()
            bench.serve_all()
            took = time.perf_counter_ns() - start
            bench.driver.reap()
            return took / BATCH

        frame = views.slices(packet.address, packet.length)
        opened.callback(frame.clear)
        bare = _repeated(os.writev, network.fd, frame, times=BATCH)
        yield in_turns(f"net: transmit {FRAME_SIZE} bytes", through_ring, f"writev({name})", bare)


def _network() -> tuple[PacketNetwork, str]:
    """A TAP device in a namespace of our own, or where there is none to be had /dev/null."""
    if threading.active_count() == 1:
        with suppress(OSError):
            return private_tap(DEFAULT_NETWORK.address)[0], "tap"
    return PacketNetwork(os.open(os.devnull, os.O_WRONLY), "null"), "null"


BENCHES: dict[str, Callable[[], Iterator[Figure]]] = {
    "ring": bench_ring, "wake": bench_wake, "block": bench_block, "net": bench_net,
}  # fmt: skip


def run_bench(name: str) -> Iterator[Figure]:
    """The figures of the benchmark *name*, one of `BENCHES`, as they are measured."""
    return BENCHES[name]()
