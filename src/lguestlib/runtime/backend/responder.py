"""A network of one host, in this process: it answers ARP and ICMP echo.

For where no TAP device may be had.  It sits at the far end of a socket pair, so
that a queue's thread makes the very calls it makes on a TAP device.
"""

import socket
import threading
from contextlib import suppress

from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.runtime.packets import Station, answer
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.devices.net import HEADER_SIZE, header_size

MAC = bytes.fromhex("02005e000001")
_PACKET_MAX = HEADER_SIZE + 65536 + 18


class Responder(PacketNetwork):
    """The network whose only other host has IPv4 *address*, such as "192.168.19.1"."""

    def __init__(self, address: str, tracer: Tracer | None = None) -> None:
        near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(near.detach(), "responder", tracer)
        self._host = Station(MAC, socket.inet_aton(address))
        self._header_size = HEADER_SIZE
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._serve, name="responder", daemon=True)
        self._thread.start()

    def activate(self, features: int) -> None:
        """Headers are those of *features*, from the next frame on."""
        self._header_size = header_size(features)

    def _serve(self) -> None:
        try:
            while packet := self._far.recv(_PACKET_MAX):
                size = self._header_size
                reply = answer(packet[size:], self._host)
                if reply is not None:
                    self._send(bytes(size) + reply)
        except OSError as error:
            # The network was closed with frames under way; or who receives is told why there are no more.
            self._failure = error
        with suppress(OSError):
            self._far.shutdown(socket.SHUT_RDWR)

    def _send(self, packet: bytes) -> None:
        # The guest does not receive, or the host has no room: a full network drops.
        with suppress(OSError):
            self._far.send(packet, socket.MSG_DONTWAIT)

    def _gone(self) -> int:
        if self._failure:
            raise OSError(self._failure.errno, self._failure.strerror)
        return super()._gone()

    def close(self) -> None:
        """End the host and its network."""
        super().close()
        self._thread.join()
        self._far.close()
