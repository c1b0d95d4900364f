"""The receive queue with mergeable buffers at work: its thread, its ring, and a network."""

import errno
import os
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from runtime.rigs import PATIENCE, Rig, buffer, eventually, nothing_left
from runtime.test_tap import in_namespace

from lguestlib.abi import virtio_net as abi
from lguestlib.memory.address import GuestAddress
from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.runtime.backend.tap import Tap
from lguestlib.runtime.interface import InterfaceAddress, Interfaces
from lguestlib.runtime.namespace import without_ipv6
from lguestlib.runtime.packets import Station, arp_reply, arp_request
from lguestlib.runtime.queue_thread import QueueEnds
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio import errors
from lguestlib.virtio.device_queue import new_device_queue
from lguestlib.virtio.devices.net import HEADER_SIZE, Net
from lguestlib.virtio.features import Feature
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.split_device import SplitDeviceQueue

STOP_SECONDS = 0.1
"""The longest that stopping a thread may take, from any state."""

MERGING = 1 << abi.VIRTIO_NET_F_MRG_RXBUF
GSO = MERGING | 1 << abi.VIRTIO_NET_F_GUEST_CSUM | 1 << abi.VIRTIO_NET_F_GUEST_TSO4
MAC = bytes.fromhex("020000000002")
HOST = InterfaceAddress(bytes([10, 9, 8, 1]), 24)
GUEST = Station(MAC, bytes([10, 9, 8, 2]))

# linux/if_packet.h, linux/if_ether.h
SOL_PACKET, PACKET_VNET_HDR, ETH_P_IP = 263, 15, 0x0800


class Receiver(Rig):
    """The driver of a receive queue; its packets come from *network*."""

    def __init__(self, network: PacketNetwork, features: int = MERGING, mtu: int = 1500) -> None:
        self.device = Net(network, MAC, mtu=mtu)
        self.device.activate(features)
        super().__init__(self.device.queues()[0], tracer=network.tracer)
        self.given = 0

    def give(self, count: int, length: int = 1536) -> None:
        """Make *count* buffers of that *length* available; the one given as number n has n as token."""
        for _ in range(count):
            self.submit(self.given, 0, length)
            self.given += 1

    def content(self, token: int, length: int) -> bytes:
        return self.memory.read(buffer(1024 + token % 1024).address, length)

    def packet(self) -> tuple[bytes, list[int]]:
        """The one packet that has come or will, its num_buffers cleared, and the bytes in each buffer."""
        done = self.collect(1)
        data = b"".join(self.content(*each) for each in done)
        assert int.from_bytes(data[10:12], "little") == len(done), "a packet's buffers come back together"
        return data[:10] + bytes(2) + data[12:], [length for _, length in done]

    def asleep(self) -> bool:
        """Whether its thread is in the network's readv."""
        return [call.call for call in self.tracer.open_calls] == ["readv"]

    def stop_in_time(self) -> None:
        start = time.monotonic()
        self.thread.stop()
        assert time.monotonic() - start < STOP_SECONDS


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def cable() -> Iterator[tuple[PacketNetwork, socket.socket]]:
    """A network, and where its packets are sent from."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    network = PacketNetwork(near.detach(), "cable", Tracer())
    yield network, far
    network.close()
    far.close()


def packet(length: int, seed: int = 1) -> bytes:
    """Header and frame, *length* bytes in all."""
    return bytes(HEADER_SIZE) + random.Random(seed).randbytes(length - HEADER_SIZE)


def test_a_packet_comes_in_as_many_buffers_as_it_needs_and_they_come_back_together(
    cable: tuple[PacketNetwork, socket.socket],
) -> None:
    network, far = cable
    with Receiver(network, GSO) as rig:
        rig.give(45)
        rig.start()
        all_lengths = (60_000, 60_000, 60, 1536, 1537, 65_565, 61)
        for length in all_lengths:
            sent = packet(length, length)
            far.send(sent)
            count = -(-length // 1536)
            assert rig.packet() == (sent, [1536] * (count - 1) + [length - 1536 * (count - 1)])
            rig.give(count)
        assert rig.device.merged.missed == 0
        eventually(lambda: rig.counters.bytes == sum(all_lengths), "the count")


def test_a_lone_packet_makes_the_seeds_calls_and_no_others(
    cable: tuple[PacketNetwork, socket.socket],
) -> None:
    network, far = cable
    assert network.tracer
    with Receiver(network, GSO) as rig:
        rig.give(60)
        rig.start()
        for _ in range(5):
            eventually(rig.asleep, "the thread's sleep")
            before = len(network.tracer.calls)
            rig.driver.enable_interrupts()
            far.send(packet(98))
            rig.packet()
            eventually(lambda: len(rig.tracer.calls) > before + 1 and rig.asleep(), "the thread's sleep")
            calls = [(call.call, call.role) for call in network.tracer.calls[before:]]
            assert calls == [("readv", "cable"), ("write", "interrupt")]


def test_without_the_feature_a_packet_has_one_buffer(cable: tuple[PacketNetwork, socket.socket]) -> None:
    network, far = cable
    with Receiver(network, int(Feature.VERSION_1)) as rig:
        rig.give(4)
        rig.start()
        far.send(packet(1000))
        assert rig.packet() == (packet(1000), [1000])


@pytest.mark.parametrize("given", [1, 20, 60])
def test_stopping_gives_back_what_is_held_and_another_thread_goes_on_with_it(
    cable: tuple[PacketNetwork, socket.socket], given: int
) -> None:
    network, far = cable
    with Receiver(network, GSO) as rig:
        rig.give(given)
        rig.start()
        for turn in range(20):
            eventually(rig.asleep, "the thread's sleep")
            rig.stop_in_time()
            assert rig.thread.stop() == QueueState(turn) == rig.ring.state
            rig.renew()
            rig.start()
            far.send(packet(1000, turn))
            assert rig.packet() == (packet(1000, turn), [1000])
            rig.give(1)


def test_t12_a_change_gives_back_what_is_held_and_it_is_taken_again(
    cable: tuple[PacketNetwork, socket.socket],
) -> None:
    network, far = cable
    with Receiver(network, GSO) as rig:
        rig.give(20)
        rig.start()
        for turn in range(20):
            eventually(rig.asleep, "the thread's sleep")

            def change(ends: QueueEnds) -> QueueEnds:
                assert ends.ring.state.available == turn
                rig.ring = new_device_queue(rig.layout, rig.memory, rig.features, ends.ring.state)
                return QueueEnds(rig.ring, ends.kick, ends.interrupt)

            start = time.monotonic()
            assert rig.thread.exchange(change)
            assert time.monotonic() - start < STOP_SECONDS
            far.send(packet(1000, turn))
            assert rig.packet() == (packet(1000, turn), [1000])
            rig.give(1)


def test_nothing_is_lost_or_torn_when_threads_come_and_go_under_load(
    cable: tuple[PacketNetwork, socket.socket],
) -> None:
    network, far = cable
    total = 1000
    seed = 9
    lengths = random.Random(seed).choices((60, 1000, 1537, 9000, 60_000), (10, 4, 2, 1, 1), k=total)

    def send() -> None:
        for number, length in enumerate(lengths):
            far.send(packet(length, number))

    sender = threading.Thread(target=send)
    with Receiver(network, GSO) as rig:
        rig.give(64)
        rig.start()
        sender.start()
        number = turns = 0
        parts: list[bytes] = []
        deadline = time.monotonic() + 3 * PATIENCE
        while number < total:
            assert time.monotonic() < deadline, (seed, number)
            turns += 1
            if turns % 7 == 0:
                rig.stop_in_time()
                rig.renew()
                rig.start()
            for token, length in rig.driver.reap():
                parts.append(rig.content(token, length))
                rig.give(1)
                if len(parts) == int.from_bytes(parts[0][10:12], "little"):
                    assert b"".join(parts)[12:] == packet(lengths[number], number)[12:], (seed, number)
                    parts.clear()
                    number += 1
        sender.join()
        assert (rig.failures, rig.device.merged.missed) == ([], 0)


def test_a_packet_that_finds_too_few_buffers_comes_when_there_are_more(
    cable: tuple[PacketNetwork, socket.socket],
) -> None:
    network, far = cable
    with Receiver(network, GSO) as rig:
        rig.give(3)
        rig.start()
        for turn in range(5):
            eventually(rig.asleep, "the thread's sleep")
            far.send(packet(4 * 1536 + 1, turn))
            rig.give(1)
            time.sleep(0.005)
            assert rig.driver.reap() == []
            rig.give(1)
            assert rig.packet() == (packet(4 * 1536 + 1, turn), [1536] * 4 + [1])
            rig.give(3)
        assert rig.device.merged.missed == 0


@pytest.mark.parametrize("ending", ["stop", "change"])
def test_a_packet_that_waits_for_buffers_outlives_a_stop_and_a_change(
    cable: tuple[PacketNetwork, socket.socket], ending: str
) -> None:
    network, far = cable
    with Receiver(network, GSO) as rig:
        rig.give(3)
        rig.start()
        eventually(rig.asleep, "the thread's sleep")
        far.send(packet(5000))
        eventually(lambda: not rig.asleep(), "the packet")
        if ending == "stop":
            rig.stop_in_time()
            assert rig.ring.state.available == 0
            rig.renew()
            rig.start()
        else:
            start = time.monotonic()
            assert rig.thread.exchange(lambda ends: ends)
            assert time.monotonic() - start < STOP_SECONDS
        assert rig.driver.reap() == []
        rig.give(1)
        assert rig.packet() == (packet(5000), [1536] * 3 + [5000 - 3 * 1536])


def test_s33_small_buffers(cable: tuple[PacketNetwork, socket.socket]) -> None:
    network, far = cable
    with Receiver(network) as rig:
        rig.give(5, HEADER_SIZE)
        rig.start()
        assert [length for _, length in rig.collect(5)] == [0] * 5
        rig.give(60, HEADER_SIZE + 1)
        far.send(packet(700))
        assert rig.packet() == (packet(700), [13] * 53 + [11])
        assert rig.failures == []


def test_s33_a_ring_full_of_buffers_with_no_room_is_given_back_and_the_thread_goes_on(
    cable: tuple[PacketNetwork, socket.socket],
) -> None:
    network, far = cable
    with Receiver(network) as rig:
        for token in range(64):
            rig.submit(token, readable=8)
        rig.start()
        assert rig.collect(64) == [(token, 0) for token in range(64)]
        rig.given = 64
        rig.give(1)
        far.send(packet(100))
        assert rig.packet() == (packet(100), [100])


@pytest.mark.parametrize("good", [0, 3, 20])
def test_s27_a_malformed_chain_fails_the_queue_and_nothing_is_held_any_more(
    cable: tuple[PacketNetwork, socket.socket], good: int
) -> None:
    network, _ = cable
    with Receiver(network, GSO) as rig:
        rig.give(good)
        bad = rig.driver.add([], [buffer(2000)], 2000)
        rig.memory.write(GuestAddress(rig.layout.descriptors + 16 * bad), b"\xff" * 16)
        rig.start()
        eventually(lambda: bool(rig.failures), "the failure")
        assert isinstance(rig.failures[0], errors.ChainError)
        assert rig.driver.reap() == [] and rig.counters.errors == 1
        rig.stop_in_time()
        assert isinstance(rig.ring, SplitDeviceQueue) and not any(chain.in_flight for chain in rig.ring._chains)


def test_s2_an_impossible_index_fails_the_queue(cable: tuple[PacketNetwork, socket.socket]) -> None:
    network, _ = cable
    with Receiver(network, GSO) as rig:
        rig.give(5)
        rig.start()
        eventually(rig.asleep, "the thread's sleep")
        rig.memory.write(GuestAddress(rig.layout.available + 2), (500).to_bytes(2, "little"))
        rig.stop_in_time()
        rig.renew()
        rig.start()
        eventually(lambda: bool(rig.failures), "the failure")
        assert isinstance(rig.failures[0], errors.AvailIndexError)


def test_a_network_that_is_gone_fails_the_queue_and_what_was_held_goes_back(
    cable: tuple[PacketNetwork, socket.socket],
) -> None:
    network, _ = cable
    with Receiver(network, GSO) as rig:
        rig.give(20)
        fd, network.fd = network.fd, os.open(os.devnull, os.O_WRONLY)
        rig.start()
        eventually(lambda: bool(rig.failures), "the failure")
        assert isinstance(rig.failures[0], OSError) and rig.failures[0].errno == errno.EBADF
        assert rig.ring.state.available == 0 and rig.driver.reap() == []
        os.close(network.fd)
        network.fd = fd


# On a TAP device.


def tap_with_host(mtu: int) -> Tap:
    tap = Tap(tracer=Tracer())
    without_ipv6(tap.name)
    with Interfaces() as interfaces:
        interfaces.set_mtu(tap.name, mtu)
        interfaces.set_address(tap.name, HOST)
        interfaces.set_up(tap.name)
    return tap


@pytest.mark.parametrize("features", [MERGING, GSO])
@pytest.mark.parametrize("mtu", [1400, 9000])
def test_frames_as_long_as_the_interfaces_mtu_go_both_ways(mtu: int, features: int) -> None:
    def test() -> None:
        tap = tap_with_host(mtu)
        assert tap.mtu == mtu
        with Receiver(tap, features, tap.mtu) as rig, socket.socket(type=socket.SOCK_DGRAM) as host:
            host.bind((socket.inet_ntoa(HOST.address), 4000))
            host.settimeout(PATIENCE)
            rig.give(60)
            rig.start()
            frame, _ = ask(rig, tap)
            station = arp_reply(frame)
            assert station
            data = random.Random(mtu).randbytes(mtu - 28)
            # Whoever has asked is known to the kernel: it does not ask back.
            host.sendto(data, (socket.inet_ntoa(GUEST.address), 4000))
            sent, lengths = rig.packet()
            assert sent[-len(data) :] == data and len(sent) == HEADER_SIZE + 14 + mtu
            assert len(lengths) == -(-len(sent) // 1536)
            frame = station.mac + MAC + ETH_P_IP.to_bytes(2, "big") + back(sent[HEADER_SIZE + 14 :])
            tap.send([memoryview(bytearray(HEADER_SIZE)), memoryview(bytearray(frame))])
            assert host.recv(65536) == data
        tap.close()

    def ask(rig: Receiver, tap: Tap) -> tuple[bytes, list[int]]:
        question = arp_request(GUEST, HOST.address)
        tap.send([memoryview(bytearray(HEADER_SIZE)), memoryview(bytearray(question))])
        data, lengths = rig.packet()
        return data[HEADER_SIZE:], lengths

    in_namespace(test)


@pytest.mark.parametrize("used", [1, 2], ids=["detached", "attached"])
def test_a_thread_that_waits_at_a_queue_of_several_stops_in_time(used: int) -> None:
    def test() -> None:
        tap = Tap(tracer=Tracer(), queues=2)
        tap.use_pairs(used)
        with Receiver(tap.pairs[1], GSO) as rig:
            rig.give(60)
            for _ in range(5):
                rig.start()
                eventually(rig.asleep, "the thread's sleep")
                rig.stop_in_time()
                rig.renew()
            rig.start()
            eventually(rig.asleep, "the thread's sleep")
            tap.use_pairs(3 - used)
            rig.stop_in_time()
        tap.close()

    in_namespace(test)


def back(datagram: bytes) -> bytes:
    """The IPv4 UDP *datagram* on its way back: addresses and ports exchanged, no UDP checksum."""
    ports = datagram[22:24] + datagram[20:22]
    addresses = datagram[16:20] + datagram[12:16]
    return datagram[:12] + addresses + ports + datagram[24:26] + bytes(2) + datagram[28:]


def test_a_segment_that_the_host_leaves_to_the_guest_to_cut_comes_in_whole() -> None:
    length = 60_000
    ip = bytes.fromhex("4500") + (length - 14).to_bytes(2, "big") + bytes.fromhex("0000400040060000")
    tcp = bytes.fromhex("0fa00fa0 00000001 00000001 5010ffff 00000000")
    frame = MAC + MAC + ETH_P_IP.to_bytes(2, "big") + ip + HOST.address + GUEST.address + tcp
    frame += random.Random(4).randbytes(length - len(frame))
    header = abi.virtio_net_hdr(
        flags=abi.VIRTIO_NET_HDR_F_NEEDS_CSUM,
        gso_type=abi.VIRTIO_NET_HDR_GSO_TCPV4,
        hdr_len=54,
        gso_size=1460,
        csum_start=34,
        csum_offset=16,
    )

    def test() -> None:
        tap = tap_with_host(1500)
        with Receiver(tap, GSO) as rig, socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as host:
            host.bind((tap.name, ETH_P_IP))
            host.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            rig.give(50)
            rig.start()
            for _ in range(2):
                host.send(bytes(header) + frame)
                data, lengths = rig.packet()
                told = abi.virtio_net_hdr_v1.from_buffer_copy(data)
                assert (told.gso_type, told.gso_size) == (abi.VIRTIO_NET_HDR_GSO_TCPV4, 1460)
                # The IP header's checksum apart, which the kernel may fill in.
                assert data[HEADER_SIZE + 54 :] == frame[54:]
                assert len(lengths) == -(-len(data) // 1536)
                rig.give(len(lengths))
        tap.close()

    in_namespace(test)


def test_waiting_for_buffers_is_sleep(cable: tuple[PacketNetwork, socket.socket]) -> None:
    network, far = cable
    with Receiver(network, GSO) as rig:
        rig.give(3)
        rig.start()
        eventually(rig.asleep, "the thread's sleep")
        far.send(packet(5000))
        eventually(lambda: [call.role for call in rig.tracer.open_calls] == ["kick"], "the wait for buffers")
        calls = len(rig.tracer.calls)
        time.sleep(0.05)
        assert len(rig.tracer.calls) == calls
        rig.give(1)
        assert rig.packet() == (packet(5000), [1536] * 3 + [5000 - 3 * 1536])


def test_a_packet_longer_than_the_whole_ring_is_lost_and_the_next_received(
    cable: tuple[PacketNetwork, socket.socket],
) -> None:
    network, far = cable
    with Receiver(network, GSO) as rig:
        rig.give(64, 100)
        rig.start()
        far.send(packet(6401))
        far.send(packet(6400))
        assert rig.packet() == (packet(6400), [100] * 64)
        assert rig.device.merged.missed == 1
