"""The queue thread with many requests in hand: out of order, none lost, and none left behind when it ends."""

import errno
import os
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from runtime.rigs import PATIENCE, Rig, buffer, eventually, nothing_left
from uring import uring_or_skip

from lguestlib.abi import virtio_blk as blk
from lguestlib.memory.address import GuestAddress
from lguestlib.runtime import transfer_thread as module
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.kick import EventfdKick
from lguestlib.runtime.queue_thread import QueueEnds
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.transfer_thread import ALONE, AT_ONCE, TransferThread
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Queue
from lguestlib.virtio.device_queue import new_device_queue
from lguestlib.virtio.devices.block import SECTOR, Block
from lguestlib.virtio.features import Feature
from lguestlib.virtio.split_driver import Buffer
from lguestlib.virtio.transfer import Operation, Transfer, Transfers

PLAIN = int(Feature.VERSION_1)

STOP_SECONDS = 0.1
"""The longest that stopping a thread may take that has nothing in flight."""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    uring_or_skip()
    with nothing_left():
        yield


class Line:
    """A queue whose chains are sent to, or received from, one end of a stream, and wait for the other."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.served: list[int] = []
        self.broken: Exception | None = None

    @property
    def queue(self) -> Queue:
        return Queue("line", self.serve, transfers=Transfers(self.near.fileno(), self.begin, self.finish))

    def serve(self, chain: Chain) -> int:
        """An answer of so many bytes as the chain has for reading, at once."""
        self.served.append(chain.head)
        return chain.write(bytes(chain.readable_length))

    def begin(self, chain: Chain) -> Transfer | None:
        if self.broken:
            raise self.broken
        if chain.readable and chain.writable:
            chain.written = self.serve(chain)
            return None
        if chain.readable:
            return Transfer(chain, Operation.WRITE, chain.readable, 0, chain.readable_length)
        return Transfer(chain, Operation.READ, chain.writable, 0, chain.writable_length)

    def finish(self, transfer: Transfer, result: int) -> bool:
        if self.broken:
            raise self.broken
        if 0 < result < transfer.length:
            transfer.advance(result)
            # A stream has no places.
            transfer.offset = 0
            return False
        transfer.chain.written = transfer.chain.writable_length if result > 0 else 0
        return True

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.close()


class TransferRig(Rig):
    """`Rig` with a `TransferThread`."""

    thread: TransferThread

    def _new_thread(self) -> TransferThread:
        return TransferThread(
            self._queue.name, self._queue, self.ring, self.kick, self.interrupt, self.counters,
            self._on_failure,
        )  # fmt: skip

    def wait_for(self, token: int, length: int = 8) -> None:
        """Submit a chain that waits until the far end sends so much."""
        self.submit(token, readable=0, writable=length)

    def sleeps(self, count: int) -> bool:
        """Whether the thread sleeps with so many chains in flight, and has taken every kick."""
        if select.select([self.kick.fd], [], [], 0)[0] or len(self.thread._in_flight) != count:
            return False
        return [(call.call, call.role) for call in self.tracer.open_calls] == [("io_uring_enter", "disk")]

    def settle(self, count: int) -> None:
        """Return when `sleeps`, for good."""
        eventually(lambda: self.sleeps(count), f"the thread's sleep with {count} in flight")
        time.sleep(0.005)
        eventually(lambda: self.sleeps(count), f"the thread's sleep with {count} in flight")

    def calls_since(self, before: int) -> list[tuple[str, str]]:
        return [(call.call, call.role) for call in self.tracer.calls[before:]]


def tokens(done: list[tuple[int, int]]) -> list[int]:
    return [token for token, _ in done]


def stop_in_time(rig: Rig) -> None:
    start = time.monotonic()
    rig.thread.stop()
    assert time.monotonic() - start < STOP_SECONDS


# Serving.


def test_what_is_complete_goes_back_while_what_came_before_it_waits(line: Line) -> None:
    with TransferRig(line.queue) as rig:
        rig.start()
        rig.wait_for(0)
        rig.wait_for(1)
        rig.submit(2, readable=5)
        rig.submit(3, readable=4, writable=4)
        assert sorted(rig.collect(2)) == [(2, 0), (3, 4)]
        assert line.far.recv(100) == bytes(5)
        line.far.send(b"12345678")
        [first] = rig.collect(1)
        line.far.send(b"12345678")
        assert sorted([first, *rig.collect(1)]) == [(0, 8), (1, 8)]
        eventually(lambda: (rig.counters.chains, rig.counters.bytes) == (4, 8 + 8 + 5 + 8), "the counters")


def test_a_short_transfer_goes_on_until_all_of_it_is_done(line: Line) -> None:
    with TransferRig(line.queue) as rig:
        rig.start()
        rig.wait_for(0, 12)
        for piece in (b"abc", b"defgh", b"ijkl"):
            line.far.send(piece)
            time.sleep(0.005)
        assert rig.collect(1) == [(0, 12)]
        place = buffer(1024).address
        assert rig.memory.read(place, 12) == b"abcdefghijkl"


def test_t8_what_was_made_available_before_the_thread_exists_is_begun_without_a_kick(line: Line) -> None:
    with TransferRig(line.queue) as rig:
        for token in range(5):
            rig.driver.add([buffer(token)], [], token)
        rig.start()
        assert sorted(tokens(rig.collect(5))) == list(range(5))


def test_a_batch_is_one_call_and_one_interrupt(line: Line) -> None:
    count = AT_ONCE
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        for token in range(count):
            rig.driver.add([], [buffer(1024 + token, 8)], token)
        rig.start()
        rig.settle(count)
        assert rig.calls_since(0) == [], "it has submitted all in the call it sleeps in"
        line.far.send(bytes(8 * count))
        assert sorted(tokens(rig.collect(count))) == list(range(count))
        rig.settle(0)
        calls = rig.calls_since(0)
        # It may find them in several wake-ups; what each has found is told of at once.
        told = rig.counters.interrupts + rig.counters.suppressed
        assert calls.count(("io_uring_enter", "disk")) == told <= count
        assert calls.count(("write", "interrupt")) == rig.counters.interrupts == len(calls) - told


def test_the_driver_is_told_every_few_chains(line: Line) -> None:
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        rig.driver.disable_interrupts()
        for token in range(40):
            rig.driver.add([buffer(token, 8)], [], token)
        rig.start()
        eventually(lambda: rig.counters.chains == 40, "the end")
        # Written at once, and so complete in the call that submits them.
        assert rig.counters.interrupts + rig.counters.suppressed == 40 // AT_ONCE
        assert sorted(tokens(rig.driver.reap())) == list(range(40))


def test_notifications_are_asked_for_while_requests_are_in_flight(line: Line) -> None:
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        rig.start()
        rig.wait_for(0)
        rig.settle(1)
        rig.driver.add([buffer(1)], [], 1)
        assert rig.driver.kick_needed()
        rig.kick.signal()
        assert rig.collect(1) == [(1, 0)]
        assert rig.counters.kicks >= 1
        line.far.send(bytes(8))
        assert rig.collect(1) == [(0, 8)]


def test_no_notification_is_asked_for_while_the_thread_works(line: Line) -> None:
    working, go = threading.Event(), threading.Event()
    serve = line.serve

    def slow(chain: Chain) -> int:
        working.set()
        assert go.wait(PATIENCE)
        return serve(chain)

    with TransferRig(line.queue, features=PLAIN, tracer=Tracer()) as rig:
        rig.start()
        rig.wait_for(0)
        rig.settle(1)
        line.serve = slow  # type: ignore[method-assign]
        rig.submit(1, readable=4, writable=4)
        assert working.wait(PATIENCE)
        rig.driver.add([buffer(2)], [], 2)
        assert not rig.driver.kick_needed()
        go.set()
        assert sorted(tokens(rig.collect(2))) == [1, 2]
        line.far.send(bytes(8))
        assert rig.collect(1) == [(0, 8)]


def test_requests_that_come_one_at_a_time_make_the_seeds_calls_and_no_others(line: Line) -> None:
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        rig.start()

        def at_rest() -> bool:
            return [(call.call, call.role) for call in rig.tracer.open_calls] == [("read", "kick")]

        def ask(token: int) -> list[tuple[str, str]]:
            before = len(rig.tracer.calls)
            rig.driver.enable_interrupts()
            rig.submit(token, readable=3, writable=3)
            assert rig.collect(1) == [(token, 3)]
            eventually(lambda: len(rig.tracer.calls) >= before + 2, "the interrupt and the call before it")
            return rig.calls_since(before)

        for token in range(ALONE):
            ask(token)
        assert len(line.served) == ALONE
        eventually(at_rest, "the thread's sleep")
        for token in range(10):
            assert ask(token) == [("read", "kick"), ("write", "interrupt")]
            eventually(at_rest, "the thread's sleep")


def test_a_request_in_company_is_not_waited_for(line: Line) -> None:
    """However often the driver has asked for one thing at a time before."""
    with TransferRig(line.queue) as rig:
        rig.start()
        for turn in range(ALONE + 3):
            rig.submit(turn, readable=3)
            assert rig.collect(1) == [(turn, 0)]
        entered, go = threading.Event(), threading.Event()
        serve = line.serve

        def slow(chain: Chain) -> int:
            entered.set()
            assert go.wait(PATIENCE)
            return serve(chain)

        rig.thread._service = slow
        rig.submit(0, readable=3)
        assert entered.wait(PATIENCE)
        rig.wait_for(1)
        go.set()
        assert rig.collect(1) == [(0, 0)]
        rig.submit(2, readable=3)
        assert rig.collect(1) == [(2, 0)], "the one before it is in flight, and nothing waits for it"
        line.far.recv(1000)
        line.far.send(bytes(8))
        assert rig.collect(1) == [(1, 8)]


def test_a_kick_that_somebody_has_made_non_blocking_still_wakes(line: Line) -> None:
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        os.set_blocking(rig.kick.fd, False)
        rig.start()
        rig.wait_for(0)
        rig.settle(1)
        for token in range(1, 4):
            rig.submit(token)
            assert rig.collect(1) == [(token, 0)]
        line.far.send(bytes(8))
        assert rig.collect(1) == [(0, 8)]


def test_a_kernel_that_does_not_wait_for_such_a_kick_is_helped(line: Line) -> None:
    with TransferRig(line.queue) as rig:
        os.set_blocking(rig.kick.fd, False)
        rig.thread._kicked(-errno.EAGAIN)
        assert os.get_blocking(rig.kick.fd)
        rig.start()


def test_an_idle_thread_makes_no_calls(line: Line) -> None:
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        rig.start()
        rig.wait_for(0)
        rig.settle(1)
        before = len(rig.tracer.calls)
        time.sleep(0.1)
        assert len(rig.tracer.calls) == before
        line.far.send(bytes(8))
        rig.collect(1)


# Ending.


def test_stopping_waits_for_what_is_in_flight_and_returns_it(line: Line) -> None:
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        rig.start()
        for token in range(3):
            rig.wait_for(token)
        rig.settle(3)
        stopped = threading.Thread(target=rig.thread.stop)
        stopped.start()
        time.sleep(0.05)
        assert stopped.is_alive() and rig.driver.reap() == []
        line.far.send(bytes(24))
        stopped.join(PATIENCE)
        assert not stopped.is_alive()
        assert sorted(rig.driver.reap()) == [(0, 8), (1, 8), (2, 8)]
        assert rig.ring.state.available == 3 and rig.failures == []


@pytest.mark.parametrize("after", [0, 1, ALONE + 2])
def test_stopping_is_prompt_wherever_the_thread_sleeps_and_the_kick_is_left_alone(
    line: Line, after: int
) -> None:
    with TransferRig(line.queue) as rig:
        rig.start()
        for token in range(after):
            rig.submit(token)
            rig.collect(1)
        stop_in_time(rig)
        with pytest.raises(BlockingIOError):
            os.set_blocking(rig.kick.fd, False)
            while True:
                os.eventfd_read(rig.kick.fd)
        rig.kick.signal()
        time.sleep(0.01)
        assert os.eventfd_read(rig.kick.fd) == 1, "nobody reads it any more"


def test_stopping_a_thousand_times_is_always_prompt_and_loses_nothing(line: Line) -> None:
    with TransferRig(line.queue) as rig:
        rig.start()
        back: list[int] = []
        for turn in range(300):
            rig.submit(turn)
            if turn % 3:
                back += tokens(rig.collect(1))
            stop_in_time(rig)
            rig.renew()
            rig.start()
            back += tokens(rig.driver.reap())
            # Or there is no more room in the stream.
            with suppress(BlockingIOError):
                line.far.recv(65536, socket.MSG_DONTWAIT)
        while len(back) < 300:
            back += tokens(rig.collect(1))
        assert sorted(back) == list(range(300))


def test_a_request_that_does_not_come_back_is_reported_and_given_up(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STUCK_SECONDS", 0.05)
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        rig.start()
        rig.wait_for(0)
        rig.wait_for(1)
        rig.settle(2)
        rig.thread.stop()
        [error] = rig.failures
        assert isinstance(error, OSError) and error.errno == errno.ETIMEDOUT
        assert "2 requests have not come back for 0.05 s and are given up" in str(error)
        assert sorted(rig.driver.reap()) == [(0, 0), (1, 0)]
        before = rig.memory.read(buffer(1024).address, 8)
        line.far.send(b"too late")
        time.sleep(0.02)
        assert rig.memory.read(buffer(1024).address, 8) == before
        assert line.near.recv(100) == b"too late", "nothing has taken it"


def test_finishing_serves_what_is_there_and_then_ends(line: Line) -> None:
    with TransferRig(line.queue) as rig:
        for token in range(30):
            rig.submit(token)
        rig.wait_for(30)
        rig.start()
        rig.thread.request_finish()
        assert not rig.thread.join(0.05)
        line.far.send(bytes(8))
        assert rig.thread.join(PATIENCE)
        assert sorted(tokens(rig.driver.reap())) == list(range(31))


def test_an_idle_thread_finishes(line: Line) -> None:
    with TransferRig(line.queue) as rig:
        rig.start()
        rig.submit(0)
        rig.collect(1)
        rig.thread.request_finish()
        assert rig.thread.join(PATIENCE)


# Failing.


def test_s27_a_malformed_chain_ends_the_thread_when_what_was_in_flight_is_back(line: Line) -> None:
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        rig.start()
        rig.wait_for(0)
        rig.settle(1)
        bad = rig.driver.add([buffer(2)], [], 2)
        rig.memory.write(GuestAddress(rig.driver.layout.descriptors + 16 * bad), b"\xff" * 16)
        rig.kick.signal()
        time.sleep(0.05)
        assert rig.failures == []
        line.far.send(bytes(8))
        eventually(lambda: bool(rig.failures), "the failure")
        assert isinstance(rig.failures[0], errors.ChainError)
        assert tokens(rig.driver.reap()) == [0]
        assert (rig.counters.errors, rig.counters.chains) == (1, 1)
        rig.driver.release()


def test_a_device_that_fails_to_begin_leaves_the_chain_with_the_driver(line: Line) -> None:
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        rig.start()
        rig.wait_for(0)
        rig.settle(1)
        line.broken = RuntimeError("broken device")
        rig.submit(1)
        time.sleep(0.02)
        line.broken = None
        line.far.send(bytes(8))
        eventually(lambda: bool(rig.failures), "the failure")
        assert str(rig.failures[0]) == "broken device"
        assert tokens(rig.driver.reap()) == [0]
        assert rig.ring.state.available == 1


def test_a_device_that_fails_to_finish_fails_and_the_kernel_is_done_with_all(line: Line) -> None:
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        rig.start()
        for token in range(4):
            rig.wait_for(token)
        rig.settle(4)
        line.broken = RuntimeError("broken device")
        line.far.send(bytes(32))
        eventually(lambda: bool(rig.failures), "the failure")
        assert str(rig.failures[0]) == "broken device"
        assert rig.thread.join(PATIENCE)


def test_a_device_that_fails_while_its_thread_stops_has_failed(line: Line) -> None:
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        rig.start()
        for token in range(2):
            rig.wait_for(token)
        rig.settle(2)
        before = len(rig.tracer.calls)
        rig.thread.request_stop()
        eventually(lambda: len(rig.tracer.calls) > before, "the thread's attention")
        line.broken = RuntimeError("broken device")
        line.far.send(bytes(16))
        eventually(lambda: bool(rig.failures), "the failure")
        assert str(rig.failures[0]) == "broken device"
        assert rig.thread.join(PATIENCE)


def test_a_process_that_has_no_room_for_a_ring_fails_the_queue(line: Line) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with TransferRig(line.queue) as rig:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            rig.start()
            eventually(lambda: bool(rig.failures), "the failure")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert isinstance(rig.failures[0], OSError) and rig.failures[0].errno == errno.EMFILE


def test_a_queue_without_transfers_is_a_mistake(line: Line) -> None:
    with Rig(Queue("plain", line.serve)) as rig:
        rig.start()
        with pytest.raises(ValueError, match="plain: a queue without transfers"):
            TransferThread(
                "plain", Queue("plain", line.serve), rig.ring, rig.kick, rig.interrupt, rig.counters,
                lambda thread, error: None,
            )  # fmt: skip


# Exchanging the ends.


def test_t10_another_kick_is_taken_when_what_is_in_flight_is_back(line: Line) -> None:
    with TransferRig(line.queue, tracer=Tracer()) as rig:
        rig.start()
        rig.wait_for(0)
        rig.settle(1)
        before, after = rig.kick, EventfdKick(tracer=rig.tracer)
        in_hand: list[int] = []

        def change(ends: QueueEnds) -> QueueEnds:
            in_hand.append(len(rig.driver.reap()))
            return QueueEnds(ends.ring, after, ends.interrupt)

        exchanged = threading.Thread(target=rig.thread.exchange, args=[change])
        exchanged.start()
        time.sleep(0.03)
        assert in_hand == []
        line.far.send(bytes(8))
        exchanged.join(PATIENCE)
        assert in_hand == [1]
        rig.kick = after
        rig.wait_for(1)
        rig.settle(1)
        before.signal()
        time.sleep(0.02)
        assert os.eventfd_read(before.fd) >= 1, "the old one is nobody's"
        rig.submit(2)
        assert rig.collect(1) == [(2, 0)]
        line.far.send(bytes(8))
        assert rig.collect(1) == [(1, 8)]
        before.close()


def test_t12_another_ring_is_taken_under_load(line: Line) -> None:
    def swallow() -> None:
        while line.far.recv(65536):
            continue

    swallower = threading.Thread(target=swallow)
    swallower.start()
    with TransferRig(line.queue) as rig:
        rig.start()
        total, sent = 2000, 0
        back: list[int] = []

        def change(ends: QueueEnds) -> QueueEnds:
            again = new_device_queue(rig.layout, rig.memory, rig.features, ends.ring.state)
            return QueueEnds(again, ends.kick, ends.interrupt)

        while len(back) < total:
            while sent < total and rig.driver.free:
                rig.submit(sent)
                sent += 1
            rig.thread.exchange(change)
            back += tokens(rig.driver.reap())
        assert sorted(back) == list(range(total))
    line.near.shutdown(socket.SHUT_RDWR)
    swallower.join()


# A disk.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FileDisk]:
    path = tmp_path / "image"
    path.write_bytes(Random(6).randbytes(1 << 20))
    disk = FileDisk.open(str(path))
    yield disk
    disk.close()


def queue_of(disk: FileDisk) -> Queue:
    [queue] = Block(disk, transfer_file=disk.fd).queues()
    return queue


class DiskRig(TransferRig):
    """A driver of a disk; request *number* has its buffers to itself."""

    def request(
        self, number: int, kind: int, sector: int, data: bytes = b"", room: int = 0, shift: int = 0
    ) -> None:
        at = 0x10_0000 + 0x4000 * number
        head, body, status = GuestAddress(at), GuestAddress(at + 0x1000 + shift), GuestAddress(at + 0x800)
        self.memory.write(head, struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(status, b"\xee")
        readable, writable = [Buffer(head, 16)], [Buffer(status, 1)]
        if data:
            self.memory.write(body, data)
            readable.append(Buffer(body, len(data)))
        if room:
            writable.insert(0, Buffer(body, room))
        self.driver.add(readable, writable, number)
        if self.driver.kick_needed():
            self.kick.signal()

    def read_many(self, count: int) -> None:
        for number in range(count):
            self.request(number, blk.VIRTIO_BLK_T_IN, number, room=4096)

    def status(self, number: int) -> int:
        return self.memory.read(GuestAddress(0x10_0800 + 0x4000 * number), 1)[0]

    def body(self, number: int, length: int, shift: int = 0) -> bytes:
        return self.memory.read(GuestAddress(0x10_1000 + shift + 0x4000 * number), length)

    def done(self, number: int) -> int:
        """The status of the one request that was made."""
        [(token, _)] = self.collect(1)
        assert token == number
        return self.status(number)


def test_a_disk_under_random_load_is_what_was_written_to_it(disk: FileDisk) -> None:
    seed = 12
    chance = Random(seed)
    with DiskRig(queue_of(disk), size=64) as rig:
        rig.start()
        expected = bytearray(Path(disk.name).read_bytes())
        free = set(range(16))
        flying: dict[int, tuple[int, int]] = {}
        made = 0
        while made < 2000 or flying:
            while made < 2000 and free and (not flying or chance.random() < 0.9):
                # Requests in flight do not overlap: number n has the sectors that leave n on division.
                number = chance.choice(sorted(free))
                sector = 16 * chance.randrange(128) + number
                free.remove(number)
                made += 1
                if chance.random() < 0.4:
                    data = chance.randbytes(SECTOR)
                    expected[SECTOR * sector : SECTOR * (sector + 1)] = data
                    rig.request(number, blk.VIRTIO_BLK_T_OUT, sector, data)
                    flying[number] = sector, 0
                elif chance.random() < 0.05:
                    rig.request(number, blk.VIRTIO_BLK_T_FLUSH, 0)
                    flying[number] = sector, 0
                else:
                    rig.request(number, blk.VIRTIO_BLK_T_IN, sector, room=SECTOR)
                    flying[number] = sector, SECTOR
            for number, _ in rig.collect(1):
                sector, length = flying.pop(number)
                assert rig.status(number) == blk.VIRTIO_BLK_S_OK, seed
                if length:
                    assert rig.body(number, length) == expected[SECTOR * sector : SECTOR * (sector + 1)], seed
                free.add(number)
        assert Path(disk.name).read_bytes() == expected


def test_t24_errors_of_a_disk_are_statuses_and_the_thread_goes_on(disk: FileDisk, tmp_path: Path) -> None:
    sectors = disk.size // SECTOR
    with DiskRig(queue_of(disk)) as rig:
        rig.start()
        rig.request(0, blk.VIRTIO_BLK_T_IN, sectors, room=SECTOR)
        assert rig.done(0) == blk.VIRTIO_BLK_S_IOERR
        rig.request(1, blk.VIRTIO_BLK_T_OUT, sectors - 1, bytes(2 * SECTOR))
        assert rig.done(1) == blk.VIRTIO_BLK_S_IOERR
        os.truncate(disk.name, SECTOR)
        rig.request(2, blk.VIRTIO_BLK_T_IN, 0, room=2 * SECTOR)
        assert rig.done(2) == blk.VIRTIO_BLK_S_IOERR, "the file has become shorter"
        rig.request(3, blk.VIRTIO_BLK_T_IN, 0, room=SECTOR)
        assert rig.done(3) == blk.VIRTIO_BLK_S_OK
        rig.request(4, 99, 0)
        assert rig.done(4) == blk.VIRTIO_BLK_S_UNSUPP


def test_t24_a_file_that_cannot_be_written_is_an_error_status(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(8 * SECTOR))
    # Taken for writable, and it is not: what a write gives is the kernel's word.
    disk = FileDisk(os.open(path, os.O_RDONLY), str(path))
    with DiskRig(queue_of(disk)) as rig:
        rig.start()
        for turn in range(2):
            rig.request(0, blk.VIRTIO_BLK_T_OUT, 0, bytes(SECTOR))
            assert rig.done(0) == blk.VIRTIO_BLK_S_IOERR
            rig.request(1, blk.VIRTIO_BLK_T_FLUSH, 0)
            assert rig.done(1) == blk.VIRTIO_BLK_S_OK
    disk.close()


def test_t24_a_full_file_system_is_an_error_status(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(8 * SECTOR))
    disk = FileDisk.open(str(path))
    full = os.open("/dev/full", os.O_RDWR)
    [queue] = Block(disk, transfer_file=full).queues()
    with DiskRig(queue) as rig:
        rig.start()
        rig.request(0, blk.VIRTIO_BLK_T_OUT, 0, bytes(SECTOR))
        assert rig.done(0) == blk.VIRTIO_BLK_S_IOERR
    os.close(full)
    disk.close()


def test_a_direct_disk_takes_buffers_that_are_not_aligned(tmp_path: Path) -> None:
    path = tmp_path / "image"
    content = Random(7).randbytes(1 << 16)
    path.write_bytes(content)
    try:
        disk = FileDisk.open(str(path), direct=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this file system has no O_DIRECT (TMPDIR=/var/tmp sh tests/run uses one that does)")
    with DiskRig(queue_of(disk)) as rig:
        rig.start()
        for number, shift in enumerate((0, 1, 77, 512)):
            rig.request(number, blk.VIRTIO_BLK_T_IN, 8, room=4096, shift=shift)
            assert rig.done(number) == blk.VIRTIO_BLK_S_OK
            assert rig.body(number, 4096, shift) == content[4096:8192]
            rig.request(number, blk.VIRTIO_BLK_T_OUT, 16, bytes([number]) * 4096, shift=shift)
            assert rig.done(number) == blk.VIRTIO_BLK_S_OK
            assert path.read_bytes() == content[:8192] + bytes([number]) * 4096 + content[12288:]
    disk.close()


STATES: dict[str, Callable[[DiskRig], None]] = {
    "asleep": lambda rig: None,
    "one": lambda rig: rig.request(0, blk.VIRTIO_BLK_T_IN, 0, room=4096),
    "many": lambda rig: rig.read_many(16),
    "flush": lambda rig: rig.request(0, blk.VIRTIO_BLK_T_FLUSH, 0),
}


@pytest.mark.parametrize("state", STATES)
def test_stopping_a_disk_is_prompt_and_nothing_is_lost(disk: FileDisk, state: str) -> None:
    with DiskRig(queue_of(disk)) as rig:
        rig.start()
        for _ in range(20):
            STATES[state](rig)
            stop_in_time(rig)
            taken = len(rig.driver.reap())
            rig.renew()
            rig.start()
            left = {"asleep": 0, "many": 16}.get(state, 1) - taken
            if left:
                assert len(rig.collect(left)) == left
