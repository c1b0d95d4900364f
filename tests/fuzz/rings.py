"""Split rings as no driver should leave them: each is served, or refused with a typed error."""

from random import Random

from virtio.rings import Oracle, Refusal, Ring, Where, memory_of, refusal, without_frames

from lguestlib.memory.address import GuestAddress
from lguestlib.virtio import errors
from lguestlib.virtio.chain import DESCRIPTOR
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.split_device import SplitDeviceQueue

RINGS = 1000
"""What one seed makes."""

HOME, HOME_SIZE = 0x10000, 0x10000
FAR, FAR_SIZE = 0x1_0000_0000, 0x1000
TABLES_AT = HOME + 0x4000
TABLE_SIZE = 16 * 12

ADDRESSES = (
    HOME, HOME + 0x8000, HOME + 0x8001, HOME + HOME_SIZE - 64, HOME + HOME_SIZE - 1, HOME + HOME_SIZE, HOME - 1, 0,
    FAR, FAR + FAR_SIZE - 1, FAR - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 64,
    *(TABLES_AT + TABLE_SIZE * number for number in range(4)),
)  # fmt: skip
LENGTHS = (0, 1, 16, 32, 48, 64, TABLE_SIZE, 512, 4096, HOME_SIZE, 15, 17, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
FLAGS = (0, 1, 2, 3, 1, 3, 4, 4, 5, 6, 7, 8, 0x8000, 0xFFFF)
FEATURES = (
    0, Feature.RING_INDIRECT_DESC, Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX, Feature.RING_EVENT_IDX,
)  # fmt: skip


def one(seed: int) -> int:
    """The rings of *seed*; how many."""
    random = Random(seed)
    draw = random.random
    size = random.choice((1, 2, 4, 8, 8, 16))
    features = int(random.choice(FEATURES) | Feature.VERSION_1)
    with memory_of((HOME, HOME_SIZE), (FAR, FAR_SIZE)) as memory:
        ring = Ring(memory, QueueLayout.contiguous(0, size, GuestAddress(HOME)))
        oracle, where = Oracle(ring, features), Where(memory)
        device = SplitDeviceQueue(ring.layout, memory, features)
        home = memory.views()
        table = home.slice(GuestAddress(HOME), 16 * size)
        tables = home.slice(GuestAddress(TABLES_AT), 4 * TABLE_SIZE)
        try:
            for number in range(RINGS):
                into, entries = (table, size) if draw() < 0.7 else (tables, 4 * TABLE_SIZE // 16)
                DESCRIPTOR.pack_into(
                    into, 16 * int(draw() * entries), ADDRESSES[int(draw() * len(ADDRESSES))],
                    LENGTHS[int(draw() * len(LENGTHS))], FLAGS[int(draw() * len(FLAGS))],
                    int(draw() * (size + 1)) if draw() < 0.95 else 0xFFFF,
                )  # fmt: skip
                head = int(draw() * size) if draw() < 0.98 else size
                ring.offer(head)
                if draw() < 0.002:
                    # As far ahead as no driver can be: this ring is broken from now on.
                    ring.avail_idx += 0x4000
                expected = oracle(head) if number % 16 == 0 else None
                try:
                    chains = device.pop_many()
                except errors.AvailIndexError as error:
                    without_frames(error)
                    device.release()
                    ring.avail_idx = ring.used_idx = 0
                    device = SplitDeviceQueue(ring.layout, memory, features)
                    continue
                except errors.ChainError as error:
                    assert expected is None or refusal(error) == expected
                    without_frames(error)
                    continue
                (chain,) = chains
                assert not isinstance(expected, Refusal)
                assert expected is None or where.outcome(chain) == expected
                assert sum(map(len, chain.readable)) == chain.readable_length
                assert sum(map(len, chain.writable)) == chain.writable_length
                chain.written = chain.writable_length
                device.push_many(chains)
                device.should_interrupt()
        finally:
            table.release()
            tables.release()
            home.release()
            device.release()
            oracle.release()
            ring.release()
    return RINGS
