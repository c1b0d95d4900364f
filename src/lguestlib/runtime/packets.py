"""The few frames a host needs to ping and to be pinged: Ethernet, ARP and ICMP echo over IPv4.

RFC 826, 791 and 792.  Station addresses are 6 bytes, IPv4 addresses 4, frames
begin with the Ethernet header.
"""

import struct
from typing import NamedTuple

FRAME_MAX = 1514
"""Bytes of the largest frame without offloads: an Ethernet header and an MTU of 1500."""

BROADCAST = b"\xff" * 6

_ETHERNET = struct.Struct("!6s6sH")
_TYPE_IPV4, _TYPE_ARP = 0x0800, 0x0806

_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ARP_ETHERNET_IPV4 = (1, _TYPE_IPV4, 6, 4)
_ARP_REQUEST, _ARP_REPLY = 1, 2

_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV4_VERSION_AND_LENGTH = 0x45
_TIME_TO_LIVE = 64
_PROTOCOL_ICMP = 1
_MORE_FRAGMENTS_OR_OFFSET = 0x3FFF

_ICMP = struct.Struct("!BBHHH")
_ECHO_REQUEST, _ECHO_REPLY = 8, 0


class Station(NamedTuple):
    """A host on the wire: its station address and its IPv4 address, empty where it has none."""

    mac: bytes
    address: bytes


class EchoReply(NamedTuple):
    """An ICMP echo reply that came in."""

    source: bytes
    identifier: int
    sequence: int


def checksum(data: bytes) -> bytes:
    """The Internet checksum of *data*, two bytes (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def arp_request(sender: Station, target: bytes) -> bytes:
    """The frame that asks who has IPv4 address *target*."""
    body = _ARP.pack(*_ARP_ETHERNET_IPV4, _ARP_REQUEST, sender.mac, sender.address, bytes(6), target)
    return _ETHERNET.pack(BROADCAST, sender.mac, _TYPE_ARP) + body


def echo_request(sender: Station, receiver: Station, identifier: int, sequence: int, data: bytes) -> bytes:
    """The frame of a ping from *sender* to *receiver*."""
    message = _ICMP.pack(_ECHO_REQUEST, 0, 0, identifier, sequence) + data
    message = message[:2] + checksum(message) + message[4:]
    header = _IPV4.pack(
        _IPV4_VERSION_AND_LENGTH, 0, _IPV4.size + len(message), 0, 0, _TIME_TO_LIVE, _PROTOCOL_ICMP, 0,
        sender.address, receiver.address,
    )  # fmt: skip
    header = header[:10] + checksum(header) + header[12:]
    return _ETHERNET.pack(receiver.mac, sender.mac, _TYPE_IPV4) + header + message


def answer(frame: bytes, host: Station) -> bytes | None:
    """What *host* replies to *frame* at once: to who-has with its station address, to a ping with the echo."""
    kind = _kind(frame)
    if kind == _TYPE_ARP:
        who = _arp(frame)
        if who and who[0] == _ARP_REQUEST and who[2] == host.address:
            body = _ARP.pack(*_ARP_ETHERNET_IPV4, _ARP_REPLY, host.mac, host.address, *who[1])
            return _ETHERNET.pack(who[1].mac, host.mac, _TYPE_ARP) + body
    elif kind == _TYPE_IPV4:
        found = _icmp(frame, host.address)
        if found and found[1][0] == _ECHO_REQUEST:
            header, message = found
            # Swapping the addresses leaves the header's checksum as it is.
            header = header[:12] + header[16:20] + header[12:16] + header[20:]
            message = bytes([_ECHO_REPLY, message[1], 0, 0]) + message[4:]
            message = message[:2] + checksum(message) + message[4:]
            return _ETHERNET.pack(frame[6:12], host.mac, _TYPE_IPV4) + header + message
    return None


def arp_reply(frame: bytes) -> Station | None:
    """Who answers, if *frame* is the answer to a who-has."""
    who = _arp(frame) if _kind(frame) == _TYPE_ARP else None
    return who[1] if who and who[0] == _ARP_REPLY else None


def echo_reply(frame: bytes, host: bytes) -> EchoReply | None:
    """The echo that *frame* brings back to IPv4 address *host*, if it does."""
    found = _icmp(frame, host) if _kind(frame) == _TYPE_IPV4 else None
    if not found or found[1][0] != _ECHO_REPLY:
        return None
    _, _, _, identifier, sequence = _ICMP.unpack_from(found[1])
    return EchoReply(found[0][12:16], identifier, sequence)


def _kind(frame: bytes) -> int:
    return int.from_bytes(frame[12:14], "big") if len(frame) >= _ETHERNET.size else 0


def _arp(frame: bytes) -> tuple[int, Station, bytes] | None:
    """An ARP frame's operation, its sender, and the IPv4 address it is about."""
    if len(frame) < _ETHERNET.size + _ARP.size:
        return None
    *kind, operation, mac, address, _, target = _ARP.unpack_from(frame, _ETHERNET.size)
    return (operation, Station(mac, address), target) if tuple(kind) == _ARP_ETHERNET_IPV4 else None


def _icmp(frame: bytes, host: bytes) -> tuple[bytes, bytes] | None:
    """The IPv4 header and the ICMP message of a whole packet addressed to *host*."""
    packet = frame[_ETHERNET.size :]
    length = (packet[0] & 0xF) * 4 if packet else 0
    if length < _IPV4.size or len(packet) < length + _ICMP.size:
        return None
    _, _, total, _, fragment, _, protocol, _, _, target = _IPV4.unpack_from(packet)
    if protocol != _PROTOCOL_ICMP or target != host or fragment & _MORE_FRAGMENTS_OR_OFFSET:
        return None
    message = packet[length:total]
    return (packet[:length], message) if len(message) >= _ICMP.size else None
