"""Guest memory in which chains are decoded, and the places in it that matter."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from lguestlib.virtio.chain import INDIRECT_MAX

T = TypeVar("T")

HOME = 0x10000
"""Guest-physical address of the largest region, which the short cuts know."""
HOME_SIZE = 0x8000
RING_AT = HOME
TABLES_AT = HOME + 0x2000
BUFFERS_AT = HOME + 0x4000
HOME_END = HOME + HOME_SIZE
NEXT_DOOR = 0x1000
"""Bytes of the regions just before and just after the largest one."""
FAR = 0x1_0000_0000
"""Address of another region, by itself."""

REGIONS = {
    "one region": ((HOME, HOME_SIZE),),
    "neighbours": (
        (HOME - NEXT_DOOR, NEXT_DOOR), (HOME, HOME_SIZE), (HOME_END, NEXT_DOOR), (FAR, NEXT_DOOR),
    ),
}  # fmt: skip

PLACES = [
    (BUFFERS_AT, 16),
    (BUFFERS_AT, 0),
    (HOME_END - 16, 16),
    (HOME_END - 16, 17),
    (HOME_END, 0),
    (HOME_END, 16),
    (HOME - 16, 16),
    (HOME - 8, 16),
    (FAR, 8),
    (0, 0),
    ((1 << 64) - 8, 16),
    (BUFFERS_AT, 0xFFFF_FFFF),
    (TABLES_AT, 16),
    (TABLES_AT, 32),
    (TABLES_AT, 48),
    (TABLES_AT, 47),
    (HOME_END - 24, 48),
    (TABLES_AT, 16 * INDIRECT_MAX + 16),
]
"""Addresses and lengths: good, bad, and on the edge between."""


def sample(options: Sequence[T], repeat: int, count: int, offset: int = 0) -> Iterator[list[T]]:
    """*count* of the many elements of ``product(options, repeat=repeat)``, spread over all of it."""
    total = len(options) ** repeat
    # The golden section leaves no part out; odd, and not of the small primes that numbers of options have.
    stride = int(total * 0.6180339887498949) | 1
    while any(stride % prime == 0 for prime in (2, 3, 5, 7)):
        stride += 2
    for number in range(count):
        index = (number * stride + offset) % total
        chosen = []
        for _ in range(repeat):
            index, which = divmod(index, len(options))
            chosen.append(options[which])
        yield chosen
