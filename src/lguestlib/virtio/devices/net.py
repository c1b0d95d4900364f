"""The network device, one queue pair (virtio 1.3, 5.1)."""

import struct
from collections.abc import Sequence
from typing import Protocol

from lguestlib.abi.virtio_ids import VIRTIO_ID_NET
from lguestlib.abi.virtio_net import VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP
from lguestlib.virtio.chain import Chain, part
from lguestlib.virtio.device import Device, Queue

HEADER_SIZE = 12
"""Bytes of `virtio_net_hdr_v1`, before each frame in both directions (virtio 1.3, 5.1.6)."""

_NUM_BUFFERS_AT = 10
_ONE_BUFFER = struct.pack("<H", 1)
_CONFIG = struct.Struct("<6sH")


class NetBackend(Protocol):
    """A network that carries frames, each behind a `virtio_net_hdr_v1`."""

    @property
    def offloads(self) -> int:
        """The VIRTIO_NET_F_* offload bits this network can carry."""

    def activate(self, features: int) -> None:
        """Carry what *features*, the negotiated ones, allow."""

    def send(self, buffers: Sequence[memoryview]) -> int:
        """Send one header and frame; return the bytes taken.  Raises OSError if it is refused."""

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Wait for a header and frame, put them into *buffers*, return their length.

        May raise InterruptedError.
        """


class Net(Device):
    """A network card with station address *mac*, six bytes."""

    device_type = VIRTIO_ID_NET

    def __init__(self, backend: NetBackend, mac: bytes, name: str = "net") -> None:
        super().__init__(name)
        self.mac = mac
        self.dropped = 0
        """Frames the network refused."""
        self._backend = backend

    @property
    def features(self) -> int:
        return 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | self._backend.offloads

    def config(self) -> bytes:
        return _CONFIG.pack(self.mac, VIRTIO_NET_S_LINK_UP)

    def queues(self) -> Sequence[Queue]:
        return (
            Queue("receive", self.serve_receive, from_outside=True),
            Queue("transmit", self.serve_transmit),
        )

    def activate(self, features: int) -> None:
        self._backend.activate(features)

    def serve_transmit(self, chain: Chain) -> int:
        """Service of transmitq1 (virtio 1.3, 5.1.6.2): a frame the network refuses is lost."""
        if chain.readable_length <= HEADER_SIZE:
            self.dropped += 1
            return 0
        try:
            self._backend.send(chain.readable)
        except InterruptedError:
            raise
        except OSError:
            self.dropped += 1
        return 0

    def serve_receive(self, chain: Chain) -> int:
        """Service of receiveq1 (virtio 1.3, 5.1.6.4)."""
        if chain.writable_length <= HEADER_SIZE:
            # No room for any frame: give it back rather than lose one (S33).
            return 0
        length = self._backend.receive(chain.writable)
        # A TAP device leaves num_buffers as it finds it; one is what 5.1.6.4.1 demands.
        first = chain.writable[0]
        if len(first) >= HEADER_SIZE:
            first[_NUM_BUFFERS_AT:HEADER_SIZE] = _ONE_BUFFER
        else:
            for position, piece in enumerate(part(chain.writable, _NUM_BUFFERS_AT, 2)):
                piece[:] = _ONE_BUFFER[position : position + len(piece)]
        return length
