"""The network device: frames out as they are, frames in with the one field that is the device's to write."""

import errno
from collections.abc import Sequence
from random import Random

import pytest
from virtio.devices.chains import UNTOUCHED, Request, all_cuts, only_its_own

from lguestlib.abi import virtio_net as abi
from lguestlib.abi.layout import offset_of
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import RING_FEATURES
from lguestlib.virtio.devices.net import ETHERNET_SIZE, HEADER_SIZE, OFFERED_MAX, Net
from lguestlib.virtio.errors import MemoryGone

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


def bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


def offered(device: Net, withheld: int) -> int:
    """The features of its own that it offers without those *withheld*."""
    device.withheld |= withheld
    return device.offered & device.features


def test_what_it_offers_and_shows() -> None:
    network = Network()
    device = Net(network, MAC)
    always = bits(abi.VIRTIO_NET_F_MAC, abi.VIRTIO_NET_F_STATUS)
    merging, mtu = bits(abi.VIRTIO_NET_F_MRG_RXBUF), bits(abi.VIRTIO_NET_F_MTU)
    assert device.features == always | merging | network.offloads
    assert offered(Net(network, MAC), network.offloads) == always | merging
    assert offered(Net(network, MAC), merging) == always | network.offloads
    assert offered(Net(network, MAC, mtu=9000), network.offloads | merging) == always | mtu
    assert only_its_own(device) and only_its_own(Net(network, MAC, mtu=1500))
    device.activate(12345)
    assert network.activated == [12345]


def test_the_config_space_is_the_kernels_structure_as_far_as_what_is_offered_needs_it() -> None:
    assert Net(Network(), MAC).config() == MAC + b"\1\0"
    space = Net(Network(), MAC, mtu=9000).config()
    assert space == MAC + b"\1\0" + b"\1\0" + b"\x28\x23"
    config = abi.virtio_net_config.from_buffer_copy(space.ljust(24, b"\0"))
    assert (bytes(config.mac), config.status) == (MAC, abi.VIRTIO_NET_S_LINK_UP)
    assert (config.max_virtqueue_pairs, config.mtu) == (1, 9000)
    assert offset_of(abi.virtio_net_config, "mtu") == 10


@pytest.mark.parametrize("mtu", [-1, 0, 67, 65536])
def test_an_mtu_that_there_cannot_be_is_refused(mtu: int) -> None:
    with pytest.raises(ValueError, match=f"net 7: an MTU of {mtu} .68 to 65535"):
        Net(Network(), MAC, "net 7", mtu=mtu)
    assert Net(Network(), MAC, mtu=68).mtu == 68 and Net(Network(), MAC, mtu=65535).mtu == 65535


def test_the_receive_queue_comes_first_and_waits_for_the_outside() -> None:
    device = Net(Network(), MAC)
    assert (device.name, Net(Network(), MAC, "net 2").name) == ("net", "net 2")
    receive, transmit = device.queues()
    assert (receive.service, receive.from_outside) == (device.serve_receive, True)
    assert (receive.merging, transmit.merging) == (device.merged, None)
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


def test_t13_a_frame_that_is_not_there_any_more_is_not_the_networks_to_lose() -> None:
    network = Network()
    network.error = OSError(errno.EFAULT, "")
    device = Net(network, MAC)
    with pytest.raises(MemoryGone):
        device.serve_transmit(Request(bytes(60)).chain)
    assert device.dropped == 0


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


@pytest.mark.parametrize(
    ("features", "size"),
    [(0, 10), (1 << 0 | 1 << 5, 10), (1 << 15, 12), (1 << 32, 12), (1 << 15 | 1 << 32, 12)],
)
def test_t2_the_header_is_a_legacy_drivers_where_neither_version_1_nor_mrg_rxbuf_is_negotiated(
    features: int, size: int
) -> None:
    network = Network()
    device = Net(network, MAC)
    device.activate(features)
    request = Request(room=100)
    assert device.serve_receive(request.chain) == 60
    assert request.writable[10:12] == (b"\1\0" if size == 12 else network.arriving[10:12])
    assert device.serve_receive(Request(room=size).chain) == 0
    assert device.serve_receive(Request(room=size + 1).chain) == size + 1
    device.serve_transmit(Request(bytes(size)).chain)
    assert (device.dropped, network.sent) == (1, [])
    device.serve_transmit(Request(bytes(size + 1)).chain)
    assert (device.dropped, len(network.sent)) == (1, 1)


# Mergeable buffers.

ROOM = HEADER_SIZE + ETHERNET_SIZE + 1500
LONGEST = HEADER_SIZE + ETHERNET_SIZE + 65535
GSO = (
    abi.VIRTIO_NET_F_GUEST_TSO4, abi.VIRTIO_NET_F_GUEST_TSO6, abi.VIRTIO_NET_F_GUEST_UFO,
    abi.VIRTIO_NET_F_GUEST_USO4, abi.VIRTIO_NET_F_GUEST_USO6,
)  # fmt: skip


def merging(network: Network, *features: int) -> Net:
    device = Net(network, MAC)
    device.activate(bits(abi.VIRTIO_NET_F_MRG_RXBUF, *features))
    return device


def chains(requests: Sequence[Request]) -> list[Chain]:
    return [request.chain for request in requests]


def received(requests: Sequence[Request], taken: int) -> bytes:
    """The packet in the buffers that were taken; the others, and what is behind it, are as they were."""
    packet = b""
    for number, request in enumerate(requests):
        used = request.chain.written if number < taken else 0
        packet += request.writable[:used]
        assert set(request.writable[used:]) <= {UNTOUCHED}
        if number < taken - 1:
            assert used == len(request.writable), "all but the last one are used completely"
    return packet


def numbered(packet: bytes, count: int) -> bytes:
    return packet[:10] + count.to_bytes(2, "little") + packet[12:]


def test_room_is_for_the_longest_frame_there_can_be() -> None:
    network = Network()
    assert merging(network).merged.room == ROOM
    for feature in GSO:
        assert merging(network, feature).merged.room == LONGEST
    # What 5.1.6.3.1 asks of a driver that has no mergeable buffers, which has no VLAN tag in mind.
    assert LONGEST >= 65562 and ROOM >= 1526
    device = Net(network, MAC, mtu=9000)
    device.activate(bits(abi.VIRTIO_NET_F_MRG_RXBUF, abi.VIRTIO_NET_F_MTU))
    assert device.merged.room == HEADER_SIZE + ETHERNET_SIZE + 9000
    # The frames are as long where the driver has not looked.
    device.activate(bits(abi.VIRTIO_NET_F_MRG_RXBUF))
    assert device.merged.room == HEADER_SIZE + ETHERNET_SIZE + 9000
    device.activate(bits(abi.VIRTIO_NET_F_MTU, *GSO))
    assert device.merged.room == 0, "not negotiated"


@pytest.mark.parametrize("size", [13, 20, 59, 60, 61, 1000])
def test_s19_a_packet_takes_as_many_buffers_as_it_needs(size: int) -> None:
    network = Network()
    device = merging(network)
    count = -(-60 // size)
    for turn in range(3):
        requests = [Request(room=size) for _ in range(8)]
        assert device.merged.serve(chains(requests)) == count
        assert received(requests, count) == numbered(network.arriving, count), turn
    assert network.received == 3 and device.merged.missed == 0


def test_s33_cve_2021_3748_cve_2022_2132_num_buffers_is_in_place_however_the_first_buffer_is_cut() -> None:
    for cuts in [*all_cuts(16, 3), (12,), (10, 12), (11,), tuple(range(1, 16))]:
        network = Network()
        device = merging(network)
        for _ in range(2):
            requests = [Request(room=16, room_cuts=cuts) for _ in range(5)]
            assert device.merged.serve(chains(requests)) == 4
            assert received(requests, 4) == numbered(network.arriving, 4), cuts


def test_packets_of_changing_length_over_buffers_of_all_kinds() -> None:
    seed = 8
    random = Random(seed)
    network = Network()
    device = merging(network)
    for turn in range(200):
        network.arriving = random.randbytes(random.choice((0, 13, 14, 60, 200, 1000, 1530)))
        requests = []
        for size in random.choices((13, 14, 100, 500, 1526, 4096), k=120):
            cuts = sorted(random.sample(range(1, size), random.randrange(4)))
            requests.append(Request(bytes(random.randrange(2)), size, (), cuts))
        taken = device.merged.serve(chains(requests))
        room = sum(len(request.writable) for request in requests[: taken - 1])
        assert room <= len(network.arriving) <= room + len(requests[taken - 1].writable), (seed, turn)
        if network.arriving:
            assert received(requests, taken) == numbered(network.arriving, taken), (seed, turn)
    assert device.merged.missed == 0


def test_more_buffers_than_one_call_takes_are_filled_all_the_same() -> None:
    class Limited(Network):
        def receive(self, buffers: Sequence[memoryview]) -> int:
            return super().receive(buffers[: OFFERED_MAX + 1])

    network = Limited()
    network.arriving = Random(6).randbytes(1300)
    device = merging(network)
    for _ in range(2):
        requests = [Request(room=1000, room_cuts=range(1, 1000)), Request(room=700, room_cuts=range(1, 700))]
        assert device.merged.serve(chains(requests)) == 2
        assert received(requests, 2) == numbered(network.arriving, 2)


def test_the_longest_packet_is_received_whole() -> None:
    network = Network()
    network.arriving = Random(3).randbytes(LONGEST)
    device = merging(network, *GSO)
    for _ in range(2):
        requests = [Request(room=1536) for _ in range(50)]
        assert device.merged.serve(chains(requests)) == 43
        assert received(requests, 43) == numbered(network.arriving, 43)


def test_a_network_is_offered_as_many_buffers_as_the_last_packet_took() -> None:
    class Counting(Network):
        def __init__(self) -> None:
            super().__init__()
            self.offered: list[int] = []

        def receive(self, buffers: Sequence[memoryview]) -> int:
            self.offered.append(len(buffers) - 1)
            return super().receive(buffers)

    network = Counting()
    device = merging(network)
    for length in (60, 1500, 1500, 60, 60):
        network.arriving = bytes(length)
        device.merged.serve(chains([Request(room=100) for _ in range(20)]))
    assert network.offered == [1, 1, 15, 15, 1]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("likely", [60, 256])
def test_a_packet_longer_than_all_buffers_waits_for_more(count: int, likely: int) -> None:
    network = Network()
    device = merging(network)
    network.arriving = bytes(likely)
    assert device.merged.serve(chains([Request(room=256)])) == 1
    network.arriving = Random(count).randbytes(256)
    for number in range(count, 6):
        assert device.merged.serve(chains([Request(room=50) for _ in range(number)])) == 0
    requests = [Request(room=50) for _ in range(7)]
    assert device.merged.serve(chains(requests)) == 6
    assert received(requests, 6) == numbered(network.arriving, 6)
    assert (network.received, device.merged.missed) == (2, 0)
    assert device.merged.serve(chains([Request(room=256)])) == 1 and network.received == 3


def test_what_waits_is_forgotten_when_the_device_starts_again() -> None:
    network = Network()
    device = merging(network)
    assert device.merged.serve(chains([Request(room=50)])) == 0
    device.activate(bits(abi.VIRTIO_NET_F_MRG_RXBUF))
    network.arriving = bytes(40)
    requests = [Request(room=50)]
    assert device.merged.serve(chains(requests)) == 1
    assert received(requests, 1) == numbered(network.arriving, 1)


@pytest.mark.parametrize("waited", [False, True])
def test_a_packet_longer_than_all_buffers_there_will_be_is_lost_whole_and_counted(waited: bool) -> None:
    packets = [bytes(200), b"\7" * 100, b"\7" * 150]

    class Several(Network):
        def receive(self, buffers: Sequence[memoryview]) -> int:
            self.arriving = packets.pop(0)
            return super().receive(buffers)

    network = Several()
    device = merging(network)
    requests = [Request(room=50) for _ in range(2)]
    if waited:
        assert device.merged.serve(chains(requests)) == 0
    assert device.merged.serve(chains(requests), complete=True) == 2
    assert received(requests, 2) == numbered(b"\7" * 100, 2)
    assert device.merged.missed == 1


def test_a_packet_longer_than_there_can_be_is_lost_and_not_cut() -> None:
    lengths = [ROOM + 101, 2 * ROOM, 70_000, ROOM]

    class Several(Network):
        def receive(self, buffers: Sequence[memoryview]) -> int:
            self.arriving = bytes(lengths.pop(0))
            return super().receive(buffers)

    device = merging(Several())
    assert device.merged.serve(chains([Request(room=100) for _ in range(1000)])) == 16
    assert device.merged.missed == 3


def test_a_packet_longer_than_there_can_be_is_received_where_it_fits() -> None:
    network = Network()
    network.arriving = bytes(9000)
    device = merging(network)
    requests = [Request(room=10_000)]
    assert device.merged.serve(chains(requests)) == 1
    assert received(requests, 1) == numbered(network.arriving, 1)


@pytest.mark.parametrize("room", range(HEADER_SIZE + 1))
def test_s33_cve_2021_3748_a_first_buffer_without_room_for_a_header_goes_back_empty(room: int) -> None:
    network = Network()
    device = merging(network)
    requests = [Request(b"readable", room, (), range(1, room)), Request(room=100)]
    assert device.merged.serve(chains(requests)) == 1
    assert requests[0].chain.written == network.received == 0
    assert received(requests, 0) == b""
    assert device.merged.serve(chains(requests[1:])) == 1 and network.received == 1


@pytest.mark.parametrize("room", range(HEADER_SIZE + 1))
def test_s33_a_later_buffer_may_be_as_small_as_it_likes(room: int) -> None:
    network = Network()
    device = merging(network)
    for _ in range(2):
        requests = [Request(room=50), Request(b"readable", room, (), range(1, room)), Request(room=50)]
        taken = 2 if room >= 10 else 3
        assert device.merged.serve(chains(requests)) == taken
        assert received(requests, taken) == numbered(network.arriving, taken)


def test_an_interrupted_merging_call_takes_nothing() -> None:
    network = Network()
    network.error = InterruptedError(errno.EINTR, "")
    device = merging(network)
    requests = [Request(room=50) for _ in range(5)]
    with pytest.raises(InterruptedError):
        device.merged.serve(chains(requests))
    assert received(requests, 0) == b"" and device.merged.missed == 0
