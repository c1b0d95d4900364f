"""A device served to a front-end: rings start, stop and change under load, and lose nothing (T8 to T12)."""

import errno
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from pathlib import Path

import pytest
from runtime.rigs import PATIENCE, eventually, nothing_left
from runtime.vhost_user_rig import (
    FEATURES,
    GUEST,
    LOG_ALL,
    MEMORY,
    PROTOCOL,
    USER,
    Echo,
    FrontEnd,
    Ring,
    Served,
    fill,
    mappings,
    message,
    region,
    state,
    table,
    u64,
    within,
)
from uring import uring_or_skip

from lguestlib.abi import vhost_user as abi
from lguestlib.abi.memfd import memfd
from lguestlib.abi.virtio_net import VIRTIO_NET_F_MRG_RXBUF
from lguestlib.memory import mapping
from lguestlib.memory.address import GuestAddress
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.net import HEADER_SIZE, Net
from lguestlib.virtio.features import Feature
from lguestlib.virtio.split_driver import Buffer
from lguestlib.virtio.status import Status

STOP_SECONDS = 0.1
"""The longest that stopping anything may take."""

PAGE = 4096


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def device(source: tuple[int, int]) -> Echo:
    return Echo(source[0])


@pytest.fixture
def served(device: Echo, tmp_path: Path) -> Iterator[Served]:
    with Served(device, tmp_path) as made:
        yield made


@pytest.fixture
def front(served: Served) -> Iterator[FrontEnd]:
    with served.front() as made:
        yield made


class Gate:
    """A service that waits to be let through."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def __call__(self, chain: Chain) -> int:
        self.entered.release()
        self.go.acquire()
        return chain.write(chain.read())

    def wait(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE)


class Load:
    """A driver that keeps *ring* busy with numbered requests until `finish`, and checks each answer.

    It reaps when it is interrupted and at no other time, so that an interrupt lost is seen.
    """

    def __init__(self, ring: Ring, depth: int = 16) -> None:
        self.ring = ring
        self.done = 0
        # Held while a descriptor is used or replaced, as in any front-end.
        self.lock = threading.Lock()
        self._idle = list(range(depth))
        self._numbers: dict[int, int] = {}
        self._sent = 0
        self._ending = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def request(self, token: int, number: int) -> None:
        """Make a request available."""
        self.ring.add(token, struct.pack("=QQ", number, self.ring.index), 16)

    def answered(self, token: int, number: int, written: int) -> None:
        """It has come back."""
        assert number == self.done
        assert self.ring.answer(token, written) == struct.pack("=QQ", number, self.ring.index)

    @property
    def due(self) -> bool:
        """Whether something must come back."""
        return bool(self._numbers)

    @property
    def more(self) -> bool:
        """Whether there are more requests to make."""
        return not self._ending

    def _run(self) -> None:
        try:
            while not self._ending or self.due:
                self._step()
        except BaseException as error:
            self._error = error

    def _step(self) -> None:
        ring = self.ring
        with self.lock:
            while self._idle and self.more:
                token = self._idle.pop(0)
                self.request(token, self._sent)
                self._numbers[token] = self._sent
                self._sent += 1
            if ring.driver.kick_needed():
                ring.notify()
            back = ring.driver.reap()
            for token, written in back:
                self.answered(token, self._numbers.pop(token), written)
                self._idle.append(token)
                self.done += 1
            if back or ring.driver.enable_interrupts():
                return
        deadline = time.monotonic() + PATIENCE
        while not self._interrupted() and (self.due or not self._ending):
            if not self.due:
                deadline = time.monotonic() + PATIENCE
            assert time.monotonic() < deadline, f"ring {ring.index}: {self.done} of {self._sent} came back"

    def _interrupted(self) -> bool:
        call = self.ring.call
        if not select.select([call], [], [], 0.002)[0]:
            return False
        with self.lock:
            if call == self.ring.call:
                os.eventfd_read(call)
                return True
        return False

    def reach(self, count: int) -> None:
        """Wait until so many more have come back."""
        wanted = self.done + count
        eventually(lambda: self._error is not None or self.done >= wanted, "requests")
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def finish(self) -> int:
        """Send no more, and wait for the rest; how many there were."""
        self._ending = True
        self._thread.join(2 * PATIENCE)
        self.check()
        assert not self._thread.is_alive()
        return self.done

    def abandon(self) -> None:
        """The device has gone: send no more, and wait for nothing."""
        self._ending = True
        with self.lock:
            self._numbers.clear()
        self._thread.join(2 * PATIENCE)
        assert not self._thread.is_alive()


class Once:
    """The echo's service, which notes every request: each once and in order, on every ring."""

    def __init__(self) -> None:
        self.next: dict[int, int] = {}
        self.wrong: list[tuple[int, int, int]] = []

    def __call__(self, chain: Chain) -> int:
        number, ring = struct.unpack("=QQ", chain.read())
        if number != self.next.get(ring, 0):
            self.wrong.append((ring, number, self.next.get(ring, 0)))
        self.next[ring] = number + 1
        return chain.write(struct.pack("=QQ", number, ring))

    def check(self, *loads: Load) -> None:
        for load in loads:
            load.finish()
        assert self.wrong == []
        assert [self.next[load.ring.index] for load in loads] == [load.done for load in loads]


# T8: what starts a ring.


STEPS: dict[str, Callable[[FrontEnd, Ring], None]] = {
    "num": lambda front, ring: front.set(abi.VHOST_USER_SET_VRING_NUM, state(0, ring.layout.size)),
    "addr": lambda front, ring: front.set_address(ring),
    "kick": lambda front, ring: front.set_kick(ring),
    "call": lambda front, ring: front.set_call(ring),
    "enable": lambda front, ring: front.enable(ring),
}


def test_t8_a_kick_before_anything_is_told_is_not_lost_whatever_order_it_is_told_in(served: Served) -> None:
    for order in permutations(STEPS):
        with served.front() as front:
            ring = front.ring()
            ring.add(0, b"hello", 5)
            assert ring.driver.kick_needed()
            ring.notify()
            for step in order:
                assert served.threads() == []
                STEPS[step](front, ring)
                if step != "call" and order[-1] == "call" and served.threads():
                    # It does not need a call to be served.
                    break
            if order[-1] == "call":
                STEPS["call"](front, ring)
            assert ring.collect(1) == [(0, 5)] and ring.answer(0, 5) == b"hello"
    assert served.device.name == "echo"


def test_t8_a_request_without_any_kick_is_served_when_the_ring_starts(front: FrontEnd) -> None:
    ring = front.ring()
    ring.add(3, b"quiet", 5)
    front.tell(ring)
    assert ring.collect(1) == [(3, 5)]


def test_the_device_is_told_what_was_negotiated_once_and_of_the_end(
    served: Served, front: FrontEnd, device: Echo
) -> None:
    rings = [front.start(index) for index in (0, 2)]
    # Its own features: no business of the device are those of the protocol.
    assert device.activated == [FEATURES & ~PROTOCOL]
    assert front.stop(rings[0]) == 0 and device.deactivated == 0
    assert front.stop(rings[1]) == 0 and device.deactivated == 1
    assert served.threads() == []
    front.disconnect()
    served.server.stop()
    assert (len(device.activated), device.deactivated) == (1, 1)


# T9: GET_VRING_BASE.


def test_t9_get_vring_base_drains_and_the_ring_goes_on_from_there(front: FrontEnd, device: Echo) -> None:
    device.serve = once = Once()
    ring = front.start()
    load = Load(ring)
    for _ in range(60):
        load.reach(3)
        with load.lock:
            base = front.stop(ring)
            # All that it has taken it has returned, and nothing comes behind the answer.
            assert base == ring.used
        front.restart(ring, base)
    once.check(load)


def test_t9_get_vring_base_waits_for_what_has_begun_and_gives_back_what_has_not(
    served: Served, front: FrontEnd, device: Echo
) -> None:
    device.serve = gate = Gate()
    ring = front.start()
    for token in range(5):
        ring.submit(token, b"x", 1)
    gate.wait()
    answers: list[int] = []
    stopping = threading.Thread(target=lambda: answers.append(front.stop(ring)))
    stopping.start()
    stopping.join(0.02)
    assert answers == [] and ring.used == 0
    gate.go.release(5)
    stopping.join()
    assert answers == [ring.used] == [1]
    assert served.threads() == []
    front.restart(ring, 1)
    assert [token for token, _ in ring.collect(5)] == [0, 1, 2, 3, 4]


def test_t9_a_ring_that_sleeps_in_a_read_from_outside_stops_at_once(
    served: Served, front: FrontEnd, source: tuple[int, int]
) -> None:
    ring = front.start(1)
    ring.submit(0, room=64)
    for turn in range(30):
        if turn % 2:
            time.sleep(0.002)
        within(STOP_SECONDS, lambda: front.stop(ring))
        assert served.threads() == []
        front.restart(ring, 0)
        assert served.threads() == ["source"]
    os.write(source[1], b"frame")
    assert ring.collect(1) == [(0, 5)]


# T10: other kicks and calls.


def test_t10_a_sleeping_ring_takes_another_kick_and_another_call(front: FrontEnd) -> None:
    ring = front.start()
    for turn in range(40):
        if turn % 3:
            ring.new_kick()
            front.set_kick(ring)
        if turn % 3 != 1:
            ring.new_call()
            front.set_call(ring)
        assert ring.ask(turn, b"%d" % turn) == b"%d" % turn


def test_t10_what_was_told_to_the_old_call_and_not_seen_is_told_to_the_new_one(front: FrontEnd) -> None:
    ring = front.start()
    for token in range(20):
        ring.driver.enable_interrupts()
        ring.submit(token, b"x", 1)
        assert select.select([ring.call], [], [], PATIENCE)[0]
        ring.new_call()
        front.set_call(ring)
        assert select.select([ring.call], [], [], PATIENCE)[0]
        assert ring.collect(1) == [(token, 1)]


def test_t10_no_request_and_no_interrupt_is_lost_when_descriptors_are_replaced_under_load(
    front: FrontEnd, device: Echo
) -> None:
    device.serve = once = Once()
    ring = front.start()
    load = Load(ring)
    for turn in range(100):
        load.reach(1)
        with load.lock:
            if turn % 2:
                ring.new_kick()
                front.set_kick(ring)
            if turn % 3:
                ring.new_call()
                front.set_call(ring)
    once.check(load)


def test_t11_a_ring_without_a_call_is_served_for_a_driver_that_looks(front: FrontEnd) -> None:
    ring = front.start()
    front.set(abi.VHOST_USER_SET_VRING_CALL, u64(0x100))
    for token in range(5):
        ring.submit(token, b"x", 1)
        back: list[tuple[int, int]] = []

        def looked(ring: Ring = ring, back: list[tuple[int, int]] = back) -> bool:
            back += ring.driver.reap()
            return bool(back)

        eventually(looked, "the answer")
        assert back == [(token, 1)]
    assert not select.select([ring.call], [], [], 0)[0]
    # And with one again it is told.
    front.set_call(ring)
    assert ring.ask(9, b"x") == b"x"


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_t11_a_call_may_be_a_pipe_or_a_socket_and_a_full_one_hinders_nothing(
    front: FrontEnd, kind: str
) -> None:
    ring = front.start()
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        reader, writer = (end.detach() for end in socket.socketpair())
    front.set(abi.VHOST_USER_SET_VRING_CALL, u64(0), [writer])
    assert select.select([reader], [], [], PATIENCE)[0]
    assert os.read(reader, 8) == (1).to_bytes(8, "little")
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(8))
    os.set_blocking(writer, True)
    front.set(abi.VHOST_USER_SET_VRING_CALL, u64(0), [writer])
    for token in range(22):
        ring.driver.enable_interrupts()
        ring.submit(token, b"x", 1)
        eventually(lambda: ring.used == token + 1, "the answer")
        ring.driver.reap()
        if token == 20:
            # It has gone, and what it has not read with it.
            os.close(reader)
    within(STOP_SECONDS, lambda: front.stop(ring))
    os.close(writer)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_full_call_that_its_other_end_makes_block_again_hinders_no_stop(
    served: Served, front: FrontEnd, kind: str
) -> None:
    reader, writer = os.pipe() if kind == "pipe" else (end.detach() for end in socket.socketpair())
    ring = front.start()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(8))
    front.set(abi.VHOST_USER_SET_VRING_CALL, u64(0), [writer])
    os.set_blocking(writer, True)
    ring.driver.enable_interrupts()
    ring.submit(0, b"x", 1)
    eventually(lambda: ring.used == 1, "the answer")
    time.sleep(0.005)
    within(STOP_SECONDS, lambda: front.stop(ring))
    assert served.threads() == []
    for fd in (reader, writer):
        os.close(fd)


@pytest.mark.parametrize("index", [0, 1])
def test_t20_full_counters_hinder_no_stop(front: FrontEnd, served: Served, device: Echo, index: int) -> None:
    ring = front.start(index)
    ring.submit(0, b"x" * (index == 0), 1)
    if index == 0:
        assert ring.collect(1) == [(0, 1)]
        ring.driver.enable_interrupts()
        ring.add(1, b"x", 1)
    fill(ring.call)
    fill(ring.kick)
    if index == 0:
        eventually(lambda: ring.used == 2, "the answer")
        # It may have been read.
        fill(ring.kick)
    within(STOP_SECONDS, lambda: front.stop(ring))
    assert served.threads() == []
    assert select.select([ring.call], [], [], 0)[0]


def test_a_kick_that_its_other_end_makes_non_blocking_is_slept_on_all_the_same(front: FrontEnd) -> None:
    ring = front.start()
    for token in range(10):
        os.set_blocking(ring.kick, False)
        assert ring.ask(token, b"x") == b"x"


# T12: another memory table.


def test_t12_the_memory_table_is_replaced_under_load_and_the_old_mapping_goes(
    front: FrontEnd, device: Echo, source: tuple[int, int]
) -> None:
    device.serve = once = Once()
    ring, asleep = front.start(), front.start(1)
    asleep.submit(0, room=64)
    load = Load(ring)
    for _ in range(60):
        load.reach(1)
        front.share()
        # The front-end's own and the server's.
        assert mappings("front-end") == 2
    once.check(load)
    os.write(source[1], b"frame")
    assert asleep.collect(1) == [(0, 5)]


def test_t12_a_region_is_removed_while_a_ring_sleeps_and_its_mapping_is_gone(
    front: FrontEnd, source: tuple[int, int]
) -> None:
    ring = front.start(1)
    ring.submit(0, room=64)
    extra = memfd("extra", 1 << 20)
    told = table(region(0x9000_0000, 1 << 20, USER + MEMORY))
    for _ in range(20):
        front.set(abi.VHOST_USER_ADD_MEM_REG, told, [extra])
        assert mappings("extra") == 1
        front.set(abi.VHOST_USER_REM_MEM_REG, told)
        assert mappings("extra") == 0
    os.write(source[1], b"frame")
    assert ring.collect(1) == [(0, 5)]
    os.close(extra)


@pytest.mark.parametrize("index", [0, 1])
def test_t12_a_region_that_a_buffer_is_in_is_removed_and_the_device_fails_without_it(
    served: Served, front: FrontEnd, device: Echo, index: int
) -> None:
    extra = memfd("extra", 1 << 20)
    told = table(region(0x9000_0000, 1 << 20, USER + MEMORY))
    front.set(abi.VHOST_USER_ADD_MEM_REG, told, [extra])
    device.serve = gate = Gate()
    ring = front.start(index)
    inside = Buffer(GuestAddress(0x9000_0000), 64)
    for token in range(3):
        ring.driver.add([inside] if index == 0 else [], [inside], token)
    ring.notify()
    if index == 0:
        gate.wait()
        gate.go.release(3)
    front.set(abi.VHOST_USER_REM_MEM_REG, told)
    assert mappings("extra") == 0
    if not ring.used == 3:
        assert "outside guest memory (head" in served.report()
    os.close(extra)


@pytest.mark.parametrize("request_", ["replaced", "removed"])
def test_t12_memory_without_the_rings_fails_the_device_and_memory_with_them_and_a_reset_mend_it(
    served: Served, front: FrontEnd, source: tuple[int, int], request_: str
) -> None:
    rings = [front.start(index) for index in range(3)]
    rings[1].submit(0, room=64)
    assert rings[0].ask(0, b"before") == b"before"
    if request_ == "removed":
        front.set(abi.VHOST_USER_REM_MEM_REG, table(region()))
    else:
        front.set(abi.VHOST_USER_SET_MEM_TABLE, table(region(0, MEMORY, 0)), [front.memory_fd])
    assert "no memory region holds the front-end's address" in served.report()
    assert served.threads() == []
    assert mappings("front-end") == (1 if request_ == "removed" else 2)
    assert front.status() & Status.NEEDS_RESET
    front.share()
    assert served.threads() == []
    front.set(abi.VHOST_USER_RESET_DEVICE)
    works_again(front)


def test_memory_that_cannot_be_mapped_is_refused_and_the_old_one_stays(front: FrontEnd) -> None:
    ring = front.start()
    read_only = os.open("/proc/self/exe", os.O_RDONLY)
    short = memfd("short", 0x1000)
    folder = os.open("/", os.O_RDONLY)
    good = memfd("good", 0x1000)
    pipe = os.pipe()
    high = 1 << 32
    for fd, told in (
        (short, region(high, 0x1001, 0)), (short, region(high, 0x1000, 0, 1)),
        (short, region(high, 1, 0, 1 << 62)), (short, region(high, 1 << 63, 0)),
        (short, region(high, (1 << 64) - high, 0)), (read_only, region(high, 0x1000, 0)),
        (folder, region(high, 1, 0)), (pipe[0], region(high, 1, 0)), (ring.kick, region(high, 1, 0)),
    ):  # fmt: skip
        assert front.try_set(abi.VHOST_USER_ADD_MEM_REG, table(told), [fd]) == 1
        assert front.try_set(abi.VHOST_USER_SET_MEM_TABLE, table(told), [fd]) == 1
        both = table(region(0x100_0000, 0x1000, 0x100_0000), told)
        assert front.try_set(abi.VHOST_USER_SET_MEM_TABLE, both, [good, fd]) == 1
        assert (mappings("good"), mappings("short"), mappings("front-end")) == (0, 0, 2)
        assert ring.ask(0, b"still here") == b"still here"
    for fd in (read_only, short, folder, good, *pipe):
        os.close(fd)


def test_enabled_and_disabled_under_load_a_ring_loses_nothing(
    served: Served, front: FrontEnd, device: Echo
) -> None:
    device.serve = once = Once()
    rings = [front.start(index) for index in (0, 2)]
    loads = [Load(ring) for ring in rings]
    for turn in range(60):
        front.enable(rings[turn % 2], False)
        assert served.threads() == [("more work", "work")[turn % 2]]
        if turn % 4 < 2:
            loads[1 - turn % 2].reach(1)
        front.enable(rings[turn % 2])
    once.check(*loads)


def test_a_ring_that_waits_does_not_keep_another_waiting(front: FrontEnd, device: Echo) -> None:
    slow, quick = front.start(0), front.start(2)
    gate = Gate()
    device.serve = lambda chain: gate(chain) if chain.readable_length == 4 else chain.write(chain.read())
    slow.submit(0, b"slow", 4)
    gate.wait()
    for token in range(20):
        assert quick.ask(token, b"quick") == b"quick"
    assert slow.used == 0
    gate.go.release()
    assert slow.collect(1) == [(0, 4)]


# The dirty log.


LOG_SIZE = (GUEST + MEMORY) // PAGE // 8


class Log:
    """The dirty log, as who copies the guest sees it."""

    def __init__(self, size: int = LOG_SIZE, offset: int = 0) -> None:
        self.fd = memfd("log", offset + size)
        self.size, self.offset = size, offset

    def share(self, front: FrontEnd) -> None:
        assert front.get(abi.VHOST_USER_SET_LOG_BASE, u64(self.size) + u64(self.offset), [self.fd]) == u64(0)

    def take(self) -> set[int]:
        """The pages marked since the last time."""
        data = os.pread(self.fd, self.offset + self.size, 0)
        os.pwrite(self.fd, bytes(self.size), self.offset)
        assert not any(data[: self.offset])
        bits = data[self.offset :]
        return {
            8 * byte + bit for byte, value in enumerate(bits) if value for bit in range(8) if value >> bit & 1
        }


def pages(start: int, length: int) -> set[int]:
    return set(range(start // PAGE, (start + length - 1) // PAGE + 1))


@pytest.mark.parametrize("used_logged", [True, False])
@pytest.mark.parametrize("features", [FEATURES, FEATURES & ~int(Feature.RING_EVENT_IDX)])
def test_t16_every_page_that_the_device_has_changed_is_marked_and_no_other(
    served: Served, features: int, used_logged: bool
) -> None:
    rng = random.Random(used_logged + features)
    log = Log(offset=0x1004)
    with FrontEnd(served.path) as front:
        front.negotiate(features)
        log.share(front)
        front.set(abi.VHOST_USER_SET_FEATURES, u64(features | LOG_ALL))
        ring = front.start()
        front.set_address(ring, int(used_logged), ring.layout.used)
        front.enable(ring, False)
        used_pages = pages(ring.layout.used, 6 + 8 * ring.layout.size) if used_logged else set()
        seen = 0
        for turn in range(12):
            expected = set(used_pages)
            for token in range(turn % 5 * 3):
                data = rng.randbytes(rng.randrange(1, 9000))
                front.memory.write(GuestAddress(GUEST + 0x20_0000), data)
                start = GuestAddress(GUEST + 0x10_0000 + rng.randrange(0x8_0000))
                room = rng.randrange(1, 9000)
                ring.driver.add(
                    [Buffer(GuestAddress(GUEST + 0x20_0000), len(data))], [Buffer(start, room)], token
                )
                expected |= pages(start, room)
            before = front.memory.read(GuestAddress(GUEST), MEMORY)
            log.take()
            front.enable(ring)
            seen += turn % 5 * 3
            eventually(lambda: ring.used == seen, "the answers")
            front.enable(ring, False)
            after = front.memory.read(GuestAddress(GUEST), MEMORY)
            changed = {
                (GUEST + at) // PAGE
                for at in range(0, MEMORY, PAGE)
                if before[at : at + PAGE] != after[at : at + PAGE]
            }
            marked = log.take()
            assert changed - pages(ring.layout.used, 6 + 8 * ring.layout.size) <= marked
            assert not used_logged or changed <= marked
            assert marked == expected
            assert len(ring.driver.reap()) == turn % 5 * 3
    os.close(log.fd)


def test_t16_logging_begins_and_ends_while_rings_are_served(front: FrontEnd) -> None:
    ring = front.start()
    log = Log()
    log.share(front)
    answer = pages(ring.buffer(1, 1).address, 1)
    used = pages(ring.layout.used, 6 + 8 * 64)

    def marked() -> set[int]:
        log.take()
        assert ring.ask(0, b"x") == b"x"
        front.enable(ring, False)
        front.enable(ring)
        return log.take()

    assert marked() == set()
    for _ in range(3):
        front.set(abi.VHOST_USER_SET_FEATURES, u64(FEATURES | LOG_ALL))
        assert marked() == answer
        front.set_address(ring, 1, ring.layout.used)
        assert marked() == answer | used
        front.set(abi.VHOST_USER_SET_FEATURES, u64(FEATURES))
        assert marked() == used
        front.set_address(ring, 0, ring.layout.used)
        assert marked() == set()
    # Another log takes the old one's place at once.
    front.set(abi.VHOST_USER_SET_FEATURES, u64(FEATURES | LOG_ALL))
    other = Log()
    other.share(front)
    assert mappings("log") == 1
    assert marked() == set() and other.take() == answer
    for each in (log, other):
        os.close(each.fd)


def test_t16_a_log_that_is_too_small_fails_the_device_and_one_that_is_none_is_refused(
    served: Served, front: FrontEnd
) -> None:
    ring = front.start()
    log = Log(16)
    log.share(front)
    assert ring.ask(0, b"x") == b"x"
    front.set(abi.VHOST_USER_SET_FEATURES, u64(FEATURES | LOG_ALL))
    assert "outside the dirty log" in served.report()
    front.set(abi.VHOST_USER_RESET_DEVICE)
    works_again(front)
    front.send(abi.VHOST_USER_SET_LOG_BASE, u64(17) + u64(0), [log.fd])
    assert front.closed()
    assert served.report() == (
        "echo: the front-end is cut off: SET_LOG_BASE: dirty log: 0x11 bytes at offset 0x0 of a file of 0x10"
    )
    os.close(log.fd)


# The config space.


def test_a_config_change_arrives_on_the_channel(front: FrontEnd, device: Echo) -> None:
    ours, theirs = socket.socketpair()
    front.set(abi.VHOST_USER_SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
    theirs.close()
    for number in range(3):
        device.space = bytes([number]) * 4
        device.on_config_change(device)
        assert ours.recv(100) == message(abi.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)
        reply = front.get(abi.VHOST_USER_GET_CONFIG, struct.pack("=III", 0, 6, 0) + bytes(6))
        assert reply == struct.pack("=III", 0, 6, 0) + bytes([number]) * 4 + bytes(2)
    # Another channel takes its place.
    again, theirs = socket.socketpair()
    front.set(abi.VHOST_USER_SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
    theirs.close()
    device.on_config_change(device)
    assert again.recv(100) == message(abi.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)
    assert ours.recv(100) == b""
    ours.close()
    again.close()
    # Who has gone is told nothing, and no harm is done.
    device.on_config_change(device)
    front.disconnect()


def test_t19_a_front_end_that_does_not_read_its_channel_keeps_nobody_waiting(
    served: Served, front: FrontEnd, device: Echo
) -> None:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    front.set(abi.VHOST_USER_SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
    theirs.close()
    within(5, lambda: [device.on_config_change(device) for _ in range(1000)])
    within(STOP_SECONDS, served.server.stop)
    told = b"".join(iter(lambda: ours.recv(4096), b""))
    # Whole messages, and one at least that it has not read.
    one = message(abi.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)
    assert told == one * (len(told) // len(one)) and told
    ours.close()


# The record of requests in flight.


def test_t17_a_reset_begins_the_record_anew_with_the_rings(front: FrontEnd) -> None:
    shape = struct.pack("=QQHHI", 0, 0, 3, 64, 0)
    made, (fd,) = front.get_fds(abi.VHOST_USER_GET_INFLIGHT_FD, shape)
    front.set(abi.VHOST_USER_SET_INFLIGHT_FD, made, [fd])
    os.close(fd)
    ring = front.start()
    for token in range(40):
        assert ring.ask(token, b"x") == b"x"
    for _ in range(2):
        front.set(abi.VHOST_USER_RESET_DEVICE)
        works_again(front)


def test_t17_a_ring_that_the_record_has_no_room_for_is_refused(served: Served, front: FrontEnd) -> None:
    shape = struct.pack("=QQHHI", 0, 0, 1, 32, 0)
    made, (fd,) = front.get_fds(abi.VHOST_USER_GET_INFLIGHT_FD, shape)
    front.set(abi.VHOST_USER_SET_INFLIGHT_FD, made, [fd])
    os.close(fd)
    front.start(size=64)
    assert "impossible inflight record" in served.report()
    front.set(abi.VHOST_USER_RESET_DEVICE)
    front.forget_rings()
    front.set(abi.VHOST_USER_SET_FEATURES, u64(FEATURES))
    ring = front.start(size=32)
    assert ring.ask(0, b"x") == b"x"


def test_s31_a_record_is_as_long_as_it_has_to_be_whatever_its_file_is(front: FrontEnd) -> None:
    fd = memfd("record", 1 << 40)
    front.set(abi.VHOST_USER_SET_INFLIGHT_FD, struct.pack("=QQHH", 1 << 40, 0, 3, 64), [fd])
    front.set(abi.VHOST_USER_RESET_DEVICE)
    works_again(front)
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    os.close(fd)


@pytest.mark.parametrize(("size", "offset"), [(1 << 20, 0), (1 << 12, 1), (1 << 12, 1 << 62)])
def test_t17_a_record_that_its_file_does_not_hold_is_refused(front: FrontEnd, size: int, offset: int) -> None:
    fd = memfd("record", 1 << 12)
    payload = struct.pack("=QQHH", size, offset, 1, 8)
    assert front.try_set(abi.VHOST_USER_SET_INFLIGHT_FD, payload, [fd]) == 1
    assert mappings("record") == 0
    os.close(fd)


# Failure.


def works_again(front: FrontEnd) -> None:
    """The device serves new rings on this connection."""
    front.forget_rings()
    front.set(abi.VHOST_USER_SET_FEATURES, u64(FEATURES))
    for index in (0, 2):
        assert front.start(index).ask(7, b"again") == b"again"


def spoil(ring: Ring) -> None:
    """Make a chain available that cannot be."""
    head = ring.driver.add([ring.buffer(0, 8)], [], 0)
    descriptor = struct.pack("<QIHH", GUEST + MEMORY - 4, 8, 0, 0)
    ring.front.memory.write(GuestAddress(ring.layout.descriptors + 16 * head), descriptor)
    ring.notify()


MENDINGS: dict[str, Callable[[FrontEnd], None]] = {
    "a stop of all rings": lambda front: [front.stop(ring) for ring in front.rings].clear(),
    "RESET_DEVICE": lambda front: front.set(abi.VHOST_USER_RESET_DEVICE),
    "SET_STATUS 0": lambda front: front.set(abi.VHOST_USER_SET_STATUS, u64(0)),
}


@pytest.mark.parametrize("mending", [*MENDINGS, "another connection"])
def test_a_malformed_chain_stops_its_device_with_one_line_and_signals_the_error(
    served: Served, front: FrontEnd, source: tuple[int, int], tmp_path: Path, mending: str
) -> None:
    rings = [front.start(index) for index in range(3)]
    rings[1].submit(0, room=64)
    assert rings[0].ask(0, b"x") == b"x" and rings[2].ask(0, b"x") == b"x"
    front.set(abi.VHOST_USER_SET_STATUS, u64(15))
    with Served(Echo(name="other"), tmp_path) as other, other.front() as untouched:
        beside = untouched.start()
        spoil(rings[2])
        line = served.report()
        # By themselves, but for one that sleeps outside.
        eventually(lambda: served.threads() in ([], ["source"]), "the end of its threads")
        assert line.startswith("echo more work: queue 2: outside guest memory (head ")
        assert line.endswith("; the device has stopped until it is reset")
        assert select.select([rings[2].error], [], [], PATIENCE)[0]
        assert os.eventfd_read(rings[2].error) == 1
        assert not select.select([rings[0].error, rings[1].error], [], [], 0)[0]
        assert front.status() == 15 | Status.NEEDS_RESET
        assert beside.ask(0, b"untouched") == b"untouched"
        # Nothing but a reset helps; the connection is as good as ever.
        rings[0].add(1, b"x", 1)
        rings[0].notify()
        front.set_call(rings[0])
        front.enable(rings[0])
        front.share()
        assert served.threads() == []
        assert rings[0].used == 1
        if mending == "another connection":
            front.disconnect()
            front.forget_rings()
            front.connect()
            front.negotiate()
        elif mending == "a stop of all rings":
            for ring in rings[:-1]:
                front.stop(ring)
                assert front.status() & Status.NEEDS_RESET
            # What has not begun is the driver's still; what was malformed has been gone past.
            assert front.stop(rings[-1]) == 2
            assert front.status() == 15
        else:
            MENDINGS[mending](front)
            assert front.status() == 0
        assert served.threads() == []
        works_again(front)
        assert beside.ask(1, b"untouched") == b"untouched"


def test_a_service_that_raises_stops_its_device(served: Served, front: FrontEnd, device: Echo) -> None:
    ring = front.start()
    device.serve = lambda chain: 1 // 0
    ring.submit(0, b"x", 1)
    assert "ZeroDivisionError" in served.report()
    front.set(abi.VHOST_USER_RESET_DEVICE)
    device.serve = lambda chain: chain.write(chain.read())
    works_again(front)


def test_a_device_that_cannot_be_activated_says_so_once_and_is_tried_again_after_a_reset(
    served: Served, front: FrontEnd, device: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(features: int) -> None:
        raise OSError(5, "no such luck")

    monkeypatch.setattr(device, "activate", refuse)
    front.start(0)
    front.start(2)
    assert served.report() == "echo: [Errno 5] no such luck; the device has stopped until it is reset"
    assert served.threads() == []
    monkeypatch.undo()
    front.set(abi.VHOST_USER_RESET_DEVICE)
    works_again(front)


def test_rings_that_break_at_the_same_time_are_one_failure(served: Served, front: FrontEnd) -> None:
    for _ in range(20):
        rings = [front.start(index) for index in (0, 2)]
        for ring in rings:
            spoil(ring)
        eventually(lambda: bool(served.reports), "a report")
        front.stop(rings[0])
        front.stop(rings[1])
        assert "outside guest memory" in served.report()
        assert not front.status() & Status.NEEDS_RESET
        front.forget_rings()


@pytest.mark.parametrize("kind", ["full", "non-blocking", "pipe"])
def test_an_error_descriptor_that_takes_nothing_does_not_hold_up_the_failure(
    served: Served, front: FrontEnd, kind: str
) -> None:
    ring = front.start()
    reader, writer = os.pipe()
    if kind == "pipe":
        os.close(reader)
        front.set(abi.VHOST_USER_SET_VRING_ERR, u64(0), [writer])
    else:
        fill(ring.error)
        os.set_blocking(ring.error, kind == "full")
        os.close(reader)
    os.close(writer)
    spoil(ring)
    assert "outside guest memory" in served.report()
    within(STOP_SECONDS, lambda: front.stop(ring))


@pytest.mark.parametrize("size", [0x8000, 64])
def test_s32_a_ring_that_is_not_inside_memory_fails_the_device(
    served: Served, front: FrontEnd, size: int
) -> None:
    ring = front.ring(size=size if size == 64 else 64)
    front.set(abi.VHOST_USER_SET_VRING_NUM, state(0, size))
    if size == 64:
        places = (USER + 0x1001, USER + 0x3000, USER + 0x2000)
    else:
        places = (USER, USER + 0x10_0000, USER + MEMORY - 0x1000)
    front.set(abi.VHOST_USER_SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, *places, 0))
    front.set_kick(ring)
    front.enable(ring)
    assert served.report().startswith("echo work: queue 0: impossible ring (size ")
    front.set(abi.VHOST_USER_RESET_DEVICE)
    works_again(front)


def test_a_reset_under_load_is_prompt_and_leaves_nothing(
    served: Served, front: FrontEnd, device: Echo
) -> None:
    for turn in range(50):
        for index in (0, 2):
            ring = front.start(index)
            for token in range(10):
                ring.add(token, b"x", 1)
            ring.notify()
        within(STOP_SECONDS, lambda: front.set(abi.VHOST_USER_RESET_DEVICE))
        assert served.threads() == [] and device.deactivated == turn + 1
        front.forget_rings()
        front.set(abi.VHOST_USER_SET_FEATURES, u64(FEATURES))


# Everything at once.


class Storm:
    """What a front-end may do to rings under load, in any order."""

    def __init__(self, front: FrontEnd, loads: Sequence[Load], seed: int) -> None:
        self.front = front
        self.loads = loads
        self.random = random.Random(seed)
        self.log = Log()
        self.extra = memfd("extra", 1 << 20)
        self.added = False

    def step(self) -> None:
        kinds = (
            self.kick, self.call, self.restart, self.disable, self.share, self.region, self.all_logged,
            self.used_logged, self.log_moved, self.config,
        )  # fmt: skip
        self.random.choice(kinds)(self.random.choice(self.loads))

    def kick(self, load: Load) -> None:
        with load.lock:
            load.ring.new_kick()
            self.front.set_kick(load.ring)

    def call(self, load: Load) -> None:
        with load.lock:
            load.ring.new_call()
            self.front.set_call(load.ring)

    def restart(self, load: Load) -> None:
        self.front.restart(load.ring, self.front.stop(load.ring))

    def disable(self, load: Load) -> None:
        self.front.enable(load.ring, False)
        self.front.enable(load.ring)

    def share(self, load: Load) -> None:
        self.added = False
        self.front.share()

    def region(self, load: Load) -> None:
        # Where the log has bits.
        told = table(region(0x1000_0000, 1 << 20, USER + MEMORY))
        if self.added:
            self.front.set(abi.VHOST_USER_REM_MEM_REG, told)
        else:
            self.front.set(abi.VHOST_USER_ADD_MEM_REG, told, [self.extra])
        self.added = not self.added

    def all_logged(self, load: Load) -> None:
        self.front.set(
            abi.VHOST_USER_SET_FEATURES, u64(self.front.features | self.random.choice((0, LOG_ALL)))
        )

    def used_logged(self, load: Load) -> None:
        self.front.set_address(load.ring, self.random.choice((0, 1)), load.ring.layout.used)

    def log_moved(self, load: Load) -> None:
        self.log.share(self.front)

    def config(self, load: Load) -> None:
        self.front.get(abi.VHOST_USER_GET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(8))

    def close(self) -> None:
        os.close(self.log.fd)
        os.close(self.extra)


def storm(served: Served, front: FrontEnd, loads: Sequence[Load], seed: int, steps: int = 120) -> None:
    """Let it loose on *loads*."""
    made = Storm(front, loads, seed)
    try:
        for step in range(steps):
            made.step()
            assert served.reports == []
            if step % 10 == 0:
                for load in loads:
                    load.reach(1)
    finally:
        made.close()


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_or_done_twice_whatever_a_front_end_does_under_load(
    served: Served, front: FrontEnd, device: Echo, source: tuple[int, int], seed: int
) -> None:
    device.serve = once = Once()
    loads = [Load(front.start(0)), Load(front.start(2), depth=4)]
    asleep = front.start(1)
    asleep.submit(0, room=64)
    storm(served, front, loads, seed)
    once.check(*loads)
    os.write(source[1], b"frame")
    assert asleep.collect(1) == [(0, 5)]


class DiskLoad(Load):
    """Writes and then reads a block of the disk's for each token, again and again; each ring its own 64."""

    def __init__(self, ring: Ring, depth: int) -> None:
        self.versions = [0] * depth
        super().__init__(ring, depth)

    def request(self, token: int, number: int) -> None:
        version, reading = divmod(self.versions[token], 2)
        data, around = self.ring.buffer(2 * token, PAGE), self.ring.buffer(2 * token + 1, 16)
        status = Buffer(GuestAddress(around.address + 64), 1)
        memory = self.ring.front.memory
        memory.write(around.address, struct.pack("<IIQ", 0 if reading else 1, 0, 8 * self._block(token)))
        memory.write(status.address, b"\xff")
        memory.write(data.address, bytes(PAGE) if reading else self._pattern(token, version))
        if reading:
            self.ring.driver.add([around], [data, status], token)
        else:
            self.ring.driver.add([around, data], [status], token)

    def answered(self, token: int, number: int, written: int) -> None:
        version, reading = divmod(self.versions[token], 2)
        memory = self.ring.front.memory
        assert memory.read(GuestAddress(self.ring.buffer(2 * token + 1, 1).address + 64), 1) == b"\0"
        assert written == (PAGE + 1 if reading else 1)
        if reading:
            assert memory.read(self.ring.buffer(2 * token, PAGE).address, PAGE) == self._pattern(
                token, version
            )
        self.versions[token] += 1

    def _block(self, token: int) -> int:
        return 64 * self.ring.index + token

    def _pattern(self, token: int, version: int) -> bytes:
        return struct.pack("=QQ", self._block(token), version) * (PAGE // 16)


@pytest.mark.parametrize("transfers", [False, True])
def test_a_disk_holds_what_was_written_whatever_a_front_end_does_under_load(
    tmp_path: Path, transfers: bool
) -> None:
    if transfers:
        uring_or_skip()
    disk = FileDisk.scratch(1 << 20)
    block = Block(disk, transfer_file=disk.fd if transfers else None)
    with Served(block, tmp_path) as served, served.front() as front:
        load = DiskLoad(front.start(), 16)
        storm(served, front, [load], 7)
        assert load.finish() > 32
    disk.close()


class ReceiveLoad(Load):
    """Gives buffers, and expects frame after frame in them, as many as were `expected`."""

    expected = 0

    @property
    def due(self) -> bool:
        return self.done < self.expected

    @property
    def more(self) -> bool:
        return True

    def request(self, token: int, number: int) -> None:
        self.ring.driver.add([], [self.ring.buffer(token, 2000)], token)

    def answered(self, token: int, number: int, written: int) -> None:
        received = self.ring.front.memory.read(self.ring.buffer(token, written).address, written)
        header, frame = received[:HEADER_SIZE], received[HEADER_SIZE:]
        assert header == bytes(HEADER_SIZE - 2) + b"\1\0"
        assert frame == struct.pack("=Q", self.done) * 25


class TransmitLoad(Load):
    """Sends frames that are numbered."""

    def request(self, token: int, number: int) -> None:
        self.ring.add(token, bytes(HEADER_SIZE) + struct.pack("=Q", number) * 25)

    def answered(self, token: int, number: int, written: int) -> None:
        assert (number, written) == (self.done, 0)


@pytest.mark.parametrize("mergeable", [True, False])
def test_frames_come_and_go_once_and_in_order_whatever_a_front_end_does_under_load(
    tmp_path: Path, mergeable: bool
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    network = PacketNetwork(theirs.detach(), "network")
    sent: list[int] = []
    card = Net(network, b"\2\0\0\0\0\1")
    card.withheld = 0 if mergeable else 1 << VIRTIO_NET_F_MRG_RXBUF
    with Served(card, tmp_path) as served:
        with FrontEnd(served.path) as front:
            front.negotiate(FEATURES | mergeable << VIRTIO_NET_F_MRG_RXBUF)
            receiving, transmitting = ReceiveLoad(front.start(0), 32), TransmitLoad(front.start(1))

            def wire() -> None:
                # What is sent is taken off the wire, and each answered with one.
                while frame := ours.recv(65536):
                    assert frame == bytes(HEADER_SIZE) + struct.pack("=Q", len(sent)) * 25
                    receiving.expected += 1
                    ours.send(bytes(HEADER_SIZE) + struct.pack("=Q", len(sent)) * 25)
                    sent.append(len(sent))

            answering = threading.Thread(target=wire)
            answering.start()
            storm(served, front, [receiving, transmitting], mergeable + 5)
            assert transmitting.finish()
            eventually(lambda: len(sent) == transmitting.done, "the frames sent")
            assert receiving.finish() == len(sent)
            ours.shutdown(socket.SHUT_RD)
            answering.join()
    ours.close()
    network.close()


# What the kernel has no room for.

SHAPE = struct.pack("=QQHHI", 0, 0, 3, 64, 0)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("call", ["memfd_create", "ftruncate"])
def test_a_record_that_cannot_be_made_ends_that_connection_with_one_line(
    call: str, number: int, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    with served.front() as front:
        ring = front.start()
        assert ring.ask(0, b"before") == b"before"
        monkeypatch.setattr(os, call, refuse)
        front.send(abi.VHOST_USER_GET_INFLIGHT_FD, SHAPE)
        line = served.report()
        monkeypatch.undo()
        assert os.strerror(number) in line and call in line
        assert front.closed()
    served.rest()
    with served.front() as other:
        made, (fd,) = other.get_fds(abi.VHOST_USER_GET_INFLIGHT_FD, SHAPE)
        other.set(abi.VHOST_USER_SET_INFLIGHT_FD, made, [fd])
        os.close(fd)
        assert other.start().ask(0, b"after") == b"after"


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN, errno.EACCES])
@pytest.mark.parametrize("what", ["memory", "log", "record"])
def test_what_cannot_be_mapped_is_refused_or_ends_that_connection_with_one_line(
    what: str, number: int, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **more: object) -> mapping.SharedMapping:
        raise OSError(number, os.strerror(number))

    with served.front() as front:
        made, (fd,) = front.get_fds(abi.VHOST_USER_GET_INFLIGHT_FD, SHAPE)
        log = memfd("log", 0x1000)
        request, payload, given = {
            "memory": (abi.VHOST_USER_SET_MEM_TABLE, table(region()), front.memory_fd),
            "log": (abi.VHOST_USER_SET_LOG_BASE, u64(0x1000) + u64(0), log),
            "record": (abi.VHOST_USER_SET_INFLIGHT_FD, made, fd),
        }[what]
        monkeypatch.setattr(mapping, "SharedMapping", refuse)
        if what == "log":
            # Its reply cannot say that it went wrong.
            front.send(request, payload, [given])
            assert front.closed() and os.strerror(number) in served.report()
        else:
            assert front.try_set(request, payload, [given]) == 1
            monkeypatch.undo()
            # What there was is still there.
            assert front.start().ask(1, b"after") == b"after"
        monkeypatch.undo()
        os.close(fd)
        os.close(log)
    served.rest()
    with served.front() as other:
        assert other.start().ask(0, b"other") == b"other"
