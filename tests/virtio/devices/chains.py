"""Chains as a device gets them, their bytes cut into buffers at will."""

from collections.abc import Iterator, Sequence
from itertools import combinations

from lguestlib.abi.virtio_config import VIRTIO_TRANSPORT_F_START
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Device
from lguestlib.virtio.layout import DescriptorIndex

UNTOUCHED = 0xEE
"""What writable bytes hold before the device has written them."""


def cut(data: bytearray, cuts: Sequence[int]) -> tuple[memoryview, ...]:
    """Views of *data* between *cuts*, which are ascending positions inside it."""
    edges = [0, *cuts, len(data)]
    return tuple(memoryview(data)[low:high] for low, high in zip(edges, edges[1:]) if high > low)


def all_cuts(length: int, most: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut so many bytes into at most that many buffers."""
    for count in range(most):
        yield from combinations(range(1, length), count)


class Request:
    """A chain of *readable* bytes and *room* writable ones, and the bytes behind it."""

    def __init__(
        self, readable: bytes = b"", room: int = 0, cuts: Sequence[int] = (), room_cuts: Sequence[int] = ()
    ) -> None:
        self.readable = bytearray(readable)
        self.writable = bytearray([UNTOUCHED]) * room
        self.chain = Chain(DescriptorIndex(0))
        self.chain.readable = cut(self.readable, cuts)
        self.chain.writable = cut(self.writable, room_cuts)
        self.chain.readable_length = len(readable)
        self.chain.writable_length = room


_OWN = (1 << VIRTIO_TRANSPORT_F_START) - 1 | ((1 << 64) - 1) >> 50 << 50


def only_its_own(device: Device) -> bool:
    """Whether *device* offers only bits that are its type's to offer (virtio 1.3, 2.2)."""
    return device.device_type > 0 and not device.features & ~_OWN
