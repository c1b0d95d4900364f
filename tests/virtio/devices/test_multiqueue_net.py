"""The network device with several queue pairs: what its driver sees, and what its control queue takes."""

import errno
from collections.abc import Sequence

import pytest
from virtio.devices.chains import UNTOUCHED, Request, all_cuts, only_its_own
from virtio.devices.test_net import MAC, Network, bits

from lguestlib.abi import virtio_net as abi
from lguestlib.virtio.devices.multiqueue_net import FIRST_CONTROL_QUEUE, MultiqueueNet
from lguestlib.virtio.devices.net import ETHERNET_SIZE, HEADER_SIZE, Net

OK, ERR = bytes([abi.VIRTIO_NET_OK]), bytes([abi.VIRTIO_NET_ERR])
CONTROL = bits(abi.VIRTIO_NET_F_CTRL_VQ)
MULTIQUEUE = bits(abi.VIRTIO_NET_F_CTRL_VQ, abi.VIRTIO_NET_F_MQ)
SET = bytes([abi.VIRTIO_NET_CTRL_MQ, abi.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET])


class Networks:
    """So many queues, each a network of its own, and how many are used, each time that is said."""

    def __init__(self, count: int = 3) -> None:
        self.pairs: Sequence[Network] = [Network() for _ in range(count)]
        self.used: list[int] = []
        self.error: OSError | None = None

    def use_pairs(self, count: int) -> None:
        if self.error:
            raise self.error
        self.used.append(count)


def card(networks: Networks, features: int = MULTIQUEUE) -> MultiqueueNet:
    device = MultiqueueNet(networks, MAC)
    device.activate(features)
    networks.used.clear()
    return device


def pairs_set(count: int) -> bytes:
    return SET + count.to_bytes(2, "little")


def test_what_it_offers_and_shows() -> None:
    networks = Networks()
    device = MultiqueueNet(networks, MAC)
    assert device.features == Net(networks.pairs[0], MAC).features | MULTIQUEUE
    assert only_its_own(device)
    assert device.config() == MAC + b"\1\0" + b"\3\0", "no MTU is told"
    assert MultiqueueNet(networks, MAC, mtu=9000).config() == MAC + b"\1\0" + b"\3\0" + b"\x28\x23"


@pytest.mark.parametrize("count", [1, 0x8001])
def test_a_number_of_pairs_that_there_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"net: {count} queue pairs"):
        MultiqueueNet(Networks(count), MAC)


def test_the_pairs_come_first_each_a_party_and_the_control_queue_last() -> None:
    queues = MultiqueueNet(Networks(2), MAC).queues()
    assert [(queue.name, queue.from_outside, queue.party) for queue in queues] == [
        ("receive0", True, 0), ("transmit0", False, 0), ("receive1", True, 1), ("transmit1", False, 1),
        ("control", False, 0),
    ]  # fmt: skip
    assert [bool(queue.merging) for queue in queues] == [True, False, True, False, False]


@pytest.mark.parametrize("features", [MULTIQUEUE, MULTIQUEUE | bits(abi.VIRTIO_NET_F_MRG_RXBUF), 0])
def test_each_pair_has_its_own_queue_of_the_network(features: int) -> None:
    networks = Networks()
    device = card(networks, features)
    queues = device.queues()
    for number, network in enumerate(networks.pairs):
        receive, transmit = queues[2 * number : 2 * number + 2]
        assert network.activated == [features]
        transmit.service(Request(bytes(60)).chain)
        request = Request(room=100)
        assert receive.service(request.chain) == 60 and request.writable[:10] == network.arriving[:10]
        assert receive.merging
        room = HEADER_SIZE + ETHERNET_SIZE + 1500 if features & bits(abi.VIRTIO_NET_F_MRG_RXBUF) else 0
        assert receive.merging.room == room
        assert [len(each.sent) for each in networks.pairs] == [1] * (number + 1) + [0] * (2 - number)
        assert [each.received for each in networks.pairs] == [1] * (number + 1) + [0] * (2 - number)


def test_a_driver_starts_with_the_first_pair_and_so_does_the_next_one() -> None:
    networks = Networks()
    device = MultiqueueNet(networks, MAC)
    device.activate(MULTIQUEUE)
    assert networks.used == [1]
    device.serve_control(Request(pairs_set(3), 1).chain)
    device.deactivate()
    assert networks.used == [1, 3, 1]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_s33_the_driver_tells_how_many_pairs_it_uses_however_its_command_is_cut(count: int) -> None:
    command = pairs_set(count)
    for cuts in all_cuts(len(command), 4):
        networks = Networks()
        request = Request(command, 3, cuts, (1, 2))
        assert card(networks).serve_control(request.chain) == 1
        assert request.writable == OK + bytes([UNTOUCHED]) * 2, "the status comes first"
        assert networks.used == [count]


@pytest.mark.parametrize("count", [0, 4, 0x8000, 0x8001, 0xFFFF])
def test_s33_a_number_of_pairs_that_it_has_not_changes_nothing(count: int) -> None:
    refused(pairs_set(count))


@pytest.mark.parametrize("length", range(4))
def test_s33_a_command_that_is_cut_off_changes_nothing(length: int) -> None:
    refused(pairs_set(1)[:length])


@pytest.mark.parametrize("command", range(256))
def test_s33_other_commands_and_classes_are_refused(command: int) -> None:
    if command != abi.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET:
        refused(bytes([abi.VIRTIO_NET_CTRL_MQ, command]) + b"\1\0" + bytes(60))
    if command != abi.VIRTIO_NET_CTRL_MQ:
        refused(bytes([command, abi.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET]) + b"\1\0" + bytes(60))


def refused(command: bytes) -> None:
    networks = Networks()
    request = Request(command, 1)
    assert card(networks).serve_control(request.chain) == 1
    assert request.writable == ERR and not networks.used


def test_s33_a_command_without_room_for_a_status_is_not_done() -> None:
    networks = Networks()
    assert card(networks).serve_control(Request(pairs_set(2)).chain) == 0
    assert networks.used == []


def test_s31_a_long_command_is_read_no_further_than_it_counts() -> None:
    networks = Networks()
    request = Request(pairs_set(2) + bytes(1 << 20), 1)
    assert card(networks).serve_control(request.chain) == 1
    assert request.writable == OK and networks.used == [2]


def test_a_network_that_cannot_use_so_many_is_an_error_of_that_command() -> None:
    networks = Networks()
    device = card(networks)
    networks.error = OSError(errno.E2BIG, "")
    request = Request(pairs_set(3), 1)
    assert device.serve_control(request.chain) == 1 and request.writable == ERR
    networks.error = None
    request = Request(pairs_set(3), 1)
    assert device.serve_control(request.chain) == 1 and request.writable == OK


def test_without_multiqueue_the_control_queue_is_the_third() -> None:
    networks = Networks()
    device = card(networks, CONTROL | bits(abi.VIRTIO_NET_F_MRG_RXBUF))
    queue = device.queues()[FIRST_CONTROL_QUEUE]
    assert queue.merging and queue.merging.room == 0, "chain after chain"
    request = Request(pairs_set(1), 1)
    assert queue.service(request.chain) == 1 and request.writable == OK
    assert networks.pairs[1].received == 0
    device.activate(MULTIQUEUE)
    assert queue.service(Request(room=100).chain) == 60 and networks.pairs[1].received == 1
