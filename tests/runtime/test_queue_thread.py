"""The queue thread: what it sleeps in, when it interrupts, and how it ends."""

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from runtime.rigs import PATIENCE, Rig, buffer, eventually, nothing_left

from lguestlib.abi import uio
from lguestlib.abi.signals import interrupt_thread
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.region import Region
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.interrupt import EventfdInterrupt, NoInterrupt
from lguestlib.runtime.kick import EventfdKick
from lguestlib.runtime.queue_thread import AT_ONCE, QueueEnds, QueueThread
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Queue, SourceEnded
from lguestlib.virtio.device_queue import new_device_queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout, RingIndex
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue

STOP_SECONDS = 0.1
"""The longest that stopping a thread may take, from any state."""

PLAIN = int(Feature.VERSION_1)

FULL = (2**64 - 2).to_bytes(8, sys.byteorder)
"""As much as an eventfd's counter holds: who adds one more sleeps."""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def taking(chain: Chain) -> int:
    return 0


def calling(rig: Rig, call: str, role: str) -> bool:
    return [(open_.call, open_.role) for open_ in rig.tracer.open_calls] == [(call, role)]


def asleep(rig: Rig) -> bool:
    return calling(rig, "read", "kick")


def native_id(name: str) -> int:
    found = [thread.native_id for thread in threading.enumerate() if thread.name == name]
    assert found and found[0]
    return found[0]


def processor_nanoseconds(thread_id: int) -> int:
    return int(Path(f"/proc/self/task/{thread_id}/schedstat").read_text().split()[0])


def stop_in_time(rig: Rig) -> None:
    start = time.monotonic()
    rig.thread.stop()
    assert time.monotonic() - start < STOP_SECONDS


def test_what_the_driver_adds_comes_back_in_order_and_once() -> None:
    with Rig(Queue("q", taking)) as rig:
        rig.start()
        sizes = [turn % 17 + 1 for turn in range(200)]
        for size in sizes:
            for token in range(size):
                rig.submit(token)
            assert [token for token, _ in rig.collect(size)] == list(range(size))
        # They are counted when the driver has them already.
        eventually(lambda: rig.counters.chains >= sum(sizes), "the last ones counted")
        assert (rig.counters.chains, rig.counters.bytes) == (sum(sizes), 64 * sum(sizes))
        assert rig.counters.errors == 0


def test_t8_what_was_made_available_before_the_thread_exists_is_served_without_a_kick() -> None:
    with Rig(Queue("q", taking)) as rig:
        for token in range(5):
            rig.driver.add([buffer(token)], [], token)
        rig.start()
        assert len(rig.collect(5)) == 5


def test_a_lone_request_makes_the_seeds_calls_and_no_others() -> None:
    with Rig(Queue("q", taking), tracer=Tracer()) as rig:
        rig.start()
        eventually(lambda: asleep(rig), "the thread's sleep")
        for token in range(10):
            before = len(rig.tracer.calls)
            rig.driver.enable_interrupts()
            rig.submit(token)
            rig.collect(1)
            eventually(lambda: len(rig.tracer.calls) > before + 1 and asleep(rig), "the thread's sleep")
            calls = [(call.call, call.role) for call in rig.tracer.calls[before:]]
            assert calls == [("read", "kick"), ("write", "interrupt")]


def test_an_idle_thread_makes_no_calls_and_uses_no_processor() -> None:
    with Rig(Queue("idle", taking), tracer=Tracer()) as rig:
        rig.start()
        eventually(lambda: asleep(rig), "the thread's sleep")
        before = processor_nanoseconds(native_id("idle"))
        time.sleep(0.2)
        assert rig.tracer.calls == []
        assert processor_nanoseconds(native_id("idle")) == before


def test_the_driver_is_told_after_half_of_what_it_has_out_and_before_sleep() -> None:
    gate = threading.Semaphore(0)

    def gated(chain: Chain) -> int:
        gate.acquire()
        return 0

    with Rig(Queue("q", gated), features=PLAIN) as rig:
        for token in range(2 * AT_ONCE):
            rig.submit(token)
        rig.start()
        # Half of what there is, so that the driver has something to do meanwhile; then the other.
        for interrupts, served in ((1, AT_ONCE), (2, AT_ONCE)):
            for _ in range(served):
                gate.release()
            eventually(lambda: rig.counters.interrupts == interrupts, f"interrupt {interrupts}")


def test_what_came_from_outside_is_told_of_before_more_is_waited_for(pipe: tuple[int, int]) -> None:
    reader, writer = pipe

    def receive(chain: Chain) -> int:
        return uio.readv(reader, chain.writable)

    with Rig(Queue("q", receive, from_outside=True)) as rig:
        for token in range(8):
            rig.submit(token, readable=0, writable=64)
        rig.start()
        for token in range(8):
            os.write(writer, b"frame")
            assert rig.collect(1) == [(token, 5)]


def test_an_unwanted_interrupt_is_not_sent_but_counted() -> None:
    with Rig(Queue("q", taking)) as rig:
        rig.driver.disable_interrupts()
        rig.start()
        for token in range(3):
            rig.submit(token)
            eventually(lambda: rig.counters.suppressed == token + 1, "the count")
        assert rig.counters.interrupts == 0
        assert len(rig.driver.reap()) == 3


def test_no_notification_is_asked_for_while_the_thread_works() -> None:
    working, go = threading.Event(), threading.Event()

    def slow(chain: Chain) -> int:
        working.set()
        go.wait()
        return 0

    with Rig(Queue("q", slow), features=PLAIN) as rig:
        rig.submit(0)
        rig.start()
        working.wait()
        rig.driver.add([buffer(1)], [], 1)
        assert not rig.driver.kick_needed()
        go.set()
        assert len(rig.collect(2)) == 2
        eventually(lambda: rig.memory.read(rig.driver.layout.used, 2) == bytes(2), "the request for one")


def test_s27_a_malformed_chain_ends_the_thread_and_is_reported_after_the_good_ones_before_it() -> None:
    with Rig(Queue("q", taking)) as rig:
        rig.submit(0)
        rig.submit(1)
        bad = rig.driver.add([buffer(2)], [], 2)
        rig.memory.write(rig.driver.layout.descriptors, bytes(16 * bad) + b"\xff" * 16)
        rig.driver.release()
        rig.start()
        eventually(lambda: bool(rig.failures), "the failure")
        assert isinstance(rig.failures[0], errors.ChainError)
        assert (rig.counters.errors, rig.counters.chains) == (1, 2 if bad else 0)
        stop_in_time(rig)


def test_a_service_that_fails_ends_the_thread_and_what_was_served_is_returned() -> None:
    def failing(chain: Chain) -> int:
        if chain.readable_length == 66:
            raise RuntimeError("broken device")
        return 0

    with Rig(Queue("q", failing)) as rig:
        for token in range(5):
            rig.submit(token, readable=64 + token)
        rig.start()
        eventually(lambda: bool(rig.failures), "the failure")
        assert str(rig.failures[0]) == "broken device"
        assert [token for token, _ in rig.collect(2)] == [0, 1]
        assert rig.ring.state.available == 2


def test_a_device_that_claims_to_have_written_more_than_there_is_room_for_fails() -> None:
    with Rig(Queue("q", lambda chain: 65)) as rig:
        rig.submit(0, readable=0, writable=64)
        rig.start()
        eventually(lambda: bool(rig.failures), "the failure")
        failure = rig.failures[0]
        assert isinstance(failure, errors.UsedLengthError)
        assert (failure.queue, failure.length, failure.room) == (0, 65, 64)


def test_a_source_that_has_ended_leaves_the_chain_with_the_driver_and_the_thread_at_rest() -> None:
    def ended(chain: Chain) -> int:
        raise SourceEnded

    with Rig(Queue("q", ended, from_outside=True)) as rig:
        rig.submit(0, readable=0, writable=64)
        rig.start()
        eventually(lambda: rig.ring.state.available == 0, "the chain's return")
        rig.submit(1, readable=0, writable=64)
        time.sleep(0.02)
        assert (rig.failures, rig.driver.reap(), rig.counters.chains) == ([], [], 0)
        stop_in_time(rig)


def test_a_signal_that_means_nothing_does_not_disturb(pipe: tuple[int, int]) -> None:
    reader, writer = pipe

    def receive(chain: Chain) -> int:
        return uio.readv(reader, chain.writable)

    with Rig(Queue("stray", receive, from_outside=True)) as rig:
        rig.submit(0, readable=0, writable=64)
        rig.start()
        for _ in range(20):
            interrupt_thread(native_id("stray"))
            time.sleep(0.001)
        os.write(writer, b"frame")
        assert rig.collect(1) == [(0, 5)]


def _in_a_read(pipe: tuple[int, int]) -> Callable[[Chain], int]:
    return lambda chain: uio.readv(pipe[0], chain.writable)


def _in_a_write(pipe: tuple[int, int]) -> Callable[[Chain], int]:
    os.set_blocking(pipe[1], False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(pipe[1], bytes(4096))
    os.set_blocking(pipe[1], True)
    return lambda chain: uio.writev(pipe[1], chain.readable) * 0


def _in_a_nap(pipe: tuple[int, int]) -> Callable[[Chain], int]:
    def nap(chain: Chain) -> int:
        time.sleep(0.02)
        return 0

    return nap


@pytest.mark.parametrize("state", [_in_a_read, _in_a_write, _in_a_nap])
def test_stopping_takes_under_100_ms_and_leaves_what_was_not_done_with_the_driver(
    pipe: tuple[int, int], state: Callable[[tuple[int, int]], Callable[[Chain], int]]
) -> None:
    entered = threading.Event()
    serve = state(pipe)

    def service(chain: Chain) -> int:
        entered.set()
        return serve(chain)

    with Rig(Queue("q", service)) as rig:
        for token in range(20):
            rig.submit(token, readable=64, writable=64)
        rig.start()
        entered.wait()
        time.sleep(0.005)
        stop_in_time(rig)
        done = [token for token, _ in rig.driver.reap()]
        assert done == list(range(rig.counters.chains))
        assert rig.ring.state.available == len(done) < 20
        assert rig.failures == []


def test_stopping_a_sleeping_thread_a_thousand_times_is_always_prompt() -> None:
    with Rig(Queue("q", taking)) as rig:
        rig.start()
        for turn in range(300):
            stop_in_time(rig)
            rig.renew()
            rig.start()
            rig.submit(turn)
            if turn % 3:
                rig.collect(1)
            else:
                rig.driver.reap()


def test_nothing_is_lost_or_done_twice_when_threads_come_and_go_under_load() -> None:
    seen: list[int] = []

    def note(chain: Chain) -> int:
        seen.append(chain.readable_length)
        return 0

    total = 3000
    with Rig(Queue("q", note), size=32) as rig:
        rig.start()
        sent = 0
        back: list[int] = []
        while len(back) < total:
            while sent < total and rig.driver.free:
                rig.submit(sent, readable=sent + 1)
                sent += 1
            if sent % 5 == 0:
                rig.thread.stop()
                rig.renew()
                rig.start()
            back += [token for token, _ in rig.driver.reap()]
        assert back == list(range(total))
        assert seen == [token + 1 for token in range(total)]


def test_finishing_serves_what_is_there_and_then_ends() -> None:
    with Rig(Queue("q", taking)) as rig:
        for token in range(30):
            rig.submit(token)
        rig.start()
        rig.thread.request_finish()
        assert rig.thread.join(5)
        assert len(rig.driver.reap()) == 30


def test_y10_the_failure_is_told_on_the_thread_that_had_it_as_its_last_act() -> None:
    names: list[str] = []

    def failed(thread: QueueThread, error: Exception) -> None:
        names.append(threading.current_thread().name)
        thread.request_stop()

    with Rig(Queue("doomed", lambda chain: 1 // 0), on_failure=failed) as rig:
        rig.submit(0)
        rig.start()
        eventually(lambda: names == ["doomed"], "the report")


def test_s24_a_ring_in_use_before_is_signalled_once_because_nobody_knows_what_was() -> None:
    with Rig(Queue("q", taking)) as rig:
        rig.start()
        rig.submit(0)
        rig.collect(1)
        rig.thread.stop()
        rig.driver.disable_interrupts()
        rig.renew()
        assert isinstance(rig.ring, SplitDeviceQueue)
        interrupts = rig.counters.interrupts
        rig.start()
        eventually(lambda: rig.counters.interrupts == interrupts + 1, "the one interrupt")


def exchange_in_time(rig: Rig, change: Callable[[QueueEnds], QueueEnds]) -> bool:
    start = time.monotonic()
    done = rig.thread.exchange(change)
    assert time.monotonic() - start < STOP_SECONDS
    return done


def same(ends: QueueEnds) -> QueueEnds:
    return ends


def signals(interrupt: EventfdInterrupt) -> int:
    """How many came; there must be one."""
    assert select.select([interrupt.fd], [], [], PATIENCE)[0]
    return os.eventfd_read(interrupt.fd)


def test_t10_a_sleeping_thread_goes_on_with_another_kick_and_another_interrupt() -> None:
    with Rig(Queue("q", taking), tracer=Tracer()) as rig:
        rig.start()
        rig.submit(0)
        rig.collect(1)
        eventually(lambda: asleep(rig), "the thread's sleep")
        old = rig.kick, rig.interrupt
        rig.kick, rig.interrupt = EventfdKick(tracer=rig.tracer), EventfdInterrupt(lambda: None)
        names: list[str] = []

        def change(ends: QueueEnds) -> QueueEnds:
            names.append(threading.current_thread().name)
            assert (ends.ring, ends.kick, ends.interrupt) == (rig.ring, *old)
            return QueueEnds(ends.ring, rig.kick, rig.interrupt)

        assert exchange_in_time(rig, change)
        assert names == ["q"]
        # The driver may have missed what went to the old one.
        assert signals(rig.interrupt) == 1
        # Nobody needs the old ones any more: they can be closed, and their numbers be somebody else's.
        for end in old:
            end.close()
        for token in range(1, 20):
            rig.submit(token)
            assert rig.collect(1) == [(token, 0)]


def test_t10_an_interrupt_that_stays_is_not_signalled_for_a_change_of_something_else() -> None:
    with Rig(Queue("q", taking)) as rig:
        rig.start()
        for _ in range(3):
            assert exchange_in_time(rig, same)
        assert rig.counters.interrupts == 0


def test_t12_a_change_is_made_between_two_chains_and_what_was_not_begun_is_served_after_it() -> None:
    inside = 0
    entered, go = threading.Event(), threading.Semaphore(0)
    seen: list[int | None] = []

    def gated(chain: Chain) -> int:
        nonlocal inside
        inside += 1
        entered.set()
        go.acquire()
        seen.append(chain.readable_length)
        inside -= 1
        return 0

    def change(ends: QueueEnds) -> QueueEnds:
        assert inside == 0
        seen.append(None)
        return ends

    with Rig(Queue("q", gated)) as rig:
        for token in range(5):
            rig.submit(token, readable=token + 1)
        rig.start()
        entered.wait()
        done: list[bool] = []
        changer = threading.Thread(target=lambda: done.append(rig.thread.exchange(change)))
        changer.start()
        # Not before the chain that is served is done.
        changer.join(0.02)
        assert not done and not seen
        go.release(5)
        changer.join()
        assert done == [True]
        assert len(rig.collect(5)) == 5
        assert seen == [1, None, 2, 3, 4, 5]


def test_t12_a_thread_in_a_read_from_outside_makes_the_change_and_keeps_its_buffer(
    pipe: tuple[int, int],
) -> None:
    reader, writer = pipe
    entered = threading.Semaphore(0)

    def receive(chain: Chain) -> int:
        entered.release()
        return uio.readv(reader, chain.writable)

    with Rig(Queue("q", receive, from_outside=True)) as rig:
        rig.submit(0, readable=0, writable=64)
        rig.start()
        for turn in range(20):
            entered.acquire()
            if turn % 2:
                time.sleep(0.002)
            assert exchange_in_time(rig, same)
        os.write(writer, b"frame")
        assert rig.collect(1) == [(0, 5)]


def test_t12_chains_held_for_merging_are_the_drivers_again_when_the_change_is_made(
    pipe: tuple[int, int],
) -> None:
    reader, writer = pipe
    entered = threading.Semaphore(0)

    class Merged:
        room = 200

        def serve(self, chains: Sequence[Chain], complete: bool) -> int:
            entered.release()
            chains[0].written = uio.readv(reader, chains[0].writable)
            return 1

    def change(ends: QueueEnds) -> QueueEnds:
        indices.append(ends.ring.state.available)
        return ends

    indices: list[int] = []
    with Rig(Queue("q", taking, from_outside=True, merging=Merged())) as rig:
        for token in range(10):
            rig.submit(token, readable=0, writable=64)
        rig.start()
        for served in range(4):
            entered.acquire()
            assert exchange_in_time(rig, change)
            entered.acquire()
            os.write(writer, b"frame")
            assert rig.collect(1) == [(served, 5)]
        assert indices == [0, 1, 2, 3]


def test_a_thread_whose_source_has_ended_makes_the_change_and_asks_again() -> None:
    asked = threading.Semaphore(0)

    def ended(chain: Chain) -> int:
        asked.release()
        raise SourceEnded

    with Rig(Queue("q", ended, from_outside=True)) as rig:
        rig.submit(0, readable=0, writable=64)
        rig.start()
        for _ in range(3):
            asked.acquire()
            assert exchange_in_time(rig, same)


def test_y4_when_the_change_is_made_nothing_holds_the_old_memory_any_more() -> None:
    size = 1 << 20
    driver_memory = GuestMemory([Region.memfd(GuestAddress(0), size)])
    fd = driver_memory.regions[0].fd

    def mapped() -> GuestMemory:
        return GuestMemory([Region.from_fd(GuestAddress(0), size, fd)])

    layout = QueueLayout.contiguous(0, 64, GuestAddress(0x1000))
    driver: SplitDriverQueue[int] = SplitDriverQueue(layout, driver_memory, PLAIN)
    kick, counters, failures = EventfdKick(), QueueCounters(), list[Exception]()
    memory = mapped()
    thread = QueueThread(
        "q", Queue("q", lambda chain: chain.write(chain.read())), SplitDeviceQueue(layout, memory, PLAIN),
        kick, NoInterrupt(), counters, lambda thread, error: failures.append(error),
    )  # fmt: skip
    thread.start()
    sent = back = 0
    for _ in range(300):
        while driver.free >= 2:
            slot = Buffer(GuestAddress(0x8000 + 64 * (sent % 64)), 64)
            driver.add([slot], [Buffer(GuestAddress(0x10000 + 64 * (sent % 64)), 64)], sent)
            sent += 1
        kick.signal()
        old, memory = memory, mapped()

        def change(ends: QueueEnds, memory: GuestMemory = memory) -> QueueEnds:
            return ends._replace(ring=new_device_queue(layout, memory, PLAIN, ends.ring.state))

        assert thread.exchange(change)
        old.close()
        for token, _ in driver.reap():
            assert token == back
            back += 1
    # The ring is looked at after every change, kick or not.
    eventually(lambda: counters.chains == sent, "the rest")
    assert [token for token, _ in driver.reap()] == list(range(back, sent))
    thread.stop()
    assert failures == []
    memory.close()
    driver.release()
    driver_memory.close()
    kick.close()


def test_a_change_that_fails_fails_the_queue_and_leaves_its_ring_to_be_stopped() -> None:
    def change(ends: QueueEnds) -> QueueEnds:
        raise errors.QueueLayoutError(0, 64, 0x1000, "used ring")

    with Rig(Queue("q", taking)) as rig:
        rig.start()
        rig.submit(0)
        rig.collect(1)
        assert not exchange_in_time(rig, change)
        # It has been told of by then.
        assert [type(failure) for failure in rig.failures] == [errors.QueueLayoutError]
        assert rig.counters.errors == 1
        assert not exchange_in_time(rig, same)
        assert rig.thread.stop() == QueueState(1)


def test_a_change_and_a_stop_at_the_same_time_leave_it_made_or_not_and_the_thread_ended() -> None:
    made = 0
    for turn in range(150):
        with Rig(Queue("q", taking), size=8) as rig:
            rig.start()
            rig.submit(0)
            together = threading.Barrier(2)

            def stop(rig: Rig = rig, together: threading.Barrier = together, turn: int = turn) -> None:
                together.wait()
                if turn % 3:
                    time.sleep(turn * 1e-6)
                rig.thread.request_stop()

            stopper = threading.Thread(target=stop)
            stopper.start()
            together.wait()
            changes: list[QueueEnds] = []

            def change(ends: QueueEnds, changes: list[QueueEnds] = changes) -> QueueEnds:
                changes.append(ends)
                return ends

            done = exchange_in_time(rig, change)
            assert done == bool(changes)
            made += done
            stopper.join()
            assert rig.thread.join(STOP_SECONDS)
            rig.thread.stop()
            assert rig.failures == []
    assert made


def test_the_last_of_many_changes_counts_and_nothing_is_lost_under_load() -> None:
    total = 2000
    with Rig(Queue("q", taking), size=32) as rig:
        rig.start()
        interrupts = [rig.interrupt, EventfdInterrupt(lambda: None)]
        kicks = [rig.kick, EventfdKick()]
        sent, back, turn = 0, list[int](), 0
        while len(back) < total:
            while sent < total and rig.driver.free:
                rig.submit(sent)
                sent += 1
            turn += 1
            rig.kick, rig.interrupt = kicks[turn % 2], interrupts[turn % 2]

            def change(ends: QueueEnds, rig: Rig = rig) -> QueueEnds:
                return QueueEnds(ends.ring, rig.kick, rig.interrupt)

            assert rig.thread.exchange(change)
            if turn % 4 == 0:
                back += [token for token, _ in rig.collect(1)]
        assert back == list(range(total))
        kicks[1 - turn % 2].close()
        interrupts[1 - turn % 2].close()


@pytest.mark.parametrize("ending", ["stop", "exchange"])
def test_an_interrupt_that_nobody_takes_hinders_neither_stop_nor_change(ending: str) -> None:
    with Rig(Queue("q", taking), features=PLAIN, tracer=Tracer()) as rig:
        os.write(rig.interrupt.fd, FULL)
        rig.start()
        rig.submit(0)
        eventually(lambda: calling(rig, "write", "interrupt"), "the thread's sleep in the interrupt")
        if ending == "stop":
            stop_in_time(rig)
        else:
            assert exchange_in_time(rig, same)
        # It is still there to be seen.
        assert signals(rig.interrupt)
        assert rig.driver.reap() == [(0, 0)]


def test_t12_the_ring_before_is_released_when_the_change_is_made() -> None:
    released: list[str] = []

    class Slow(SplitDeviceQueue):
        def release(self) -> None:
            time.sleep(0.02)
            super().release()
            released.append(threading.current_thread().name)

    def change(ends: QueueEnds) -> QueueEnds:
        kind = SplitDeviceQueue if isinstance(ends.ring, Slow) else Slow
        rig.ring = kind(rig.layout, rig.memory, rig.features, RingIndex(ends.ring.state.available))
        return ends._replace(ring=rig.ring)

    with Rig(Queue("q", taking)) as rig:
        rig.start()
        for turn in range(1, 4):
            assert exchange_in_time(rig, change)
            assert exchange_in_time(rig, change)
            assert released == ["q"] * turn


def test_a_stop_that_is_asked_for_just_before_the_thread_looks_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Rig(Queue("q", taking)) as rig:
        look = rig.thread._make_change

        def stopped_then_look() -> None:
            rig.thread.request_stop()
            look()

        monkeypatch.setattr(rig.thread, "_make_change", stopped_then_look)
        rig.start()
        assert rig.thread.join(STOP_SECONDS)
