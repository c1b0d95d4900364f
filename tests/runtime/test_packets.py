"""Frames made and answered: Ethernet, ARP, ICMP echo over IPv4."""

import random
import struct

import pytest

from lguestlib.runtime.packets import (
    BROADCAST,
    EchoReply,
    Station,
    answer,
    arp_reply,
    arp_request,
    checksum,
    echo_reply,
    echo_request,
)

GUEST = Station(bytes.fromhex("020000000002"), bytes([192, 168, 19, 2]))
HOST = Station(bytes.fromhex("020000000001"), bytes([192, 168, 19, 1]))
ECHO = echo_request(GUEST, HOST, 7, 9, b"payload!")
IPV4_AT, ICMP_AT = 14, 34


def changed(frame: bytes, at: int, data: bytes) -> bytes:
    return frame[:at] + data + frame[at + len(data) :]


@pytest.mark.parametrize(
    ("data", "sum"),
    [
        (b"", "ffff"),
        (b"\0\0", "ffff"),
        (b"\xff\xff", "0000"),
        # RFC 1071, section 3.
        (bytes.fromhex("0001f203f4f5f6f7"), "220d"),
        (b"\x01", "feff"),
        (b"\xff" * 70_000, "0000"),
    ],
)
def test_the_internet_checksum(data: bytes, sum: str) -> None:
    assert checksum(data).hex() == sum


def test_who_has_is_answered_by_who_has_it_alone() -> None:
    question = arp_request(GUEST, HOST.address)
    assert question[:6] == BROADCAST and question[6:12] == GUEST.mac
    reply = answer(question, HOST)
    assert reply is not None and reply[:12] == GUEST.mac + HOST.mac
    assert arp_reply(reply) == HOST
    assert arp_reply(question) is None
    assert answer(arp_request(GUEST, bytes([192, 168, 19, 3])), HOST) is None
    assert answer(reply, GUEST) is None


def test_a_ping_is_echoed_with_sums_that_are_right() -> None:
    reply = answer(ECHO, HOST)
    assert reply is not None and reply[:12] == GUEST.mac + HOST.mac
    assert reply[-8:] == b"payload!"
    assert checksum(reply[IPV4_AT:ICMP_AT]) == checksum(reply[ICMP_AT:]) == b"\0\0"
    assert echo_reply(reply, GUEST.address) == EchoReply(HOST.address, 7, 9)
    assert echo_reply(reply, HOST.address) is None
    assert echo_reply(ECHO, HOST.address) is None
    assert answer(reply, GUEST) is None


def test_what_stands_behind_the_packet_is_not_echoed() -> None:
    padded = answer(ECHO + b"padding", HOST)
    assert padded is not None and padded.endswith(b"payload!")


def test_options_of_the_header_are_kept() -> None:
    header = bytes([0x46]) + ECHO[IPV4_AT + 1 : IPV4_AT + 2]
    header += struct.pack("!H", 24 + len(ECHO) - ICMP_AT) + ECHO[IPV4_AT + 4 : ICMP_AT] + b"\x01\x01\x01\x00"
    reply = answer(ECHO[:IPV4_AT] + header + ECHO[ICMP_AT:], HOST)
    assert reply is not None and reply[ICMP_AT : ICMP_AT + 4] == b"\x01\x01\x01\x00"


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        ECHO[:13],
        ECHO[:IPV4_AT],
        ECHO[: ICMP_AT + 7],
        changed(ECHO, 12, b"\x86\xdd"),
        changed(ECHO, IPV4_AT, b"\x44"),
        changed(ECHO, IPV4_AT, b"\x4f"),
        changed(ECHO, IPV4_AT + 2, b"\0\0"),
        changed(ECHO, IPV4_AT + 6, b"\x20\0"),
        changed(ECHO, IPV4_AT + 6, b"\0\x01"),
        changed(ECHO, IPV4_AT + 9, b"\x11"),
        changed(ECHO, IPV4_AT + 16, b"\x0a\0\0\x01"),
        changed(ECHO, ICMP_AT, b"\x08\x08")[: ICMP_AT + 2],
        changed(ECHO, ICMP_AT, b"\x0d"),
        arp_request(GUEST, HOST.address)[:-1],
        changed(arp_request(GUEST, HOST.address), 18, b"\x08"),
    ],
)
def test_other_frames_get_no_answer(frame: bytes) -> None:
    assert answer(frame, HOST) is None
    assert arp_reply(frame) is None
    assert echo_reply(frame, HOST.address) is None


def test_frames_of_any_bytes_are_no_error() -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    frames = (ECHO, arp_request(GUEST, HOST.address))
    for _ in range(5000):
        frame = bytearray(rng.choice(frames)[: rng.randrange(1, 60)])
        for _ in range(rng.randrange(4)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        try:
            answer(bytes(frame), HOST)
            arp_reply(bytes(frame))
            echo_reply(bytes(frame), HOST.address)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {frame.hex()}") from error
