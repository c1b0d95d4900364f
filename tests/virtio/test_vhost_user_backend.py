"""The back-end's side of vhost-user: every request, in any order, with whatever a front-end may send."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations
from random import Random
from typing import NamedTuple

import pytest
from virtio.toy import SIZES, Toy

from lguestlib.abi import vhost_user as abi
from lguestlib.memory.address import GuestAddress, UserAddress
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.inflight import area_size
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.status import Status
from lguestlib.virtio.vhost_user.backend import (
    OFFERED,
    Area,
    Arrange,
    BackEnd,
    Effect,
    MapInflight,
    MapLog,
    MapMemory,
    NewInflight,
    QueueSetup,
    Reset,
    StopQueue,
)
from lguestlib.virtio.vhost_user.memory_table import MemoryRegion, RingAddresses
from lguestlib.virtio.vhost_user.message import Message, ProtocolError

NEED_REPLY = 1 | 8
REPLY = 1 | 4
LOG_ALL, PROTOCOL = 1 << 26, 1 << 30
FEATURES = int(Feature.VERSION_1 | Feature.RING_EVENT_IDX) | PROTOCOL
RINGS = len(SIZES)

GUEST, USER, SIZE = 0x4000_0000, 0x7F00_0000_0000, 0x10_0000
LAYOUT = QueueLayout(
    0, 8, GuestAddress(GUEST + 0x1000), GuestAddress(GUEST + 0x2000), GuestAddress(GUEST + 0x3000)
)
ADDRESSES = RingAddresses(UserAddress(USER + 0x1000), UserAddress(USER + 0x2000), UserAddress(USER + 0x3000))


def u64(value: int) -> bytes:
    return value.to_bytes(8, sys.byteorder)


def state(index: int, number: int = 0) -> bytes:
    return bytes(abi.vhost_vring_state(index, number))


def address(
    index: int, descriptors: int = USER + 0x1000, available: int = USER + 0x2000, used: int = USER + 0x3000,
    flags: int = 0, log: int = 0,
) -> bytes:  # fmt: skip
    return bytes(abi.vhost_vring_addr(index, flags, descriptors, used, available, log))


def region(guest: int = GUEST, size: int = SIZE, user: int = USER, offset: int = 0) -> MemoryRegion:
    return MemoryRegion(GuestAddress(guest), size, UserAddress(user), offset)


def table(*regions: MemoryRegion, count: int | None = None) -> bytes:
    counted = len(regions) if count is None else count
    return bytes(abi.vhost_user_mem_table(counted, 0)) + b"".join(each.encode() for each in regions)


def config(offset: int, size: int, data: bytes | None = None) -> bytes:
    return bytes(abi.vhost_user_config(offset, size, 0)) + (bytes(size) if data is None else data)


def inflight(queues: int = RINGS, size: int = 8, length: int = 1 << 20, offset: int = 0) -> bytes:
    return bytes(abi.vhost_user_inflight(length, offset, queues, size))


class Talk:
    """A front-end and a back-end, with made-up descriptors each of which is accounted for.

    *fail*: the effect of every request ends in this.
    """

    def __init__(self, protocol: int = OFFERED, device: Device | None = None) -> None:
        self.device = device or Toy()
        self.backend = BackEnd(self.device)
        self.effects: list[Effect] = []
        self.fail: Exception | None = None
        self._next = 100
        self.open: set[int] = set()
        self.closed = Counter[int]()
        if protocol:
            self.send(abi.VHOST_USER_SET_PROTOCOL_FEATURES, u64(protocol))

    def new(self, count: int) -> tuple[int, ...]:
        fds = tuple(range(self._next, self._next + count))
        self._next += count
        self.open |= set(fds)
        return fds

    def _close(self, fds: list[int]) -> None:
        self.closed.update(fds)
        self.open.difference_update(fds)

    def send(self, request: int, payload: bytes = b"", fds: int = 0, flags: int = 1) -> Message | None:
        """One request, whose effect succeeds at once; its reply."""
        backend = self.backend
        self.effects.clear()
        effect = backend.receive(Message(request, payload, self.new(fds), flags))
        result = 0
        if effect is not None:
            self.effects.append(effect)
            if isinstance(effect, NewInflight):
                (result,) = self.new(1)
        discarded, backend.discarded = backend.discarded, []
        self._close(discarded)
        if self.fail and isinstance(effect, NewInflight):
            self._close([result])
        reply = backend.finish(result, self.fail)
        if reply is not None:
            self._close(list(reply.fds))
        return reply

    def effect(self, request: int, payload: bytes = b"", fds: int = 0) -> Effect | None:
        """What one request asks of its owner."""
        self.send(request, payload, fds)
        return self.effects[0] if self.effects else None

    def refused(self, request: int, payload: bytes = b"", fds: int = 0, flags: int = 1) -> str:
        """Why one request ends the conversation; not to is a failure."""
        with pytest.raises(ProtocolError) as caught:
            self.send(request, payload, fds, flags)
        self.end()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def end(self) -> None:
        """Close: then each descriptor there ever was has been closed, once."""
        self._close(self.backend.close())
        assert not self.open
        assert set(self.closed.values()) <= {1}
        assert self.backend.close() == []

    def negotiate(self, features: int = FEATURES) -> None:
        self.send(abi.VHOST_USER_SET_FEATURES, u64(features))
        self.send(abi.VHOST_USER_SET_MEM_TABLE, table(region()), 1)

    def start(self, index: int = 0) -> None:
        """Set ring *index* up as front-ends do."""
        self.send(abi.VHOST_USER_SET_VRING_NUM, state(index, 8))
        self.send(abi.VHOST_USER_SET_VRING_BASE, state(index, 0))
        self.send(abi.VHOST_USER_SET_VRING_ADDR, address(index))
        self.send(abi.VHOST_USER_SET_VRING_CALL, u64(index), 1)
        self.send(abi.VHOST_USER_SET_VRING_KICK, u64(index), 1)
        self.send(abi.VHOST_USER_SET_VRING_ENABLE, state(index, 1))

    def setup(self, index: int = 0) -> QueueSetup | None:
        return self.backend.setup(index)


def running() -> Talk:
    talk = Talk()
    talk.negotiate()
    talk.start()
    assert talk.setup() is not None
    return talk


class Row(NamedTuple):
    """A request as the specification has it, with a payload that is good in a fresh conversation."""

    request: int
    payload: bytes
    fds: tuple[int, int]
    feature: int | None
    replies: bool

    @property
    def name(self) -> str:
        return Message(self.request).name


MQ, LOG, CONFIG, BACKEND, INFLIGHT, RESET, SLOTS, STATUS = 0, 1, 9, 5, 12, 13, 15, 16

TABLE = [
    Row(1, b"", (0, 0), None, True),
    Row(2, u64(FEATURES), (0, 0), None, False),
    Row(3, b"", (0, 0), None, False),
    Row(4, b"", (0, 0), None, False),
    Row(5, table(region()), (1, 1), None, False),
    Row(6, u64(0x1000) + u64(0), (1, 1), LOG, True),
    Row(7, b"", (1, 1), None, False),
    Row(8, state(0, 8), (0, 0), None, False),
    Row(9, address(0), (0, 0), None, False),
    Row(10, state(0, 5), (0, 0), None, False),
    Row(11, state(0), (0, 0), None, True),
    Row(12, u64(0), (1, 1), None, False),
    Row(13, u64(0), (1, 1), None, False),
    Row(14, u64(0), (1, 1), None, False),
    Row(15, b"", (0, 0), None, True),
    Row(16, u64(OFFERED), (0, 0), None, False),
    Row(17, b"", (0, 0), MQ, True),
    Row(18, state(0, 1), (0, 0), None, False),
    Row(21, b"", (1, 1), BACKEND, False),
    Row(24, config(0, 8), (0, 0), CONFIG, True),
    Row(25, config(0, 8), (0, 0), CONFIG, False),
    Row(31, inflight(), (0, 0), INFLIGHT, True),
    Row(32, inflight(), (1, 1), INFLIGHT, False),
    Row(34, b"", (0, 0), RESET, False),
    Row(36, b"", (0, 0), SLOTS, True),
    Row(37, table(region(0x1000, 0x1000), count=1), (1, 1), SLOTS, False),
    Row(38, table(region(), count=1), (0, 1), SLOTS, False),
    Row(39, u64(1), (0, 0), STATUS, False),
    Row(40, b"", (0, 0), STATUS, True),
]
KNOWN = {row.request for row in TABLE}
NAMED = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


def fresh(protocol: int = OFFERED) -> Talk:
    talk = Talk(protocol)
    talk.send(abi.VHOST_USER_SET_MEM_TABLE, table(region()), 1)
    return talk


# Any request: how long, how many descriptors, which feature, which flags.


@NAMED
def test_a_good_request_is_taken_with_as_few_and_as_many_descriptors_as_it_may_have(row: Row) -> None:
    for fds in set(row.fds):
        talk = fresh()
        reply = talk.send(row.request, row.payload, fds)
        assert (reply is not None) == row.replies
        if reply is not None:
            assert (reply.request, reply.flags) == (row.request, REPLY)
        talk.end()


@NAMED
def test_t14_a_payload_of_another_length_is_refused(row: Row) -> None:
    payload = row.payload
    lengths = {0, 1, 7, 9, len(payload) - 1, len(payload) + 1, len(payload) + 8, 4096} - {len(payload), -1}
    if row.request == abi.VHOST_USER_SET_MEM_TABLE:
        # A table may have room for more regions than it has: User-mode Linux's does.
        lengths -= set(range(len(payload), 8 + 8 * 32 + 1))
    for length in sorted(lengths):
        message = fresh().refused(row.request, payload[:length].ljust(length, b"\0"), row.fds[0])
        assert message.startswith(row.name)


@NAMED
def test_t14_too_few_and_too_many_descriptors_are_refused_and_closed(row: Row) -> None:
    for fds in {row.fds[0] - 1, row.fds[1] + 1, row.fds[1] + 2, 8} - {-1}:
        assert fresh().refused(row.request, row.payload, fds).startswith(row.name)


@NAMED
def test_a_request_of_a_protocol_feature_is_refused_without_it(row: Row) -> None:
    if row.feature is None:
        for protocol in (0, 1 << 3):
            fresh(protocol).send(row.request, row.payload if row.request != 16 else u64(0), row.fds[0])
        return
    fresh(1 << row.feature).send(row.request, row.payload, row.fds[0])
    message = fresh(OFFERED & ~(1 << row.feature)).refused(row.request, row.payload, row.fds[0])
    assert message == f"{row.name}: its protocol feature was not negotiated"


@NAMED
def test_a_request_that_says_it_is_a_reply_is_refused(row: Row) -> None:
    for flags in (1 | 4, 1 | 4 | 8):
        assert "marked as a reply" in fresh().refused(row.request, row.payload, row.fds[0], flags)


@NAMED
def test_t18_need_reply_gets_an_answer_where_there_is_none_already_and_it_was_negotiated(row: Row) -> None:
    for protocol in (OFFERED, OFFERED & ~(1 << 3)):
        talk = fresh(protocol)
        payload = u64(protocol) if row.request == abi.VHOST_USER_SET_PROTOCOL_FEATURES else row.payload
        reply = talk.send(row.request, payload, row.fds[0], NEED_REPLY)
        if row.replies:
            # Its own, and that is all.
            assert reply is not None and reply.flags == REPLY
        elif protocol & 1 << 3:
            assert reply == Message(row.request, u64(0), flags=REPLY)
        else:
            assert reply is None
        talk.end()


@NAMED
def test_t18_a_failure_is_told_to_who_asked_and_ends_the_conversation_of_who_did_not(row: Row) -> None:
    for protocol, flags in ((OFFERED, NEED_REPLY), (OFFERED, 1), (OFFERED & ~(1 << 3), NEED_REPLY)):
        talk = fresh(protocol)
        payload = u64(protocol) if row.request == abi.VHOST_USER_SET_PROTOCOL_FEATURES else row.payload
        talk.fail = OSError(12, "no memory")
        if not row.replies and protocol & 1 << 3 and flags == NEED_REPLY:
            assert talk.send(row.request, payload, row.fds[0], flags) == Message(
                row.request, u64(1), flags=REPLY
            )
            talk.end()
        else:
            assert (
                talk.refused(row.request, payload, row.fds[0], flags) == f"{row.name}: [Errno 12] no memory"
            )


def test_a_request_that_is_not_known_is_refused() -> None:
    for request in (*(set(range(300)) - KNOWN), 0x7FFF_FFFF, 0xFFFF_FFFF):
        for fds in (0, 3):
            assert "not known here" in Talk().refused(request, b"", fds)
    assert Talk().refused(99) == "request 99: not known here"


RING_REQUESTS = [
    (8, lambda index: state(index, 8), 0), (9, address, 0), (10, lambda index: state(index, 0), 0),
    (11, state, 0), (12, u64, 1), (13, u64, 1), (14, u64, 1), (18, lambda index: state(index, 1), 0),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "payload", "fds"), RING_REQUESTS, ids=lambda value: str(value))
def test_t6_a_ring_that_is_not_there_is_refused(
    request_: int, payload: Callable[[int], bytes], fds: int
) -> None:
    for index in range(RINGS):
        fresh().send(request_, payload(index), fds)
    numbers = (RINGS, 0xFF) if fds else (RINGS, 0xFF, 0x100, 0x1_0000, 0xFFFF_FFFF)
    for index in numbers:
        assert f"ring {index} of {RINGS}" in fresh().refused(request_, payload(index), fds)


# Features.


def test_what_is_offered_is_the_devices_and_the_protocols() -> None:
    talk = Talk()
    offered = talk.send(abi.VHOST_USER_GET_FEATURES)
    assert offered is not None
    assert offered.number() == talk.device.offered | LOG_ALL | PROTOCOL
    talk.device.withheld = 1 << 5
    withheld = Talk(device=talk.device).send(abi.VHOST_USER_GET_FEATURES)
    assert withheld is not None and not withheld.number() & 1 << 5


def test_the_protocol_features_offered_are_these_nine() -> None:
    reply = Talk().send(abi.VHOST_USER_GET_PROTOCOL_FEATURES)
    assert reply is not None
    assert {bit for bit in range(64) if reply.number() >> bit & 1} == {0, 1, 3, 5, 9, 12, 13, 15, 16}


def test_every_feature_that_was_not_offered_is_refused() -> None:
    offered = Talk().backend.offered
    for bit in range(64):
        talk = Talk()
        if offered >> bit & 1:
            talk.send(abi.VHOST_USER_SET_FEATURES, u64(FEATURES | 1 << bit))
            assert talk.backend.features == FEATURES | 1 << bit
        else:
            message = talk.refused(abi.VHOST_USER_SET_FEATURES, u64(FEATURES | 1 << bit))
            assert message == f"SET_FEATURES: {1 << bit:#x} were not offered"


def test_every_protocol_feature_that_was_not_offered_is_refused() -> None:
    for bit in range(64):
        talk = Talk(0)
        if OFFERED >> bit & 1:
            talk.send(abi.VHOST_USER_SET_PROTOCOL_FEATURES, u64(1 << bit))
            assert talk.backend.protocol_features == 1 << bit
        else:
            message = talk.refused(abi.VHOST_USER_SET_PROTOCOL_FEATURES, u64(OFFERED | 1 << bit))
            assert message == f"SET_PROTOCOL_FEATURES: {1 << bit:#x} were not offered"


def test_features_without_version_1_are_refused() -> None:
    for features in (0, PROTOCOL, FEATURES & ~int(Feature.VERSION_1)):
        assert "lacks VERSION_1" in Talk().refused(abi.VHOST_USER_SET_FEATURES, u64(features))


def test_features_do_not_change_while_a_ring_is_served_but_for_the_log() -> None:
    talk = running()
    for features in (FEATURES, FEATURES | LOG_ALL, FEATURES):
        assert talk.effect(abi.VHOST_USER_SET_FEATURES, u64(features)) == Arrange(tuple(range(RINGS)))
        setup = talk.setup()
        assert setup is not None and setup.features == features
    assert "changed while rings are served" in talk.refused(abi.VHOST_USER_SET_FEATURES, u64(FEATURES | 1))


def test_features_change_when_every_ring_has_stopped() -> None:
    talk = running()
    talk.send(abi.VHOST_USER_GET_VRING_BASE, state(0))
    talk.send(abi.VHOST_USER_SET_FEATURES, u64(FEATURES | 1))
    assert talk.backend.features == FEATURES | 1


def test_without_the_protocol_features_bit_rings_are_enabled_from_the_start() -> None:
    talk = Talk()
    talk.negotiate(FEATURES & ~PROTOCOL)
    talk.send(abi.VHOST_USER_SET_VRING_NUM, state(0, 8))
    talk.send(abi.VHOST_USER_SET_VRING_ADDR, address(0))
    assert talk.setup() is None
    assert talk.effect(abi.VHOST_USER_SET_VRING_KICK, u64(0), 1) == Arrange((0,))
    assert talk.setup() is not None


# A ring's life.

STEPS: dict[str, Callable[[Talk], object]] = {
    "features": lambda talk: talk.send(abi.VHOST_USER_SET_FEATURES, u64(FEATURES)),
    "num": lambda talk: talk.send(abi.VHOST_USER_SET_VRING_NUM, state(0, 8)),
    "addr": lambda talk: talk.send(abi.VHOST_USER_SET_VRING_ADDR, address(0)),
    "kick": lambda talk: talk.send(abi.VHOST_USER_SET_VRING_KICK, u64(0), 1),
    "enable": lambda talk: talk.send(abi.VHOST_USER_SET_VRING_ENABLE, state(0, 1)),
}


@pytest.mark.parametrize("order", list(permutations(STEPS)), ids="-".join)
def test_t8_a_ring_is_served_once_all_is_told_whatever_comes_last(order: Sequence[str]) -> None:
    talk = fresh()
    for step in order:
        assert talk.setup() is None
        STEPS[step](talk)
    assert talk.setup() == QueueSetup(LAYOUT, ADDRESSES, QueueState(0), FEATURES, 101, -1, None, 1)
    assert isinstance(talk.effects[0], Arrange) and 0 in talk.effects[0].indices
    talk.end()


def test_a_ring_that_is_not_complete_is_not_served() -> None:
    for missing in STEPS:
        talk = fresh()
        for step in STEPS.keys() - {missing}:
            STEPS[step](talk)
        assert talk.setup() is None and talk.backend.idle, missing
        assert [talk.setup(index) for index in range(1, RINGS)] == [None] * (RINGS - 1)


def test_t9_get_vring_base_stops_the_ring_and_answers_where_to_go_on() -> None:
    talk = running()
    talk.backend.rings[0].base = QueueState(7)
    before = talk.setup()
    assert before is not None
    effect = talk.backend.receive(Message(abi.VHOST_USER_GET_VRING_BASE, state(0)))
    assert effect == StopQueue(0)
    # Until the owner has stopped the ring, its descriptors are open.
    assert talk.backend.discarded == [before.kick]
    assert talk.setup() is None
    talk.backend.stopped(0, QueueState(0xFFFE))
    reply = talk.backend.finish()
    assert reply == Message(abi.VHOST_USER_GET_VRING_BASE, state(0, 0xFFFE), flags=REPLY)
    # It is not a reset: a new kick is enough.
    talk.send(abi.VHOST_USER_SET_VRING_KICK, u64(0), 1)
    after = talk.setup()
    assert after is not None
    assert (after.base, after.layout, after.call, after.features) == (
        QueueState(0xFFFE), before.layout, before.call, before.features,
    )  # fmt: skip
    talk.end()


def test_t9_a_ring_stopped_by_its_owner_goes_on_from_there() -> None:
    talk = running()
    talk.send(abi.VHOST_USER_SET_VRING_ENABLE, state(0, 0))
    assert talk.setup() is None
    talk.backend.stopped(0, QueueState(5))
    talk.send(abi.VHOST_USER_SET_VRING_ENABLE, state(0, 1))
    setup = talk.setup()
    assert setup is not None and setup.base == QueueState(5)


def test_get_vring_base_of_a_ring_that_never_ran_is_what_was_set() -> None:
    talk = fresh()
    talk.send(abi.VHOST_USER_SET_VRING_BASE, state(2, 9))
    reply = talk.send(abi.VHOST_USER_GET_VRING_BASE, state(2))
    assert reply is not None and reply.payload == state(2, 9)


def test_enabling_is_0_or_1_and_asks_for_the_ring_to_be_looked_at() -> None:
    talk = running()
    for value in (0, 1, 1, 0, 0, 1):
        assert talk.effect(abi.VHOST_USER_SET_VRING_ENABLE, state(0, value)) == Arrange((0,))
        assert (talk.setup() is not None) == bool(value)
    for value in (2, 3, 0x100, 0xFFFF_FFFF):
        assert "neither 0 nor 1" in running().refused(abi.VHOST_USER_SET_VRING_ENABLE, state(0, value))


def test_rings_are_apart() -> None:
    talk = running()
    before = talk.setup(0)
    for index in (1, 2):
        assert talk.setup(index) is None
        talk.start(index)
        assert talk.setup(0) == before
    setups = [talk.setup(index) for index in range(RINGS)]
    assert all(setups) and len({setup.kick for setup in setups if setup}) == RINGS
    talk.send(abi.VHOST_USER_GET_VRING_BASE, state(1))
    assert [talk.setup(0), talk.setup(1), talk.setup(2)] == [before, None, setups[2]]


@pytest.mark.parametrize("size", [0, 3, 6, 12, 100, 32767, 32769, 65536, 0x1_0008, 0x8000_0000, 0xFFFF_FFFF])
def test_t15_a_size_that_is_no_power_of_two_up_to_32768_is_refused(size: int) -> None:
    assert f"{size} is no power of two" in fresh().refused(abi.VHOST_USER_SET_VRING_NUM, state(0, size))


def test_t15_every_size_there_can_be_is_taken() -> None:
    for power in range(16):
        talk = fresh()
        talk.send(abi.VHOST_USER_SET_VRING_NUM, state(0, 1 << power))
        assert talk.backend.rings[0].size == 1 << power


@pytest.mark.parametrize("base", [0x1_0000, 0x8000_0000, 0xFFFF_FFFF])
def test_t15_a_base_of_more_than_16_bits_is_refused(base: int) -> None:
    assert "no 16-bit index" in fresh().refused(abi.VHOST_USER_SET_VRING_BASE, state(0, base))
    talk = fresh()
    talk.send(abi.VHOST_USER_SET_VRING_BASE, state(0, 0xFFFF))
    assert talk.backend.rings[0].base == QueueState(0xFFFF)


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (abi.VHOST_USER_SET_VRING_NUM, state(0, 16)),
        (abi.VHOST_USER_SET_VRING_NUM, state(0, 8)),
        (abi.VHOST_USER_SET_VRING_BASE, state(0, 1)),
        (abi.VHOST_USER_SET_VRING_ADDR, address(0, used=USER + 0x4000)),
        (abi.VHOST_USER_SET_VRING_ADDR, address(0, available=USER)),
        (abi.VHOST_USER_SET_VRING_ADDR, address(0, descriptors=USER)),
    ],
)
def test_t15_a_ring_that_is_served_keeps_its_size_base_and_place(request_: int, payload: bytes) -> None:
    assert "ring 0 is served" in running().refused(request_, payload)
    for stopping in (
        (abi.VHOST_USER_GET_VRING_BASE, state(0)),
        (abi.VHOST_USER_SET_VRING_ENABLE, state(0, 0)),
    ):
        talk = running()
        talk.send(*stopping)
        talk.send(request_, payload)
        talk.end()


@pytest.mark.parametrize("part", ["descriptors", "available", "used"])
@pytest.mark.parametrize("place", [0, USER - 1, USER + SIZE, GUEST, (1 << 64) - 1])
def test_a_ring_outside_memory_is_refused(part: str, place: int) -> None:
    payload = address(0, **{part: place})
    assert f"address {place:#x}" in fresh().refused(abi.VHOST_USER_SET_VRING_ADDR, payload)


def test_a_rings_place_is_told_in_the_front_ends_addresses_and_found_in_the_guests() -> None:
    talk = fresh()
    talk.send(abi.VHOST_USER_ADD_MEM_REG, table(region(0x1000, 0x2000, 0x5000), count=1), 1)
    talk.send(abi.VHOST_USER_SET_FEATURES, u64(FEATURES))
    talk.start()
    talk.send(abi.VHOST_USER_GET_VRING_BASE, state(0))
    talk.send(abi.VHOST_USER_SET_VRING_ADDR, address(0, 0x5000, 0x6000, USER + SIZE - 16))
    talk.send(abi.VHOST_USER_SET_VRING_KICK, u64(0), 1)
    setup = talk.setup()
    assert setup is not None
    assert setup.layout == QueueLayout(
        0, 8, GuestAddress(0x1000), GuestAddress(0x2000), GuestAddress(GUEST + SIZE - 16)
    )


@pytest.mark.parametrize(
    "kind", [abi.VHOST_USER_SET_VRING_KICK, abi.VHOST_USER_SET_VRING_CALL, abi.VHOST_USER_SET_VRING_ERR]
)
def test_t11_the_no_fd_bit_and_the_descriptor_agree_and_no_other_bit_is_known(kind: int) -> None:
    for number, fds in ((0x100, 1), (0, 0), *((1 << bit, fds) for bit in range(9, 64) for fds in (0, 1))):
        assert f"{number:#x} with {fds} descriptors" in fresh().refused(kind, u64(number), fds)


def test_t11_a_ring_without_a_kick_would_have_to_be_polled_and_is_refused() -> None:
    assert "would have to be polled" in fresh().refused(abi.VHOST_USER_SET_VRING_KICK, u64(0x100))
    assert "would have to be polled" in running().refused(abi.VHOST_USER_SET_VRING_KICK, u64(0x100))


def test_t11_a_ring_without_a_call_or_error_descriptor_is_served_all_the_same() -> None:
    talk = running()
    before = talk.setup()
    assert before is not None and before.call >= 0
    assert talk.effect(abi.VHOST_USER_SET_VRING_CALL, u64(0x100)) == Arrange((0,))
    assert talk.effect(abi.VHOST_USER_SET_VRING_ERR, u64(0x100)) is None
    after = talk.setup()
    assert after is not None and after.call == -1
    assert before.call in talk.closed


def test_t10_a_kick_or_call_that_is_replaced_is_kept_open_until_the_ring_was_looked_at() -> None:
    for request, field in (
        (abi.VHOST_USER_SET_VRING_KICK, "kick"), (abi.VHOST_USER_SET_VRING_CALL, "call"),
    ):  # fmt: skip
        talk = running()
        old = getattr(talk.setup(), field)
        (new,) = talk.new(1)
        assert talk.backend.receive(Message(request, u64(0), (new,))) == Arrange((0,))
        assert talk.backend.discarded == [old]
        assert getattr(talk.setup(), field) == new
        talk.backend.finish()
        talk.end()


# Memory.


def test_a_memory_table_is_mapped_whole() -> None:
    talk = Talk()
    regions = [region(0x1000 * number, 0x1000, 0x10_0000 + 0x1000 * number) for number in range(8)]
    effect = talk.effect(abi.VHOST_USER_SET_MEM_TABLE, table(*reversed(regions)), 8)
    assert isinstance(effect, MapMemory)
    assert effect.table.regions == tuple(regions)
    assert list(effect.files) == regions[::-1] and list(effect.files.values()) == list(range(100, 108))
    assert set(talk.closed) == set(range(100, 108))


def test_a_memory_table_may_have_room_for_more_regions_than_there_are() -> None:
    talk = Talk()
    effect = talk.effect(abi.VHOST_USER_SET_MEM_TABLE, table(region(), region(), count=1), 1)
    assert isinstance(effect, MapMemory) and effect.table.regions == (region(),)
    assert "297 bytes" in talk.refused(abi.VHOST_USER_SET_MEM_TABLE, table(region()) + bytes(257), 1)


def test_an_empty_memory_table_takes_all_memory_away() -> None:
    talk = fresh()
    effect = talk.effect(abi.VHOST_USER_SET_MEM_TABLE, table())
    assert isinstance(effect, MapMemory) and effect.table.regions == () and effect.files == {}


@pytest.mark.parametrize(
    ("payload", "fds", "reason"),
    [
        (table(region(size=0)), 1, "empty"),
        (table(region(offset=(1 << 64) - 1)), 1, "past the end of addresses"),
        (table(region(), region()), 2, "overlap"),
        (table(region(), region(GUEST + SIZE - 1)), 2, "overlap"),
        (table(region()), 0, "1 regions, 0 descriptors"),
        (table(region()), 2, "1 regions, 2 descriptors"),
        (table(region(), count=0), 1, "0 regions, 1 descriptors"),
        (table(region(), count=2), 2, "2 regions, 2 descriptors, 40 bytes"),
        (table(region(), count=0xFFFF_FFFF), 8, "4294967295 regions"),
        (table(count=1), 1, "1 regions"),
        (table(region())[:-1], 1, "1 regions, 1 descriptors, 39 bytes"),
    ],
)
def test_t13_an_impossible_memory_table_is_refused(payload: bytes, fds: int, reason: str) -> None:
    assert reason in fresh().refused(abi.VHOST_USER_SET_MEM_TABLE, payload, fds)


def test_regions_come_and_go_one_by_one() -> None:
    talk = fresh()
    other = region(0x1000, 0x1000, 0x5000, 0x40)
    added = talk.effect(abi.VHOST_USER_ADD_MEM_REG, table(other), 1)
    assert isinstance(added, MapMemory)
    assert added.table.regions == (other, region()) and list(added.files) == [other]
    for fds in (0, 1):
        removed = talk.effect(abi.VHOST_USER_REM_MEM_REG, table(region()), fds)
        assert isinstance(removed, MapMemory)
        assert removed.table.regions == (other,) and removed.files == {}
        talk.send(abi.VHOST_USER_ADD_MEM_REG, table(region()), 1)
    assert "overlap" in talk.refused(abi.VHOST_USER_ADD_MEM_REG, table(region(GUEST + 1, 1)), 1)
    assert "not in the table" in fresh().refused(abi.VHOST_USER_REM_MEM_REG, table(other))
    assert "empty" in fresh().refused(abi.VHOST_USER_ADD_MEM_REG, table(region(size=0)), 1)


def test_as_many_regions_as_were_offered_can_be_added() -> None:
    talk = Talk()
    reply = talk.send(abi.VHOST_USER_GET_MAX_MEM_SLOTS)
    assert reply is not None
    for number in range(reply.number()):
        talk.send(abi.VHOST_USER_ADD_MEM_REG, table(region(0x1000 * number, 0x1000)), 1)
    assert "more than" in talk.refused(
        abi.VHOST_USER_ADD_MEM_REG, table(region(0x1000 * reply.number(), 0x1000)), 1
    )


def test_memory_that_could_not_be_mapped_is_not_there() -> None:
    talk = fresh()
    talk.fail = ValueError("past the end of the file")
    for request, payload, fds in (
        (abi.VHOST_USER_SET_MEM_TABLE, table(region(0, 0x1000)), 1),
        (abi.VHOST_USER_ADD_MEM_REG, table(region(0, 0x1000)), 1),
        (abi.VHOST_USER_REM_MEM_REG, table(region()), 0),
    ):
        reply = talk.send(request, payload, fds, NEED_REPLY)
        assert reply is not None and reply.number() == 1
        assert talk.backend.table.regions == (region(),)
    talk.end()


def test_t12_whatever_a_served_ring_depends_on_changes_its_setup() -> None:
    talk = running()
    seen = [talk.setup()]
    for request, payload, fds in (
        (abi.VHOST_USER_SET_MEM_TABLE, table(region()), 1),
        (abi.VHOST_USER_ADD_MEM_REG, table(region(0, 0x1000)), 1),
        (abi.VHOST_USER_REM_MEM_REG, table(region(0, 0x1000)), 0),
        (abi.VHOST_USER_SET_LOG_BASE, u64(0x1000) + u64(0), 1),
        (abi.VHOST_USER_SET_FEATURES, u64(FEATURES | LOG_ALL), 0),
        (abi.VHOST_USER_SET_VRING_ADDR, address(0, flags=1, log=0x3000), 0),
        (abi.VHOST_USER_SET_VRING_KICK, u64(0), 1),
        (abi.VHOST_USER_SET_VRING_CALL, u64(0), 1),
    ):
        talk.send(request, payload, fds)
        assert talk.effects and talk.setup() is not None and talk.setup() not in seen
        seen.append(talk.setup())
    for request, payload in (
        (abi.VHOST_USER_GET_FEATURES, b""),
        (abi.VHOST_USER_SET_VRING_ERR, u64(0x100)),
        (abi.VHOST_USER_SET_VRING_ENABLE, state(0, 1)),
        (abi.VHOST_USER_SET_VRING_ADDR, address(0, flags=1, log=0x3000)),
        (abi.VHOST_USER_SET_STATUS, u64(15)),
    ):
        talk.send(request, payload)
        assert talk.setup() == seen[-1]


def test_t12_a_served_ring_that_the_new_memory_does_not_hold_has_no_place() -> None:
    talk = running()
    talk.send(abi.VHOST_USER_SET_MEM_TABLE, table(region(user=USER + SIZE)), 1)
    with pytest.raises(ProtocolError, match="no memory region holds"):
        talk.setup()


# The log.


def test_the_log_is_an_area_of_a_file_and_answered() -> None:
    talk = fresh()
    reply = talk.send(abi.VHOST_USER_SET_LOG_BASE, u64(0x3000) + u64(0x40), 1)
    assert reply == Message(abi.VHOST_USER_SET_LOG_BASE, u64(0), flags=REPLY)
    assert talk.effects == [MapLog(Area(101, 0x3000, 0x40))]


def test_a_used_ring_is_logged_where_its_flag_says_also_while_it_is_served() -> None:
    talk = running()
    for flags, log in ((1, 0x7000), (0, 0x7000), (3, 0x8000), (2, 0x7000), (1, 0), (0, 0)):
        effect = talk.effect(abi.VHOST_USER_SET_VRING_ADDR, address(0, flags=flags, log=log))
        assert effect == Arrange((0,))
        setup = talk.setup()
        assert setup is not None and setup.log_used == (log if flags & 1 else None)


# The config space.


@pytest.mark.parametrize("offset", [0, 1, 5, 9, 10, 100, 255, 256])
@pytest.mark.parametrize("size", [0, 1, 4, 10, 11, 156, 256])
def test_any_part_of_the_config_space_reads_as_it_is_and_zeros_behind_it(offset: int, size: int) -> None:
    talk = Talk()
    space = talk.device.config() + bytes(256)
    if offset + size > 256:
        assert f"{size} bytes at {offset}" in talk.refused(abi.VHOST_USER_GET_CONFIG, config(offset, size))
        return
    reply = talk.send(abi.VHOST_USER_GET_CONFIG, config(offset, size))
    assert reply is not None and reply.payload == config(offset, size, space[offset : offset + size])


@pytest.mark.parametrize("request_", [abi.VHOST_USER_GET_CONFIG, abi.VHOST_USER_SET_CONFIG])
def test_a_config_size_that_is_not_the_messages_and_offsets_that_wrap_are_refused(request_: int) -> None:
    for payload in (
        config(0, 4, bytes(3)), config(0, 4, bytes(5)), config(0, 0xFFFF_FFFF, b""),
        config(0xFFFF_FFFF, 1), config(0xFFFF_FF00, 256), config(0, 0, b"1"), config(0, 257), config(256, 1),
    ):  # fmt: skip
        assert "bytes" in Talk().refused(request_, payload)


def test_a_write_to_the_config_space_is_the_devices() -> None:
    toy = Toy()
    talk = Talk(device=toy)
    talk.send(abi.VHOST_USER_SET_CONFIG, config(3, 2, b"hi"))
    assert toy.written == [(3, b"hi")]


def test_a_config_change_is_told_on_the_channel_where_there_is_one_and_config_was_negotiated() -> None:
    talk = Talk()
    assert talk.backend.config_change() is None
    talk.send(abi.VHOST_USER_SET_BACKEND_REQ_FD, fds=1)
    # Without a wish for a reply (T19).
    assert talk.backend.config_change() == Message(2, b"", (), 1)
    talk.send(abi.VHOST_USER_SET_BACKEND_REQ_FD, fds=1)
    assert list(talk.closed) == [100] and talk.backend.channel == 101
    talk.end()
    other = Talk(1 << BACKEND)
    other.send(abi.VHOST_USER_SET_BACKEND_REQ_FD, fds=1)
    assert other.backend.config_change() is None
    other.end()
    assert talk.backend.config_change() is None


# Requests in flight.


@pytest.mark.parametrize("length", [20, 24])
def test_t17_the_inflight_record_is_made_for_the_rings_and_the_size_asked_for(length: int) -> None:
    talk = fresh()
    payload = inflight(2, 16, 77, 88)[:length]
    (expected,) = range(101, 102)
    reply = talk.send(abi.VHOST_USER_GET_INFLIGHT_FD, payload)
    assert talk.effects == [NewInflight(area_size(2, 16))]
    assert reply is not None and reply.fds == (expected,)
    assert reply.payload == inflight(2, 16, area_size(2, 16), 0)[:length]
    talk.end()


@pytest.mark.parametrize("length", [20, 24])
def test_t17_the_inflight_record_is_taken_back(length: int) -> None:
    talk = fresh()
    size = area_size(2, 16)
    payload = inflight(2, 16, size, 0x40)[:length]
    effect = talk.effect(abi.VHOST_USER_SET_INFLIGHT_FD, payload, 1)
    assert effect == MapInflight(Area(101, size, 0x40), size, 16, 0)
    assert "too few" in talk.refused(abi.VHOST_USER_SET_INFLIGHT_FD, inflight(2, 16, size - 1)[:length], 1)
    assert "rings are served" in running().refused(abi.VHOST_USER_SET_INFLIGHT_FD, payload, 1)


@pytest.mark.parametrize(
    ("queues", "size"),
    [(0, 8), (RINGS + 1, 8), (0xFFFF, 8), (1, 0), (1, 3), (1, 100), (1, 0xFFFF), (1, 0xC000), (0, 0)],
)
def test_t17_an_inflight_record_of_an_impossible_shape_is_refused(queues: int, size: int) -> None:
    payload = inflight(queues, size, 1 << 40)
    assert f"{queues} rings of {size}" in fresh().refused(abi.VHOST_USER_GET_INFLIGHT_FD, payload)
    assert f"{queues} rings of {size}" in fresh().refused(abi.VHOST_USER_SET_INFLIGHT_FD, payload, 1)


@pytest.mark.parametrize("length", [0, 16, 19, 21, 22, 23, 25, 32])
def test_t17_an_inflight_record_of_another_length_than_20_or_24_is_refused(length: int) -> None:
    payload = inflight().ljust(40, b"\0")[:length]
    message = f"{length} bytes of payload"
    assert message in fresh().refused(abi.VHOST_USER_GET_INFLIGHT_FD, payload)
    assert message in fresh().refused(abi.VHOST_USER_SET_INFLIGHT_FD, payload, 1)


# Status and resets.


def test_a_status_is_what_was_set_and_what_became_of_the_device() -> None:
    talk = Talk()

    def status() -> int:
        reply = talk.send(abi.VHOST_USER_GET_STATUS)
        assert reply is not None
        return reply.number()

    assert status() == 0
    for value in (1, 3, 11, 15, 0xFF, 128):
        assert talk.effect(abi.VHOST_USER_SET_STATUS, u64(value)) is None
        assert status() == value
    talk.send(abi.VHOST_USER_SET_STATUS, u64(15))
    talk.backend.failed = True
    assert status() == 15 | Status.NEEDS_RESET
    assert talk.effect(abi.VHOST_USER_SET_STATUS, u64(0)) == Reset()
    assert status() == 0
    for value in (0x100, 1 << 32, 1 << 63):
        assert "is no device status" in Talk().refused(abi.VHOST_USER_SET_STATUS, u64(value))


@pytest.mark.parametrize(
    ("request_", "payload"), [(abi.VHOST_USER_RESET_DEVICE, b""), (abi.VHOST_USER_SET_STATUS, u64(0))]
)
def test_a_reset_forgets_the_rings_and_keeps_memory_protocol_and_who_is_to_be_told(
    request_: int, payload: bytes
) -> None:
    talk = running()
    talk.send(abi.VHOST_USER_SET_VRING_ERR, u64(0), 1)
    talk.send(abi.VHOST_USER_SET_BACKEND_REQ_FD, fds=1)
    talk.send(abi.VHOST_USER_SET_STATUS, u64(15))
    talk.backend.failed = True
    before = talk.setup()
    assert before is not None
    channel, error = talk.backend.channel, talk.backend.rings[0].error
    assert talk.effect(request_, payload) == Reset()
    assert [talk.setup(index) for index in range(RINGS)] == [None] * RINGS and talk.backend.idle
    assert (talk.backend.features, talk.backend.status, talk.backend.failed) == (0, 0, False)
    assert talk.backend.table.regions == (region(),)
    assert talk.backend.protocol_features == OFFERED
    assert talk.backend.channel == channel
    assert before.kick in talk.closed and before.call not in talk.closed
    # From the start, with the interrupt that was told before.
    talk.send(abi.VHOST_USER_SET_FEATURES, u64(FEATURES))
    talk.send(abi.VHOST_USER_SET_VRING_NUM, state(0, 8))
    talk.send(abi.VHOST_USER_SET_VRING_ADDR, address(0))
    talk.send(abi.VHOST_USER_SET_VRING_KICK, u64(0), 1)
    assert talk.setup() is None
    talk.send(abi.VHOST_USER_SET_VRING_ENABLE, state(0, 1))
    after = talk.setup()
    assert after is not None and (after.call, after.base) == (before.call, QueueState(0))
    assert talk.backend.rings[0].error == error
    talk.end()


def test_reset_owner_stops_the_rings() -> None:
    talk = running()
    assert talk.effect(abi.VHOST_USER_RESET_OWNER) == Arrange(tuple(range(RINGS)))
    assert talk.setup() is None
    talk.send(abi.VHOST_USER_SET_VRING_ENABLE, state(0, 1))
    assert talk.setup() is not None


# Whatever comes.


class Plain(Device):
    """As little as a device can be, and cheap to make a back-end for."""

    device_type = 42
    _queues = tuple(Queue(f"queue {index}", lambda chain: 0) for index in range(2))

    def queues(self) -> Sequence[Queue]:
        return self._queues

    def serve(self, chain: Chain) -> int:
        return 0


def _pool() -> list[tuple[int, bytes, int]]:
    """Requests, payloads and how many descriptors, good and bad: those that are taken are more likely."""
    good = [(row.request, row.payload, fds) for row in TABLE for fds in set(row.fds)]
    for index in range(2):
        good += [
            (8, state(index, 8), 0), (9, address(index), 0), (9, address(index, flags=1, log=0x3000), 0),
            (10, state(index, 9), 0), (11, state(index), 0), (12, u64(index), 1), (13, u64(index), 1),
            (13, u64(index | 0x100), 0), (14, u64(index), 1), (14, u64(index | 0x100), 0),
            (18, state(index, 1), 0), (18, state(index, 0), 0),
        ]  # fmt: skip
    good += [
        (2, u64(FEATURES), 0), (2, u64(FEATURES | LOG_ALL), 0), (2, u64(FEATURES & ~PROTOCOL), 0),
        (5, table(region(0, 0x1000, 0), region()), 2), (5, table(), 0), (31, inflight(2), 0),
        (32, inflight(1)[:20], 1), (39, u64(0), 0), (39, u64(15), 0), (16, u64(OFFERED & ~(1 << 3)), 0),
    ]  # fmt: skip
    random = Random(3)
    bad = [(request, payload, fds + 1) for request, payload, fds in good]
    bad += [(request, payload + b"\0", fds) for request, payload, fds in good]
    bad += [
        (request, random.randbytes(len(payload)), fds) for request, payload, fds in good for _ in range(3)
    ]
    bad += [(request, b"", fds) for request in (0, 19, 20, 22, 23, 26, 33, 99) for fds in (0, 1, 8)]
    return good * 40 + bad


POOL = _pool()
NEGOTIATION = [(16, u64(OFFERED), 0), (2, u64(FEATURES), 0), (5, table(region()), 1)]
STARTING = [
    step
    for index in range(2)
    for step in (
        (8, state(index, 8), 0),
        (9, address(index), 0),
        (12, u64(index), 1),
        (18, state(index, 1), 0),
    )
]
OPENINGS: tuple[list[tuple[int, bytes, int]], ...] = ([], NEGOTIATION, NEGOTIATION + STARTING)
FLAGS = (1, 9) * 25 + (5,)
LONGEST = 100
FAILURE = OSError(12, "no memory")


def transcript(device: Device, seed: int) -> int:
    """One conversation of random requests, until one ends it; how many there were.

    `transcript(Plain("again"), seed)` does it again.
    """
    draw = Random(seed).random
    backend = BackEnd(device)
    held: set[int] = set()
    fd = count = 0
    opening = OPENINGS[int(draw() * 3)]
    try:
        while count < LONGEST:
            if count < len(opening):
                request, payload, fds = opening[count]
            else:
                request, payload, fds = POOL[int(draw() * len(POOL))]
            count += 1
            given = tuple(range(fd, fd + fds))
            fd += fds
            held.update(given)
            effect = backend.receive(Message(request, payload, given, FLAGS[int(draw() * len(FLAGS))]))
            failing = FAILURE if draw() < 0.03 else None
            result = 0
            if type(effect) is NewInflight:
                result, fd = fd, fd + 1
            discarded, backend.discarded = backend.discarded, []
            for each in discarded:
                held.remove(each)
            reply = backend.finish(result, failing)
            if reply is not None:
                assert reply.flags == REPLY and reply.request == request
    except ProtocolError:
        pass
    for index in range(len(backend.rings)):
        try:
            setup = backend.setup(index)
        except ProtocolError:
            continue
        assert setup is None or setup.kick in held and (setup.call in held or setup.call == -1)
    for each in backend.close():
        held.remove(each)
    assert not held, "never closed"
    return count


def test_t14_whatever_comes_every_descriptor_is_closed_once_and_nothing_but_protocol_errors_is_raised() -> (
    None
):
    device = Plain("plain")
    count = 0
    for seed in range(50_000):
        try:
            count += transcript(device, seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    assert count > 250_000


PACKED = FEATURES | int(Feature.RING_PACKED)


def packed_talk() -> Talk:
    """A conversation in which packed rings were agreed on."""
    device = Toy()
    device.withheld = 0
    talk = Talk(device=device)
    talk.send(abi.VHOST_USER_SET_FEATURES, u64(PACKED))
    return talk


def test_packed_rings_are_offered_unless_withheld() -> None:
    for withheld in (0, int(Feature.RING_PACKED)):
        device = Toy()
        device.withheld = withheld
        offered = Talk(device=device).send(abi.VHOST_USER_GET_FEATURES)
        assert offered is not None
        assert bool(int.from_bytes(offered.payload, "little") & Feature.RING_PACKED) is not bool(withheld)


@pytest.mark.parametrize("size", [1, 3, 100, 32767])
def test_p2_a_packed_ring_may_have_any_size(size: int) -> None:
    talk = packed_talk()
    talk.send(abi.VHOST_USER_SET_VRING_NUM, state(0, size))
    assert talk.backend.rings[0].size == size
    for bad in (0, 32769):
        assert "no size up to" in packed_talk().refused(abi.VHOST_USER_SET_VRING_NUM, state(0, bad))
    if size & size - 1:
        assert "no power of two" in fresh().refused(abi.VHOST_USER_SET_VRING_NUM, state(0, size))
    talk.end()


def test_p8_a_packed_rings_base_is_two_positions_with_their_wrap_counters() -> None:
    talk = packed_talk()
    talk.send(abi.VHOST_USER_SET_MEM_TABLE, table(region()), 1)
    talk.send(abi.VHOST_USER_SET_VRING_NUM, state(0, 8))
    talk.send(abi.VHOST_USER_SET_VRING_ADDR, address(0))
    talk.send(abi.VHOST_USER_SET_VRING_KICK, u64(0), 1)
    talk.send(abi.VHOST_USER_SET_VRING_ENABLE, state(0, 1))
    setup = talk.setup()
    assert setup is not None and setup.base == QueueState(1 << 15, 1 << 15)
    effect = talk.backend.receive(Message(abi.VHOST_USER_GET_VRING_BASE, state(0)))
    assert effect == StopQueue(0)
    talk.backend.stopped(0, QueueState(5, 3 | 1 << 15))
    reply = talk.backend.finish()
    assert reply is not None and reply.payload == state(0, 5 | 3 << 16 | 1 << 31)
    talk.send(abi.VHOST_USER_SET_VRING_BASE, state(0, 0x8007_0002))
    talk.send(abi.VHOST_USER_SET_VRING_KICK, u64(0), 1)
    setup = talk.setup()
    assert setup is not None and setup.base == QueueState(2, 0x8007)
    talk.end()
