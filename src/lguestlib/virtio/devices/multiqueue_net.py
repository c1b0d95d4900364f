"""The network device with several queue pairs and a control queue (virtio 1.3, 5.1.6.5 and 5.1.6.5.5)."""

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from lguestlib.abi import virtio_net as abi
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Queue, Service
from lguestlib.virtio.devices.net import Net, NetBackend

_HEADER = struct.Struct("<BB")
_PAIRS = struct.Struct("<H")
_CONTROL_FEATURES = 1 << abi.VIRTIO_NET_F_CTRL_VQ | 1 << abi.VIRTIO_NET_F_MQ

FIRST_CONTROL_QUEUE = 2
"""The control queue's index where a driver has it without VIRTIO_NET_F_MQ (virtio 1.3, 5.1.2)."""


class MultiqueueNetBackend(Protocol):
    """A network with several queues, each of which carries frames both ways."""

    @property
    def pairs(self) -> Sequence[NetBackend]:
        """The queues; the first one's `activate` and `offloads` speak for all."""

    def use_pairs(self, count: int) -> None:
        """Give frames for the guest to the first *count* queues alone.  Raises OSError."""


class MultiqueueNet(Net):
    """A network card with a queue pair for each of *network*'s, and a control queue behind them.

    A driver starts with the first pair, and tells how many it uses from then on.
    Otherwise as `Net`, which serves the first pair.  Raises ValueError for fewer
    pairs than two, and more than there may be.
    """

    def __init__(
        self, network: MultiqueueNetBackend, mac: bytes, name: str = "net", *, mtu: int | None = None
    ) -> None:
        first, *others = network.pairs
        super().__init__(first, mac, name, mtu=mtu)
        if not 1 < len(network.pairs) <= abi.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX:
            raise ValueError(f"{name}: {len(network.pairs)} queue pairs")
        # Each further pair is served as a card's of its own would be.
        self.pairs: Sequence[Net] = (self, *(Net(pair, mac, name, mtu=mtu) for pair in others))
        """The cards whose services are the pairs'."""
        self._use_pairs = network.use_pairs
        self._second_receive: Service = self.pairs[1].serve_receive

    @property
    def max_pairs(self) -> int:
        return len(self.pairs)

    @property
    def features(self) -> int:
        return super().features | _CONTROL_FEATURES

    def queues(self) -> Sequence[Queue]:
        queues = []
        for number, card in enumerate(self.pairs):
            receive, transmit = Net.queues(card)
            queues.append(replace(receive, name=f"receive{number}", party=number))
            queues.append(replace(transmit, name=f"transmit{number}", party=number))
        queues[FIRST_CONTROL_QUEUE] = replace(queues[FIRST_CONTROL_QUEUE], service=self._serve_second_receive)
        return (*queues, Queue("control", self.serve_control))

    def activate(self, features: int) -> None:
        super().activate(features)
        for card in self.pairs[1:]:
            card.activate(features)
        self._use_pairs(1)
        self._second_receive = self.pairs[1].serve_receive
        if features & _CONTROL_FEATURES == 1 << abi.VIRTIO_NET_F_CTRL_VQ:
            self.pairs[1].merged.start(0)
            self._second_receive = self.serve_control

    def deactivate(self) -> None:
        self._use_pairs(1)

    def _serve_second_receive(self, chain: Chain) -> int:
        return self._second_receive(chain)

    def serve_control(self, chain: Chain) -> int:
        """Service of the control queue: of its commands, there is the number of pairs to use alone."""
        if not chain.writable_length:
            # Not even a status can be given (S33).
            return 0
        return chain.write(bytes([self._control(chain.read(_HEADER.size + _PAIRS.size))]))

    def _control(self, command: bytes) -> int:
        """Do what the first bytes of a *command* ask; the status to give."""
        if len(command) < _HEADER.size + _PAIRS.size:
            return abi.VIRTIO_NET_ERR
        if _HEADER.unpack_from(command) != (abi.VIRTIO_NET_CTRL_MQ, abi.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET):
            return abi.VIRTIO_NET_ERR
        [pairs] = _PAIRS.unpack_from(command, _HEADER.size)
        if not abi.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN <= pairs <= len(self.pairs):
            return abi.VIRTIO_NET_ERR
        try:
            self._use_pairs(pairs)
        except OSError:
            return abi.VIRTIO_NET_ERR
        return abi.VIRTIO_NET_OK
