"""The packed ring, device side: rows P1 to P8 (virtio 1.3, 2.8)."""

import struct

from lguestlib.abi.virtio_blk import VIRTIO_BLK_T_IN
from lguestlib.abi.virtio_ring import (
    VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE,
    VRING_PACKED_EVENT_FLAG_ENABLE,
)
from lguestlib.virtio import errors
from lguestlib.virtio.conformance.case import (
    BOTH,
    DATA,
    HEADER,
    INDIRECT,
    MORE,
    NEXT,
    NOWHERE,
    STATUS,
    TABLE,
    WITH_EVENT,
    WITH_INDIRECT,
    WRITE,
    Anchor,
    At,
    Case,
    Content,
    DriverEvent,
    Fault,
    Fill,
    Kick,
    PackedCase,
    PackedDescriptor,
    PackedStep,
    Restart,
    Served,
    Take,
    Told,
    WatchedCase,
)
from lguestlib.virtio.conformance.split_cases import GOT, READ, SECTOR, header

AVAIL, USED = 1 << 7, 1 << 15


def chain(*ids: int) -> tuple[PackedDescriptor, ...]:
    """Header, data and status of a read, with these buffer IDs."""
    return (
        PackedDescriptor(HEADER, 16, NEXT, ids[0]), PackedDescriptor(DATA, SECTOR, NEXT | WRITE, ids[1]),
        PackedDescriptor(STATUS, 1, WRITE, ids[2]),
    )  # fmt: skip


def table(buffer: int = 0, at: At = TABLE, length: int = 48, flags: int = INDIRECT) -> tuple[PackedDescriptor, ...]:
    """The descriptor that names an indirect table."""
    return (PackedDescriptor(at, length, flags, buffer),)


ENTRIES = (PackedDescriptor(HEADER, 16), PackedDescriptor(DATA, SECTOR, WRITE), PackedDescriptor(STATUS, 1, WRITE))
REQUEST = chain(0, 0, 0)
DONE = Served(0, SECTOR + 1)


def _used(slot: int, buffer: int, wrap: bool = True) -> dict[At, Content]:
    """The used element of a read at *slot*, from its length on."""
    flags = (AVAIL | USED if wrap else 0) | WRITE
    return {At(Anchor.DESCRIPTORS, 16 * slot + 8): struct.pack("<IHH", SECTOR + 1, buffer, flags)}


def _legal(
    ids: str,
    title: str,
    clause: str,
    *steps: PackedStep,
    events: tuple[Served, ...] = (DONE,),
    after: dict[At, Content] | None = None,
    size: int = 8,
    features: int = BOTH,
    base: int | None = None,
    indirect: dict[At, tuple[PackedDescriptor, ...]] | None = None,
) -> PackedCase:
    return PackedCase(
        tuple(ids.split()), title, clause, size=size, features=features, base=base, memory=READ,
        indirect=indirect or {}, steps=steps, events=events, after=GOT | (after or {}), demanded=True,
    )  # fmt: skip


def _hostile(
    ids: str,
    title: str,
    clause: str,
    error: type[errors.QueueError],
    *descriptors: PackedDescriptor,
    features: int = BOTH,
    indirect: dict[At, tuple[PackedDescriptor, ...]] | None = None,
) -> PackedCase:
    """A chain that is refused, and gone past: the next one, behind it, is served (S27)."""
    memory = READ | {MORE: header(VIRTIO_BLK_T_IN, 2)}
    return PackedCase(
        tuple(ids.split()), title, clause, features=features, memory=memory, indirect=indirect or {},
        steps=(Fill(0, descriptors), Fill(len(descriptors), chain(7, 7, 7)), Kick()),
        events=(Fault(error), Served(7, SECTOR + 1)), after=GOT,
    )  # fmt: skip


def _event(title: str, off_wrap: int, flags: int, told: bool, features: int = BOTH) -> PackedCase:
    return _legal(
        "P6", title, "2.8.10", DriverEvent(off_wrap, flags), Fill(0, REQUEST), Kick(), Told(told), features=features,
    )  # fmt: skip


_LAPS = tuple(
    step for number in range(16)
    for step in (Fill(3 * number % 8, REQUEST, not (3 * number // 8) & 1), Kick())
)  # fmt: skip

PACKED_CASES: tuple[Case, ...] = (
    _legal("P1", "available by AVAIL set and USED clear", "2.8.1", Fill(0, REQUEST), Kick()),
    PackedCase(
        ("P1",), "AVAIL and USED both set is nothing available", "2.8.1", memory=READ, steps=(
            Fill(
                0, tuple(PackedDescriptor(d.address, d.length, d.flags | AVAIL | USED, raw=True) for d in REQUEST),
                available=False,
            ),
            Kick(),
        ), demanded=True,
    ),
    PackedCase(
        ("P1",), "the flags of the lap before are nothing available", "2.8.1", base=0x0001_0001, memory=READ,
        steps=(Fill(1, REQUEST, available=False), Kick()), demanded=True,
    ),
    _legal(
        "P2", "a chain that ends where the ring does", "2.8.1", Fill(0, REQUEST), Kick(),
        Fill(0, REQUEST, False), Kick(), Fill(0, REQUEST), Kick(), size=3, events=(DONE,) * 3, after=_used(0, 0),
    ),
    _legal(
        "P2", "a chain round the ring's end", "2.8.1", Fill(0, REQUEST), Kick(), Fill(3, REQUEST), Kick(),
        size=5, events=(DONE,) * 2, after=_used(3, 0),
    ),
    _legal(
        "P2", "a ring of one", "2.8.1", Fill(0, table()), Kick(), Fill(0, table(), False), Kick(), Fill(0, table()),
        Kick(), size=1, indirect={TABLE: ENTRIES}, events=(DONE,) * 3,
    ),
    _legal("P2", "sixteen chains through six laps", "2.8.1", *_LAPS, events=(DONE,) * 16),
    PackedCase(
        ("P2", "S1"), "a size of 0", "2.8.10.1", size=0, steps=(Kick(),), events=(Fault(errors.QueueLayoutError),),
    ),
    WatchedCase(
        ("P3",), "flags are read first and written last, whole", "2.8.21", tests=(
            "tests/virtio/test_order.py::test_p3_flags_are_read_first_and_the_first_ones_written_last",
        ),
    ),
    _legal(
        "P3", "a chain without its first descriptor's flags is nothing yet", "2.8.21",
        Fill(1, REQUEST[1:], available=False), Kick(), Fill(0, REQUEST), Kick(),
    ),
    _legal(
        "P4", "the buffer ID is the last descriptor's", "2.8.6", Fill(0, chain(7, 6, 5)), Kick(),
        events=(Served(5, SECTOR + 1),), after=_used(0, 5),
    ),
    _hostile("P4", "a buffer ID past the ring's size", "2.8.5", errors.BufferIdOutOfRange, *chain(0, 0, 8)),
    PackedCase(
        ("P4", "S29"), "a buffer ID that is in flight", "2.8.5", memory=READ, steps=(
            Fill(0, chain(1, 1, 1)), Take(1), Fill(3, chain(1, 1, 1)), Take(1), Kick(),
        ), events=(Fault(errors.BufferIdInFlight), Served(1, SECTOR + 1)), after=GOT,
    ),
    _legal(
        "P5", "used elements stand where chains began, and their lengths are passed over", "2.8.6",
        Fill(0, chain(4, 4, 4)), Fill(3, chain(2, 2, 2)), Kick(),
        events=(Served(4, SECTOR + 1), Served(2, SECTOR + 1)), after=_used(0, 4) | _used(3, 2),
    ),
    PackedCase(
        ("P5", "S4", "S28"), "every descriptor of the ring is chained to the next", "2.8.19", memory=READ,
        steps=(Fill(0, (PackedDescriptor(HEADER, 16, NEXT),) * 8), Kick()), events=(Fault(errors.DescriptorLoop),),
    ),
    PackedCase(
        ("P5", "S28"), "descriptors made available over those in flight", "2.8.13", size=4, memory=READ, steps=(
            Fill(0, chain(1, 1, 1)), Take(1), Fill(3, chain(2, 2, 2)), Take(1), Kick(),
        ), events=(Fault(errors.RingOverrun), Served(1, SECTOR + 1)), after=GOT,
    ),
    _event("enabled by flag", 0, VRING_PACKED_EVENT_FLAG_ENABLE, True),
    _event("disabled by flag", 0, VRING_PACKED_EVENT_FLAG_DISABLE, False),
    _event("asked for at the chain that comes", 0x8000, VRING_PACKED_EVENT_FLAG_DESC, True),
    _event("asked for at a later descriptor", 0x8005, VRING_PACKED_EVENT_FLAG_DESC, False),
    _event("asked for at the same place a lap later", 0, VRING_PACKED_EVENT_FLAG_DESC, False),
    _event("asked for at a place past the ring", 0x8008, VRING_PACKED_EVENT_FLAG_DESC, True),
    _event("asked for by position though that was not negotiated", 0x8005, VRING_PACKED_EVENT_FLAG_DESC, True,
           WITH_INDIRECT),
    _event("flags that mean nothing", 0x8005, 3, True),
    _event("flags of all ones", 0xFFFF, 0xFFFF, True),
    _legal(
        "P7", "an indirect table goes by position", "2.8.7", Fill(0, table(3)), Kick(), indirect={TABLE: ENTRIES},
        events=(Served(3, SECTOR + 1),), after=_used(0, 3),
    ),
    PackedCase(
        ("P7",), "NEXT and IDs in an indirect table mean nothing", "2.8.7", memory=READ,
        indirect={TABLE: tuple(PackedDescriptor(d.address, d.length, d.flags | NEXT, 0xFFFF) for d in ENTRIES)},
        steps=(Fill(0, table(3)), Kick()), events=(Served(3, SECTOR + 1),), after=GOT,
    ),
    _hostile(
        "P7 S5", "an indirect table that was not negotiated", "2.8.7", errors.IndirectNotNegotiated, *table(),
        features=WITH_EVENT, indirect={TABLE: ENTRIES},
    ),
    PackedCase(
        ("P7", "S6"), "INDIRECT in an indirect table means nothing", "2.8.7", memory=READ,
        indirect={TABLE: tuple(PackedDescriptor(d.address, d.length, d.flags | INDIRECT) for d in ENTRIES)},
        steps=(Fill(0, table(3)), Kick()), events=(Served(3, SECTOR + 1),), after=GOT,
    ),
    _hostile(
        "P7 S7", "indirect and chained", "2.8.19", errors.IndirectWithNext,
        PackedDescriptor(TABLE, 48, INDIRECT | NEXT), PackedDescriptor(STATUS, 1, WRITE), indirect={TABLE: ENTRIES},
    ),
    _hostile("P7 S9", "a table of nothing", "2.8.7", errors.IndirectLength, *table(length=0)),
    _hostile("P7 S9", "a table of two and a half", "2.8.7", errors.IndirectLength, *table(length=40)),
    _hostile("P7 S11", "a table in no memory", "2.8.7", errors.BadAddress, *table(at=NOWHERE)),
    _hostile(
        "P7 S13", "readable after writable", "2.8.5", errors.ReadableAfterWritable,
        PackedDescriptor(DATA, SECTOR, NEXT | WRITE), PackedDescriptor(HEADER, 16),
    ),
    _hostile("P7 S30", "a buffer in no memory", "2.8.5", errors.BadAddress, PackedDescriptor(NOWHERE, 16, WRITE)),
    _legal(
        "P8", "a stopped ring says where both sides are", "2.8.1", Fill(0, REQUEST), Kick(), Restart(0x8003_8003),
        Fill(3, REQUEST), Kick(), Restart(0x8006_8006), Fill(6, REQUEST), Kick(), Restart(0x0001_0001),
        Fill(1, REQUEST, False), Kick(), events=(DONE,) * 4,
    ),
    _legal(
        "P8", "it goes on from where SET_VRING_BASE says", "2.8.1", Fill(5, REQUEST), Kick(), base=0x8005_8005,
        after=_used(5, 0),
    ),
    PackedCase(
        ("P8", "T15"), "a place that the ring has not", "Vring state description", base=0x8009_8009,
        steps=(Kick(),), events=(Fault(errors.QueueStateError),),
    ),
)  # fmt: skip
"""Every P row."""
