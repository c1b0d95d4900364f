"""A network whose frames come back."""

import errno
import threading
from collections.abc import Iterator

import pytest
from runtime.rigs import eventually, nothing_left

from lguestlib.abi.signals import install_interrupt_handler, interrupt_thread
from lguestlib.runtime.backend.loopback import Loopback
from lguestlib.runtime.trace import Tracer


@pytest.fixture
def network() -> Iterator[Loopback]:
    with nothing_left():
        network = Loopback()
        yield network
        network.close()


def test_frames_come_back_whole_and_in_order(network: Loopback) -> None:
    frames = [bytes([number]) * (60 + number) for number in range(20)]
    for frame in frames:
        assert network.send([memoryview(frame[:12]), memoryview(frame[12:])]) == len(frame)
    for frame in frames:
        head, rest = bytearray(12), bytearray(2048)
        assert network.receive([memoryview(head), memoryview(rest)]) == len(frame)
        assert head + rest[: len(frame) - 12] == frame


def test_a_full_network_refuses_and_goes_on_when_there_is_room(network: Loopback) -> None:
    frame, room = memoryview(bytes(1512)), [memoryview(bytearray(2048))]
    sent = 0
    with pytest.raises(BlockingIOError) as refused:
        while sent < 100_000:
            sent += bool(network.send([frame]))
    assert refused.value.errno == errno.EAGAIN and 10 < sent < 100_000
    assert network.receive(room) == 1512
    assert network.send([frame]) == 1512


def test_who_waits_for_a_frame_can_be_called_out() -> None:
    install_interrupt_handler()
    network = Loopback()
    ended: list[str] = []

    def wait() -> None:
        try:
            network.receive([memoryview(bytearray(64))])
        except InterruptedError:
            ended.append("interrupted")

    thread = threading.Thread(target=wait)
    thread.start()

    def called_out() -> bool:
        if thread.native_id is not None and thread.is_alive():
            interrupt_thread(thread.native_id)
        return bool(ended)

    eventually(called_out, "the end of the wait")
    thread.join()
    network.close()


def test_calls_are_recorded() -> None:
    tracer = Tracer()
    network = Loopback(tracer)
    network.send([memoryview(bytes(64))])
    network.receive([memoryview(bytearray(64))])
    assert [(call.call, call.role) for call in tracer.calls] == [("writev", "loopback"), ("readv", "loopback")]
    network.close()
