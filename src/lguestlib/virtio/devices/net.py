"""The network device, one queue pair (virtio 1.3, 5.1)."""

import errno
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from lguestlib.abi import virtio_net as abi
from lguestlib.abi.layout import offset_of
from lguestlib.abi.virtio_ids import VIRTIO_ID_NET
from lguestlib.virtio.chain import Chain, part
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.errors import MemoryGone
from lguestlib.virtio.features import Feature

HEADER_SIZE = 12
"""Bytes of `virtio_net_hdr_v1`, before each frame in both directions (virtio 1.3, 5.1.6)."""

LEGACY_HEADER_SIZE = 10
"""Bytes of the header of a legacy driver without mergeable buffers: no num_buffers (5.1.6.1; T2)."""

MTU = 1500
"""The bytes in a frame behind its Ethernet header, at most, where nothing else is said."""

MTU_MIN, MTU_MAX = 68, 65535
"""What an MTU that is told to a driver may be (virtio 1.3, 5.1.4.1)."""

ETHERNET_SIZE = 18
"""Bytes before those: two addresses, a VLAN tag and a type."""

_GSO = sum(
    1 << bit
    for bit in (
        abi.VIRTIO_NET_F_GUEST_TSO4, abi.VIRTIO_NET_F_GUEST_TSO6, abi.VIRTIO_NET_F_GUEST_UFO,
        abi.VIRTIO_NET_F_GUEST_USO4, abi.VIRTIO_NET_F_GUEST_USO6,
    )
)  # fmt: skip
"""With any of these a frame is as long as its IP packet can be, whatever the MTU."""

OFFERED_MAX = 256
"""Buffers that one call of a back-end's `receive` is given, with one more behind them."""

_NUM_BUFFERS_AT = LEGACY_HEADER_SIZE
_ONE_BUFFER = struct.pack("<H", 1)
_CONFIG = struct.Struct("<6sHHH")
_CONFIG_PAIRS_AT = offset_of(abi.virtio_net_config, "max_virtqueue_pairs")
_CONFIG_MTU_AT = offset_of(abi.virtio_net_config, "mtu")


def header_size(features: int) -> int:
    """The bytes before each frame with *features* negotiated."""
    if features & (Feature.VERSION_1 | 1 << abi.VIRTIO_NET_F_MRG_RXBUF):
        return HEADER_SIZE
    return LEGACY_HEADER_SIZE


class NetBackend(Protocol):
    """A network that carries frames, each behind a header: a `virtio_net_hdr_v1` until `activate` tells."""

    @property
    def offloads(self) -> int:
        """The VIRTIO_NET_F_* offload bits this network can carry."""

    def activate(self, features: int) -> None:
        """Carry what *features*, the negotiated ones, allow, behind headers of their `header_size`."""

    def send(self, buffers: Sequence[memoryview]) -> int:
        """Send one header and frame; return the bytes taken.  Raises OSError if it is refused."""

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Wait for a header and frame, put them into *buffers*, return their length.

        May raise InterruptedError.
        """


class MergedReceive:
    """Receives packets, each into as many buffers as it needs (virtio 1.3, 5.1.6.3.1 and 5.1.6.4).

    The network is offered as many as the last packet took, since each costs time
    whether it is used or not.  What a longer packet has beyond them is copied.
    """

    def __init__(self, receive: Callable[[Sequence[memoryview]], int]) -> None:
        self.room = 0
        """Bytes of the longest packet, its header included; 0 before `start`."""
        self.missed = 0
        """Packets lost because no buffers of the driver's could hold them."""
        self._receive = receive
        self.start(0)

    def start(self, room: int) -> None:
        """Packets are *room* bytes long at most; 0 where they are not to be merged."""
        self.room = room
        self._beyond = memoryview(bytearray(room))
        self._likely = 0
        # A packet that is longer than all the buffers there were.
        self._waiting = b""

    def serve(self, chains: Sequence[Chain], complete: bool = False) -> int:
        """Receive one packet into the first of *chains*; return how many it took.

        0 if it is longer than all of them: it waits for a call with more.  When
        these are *complete*, so that no more will come, it is lost instead, and the
        next one received.  A driver must give each buffer more room than a header
        needs: a first one without it is taken alone, and nothing received (S33).
        May raise InterruptedError.
        """
        first = chains[0]
        if first.writable_length <= HEADER_SIZE:
            first.written = 0
            return 1
        while (left := self._take(chains)) < 0:
            if not complete:
                return 0
            self._waiting = b""
            self.missed += 1
        taken = 0
        for chain in chains:
            room = chain.writable_length
            taken += 1
            if left <= room:
                chain.written = left
                break
            chain.written = room
            left -= room
        _set_num_buffers(first, taken.to_bytes(2, "little"))
        return taken

    def _take(self, chains: Sequence[Chain]) -> int:
        """Put the next packet into *chains*; return its length, or -1 if it is longer, and waits."""
        if self._waiting:
            if not _copied(memoryview(self._waiting), chains, 0):
                return -1
            length, self._waiting = len(self._waiting), b""
            return length
        buffers: list[memoryview] = []
        offered = 0
        for chain in chains:
            buffers += chain.writable
            offered += chain.writable_length
            if offered >= self._likely:
                break
        if len(buffers) > OFFERED_MAX:
            del buffers[OFFERED_MAX:]
            offered = sum(map(len, buffers))
        buffers.append(self._beyond)
        while (length := self._receive(buffers)) > offered and length > self.room:
            # Longer than there can be, and cut perhaps.
            self.missed += 1
        self._likely = length
        if length > offered:
            buffers[-1] = rest = self._beyond[: length - offered]
            if not _copied(rest, chains, offered):
                self._waiting = b"".join(buffers)
                return -1
        return length


def _copied(data: memoryview, chains: Sequence[Chain], start: int) -> bool:
    """Copy *data* to byte *start* of what is writable in *chains*; False, nothing done, if it does not fit."""
    if len(data) > sum(chain.writable_length for chain in chains) - start:
        return False
    done = 0
    for piece in part(tuple(buffer for chain in chains for buffer in chain.writable), start, len(data)):
        piece[:] = data[done : done + len(piece)]
        done += len(piece)
    return True


class Net(Device):
    """A network card with station address *mac*, six bytes.

    *mtu* is what the network's frames hold behind their Ethernet header, and is
    told to the driver; None is 1500, and not told.  Raises
    ValueError for an MTU that there cannot be.
    """

    device_type = VIRTIO_ID_NET

    def __init__(
        self, backend: NetBackend, mac: bytes, name: str = "net", *, mtu: int | None = None
    ) -> None:
        super().__init__(name)
        if mtu is not None and not MTU_MIN <= mtu <= MTU_MAX:
            raise ValueError(f"{name}: an MTU of {mtu} ({MTU_MIN} to {MTU_MAX})")
        self.mac = mac
        self.mtu = mtu
        self.dropped = 0
        """Frames the network refused."""
        self.merged = MergedReceive(backend.receive)
        """The receive queue's work with VIRTIO_NET_F_MRG_RXBUF negotiated."""
        self._backend = backend
        self._send = backend.send
        self._header_size = HEADER_SIZE

    @property
    def max_pairs(self) -> int:
        """How many pairs of a receive and a transmit queue it has."""
        return 1

    @property
    def features(self) -> int:
        bits = [abi.VIRTIO_NET_F_MAC, abi.VIRTIO_NET_F_STATUS, abi.VIRTIO_NET_F_MRG_RXBUF]
        if self.mtu is not None:
            bits.append(abi.VIRTIO_NET_F_MTU)
        return sum(1 << bit for bit in bits) | self._backend.offloads

    def config(self) -> bytes:
        config = _CONFIG.pack(self.mac, abi.VIRTIO_NET_S_LINK_UP, self.max_pairs, self.mtu or 0)
        if self.mtu is not None:
            return config
        return config[: _CONFIG_PAIRS_AT if self.max_pairs == 1 else _CONFIG_MTU_AT]

    def queues(self) -> Sequence[Queue]:
        return (
            Queue("receive", self.serve_receive, from_outside=True, merging=self.merged),
            Queue("transmit", self.serve_transmit),
        )

    def activate(self, features: int) -> None:
        self._backend.activate(features)
        self._header_size = header_size(features)
        merging = features & 1 << abi.VIRTIO_NET_F_MRG_RXBUF
        mtu = MTU_MAX if features & _GSO else self.mtu or MTU
        self.merged.start(HEADER_SIZE + ETHERNET_SIZE + mtu if merging else 0)

    def serve_transmit(self, chain: Chain) -> int:
        """Service of transmitq1 (virtio 1.3, 5.1.6.2): a frame the network refuses is lost."""
        if chain.readable_length <= self._header_size:
            self.dropped += 1
            return 0
        try:
            self._send(chain.readable)
        except InterruptedError:
            raise
        except OSError as error:
            if error.errno == errno.EFAULT:
                raise MemoryGone from None
            self.dropped += 1
        return 0

    def serve_receive(self, chain: Chain) -> int:
        """Service of receiveq1 (virtio 1.3, 5.1.6.4)."""
        if chain.writable_length <= self._header_size:
            # No room for any frame: give it back rather than lose one (S33).
            return 0
        length = self._backend.receive(chain.writable)
        if self._header_size == HEADER_SIZE:
            _set_num_buffers(chain, _ONE_BUFFER)
        return length


def _set_num_buffers(chain: Chain, count: bytes) -> None:
    """Write the header's num_buffers, which a TAP device leaves as it finds it (virtio 1.3, 5.1.6.4.1)."""
    first = chain.writable[0]
    if len(first) >= HEADER_SIZE:
        first[_NUM_BUFFERS_AT:HEADER_SIZE] = count
    else:
        for position, piece in enumerate(part(chain.writable, _NUM_BUFFERS_AT, 2)):
            piece[:] = count[position : position + len(piece)]
