"""Packed rings as no driver should leave them: each is served, or refused with a typed error."""

from random import Random

from virtio.packed_rings import AVAIL, PACKED, USED, PackedOracle, PackedRing, off_wrap
from virtio.rings import Verdict, Where, memory_of, refusal, without_frames

from fuzz.rings import ADDRESSES, FAR, FAR_SIZE, FEATURES, FLAGS, HOME, HOME_SIZE, LENGTHS, TABLE_SIZE, TABLES_AT
from lguestlib.memory.address import GuestAddress
from lguestlib.virtio import errors
from lguestlib.virtio.chain import DESCRIPTOR, Chain
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.packed_ring import BOTH, position_of
from lguestlib.virtio.queue_state import QueueState

RINGS = 1000
"""What one seed makes."""

_MARKS = (0, AVAIL, USED, BOTH)


def one(seed: int) -> int:
    """The rings of *seed*; how many."""
    random = Random(seed)
    draw = random.random
    size = random.choice((1, 2, 3, 4, 5, 8, 16))
    features = int(random.choice(FEATURES)) | PACKED
    with memory_of((HOME, HOME_SIZE), (FAR, FAR_SIZE)) as memory:
        ring = PackedRing(memory, QueueLayout.contiguous(0, size, GuestAddress(HOME)))
        oracle, where = PackedOracle(ring, features), Where(memory)
        device = PackedDeviceQueue(ring.layout, memory, features)
        home = memory.views()
        table = home.slice(GuestAddress(HOME), 16 * size)
        tables = home.slice(GuestAddress(TABLES_AT), 4 * TABLE_SIZE)
        held: list[Chain] = []
        try:
            for number in range(RINGS):
                at = position_of(device.state.available, size)
                first = at % size
                available = AVAIL if at < size else USED
                for _ in range(1 + int(draw() * 3)):
                    into, slot = table, first
                    if draw() < 0.3:
                        into, slot = tables, int(draw() * (4 * TABLE_SIZE // 16))
                    elif draw() < 0.6:
                        slot = (first + int(draw() * 4)) % size
                    marks = _MARKS[int(draw() * 4)]
                    if draw() < 0.5:
                        # Good as far as it goes: rings get full of such, and see what comes then.
                        DESCRIPTOR.pack_into(into, 16 * slot, HOME + 0x8000, 16, int(draw() * size), int(draw() * 4) | marks)
                        continue
                    DESCRIPTOR.pack_into(
                        into, 16 * slot, ADDRESSES[int(draw() * len(ADDRESSES))], LENGTHS[int(draw() * len(LENGTHS))],
                        int(draw() * (size + 1)) if draw() < 0.95 else 0xFFFF,
                        FLAGS[int(draw() * len(FLAGS))] & ~BOTH | marks,
                    )  # fmt: skip
                if draw() < 0.15:
                    # As a block request has them, in a row or in a table.
                    into, slots = table, [(first + step) % size for step in range(3)]
                    buffer_id = int(draw() * size)
                    if draw() < 0.4:
                        DESCRIPTOR.pack_into(table, 16 * first, TABLES_AT, 48, buffer_id, 4)
                        into, slots = tables, [0, 1, 2]
                    for slot, flags in zip(slots, (1, 3 if draw() < 0.5 else 1, 2)):
                        DESCRIPTOR.pack_into(into, 16 * slot, HOME + 0x8000, 16, buffer_id, flags)
                table[16 * first + 14] = table[16 * first + 14] & ~AVAIL | available & AVAIL
                table[16 * first + 15] = table[16 * first + 15] & ~(USED >> 8) | (available & USED) >> 8
                if draw() < 0.05:
                    ring.driver_event = random.getrandbits(16), int(draw() * 5)
                expected = oracle.all_from(at, held) if number % 8 == 0 else None
                found: list[Verdict] = []
                try:
                    while chains := device.pop_many():
                        held += chains
                        if expected is not None:
                            found += map(where.outcome, chains)
                except errors.ChainError as error:
                    found.append(refusal(error))
                    without_frames(error)
                assert expected is None or found == expected
                for chain in held:
                    assert sum(map(len, chain.readable)) == chain.readable_length
                    assert sum(map(len, chain.writable)) == chain.writable_length
                    chain.written = chain.writable_length
                if draw() < 0.6:
                    device.push_many(held)
                    held.clear()
                    device.should_interrupt()
                if draw() < 0.002:
                    held.clear()
                    device.release()
                    places = (off_wrap(int(draw() * 2 * size), size) for _ in range(2))
                    device = PackedDeviceQueue(ring.layout, memory, features, QueueState(*places))
        finally:
            table.release()
            tables.release()
            home.release()
            device.release()
            oracle.release()
            ring.release()
    return RINGS
