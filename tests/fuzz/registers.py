"""Register and configuration accesses that no driver should make, on every kind of device."""

from random import Random

from virtio.devices.test_block import Disk
from virtio.devices.test_console import Line
from virtio.devices.test_entropy import Source
from virtio.devices.test_multiqueue_net import Networks
from virtio.devices.test_net import MAC, Network

from lguestlib.virtio.device import Device
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.multiqueue_net import MultiqueueNet
from lguestlib.virtio.devices.net import Net
from lguestlib.virtio.effects import QueueStop, Reset
from lguestlib.virtio.mmio import REGION_SIZE, MmioTransport

ACCESSES = 1000
"""What one seed makes."""

_STATUS, _QUEUE_SEL, _QUEUE_NUM, _QUEUE_READY = 0x70, 0x30, 0x38, 0x44
_REGISTERS = (*range(0, 0x110, 4), _STATUS, _STATUS, _STATUS, _QUEUE_SEL, _QUEUE_NUM, _QUEUE_READY, _QUEUE_READY)
_VALUES = (0, 1, 2, 3, 4, 8, 11, 15, 0x80, 255, 256, 0x8000, 0xFFFF, 1 << 31, 0xFFFF_FFFF)


def one(seed: int) -> int:
    """The accesses of *seed*; how many."""
    random = Random(seed)
    device: Device = random.choice(
        (lambda: Block(Disk(), num_queues=3), lambda: Net(Network(), MAC, mtu=1500), lambda: Console(Line()),
         lambda: Entropy(Source()), lambda: MultiqueueNet(Networks(), MAC))
    )()  # fmt: skip
    transport = MmioTransport(device)
    config = device.config()
    for _ in range(ACCESSES):
        draw = random.random()
        width = random.choice((1, 2, 4, 4, 4, 8, 3))
        if draw < 0.5:
            value = random.choice(_VALUES).to_bytes(8, "little")
            effect = transport.write(random.choice(_REGISTERS), value[: width if draw < 0.1 else 4])
            if isinstance(effect, Reset):
                transport.reset_done()
                assert transport.status == 0 and not transport.layouts
            elif isinstance(effect, QueueStop):
                transport.queue_stopped(effect.index)
        elif draw < 0.7:
            transport.write(random.randrange(REGION_SIZE), random.randbytes(width))
        elif draw < 0.9:
            assert len(transport.read(random.randrange(REGION_SIZE), width)) == width
        else:
            at = random.randrange(len(config) + 8)
            inside = (config + bytes(16))[at : at + width]
            if width in (1, 2, 4) and not at % width and at + width <= len(config):
                assert transport.read(0x100 + at, width) == inside
            else:
                assert len(transport.read(0x100 + at, width)) == width
        assert len(transport.layouts) <= len(device.queues())
        assert not transport.features & ~transport.offered
    return ACCESSES
