"""Requests in good chains that no driver should make: each is answered within its room, and harms nothing."""

import struct
from collections.abc import Callable
from random import Random

from virtio.devices.chains import UNTOUCHED, Request
from virtio.devices.test_block import SIZE, Disk
from virtio.devices.test_console import Line
from virtio.devices.test_entropy import Source
from virtio.devices.test_net import MAC, Network

from lguestlib.virtio.device import SourceEnded
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.net import Net

REQUESTS = 200
"""What one seed makes, for each kind of device."""

_KINDS = (0, 1, 2, 4, 8, 9, 10, 11, 13, 16, 0x8000_0000, 0xFFFF_FFFF)
_SECTORS = (0, 1, 7, 8, 9, 1 << 31, 1 << 55, (1 << 64) - 1, (1 << 64) // 512)
_LENGTHS = (0, 1, 11, 12, 13, 15, 16, 17, 20, 21, 60, 511, 512, 513, 1024, 4096)


def one(seed: int) -> int:
    """The requests of *seed*; how many."""
    random = Random(seed)
    disk = Disk(read_only=random.random() < 0.2, most=random.choice((1, 511, SIZE)))
    network = Network()
    block, net = Block(disk), Net(network, MAC)
    net.activate(random.getrandbits(64) & net.offered)
    console, entropy = Console(Line(b"typed" * 100)), Entropy(Source())
    done = 0
    for service, header in (
        (block.serve_request, _block_header),
        (net.serve_transmit, _bytes), (net.serve_receive, _bytes),
        (console.serve_input, _bytes), (console.serve_output, _bytes),
        (entropy.serve_request, _bytes),
    ):  # fmt: skip
        for _ in range(REQUESTS):
            _ask(random, service, header(random))
            done += 1
    assert len(disk.content) == SIZE
    return done


def _block_header(random: Random) -> bytes:
    header = struct.pack("<IIQ", random.choice(_KINDS), random.getrandbits(32), random.choice(_SECTORS))
    if random.random() < 0.3:
        header += struct.pack("<QII", random.choice(_SECTORS), random.getrandbits(17), random.getrandbits(2))
    else:
        header += random.randbytes(random.choice(_LENGTHS))
    return header if random.random() < 0.9 else header[: random.randrange(len(header))]


def _bytes(random: Random) -> bytes:
    return random.randbytes(random.choice(_LENGTHS))


def _ask(random: Random, service: Callable[..., int], readable: bytes) -> None:
    room = random.choice(_LENGTHS) + random.randrange(2)
    cuts = sorted(random.sample(range(1, len(readable)), min(random.randrange(4), max(len(readable) - 1, 0))))
    room_cuts = sorted(random.sample(range(1, room), min(random.randrange(4), max(room - 1, 0))))
    request = Request(readable, room, cuts, room_cuts)
    try:
        used = service(request.chain)
    except SourceEnded:
        used = 0
        assert request.writable == bytes([UNTOUCHED]) * room
    assert 0 <= used <= room
    assert request.readable == readable
