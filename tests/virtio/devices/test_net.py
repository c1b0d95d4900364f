"""The network device: frames out as they are, frames in with the one field that is the device's to write."""

import errno
from collections.abc import Sequence

import pytest
from virtio.devices.chains import UNTOUCHED, Request, all_cuts, only_its_own

from lguestlib.abi import virtio_net as abi
from lguestlib.virtio.devices.net import HEADER_SIZE, Net

MAC = bytes.fromhex("0200005e0001")


class Network:
    """Keeps what is sent, and has one packet to receive."""

    offloads = 1 << abi.VIRTIO_NET_F_CSUM | 1 << abi.VIRTIO_NET_F_HOST_TSO4

    def __init__(self) -> None:
        self.sent: list[Sequence[memoryview]] = []
        self.arriving = bytes(range(1, 61))
        self.received = 0
        self.error: Exception | None = None
        self.activated: list[int] = []

    def activate(self, features: int) -> None:
        self.activated.append(features)

    def send(self, buffers: Sequence[memoryview]) -> int:
        if self.error:
            raise self.error
        self.sent.append(buffers)
        return sum(map(len, buffers))

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """As readv on a TAP device: what does not fit is lost."""
        if self.error:
            raise self.error
        self.received += 1
        done = 0
        for buffer in buffers:
            piece = self.arriving[done : done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done


def test_what_it_offers_and_shows() -> None:
    network = Network()
    device = Net(network, MAC)
    assert device.features == network.offloads | 1 << abi.VIRTIO_NET_F_MAC | 1 << abi.VIRTIO_NET_F_STATUS
    assert only_its_own(device)
    config = abi.virtio_net_config.from_buffer_copy(device.config().ljust(24, b"\0"))
    assert bytes(config.mac) == MAC and config.status == abi.VIRTIO_NET_S_LINK_UP
    device.activate(12345)
    assert network.activated == [12345]


def test_the_receive_queue_comes_first_and_waits_for_the_outside() -> None:
    device = Net(Network(), MAC)
    assert (device.name, Net(Network(), MAC, "net 2").name) == ("net", "net 2")
    receive, transmit = device.queues()
    assert (receive.service, receive.from_outside) == (device.serve_receive, True)
    assert (transmit.service, transmit.from_outside) == (device.serve_transmit, False)


def test_s33_cve_2022_2132_a_packet_goes_out_from_where_it_lies_however_it_is_cut() -> None:
    packet = bytes(range(40))
    for cuts in [*all_cuts(14, 3), (12,), (4, 12, 30), tuple(range(1, 40))]:
        network = Network()
        request = Request(packet, 0, cuts)
        assert Net(network, MAC).serve_transmit(request.chain) == 0
        [sent] = network.sent
        assert b"".join(sent) == packet
        assert list(map(id, sent)) == list(map(id, request.chain.readable)), "not copied"


@pytest.mark.parametrize("length", range(HEADER_SIZE + 1))
def test_s33_cve_2021_3748_a_packet_without_a_frame_is_dropped(length: int) -> None:
    network = Network()
    device = Net(network, MAC)
    assert device.serve_transmit(Request(bytes(length), 0, range(1, length)).chain) == 0
    assert device.serve_transmit(Request(bytes(length), 100, ()).chain) == 0
    assert (device.dropped, network.sent) == (2, [])


def test_s33_cve_2024_11614_offsets_past_the_packet_are_the_networks_to_judge() -> None:
    network = Network()
    header = abi.virtio_net_hdr_v1(
        flags=abi.VIRTIO_NET_HDR_F_NEEDS_CSUM,
        gso_type=0xFF,
        hdr_len=0xFFFF,
        csum_start=0xFFFF,
        csum_offset=0xFFFF,
    )
    request = Request(bytes(header) + b"frame", 0)
    assert Net(network, MAC).serve_transmit(request.chain) == 0
    assert b"".join(network.sent[0]) == bytes(header) + b"frame"


def test_a_frame_the_network_refuses_is_lost_and_counted() -> None:
    network = Network()
    device = Net(network, MAC)
    for number in (errno.EIO, errno.EINVAL, errno.ENOBUFS, errno.EMSGSIZE, errno.ENETDOWN):
        network.error = OSError(number, "")
        assert device.serve_transmit(Request(bytes(60)).chain) == 0
    assert device.dropped == 5


def test_an_interrupted_call_loses_nothing() -> None:
    network = Network()
    network.error = InterruptedError(errno.EINTR, "")
    device = Net(network, MAC)
    with pytest.raises(InterruptedError):
        device.serve_transmit(Request(bytes(60)).chain)
    with pytest.raises(InterruptedError):
        device.serve_receive(Request(room=60).chain)
    assert device.dropped == 0


def test_a_network_that_is_gone_fails_the_receive_queue() -> None:
    network = Network()
    network.error = OSError(errno.EBADFD, "")
    with pytest.raises(OSError, match="77|bad state"):
        Net(network, MAC).serve_receive(Request(room=60).chain)


def test_s19_s33_a_packet_comes_in_with_num_buffers_one_however_the_buffers_are_cut() -> None:
    for cuts in [*all_cuts(16, 3), (12,), (10, 12), (11,), tuple(range(1, 100))]:
        network = Network()
        request = Request(room=100, room_cuts=cuts)
        assert Net(network, MAC).serve_receive(request.chain) == 60
        expected = bytearray(network.arriving)
        expected[10:12] = b"\1\0"
        assert request.writable[:60] == expected, cuts
        assert set(request.writable[60:]) == {UNTOUCHED}


@pytest.mark.parametrize("room", range(HEADER_SIZE + 1))
def test_s33_a_buffer_without_room_for_a_frame_takes_none(room: int) -> None:
    network = Network()
    request = Request(b"readable", room, (), range(1, room))
    assert Net(network, MAC).serve_receive(request.chain) == 0
    assert network.received == 0 and set(request.writable) <= {UNTOUCHED}


def test_s19_a_packet_longer_than_its_buffer_is_cut_and_its_length_the_buffers() -> None:
    for room in (13, 20, 59):
        request = Request(room=room, room_cuts=(5,))
        assert Net(Network(), MAC).serve_receive(request.chain) == room
