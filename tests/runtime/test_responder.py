"""A host in this process, at the far end of a network."""

import os
import threading
from collections.abc import Iterator

import pytest
from runtime.rigs import nothing_left

from lguestlib.abi.signals import install_interrupt_handler, interrupt_thread
from lguestlib.runtime.backend.responder import MAC, Responder
from lguestlib.runtime.packets import Station, arp_reply, arp_request, echo_reply, echo_request
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.devices.net import HEADER_SIZE

GUEST = Station(bytes.fromhex("020000000002"), bytes([192, 168, 19, 2]))
HOST = Station(MAC, bytes([192, 168, 19, 1]))


@pytest.fixture
def network() -> Iterator[Responder]:
    with nothing_left():
        network = Responder("192.168.19.1")
        yield network
        network.close()


def send(network: Responder, frame: bytes) -> int:
    """Send behind a header, from two buffers, as from guest memory."""
    return network.send([memoryview(bytearray(HEADER_SIZE)), memoryview(bytearray(frame))])


def receive(network: Responder) -> bytes:
    buffers = [memoryview(bytearray(HEADER_SIZE)), memoryview(bytearray(70_000))]
    length = network.receive(buffers)
    assert not any(buffers[0])
    return bytes(buffers[1][: length - HEADER_SIZE])


def test_it_answers_who_has_and_pings(network: Responder) -> None:
    question = arp_request(GUEST, HOST.address)
    assert send(network, question) == HEADER_SIZE + len(question)
    assert arp_reply(receive(network)) == HOST
    for sequence in range(100):
        send(network, echo_request(GUEST, HOST, 1, sequence, bytes(56)))
        echo = echo_reply(receive(network), GUEST.address)
        assert echo and echo.sequence == sequence


def test_t2_headers_are_those_of_the_negotiated_features(network: Responder) -> None:
    network.activate(0)
    question = arp_request(GUEST, HOST.address)
    network.send([memoryview(bytearray(10)), memoryview(bytearray(question))])
    reply = memoryview(bytearray(2000))
    length = network.receive([reply])
    assert arp_reply(bytes(reply[10:length])) == HOST
    network.activate(1 << 15)
    send(network, question)
    assert arp_reply(receive(network)) == HOST


def test_frames_that_ask_nothing_get_no_answer(network: Responder) -> None:
    for frame in (b"x", os.urandom(1500), os.urandom(65536), arp_request(GUEST, bytes([10, 0, 0, 1]))):
        send(network, frame)
    send(network, arp_request(GUEST, HOST.address))
    assert arp_reply(receive(network)) == HOST


def test_it_does_not_say_how_long_frames_may_be(network: Responder) -> None:
    assert network.mtu is None


def test_the_largest_ping_is_echoed_whole(network: Responder) -> None:
    data = os.urandom(65_000)
    send(network, echo_request(GUEST, HOST, 1, 1, data))
    assert receive(network).endswith(data)


def test_a_guest_that_does_not_receive_loses_frames_and_is_not_held_up(network: Responder) -> None:
    ping = echo_request(GUEST, HOST, 1, 1, bytes(1400))
    for _ in range(2000):
        send(network, ping)
    assert echo_reply(receive(network), GUEST.address)


def test_a_receive_is_interrupted_by_a_directed_signal(network: Responder) -> None:
    install_interrupt_handler()
    outcome: list[str] = []

    def receiving() -> None:
        try:
            receive(network)
        except InterruptedError:
            outcome.append("interrupted")

    thread = threading.Thread(target=receiving)
    thread.start()
    while thread.is_alive():
        if thread.native_id:
            interrupt_thread(thread.native_id)
        thread.join(0.005)
    assert outcome == ["interrupted"]


def test_it_closes_with_frames_under_way() -> None:
    with nothing_left():
        network = Responder("192.168.19.1")
        for _ in range(50):
            send(network, echo_request(GUEST, HOST, 1, 1, bytes(1400)))
        network.close()


def test_calls_are_traced_as_the_responders() -> None:
    tracer = Tracer()
    network = Responder("192.168.19.1", tracer)
    send(network, arp_request(GUEST, HOST.address))
    receive(network)
    network.close()
    calls = [(call.call, call.role) for call in tracer.calls]
    assert calls == [("writev", "responder"), ("readv", "responder")]
