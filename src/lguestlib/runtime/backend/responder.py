"""A network of one host, in this process: it answers ARP and ICMP echo.

For where no TAP device may be had.  It sits at the far end of a socket pair, so
that a queue's thread makes the very calls it makes on a TAP device.
"""

import socket
import struct
import threading

from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.devices.net import HEADER_SIZE

MAC = bytes.fromhex("02005e000001")
_FRAME_MAX = HEADER_SIZE + 65536 + 18
_ETHERNET = struct.Struct("!6s6sH")
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ARP_REQUEST, _ARP_REPLY = 1, 2
_TYPE_IPV4, _TYPE_ARP = 0x0800, 0x0806
_PROTOCOL_ICMP = 1
_ECHO_REQUEST, _ECHO_REPLY = 8, 0


def answer(frame: bytes, address: bytes) -> bytes | None:
    """What a host with IPv4 *address* (4 bytes) and `MAC` replies to Ethernet *frame*, if anything."""
    if len(frame) < _ETHERNET.size:
        return None
    _, source, kind = _ETHERNET.unpack_from(frame)
    header = _ETHERNET.pack(source, MAC, kind)
    body = frame[_ETHERNET.size :]
    if kind == _TYPE_ARP and len(body) >= _ARP.size:
        hardware, protocol, hlen, plen, operation, sender, sender_ip, _, target = _ARP.unpack_from(body)
        if operation == _ARP_REQUEST and target == address:
            return header + _ARP.pack(hardware, protocol, hlen, plen, _ARP_REPLY, MAC, address, sender, sender_ip)
    if kind == _TYPE_IPV4:
        packet = _echo(body, address)
        return packet and header + packet
    return None


def _echo(packet: bytes, address: bytes) -> bytes | None:
    header_length = (packet[0] & 0xF) * 4 if packet else 0
    if header_length < 20 or len(packet) < header_length + 8 or packet[16:20] != address:
        return None
    total = int.from_bytes(packet[2:4], "big")
    message = packet[header_length:total]
    if packet[9] != _PROTOCOL_ICMP or len(message) < 8 or message[0] != _ECHO_REQUEST:
        return None
    # Swapping the addresses leaves the IP header's checksum as it is.
    reply = packet[:12] + packet[16:20] + packet[12:16] + packet[20:header_length]
    unsummed = bytes([_ECHO_REPLY, message[1], 0, 0]) + message[4:]
    return reply + unsummed[:2] + checksum(unsummed) + unsummed[4:]


def checksum(data: bytes) -> bytes:
    """The Internet checksum of *data* (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


class Responder(PacketNetwork):
    """The network whose only other host has IPv4 *address*, such as "192.168.19.1"."""

    def __init__(self, address: str, tracer: Tracer | None = None) -> None:
        near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(near.detach(), "responder", tracer)
        self._address = socket.inet_aton(address)
        self._thread = threading.Thread(target=self._serve, name="responder", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while packet := self._far.recv(_FRAME_MAX):
            reply = answer(packet[HEADER_SIZE:], self._address)
            if reply is None:
                continue
            try:
                self._far.send(bytes(HEADER_SIZE) + reply, socket.MSG_DONTWAIT)
            except BlockingIOError:
                # The guest does not receive: a full network drops.
                continue
            except OSError:
                return

    def close(self) -> None:
        """End the host and its network."""
        super().close()
        self._thread.join()
        self._far.close()
