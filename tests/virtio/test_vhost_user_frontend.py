"""The front-end's requests as they go out, and every way a back-end may answer them."""

import struct
from collections.abc import Callable
from random import Random

import pytest
from virtio.toy import Toy

from lguestlib.abi import vhost_user as abi
from lguestlib.memory.address import GuestAddress, UserAddress
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.vhost_user.backend import BackEnd
from lguestlib.virtio.vhost_user.frontend import (
    PROTOCOL_FEATURES,
    Request,
    RequestRefused,
    Requests,
)
from lguestlib.virtio.vhost_user.memory_table import MemoryRegion, RingAddresses
from lguestlib.virtio.vhost_user.message import Message, ProtocolError

EVERYTHING = (1 << 64) - 1
REPLY = 0x5
NEED_REPLY = 0x8
REGION = MemoryRegion(GuestAddress(0x1000), 0x2000, UserAddress(0x7F00_0000_0000), 0x3000)
ADDRESSES = RingAddresses(UserAddress(0x10), UserAddress(0x20), UserAddress(0x30))

Make = Callable[[Requests], Request[object]]

QUESTIONS: list[tuple[Make, int, bytes]] = [
    (lambda requests: requests.get_features(), 1, b""),
    (lambda requests: requests.get_vring_base(3), 11, struct.pack("<II", 3, 0)),
    (lambda requests: requests.get_protocol_features(), 15, b""),
    (lambda requests: requests.get_queue_num(), 17, b""),
    (lambda requests: requests.get_config(4, 8), 24, struct.pack("<III8x", 4, 8, 0)),
]
"""Each with its number and its payload; the answer to it is of its own kind."""

COMMANDS: list[tuple[Make, int, bytes, tuple[int, ...]]] = [
    (lambda requests: requests.set_features(1 << 32 | 5), 2, struct.pack("<Q", 1 << 32 | 5), ()),
    (lambda requests: requests.set_owner(), 3, b"", ()),
    (
        lambda requests: requests.set_mem_table([REGION], [9]), 5,
        struct.pack("<II4Q", 1, 0, 0x1000, 0x2000, 0x7F00_0000_0000, 0x3000), (9,),
    ),
    (lambda requests: requests.set_vring_num(1, 256), 8, struct.pack("<II", 1, 256), ()),
    (
        lambda requests: requests.set_vring_addr(1, ADDRESSES), 9,
        struct.pack("<II4Q", 1, 0, 0x10, 0x30, 0x20, 0), (),
    ),
    (
        lambda requests: requests.set_vring_addr(1, ADDRESSES, GuestAddress(0x40)), 9,
        struct.pack("<II4Q", 1, 1, 0x10, 0x30, 0x20, 0x40), (),
    ),
    (lambda requests: requests.set_vring_base(1, QueueState(7)), 10, struct.pack("<II", 1, 7), ()),
    (lambda requests: requests.set_vring_kick(1, 4), 12, struct.pack("<Q", 1), (4,)),
    (lambda requests: requests.set_vring_call(1, 5), 13, struct.pack("<Q", 1), (5,)),
    (lambda requests: requests.set_vring_call(1, -1), 13, struct.pack("<Q", 0x101), ()),
    (lambda requests: requests.passed_on(Message(37, b"region", (9,), 0x1)), 37, b"region", (9,)),
    (lambda requests: requests.passed_on(Message(6, b"log", (9,), 0x1 | NEED_REPLY)), 6, b"log", (9,)),
    (lambda requests: requests.set_vring_err(1, 6), 14, struct.pack("<Q", 1), (6,)),
    (lambda requests: requests.set_vring_enable(1, True), 18, struct.pack("<II", 1, 1), ()),
    (lambda requests: requests.set_backend_req_fd(8), 21, b"", (8,)),
    (lambda requests: requests.set_config(32, b"\1"), 25, struct.pack("<III", 32, 1, 0) + b"\1", ()),
    (lambda requests: requests.reset_device(), 34, b"", ()),
]  # fmt: skip
"""Each with its number, its payload and its descriptors; nothing but success comes back."""


def negotiated(*features: int) -> Requests:
    """Requests after these protocol features were set; all there are unless told."""
    requests = Requests()
    requests.protocol_features = sum(1 << feature for feature in features) if features else EVERYTHING
    return requests


def reply(request: int, payload: bytes, flags: int = REPLY, fds: tuple[int, ...] = ()) -> Message:
    return Message(request, payload, fds, flags)


@pytest.mark.parametrize(("make", "number", "payload"), QUESTIONS)
def test_a_question_always_waits_for_its_answer_and_never_asks_for_another(
    make: Make, number: int, payload: bytes
) -> None:
    request = make(negotiated())
    assert request.answered
    assert request.message == Message(number, payload, (), 0x1)
    assert request.message.encode() == struct.pack("<III", number, 1, len(payload)) + payload


@pytest.mark.parametrize(("make", "number", "payload", "fds"), COMMANDS)
def test_a_command_is_acknowledged_once_reply_ack_is_negotiated(
    make: Make, number: int, payload: bytes, fds: tuple[int, ...]
) -> None:
    request = make(negotiated())
    assert request.answered
    assert request.message == Message(number, payload, fds, 0x1 | NEED_REPLY)
    assert request.answer(reply(number, bytes(8))) is None
    for refusal in (1, 1 << 63, EVERYTHING):
        with pytest.raises(RequestRefused, match=f"^{request.message.name}: the back-end has refused it"):
            request.answer(reply(number, struct.pack("<Q", refusal)))


@pytest.mark.parametrize(("make", "number", "payload", "fds"), COMMANDS)
def test_without_reply_ack_nothing_is_waited_for(
    make: Make, number: int, payload: bytes, fds: tuple[int, ...]
) -> None:
    requests = negotiated()
    requests.protocol_features &= ~(1 << abi.VHOST_USER_PROTOCOL_F_REPLY_ACK)
    request = make(requests)
    assert not request.answered
    assert request.message == Message(number, payload, fds, 0x1)
    assert request.answer(None) is None


def test_protocol_features_are_set_before_they_hold() -> None:
    requests = Requests()
    chosen = 1 << abi.VHOST_USER_PROTOCOL_F_REPLY_ACK
    first = requests.set_protocol_features(chosen)
    assert (first.answered, first.message) == (False, Message(16, struct.pack("<Q", chosen)))
    assert requests.set_owner().answered


@pytest.mark.parametrize(
    ("offered", "channel", "chosen"),
    [
        (EVERYTHING, True, {0, 3, 5, 9, 13}),
        (EVERYTHING, False, {0, 3, 9, 13}),
        (0x229, True, {0, 3, 5, 9}),
        (0x28, True, {3}),
        (1 << 5 | 1 << 9, True, {5, 9}),
        (0, True, set()),
    ],
)
def test_of_what_is_offered_only_what_is_known_is_taken(
    offered: int, channel: bool, chosen: set[int]
) -> None:
    taken = Requests.choose(offered, channel)
    assert {feature for feature in range(64) if taken >> feature & 1} == chosen


@pytest.mark.parametrize(
    "make",
    [
        lambda requests: requests.get_queue_num(),
        lambda requests: requests.get_config(0, 8),
        lambda requests: requests.set_config(0, b"x"),
        lambda requests: requests.set_backend_req_fd(3),
        lambda requests: requests.reset_device(),
    ],
)
def test_what_was_not_negotiated_is_not_asked(make: Make) -> None:
    with pytest.raises(RequestRefused, match="^the back-end does not offer the protocol feature [A-Z_]+$"):
        make(Requests())


def test_numbers_are_decoded() -> None:
    requests = negotiated()
    offered = struct.pack("<Q", 1 << 32 | PROTOCOL_FEATURES)
    assert requests.get_features().answer(reply(1, offered)) == 1 << 32 | PROTOCOL_FEATURES
    assert requests.get_queue_num().answer(reply(17, struct.pack("<Q", 4))) == 4
    assert requests.get_vring_base(3).answer(reply(11, struct.pack("<II", 3, 0xFFFF))) == QueueState(0xFFFF)
    config = struct.pack("<III", 4, 8, 0) + b"settings"
    assert requests.get_config(4, 8).answer(reply(24, config)) == b"settings"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply(2, bytes(8)), "answered with a reply to SET_FEATURES"),
        (reply(99, bytes(8)), "answered with a reply to request 99"),
        (reply(1, bytes(8), flags=0x1), "answered with flags 0x1, which are not a reply's"),
        (reply(1, bytes(8), flags=0x9), "answered with flags 0x9, "),
        (reply(1, bytes(8), flags=0x6), "answered with flags 0x6, "),
        (reply(1, bytes(8), fds=(3, 4)), "answered with 2 descriptors"),
        (reply(1, b""), "answered with 0 bytes, not 8"),
        (reply(1, bytes(7)), "answered with 7 bytes, not 8"),
        (reply(1, bytes(9)), "answered with 9 bytes, not 8"),
    ],
)
def test_what_is_no_reply_to_the_request_ends_the_conversation(answer: Message, reason: str) -> None:
    with pytest.raises(ProtocolError, match=f"^GET_FEATURES: {reason}"):
        negotiated().get_features().answer(answer)


def test_a_reply_may_carry_flags_that_mean_nothing_to_us() -> None:
    assert negotiated().get_features().answer(reply(1, bytes(8), flags=REPLY | NEED_REPLY | 0x100)) == 0


@pytest.mark.parametrize(
    "payload",
    [bytes(4), bytes(9), *(struct.pack("<II", *pair) for pair in ((2, 0), (3, 0x10000), (3, 1 << 31)))],
)
def test_t9_where_a_ring_stopped_is_checked(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="^GET_VRING_BASE: "):
        negotiated().get_vring_base(3).answer(reply(11, payload))


@pytest.mark.parametrize("payload", [b"", struct.pack("<III", 0, 0, 0), struct.pack("<III8x", 0, 0, 0)])
def test_a_config_space_that_is_refused_is_no_end(payload: bytes) -> None:
    with pytest.raises(RequestRefused, match="^GET_CONFIG: the back-end has refused 8 bytes at 0$"):
        negotiated().get_config(0, 8).answer(reply(24, payload))


@pytest.mark.parametrize(
    "payload",
    [
        b"x", bytes(7), struct.pack("<III7x", 0, 8, 0), struct.pack("<III9x", 0, 8, 0),
        struct.pack("<III8x", 4, 8, 0), struct.pack("<III8x", 0, 9, 0), struct.pack("<III", 0, 8, 0),
    ],
)  # fmt: skip
def test_a_config_space_that_is_not_what_was_asked_for_is_an_end(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="^GET_CONFIG: answered with "):
        negotiated().get_config(0, 8).answer(reply(24, payload))


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (0, 257), (256, 1), (-1, 4), (255, 2)])
def test_no_message_carries_more_of_a_config_space_than_it_can(offset: int, size: int) -> None:
    with pytest.raises(ValueError, match="^config space: "):
        negotiated().get_config(offset, size)
    assert negotiated().get_config(0, 256).message.payload[8:] == bytes(260)
    assert negotiated().get_config(255, 1)


@pytest.mark.parametrize(("regions", "files"), [(0, 0), (9, 9), (2, 1)])
def test_no_message_carries_more_memory_than_it_can(regions: int, files: int) -> None:
    with pytest.raises(ValueError, match=f"^{regions} memory regions with {files} files"):
        negotiated().set_mem_table([REGION] * regions, list(range(files)))


@pytest.mark.parametrize(
    ("message", "reply_ack", "heard"),
    [
        (Message(2, flags=0x1), True, (True, None)),
        (Message(2, flags=0x9), True, (True, Message(2, bytes(8), (), REPLY))),
        (Message(2, flags=0x9), False, (True, None)),
        (Message(3, bytes(8), flags=0x1), True, (False, None)),
        (Message(3, bytes(8), flags=0x9), True, (False, Message(3, struct.pack("<Q", 1), (), REPLY))),
    ],
)
def test_t18_what_a_back_end_says_is_answered_if_it_wants_that(
    message: Message, reply_ack: bool, heard: tuple[bool, Message | None]
) -> None:
    requests = negotiated(abi.VHOST_USER_PROTOCOL_F_REPLY_ACK) if reply_ack else Requests()
    assert requests.heard(message) == heard


@pytest.mark.parametrize("flags", [0x0, 0x2, 0x5, 0xD])
def test_what_is_no_request_on_the_channel_is_an_error(flags: int) -> None:
    with pytest.raises(ProtocolError, match="^back-end request 2 with flags "):
        negotiated().heard(Message(2, flags=flags))


@pytest.mark.parametrize("make", [make for make, *_ in QUESTIONS] + [make for make, *_ in COMMANDS])
def test_whatever_comes_as_a_reply_is_an_answer_a_refusal_or_an_error(make: Make) -> None:
    random = Random(5)
    request = make(negotiated())
    for _ in range(2000):
        payload = random.randbytes(random.choice((0, 1, 7, 8, 9, 12, 20, 21)))
        number = random.choice((request.message.request, random.randrange(64)))
        flags = random.choice((REPLY, random.randrange(16)))
        try:
            answer = request.answer(reply(number, payload, flags))
        except (ProtocolError, RequestRefused) as error:
            assert len(str(error)) < 200
        else:
            assert (number, flags & 7) == (request.message.request, REPLY)
            assert answer is None or isinstance(answer, (int, bytes))


def test_our_own_back_end_understands_every_request() -> None:
    backend = BackEnd(Toy())
    requests = Requests()

    def ask(request: Request[object]) -> object:
        backend.receive(request.message)
        answer = backend.finish()
        assert (answer is not None) == request.answered
        return request.answer(answer)

    offered = ask(requests.get_features())
    assert isinstance(offered, int) and offered & PROTOCOL_FEATURES
    protocol = ask(requests.get_protocol_features())
    assert isinstance(protocol, int)
    ask(requests.set_protocol_features(requests.choose(protocol, channel=True)))
    ask(requests.set_owner())
    assert ask(requests.get_queue_num()) == len(Toy().queues())
    ask(requests.set_features(1 << 32 | PROTOCOL_FEATURES))
    ask(requests.set_mem_table([REGION], [100]))
    place = RingAddresses(REGION.user, UserAddress(REGION.user + 0x800), UserAddress(REGION.user + 0x1000))
    ask(requests.set_vring_num(0, 8))
    ask(requests.set_vring_base(0, QueueState(5)))
    ask(requests.set_vring_addr(0, place))
    ask(requests.set_vring_err(0, 101))
    ask(requests.set_vring_call(0, 102))
    ask(requests.set_vring_kick(0, 103))
    assert backend.setup(0) is None
    ask(requests.set_vring_enable(0, True))
    setup = backend.setup(0)
    assert setup and (setup.kick, setup.call, setup.base, setup.layout.size) == (
        103, 102, QueueState(5), 8,
    )  # fmt: skip
    assert (setup.layout.descriptors, setup.layout.available, setup.layout.used) == (0x1000, 0x1800, 0x2000)
    assert ask(requests.get_config(0, 4)) == Toy().config()[:4].ljust(4, b"\0")
    ask(requests.set_config(0, b"\1"))
    ask(requests.set_backend_req_fd(104))
    assert backend.channel == 104
    assert ask(requests.get_vring_base(0)) == QueueState(5)
    assert backend.setup(0) is None
    ask(requests.reset_device())
    assert backend.features == 0
