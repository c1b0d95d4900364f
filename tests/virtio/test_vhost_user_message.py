"""vhost-user messages put together from bytes and descriptors, however they are cut (T14)."""

import ctypes
from random import Random

import pytest

from lguestlib.abi import vhost_user as abi
from lguestlib.virtio.vhost_user.backend import RULES
from lguestlib.virtio.vhost_user.message import FDS_MAX, PAYLOAD_MAX, Message, MessageReader, ProtocolError

HEADER = ctypes.sizeof(abi.vhost_user_header)


def header(request: int = 1, flags: int = 1, size: int = 0) -> bytes:
    return bytes(abi.vhost_user_header(request, flags, size))


def feed(reader: MessageReader, data: bytes) -> Message:
    """The one message in *data*, taken in the biggest pieces there can be."""
    while data:
        piece, data = data[: reader.wanted], data[reader.wanted :]
        message = reader.feed(piece)
        if message is not None:
            assert not data
            return message
    raise AssertionError("no message")


def test_a_message_is_a_header_of_three_words_and_its_payload() -> None:
    message = Message(8, b"\1\2\3", flags=9)
    assert message.encode() == b"\x08\0\0\0\x09\0\0\0\x03\0\0\0\1\2\3"
    assert feed(MessageReader(), message.encode()) == message


@pytest.mark.parametrize("size", [0, 1, 8, 263, PAYLOAD_MAX])
def test_t14_a_message_is_the_same_however_it_is_cut(size: int) -> None:
    random = Random(size)
    message = Message(5, random.randbytes(size), flags=1)
    for _ in range(50):
        reader = MessageReader()
        data, found = message.encode(), None
        while data:
            assert found is None and reader.wanted
            count = random.randint(1, min(reader.wanted, random.choice((1, 7, PAYLOAD_MAX))))
            found = reader.feed(data[:count])
            data = data[count:]
        assert found == message
        assert reader.between_messages and reader.wanted == HEADER


def test_t14_no_byte_of_the_next_message_is_asked_for() -> None:
    reader = MessageReader()
    assert reader.wanted == HEADER
    for begun in range(1, HEADER):
        assert reader.feed(header(size=20)[begun - 1 : begun]) is None
        assert reader.wanted == HEADER - begun
    assert reader.feed(header(size=20)[-1:]) is None
    assert reader.wanted == 20
    assert reader.feed(bytes(13)) is None
    assert reader.wanted == 7


def test_one_reader_takes_message_after_message() -> None:
    reader = MessageReader()
    for number in range(5):
        message = Message(number, bytes(number))
        assert feed(reader, message.encode()) == message


def test_descriptors_come_with_any_of_a_messages_bytes_and_go_with_the_message() -> None:
    reader = MessageReader()
    data = Message(5, bytes(10)).encode()
    assert reader.feed(data[:5], [30]) is None
    assert reader.feed(data[5:HEADER]) is None
    assert reader.feed(data[HEADER : HEADER + 1], [31, 32]) is None
    assert reader.fds == [30, 31, 32]
    assert reader.feed(data[HEADER + 1 :], [33]) == Message(5, bytes(10), (30, 31, 32, 33))
    assert reader.fds == []
    assert reader.feed(header()) == Message(1)


@pytest.mark.parametrize("parts", [[FDS_MAX + 1], [FDS_MAX, 1], [1] * (FDS_MAX + 1), [200]])
def test_t14_too_many_descriptors_are_refused_and_still_there_to_be_closed(parts: list[int]) -> None:
    reader = MessageReader()
    data = Message(5, bytes(200)).encode()
    came: list[int] = []
    with pytest.raises(ProtocolError, match="more than 8 descriptors"):
        for at, count in enumerate(parts):
            fds = list(range(100 * at, 100 * at + count))
            came += fds
            reader.feed(data[at : at + 1], fds)
    assert reader.fds == came and len(came) > FDS_MAX


def test_eight_descriptors_are_not_too_many() -> None:
    message = MessageReader().feed(header(), range(FDS_MAX))
    assert message is not None and message.fds == tuple(range(FDS_MAX))


@pytest.mark.parametrize("flags", [0, 2, 3, 4, 8, 12, 0xFFFF_FFFF])
def test_t14_another_version_is_refused(flags: int) -> None:
    with pytest.raises(ProtocolError, match=f"flags {flags:#x} are not of version 1"):
        MessageReader().feed(header(flags=flags))


@pytest.mark.parametrize("flags", [1, 5, 9, 13, 0xFFFF_FFFD])
def test_the_other_flags_are_not_the_readers_business(flags: int) -> None:
    message = MessageReader().feed(header(flags=flags))
    assert message is not None
    assert (message.flags, message.need_reply) == (flags, bool(flags & 8))


@pytest.mark.parametrize("size", [PAYLOAD_MAX + 1, 1 << 16, 0x8000_0000, 0xFFFF_FFFF])
def test_t14_an_oversized_payload_is_refused_before_any_of_it_is_read(size: int) -> None:
    reader = MessageReader()
    with pytest.raises(ProtocolError, match=f"{size} bytes announced"):
        reader.feed(header(size=size))
    reader = MessageReader()
    assert reader.feed(header(size=PAYLOAD_MAX)) is None
    assert reader.wanted == PAYLOAD_MAX


def test_t14_the_stream_ends_between_messages_or_badly() -> None:
    data = Message(5, bytes(9)).encode()
    for end in range(1, len(data)):
        reader = MessageReader()
        reader.feed(data[: min(end, HEADER)], [7])
        if end > HEADER:
            reader.feed(data[HEADER:end])
        assert not reader.between_messages
        with pytest.raises(ProtocolError, match=f"inside a message, after {end} bytes"):
            reader.feed(b"")
        assert reader.fds == [7]
    assert MessageReader().between_messages


def test_a_number_is_eight_bytes() -> None:
    assert Message(2, (1 << 63 | 5).to_bytes(8, "little")).number() == 1 << 63 | 5
    for size in (0, 4, 7, 9, 16):
        with pytest.raises(ProtocolError, match=f"SET_FEATURES: {size} bytes of payload, not 8"):
            Message(2, bytes(size)).number()


def test_every_request_has_a_name_for_people() -> None:
    names = [Message(request).name for request in RULES]
    assert len(set(names)) == len(names) and not any(name.startswith("request") for name in names)
    assert (Message(8).name, Message(37).name, Message(34).name) == (
        "SET_VRING_NUM", "ADD_MEM_REG", "RESET_DEVICE",
    )  # fmt: skip
    assert Message(99).name == "request 99"
