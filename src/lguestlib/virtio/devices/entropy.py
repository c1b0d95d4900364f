"""The entropy device (virtio 1.3, 5.4)."""

from collections.abc import Sequence
from typing import Protocol

from lguestlib.abi.virtio_ids import VIRTIO_ID_RNG
from lguestlib.virtio.chain import Chain, part
from lguestlib.virtio.device import Device, Queue

REQUEST_MAX = 65536
"""Bytes given for one request: a device may give fewer than asked for (5.4.6.2; S31)."""


class EntropySource(Protocol):
    """Where random bytes come from."""

    def fill(self, buffers: Sequence[memoryview]) -> int:
        """Fill *buffers* from the start with random bytes; return how many, at least one."""


class Entropy(Device):
    """Fills whatever it is given with random bytes."""

    device_type = VIRTIO_ID_RNG

    def __init__(self, source: EntropySource, name: str = "entropy") -> None:
        super().__init__(name)
        self._source = source

    def queues(self) -> Sequence[Queue]:
        return (Queue("requests", self.serve_request),)

    def serve_request(self, chain: Chain) -> int:
        """Service of the request queue (virtio 1.3, 5.4.6)."""
        if not chain.writable_length:
            return 0
        if chain.writable_length > REQUEST_MAX:
            return self._source.fill(part(chain.writable, 0, REQUEST_MAX))
        return self._source.fill(chain.writable)
