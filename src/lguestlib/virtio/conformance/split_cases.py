"""The split ring, device side: rows S1 to S34 (virtio 1.3, 2.7)."""

from lguestlib.abi.virtio_blk import (
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    virtio_blk_outhdr,
)
from lguestlib.virtio import errors
from lguestlib.virtio.chain import INDIRECT_MAX
from lguestlib.virtio.conformance.case import (
    ANY,
    BLK,
    BOTH,
    DATA,
    END,
    HEADER,
    INDIRECT,
    ISLAND,
    MORE,
    NET,
    NEXT,
    NOWHERE,
    SEAM,
    STATUS,
    TABLE,
    WITH_EVENT,
    WITH_INDIRECT,
    WRITE,
    WRITING,
    Anchor,
    Applies,
    At,
    Case,
    Content,
    Descriptor,
    Fault,
    Flicker,
    Interrupts,
    Kick,
    Load,
    Publish,
    Restart,
    Rewrite,
    RingCase,
    Sectors,
    Served,
    Take,
    WatchedCase,
    Told,
)
from lguestlib.virtio.features import Feature

OK = bytes([VIRTIO_BLK_S_OK])
IOERR = bytes([VIRTIO_BLK_S_IOERR])
SECTOR = 512


def header(kind: int, sector: int) -> bytes:
    """A block request's first 16 bytes."""
    return bytes(virtio_blk_outhdr(kind, 0, sector))


def r(address: At, length: int) -> Descriptor:
    """A buffer that the device reads."""
    return Descriptor(address, length)


def w(address: At, length: int) -> Descriptor:
    """A buffer that the device writes."""
    return Descriptor(address, length, WRITE)


def table_of(count: int, at: At = TABLE, flags: int = INDIRECT) -> Descriptor:
    """The descriptor that names an indirect table of *count* entries."""
    return Descriptor(at, 16 * count, flags)


def linked(*descriptors: Descriptor, at: int = 0) -> dict[int, Descriptor]:
    """A chain in consecutive entries from *at*."""
    table = {
        index: Descriptor(each.address, each.length, each.flags | NEXT, index + 1)
        for index, each in enumerate(descriptors, at)
    }
    table[at + len(descriptors) - 1] = descriptors[-1]
    return table


def inside(*descriptors: Descriptor) -> tuple[Descriptor, ...]:
    """A chain that fills an indirect table."""
    return tuple(linked(*descriptors).values())


REQUEST = (r(HEADER, 16), w(DATA, SECTOR), w(STATUS, 1))
"""Header, a sector of data, status: a read as drivers make it."""
READ = {HEADER: header(VIRTIO_BLK_T_IN, 2)}
GOT: dict[At, Content] = {DATA: Sectors(2), STATUS: OK}
GOOD = linked(r(MORE, 16), w(MORE + 0x200, SECTOR), w(MORE + 0x400, 1), at=5)
"""Another read, in the last three entries of a table of eight."""
READ_TWO = READ | {MORE: header(VIRTIO_BLK_T_IN, 3)}
GOT_OTHER: dict[At, Content] = {MORE + 0x200: Sectors(3), MORE + 0x400: OK}

BUFFER_RULES = "2.7.4.2"
TABLE_RULES = "2.7.5"
INDIRECT_RULES = "2.7.5.3.1"


def _hostile(
    ids: str,
    title: str,
    clause: str,
    error: type[errors.QueueError],
    table: dict[int, Descriptor],
    indirect: dict[At, tuple[Descriptor, ...]] | None = None,
    features: int = BOTH,
    head: int = 0,
    applies: Applies = ANY,
    size: int = 8,
) -> RingCase:
    """A chain at *head* that is refused, and a good one behind it (S27)."""
    return RingCase(
        tuple(ids.split()), title, clause, applies, size, features,
        table=GOOD | table, indirect=indirect or {}, memory=READ_TWO,
        steps=(Publish((head, 5)), Kick()), events=(Fault(error), Served(5, SECTOR + 1)), after=GOT_OTHER,
    )  # fmt: skip


def _legal(
    ids: str,
    title: str,
    clause: str,
    table: dict[int, Descriptor],
    indirect: dict[At, tuple[Descriptor, ...]] | None = None,
    after: dict[At, Content] | None = None,
    written: int = SECTOR + 1,
    size: int = 8,
    demanded: bool = True,
    memory: dict[At, bytes] | None = None,
    features: int = BOTH,
    applies: Applies = BLK,
) -> RingCase:
    """One chain at 0 that is served."""
    return RingCase(
        tuple(ids.split()), title, clause, applies, size, features,
        table=table, indirect=indirect or {}, memory=READ if memory is None else memory,
        events=(Served(0, written),), after=GOT if after is None else after, demanded=demanded,
    )  # fmt: skip


def _layout(ids: str, title: str, size: int, misplaced: tuple[int, int, int] = (0, 0, 0)) -> RingCase:
    return RingCase(
        tuple(ids.split()), title, "2.7", ANY, size, misplaced=misplaced, table=linked(*REQUEST), memory=READ,
        events=(Fault(errors.QueueLayoutError),),
    )  # fmt: skip


_SPLIT_HEADERS = [(1, 15), (8, 8), (15, 1), (4, 4, 4, 4), (1,) * 16]


def _cut_header(pieces: tuple[int, ...]) -> RingCase:
    at, descriptors = 0, []
    for length in pieces:
        descriptors.append(r(HEADER + at, length))
        at += length
    cut = " and ".join(map(str, pieces)) if len(pieces) < 16 else "single bytes"
    return _legal(
        "S33 CVE-2022-2132" if len(pieces) > 4 else "S33", f"header cut into {cut}", "2.7.4.1",
        linked(*descriptors, *REQUEST[1:]), size=32,
    )  # fmt: skip


SPLIT_CASES: tuple[Case, ...] = (
    RingCase(
        ("S1",), "indices run past 65535", "2.7.6", BLK, base=0xFFFE, table=linked(*REQUEST), memory=READ,
        steps=(Publish((0,)), Kick()) * 4, events=(Served(0, SECTOR + 1),) * 4, after=GOT, demanded=True,
    ),
    _layout("S1 CVE-2017-17381", "a size of 0", 0),
    _layout("S1", "a size that is no power of two", 12),
    _layout("S1", "a size over 32768", 65536),
    RingCase(
        ("S2", "CVE-2016-5403"), "avail index one more than the queue is long", "2.7.13.3", ANY,
        table=linked(*REQUEST), memory=READ, steps=(Publish((0,), ahead=8), Kick()),
        events=(Fault(errors.AvailIndexError),),
    ),
    RingCase(
        ("S2",), "avail index goes back", "2.7.13.3", ANY, table=linked(*REQUEST), memory=READ,
        steps=(Publish((), ahead=-1), Kick()), events=(Fault(errors.AvailIndexError),),
    ),
    RingCase(
        ("S2",), "the whole queue at once", "2.7.13.3", BLK, size=4, memory=READ_TWO, features=BOTH,
        table={
            0: table_of(3), 1: table_of(3, TABLE + 0x100), 2: table_of(3, TABLE + 0x200), 3: table_of(3, TABLE + 0x300),
        },
        indirect={
            TABLE + 0x100 * number: inside(r(HEADER, 16), w(DATA + 0x200 * number, SECTOR), w(STATUS + number, 1))
            for number in range(4)
        },
        steps=(Publish((3, 1, 0, 2)), Kick()), events=tuple(Served(head, SECTOR + 1) for head in (3, 1, 0, 2)),
        after={DATA + 0x200 * number: Sectors(2) for number in range(4)}, demanded=True,
    ),
    _hostile("S3", "head just past the table", "2.7.6", errors.HeadOutOfRange, {}, head=8),
    _hostile("S3", "head as large as can be", "2.7.6", errors.HeadOutOfRange, {}, head=0xFFFF),
    _hostile(
        "S3", "next just past the table", TABLE_RULES, errors.NextOutOfRange,
        {0: Descriptor(HEADER, 16, NEXT, 8)},
    ),
    _hostile(
        "S3", "next as large as can be", TABLE_RULES, errors.NextOutOfRange,
        {0: Descriptor(HEADER, 16, NEXT, 1), 1: Descriptor(DATA, SECTOR, NEXT | WRITE, 0xFFFF)},
    ),
    _hostile(
        "S3", "next past the indirect table but not past the ring", INDIRECT_RULES, errors.NextOutOfRange,
        {0: table_of(2)},
        {TABLE: (Descriptor(HEADER, 16, NEXT, 1), Descriptor(DATA, SECTOR, NEXT | WRITE, 2), w(STATUS, 1))},
    ),
    _hostile("S4", "a loop of one", "2.7.5.2", errors.DescriptorLoop, {0: Descriptor(HEADER, 16, NEXT, 0)}),
    _hostile(
        "S4", "a loop behind a good start", "2.7.5.2", errors.DescriptorLoop,
        {
            0: Descriptor(HEADER, 16, NEXT, 1), 1: Descriptor(DATA, SECTOR, NEXT | WRITE, 2),
            2: Descriptor(DATA, SECTOR, NEXT | WRITE, 1),
        },
    ),
    _hostile(
        "S4", "a loop in an indirect table", "2.7.5.2", errors.DescriptorLoop, {0: table_of(2)},
        {TABLE: (Descriptor(HEADER, 16, NEXT, 1), Descriptor(DATA, SECTOR, NEXT | WRITE, 1))},
    ),
    _legal(
        "S4", "a chain as long as its table", "2.7.5.2",
        linked(r(HEADER, 16), *(w(DATA + 0x100 * n, 0x100) for n in range(6)), w(STATUS, 1)),
        after={DATA: Sectors(2, 3), STATUS: OK}, written=3 * SECTOR + 1,
    ),
    _hostile(
        "S5", "an indirect table that was not negotiated", INDIRECT_RULES, errors.IndirectNotNegotiated,
        {0: table_of(3)}, {TABLE: inside(*REQUEST)}, features=WITH_EVENT,
    ),
    _hostile(
        "S6", "an indirect table inside an indirect table", INDIRECT_RULES, errors.NestedIndirect,
        {0: table_of(1)}, {TABLE: (table_of(3, TABLE + 0x100),), TABLE + 0x100: inside(*REQUEST)},
    ),
    _hostile(
        "S6", "an indirect table that names itself", INDIRECT_RULES, errors.NestedIndirect,
        {0: table_of(1)}, {TABLE: (table_of(1),)},
    ),
    _hostile(
        "S7", "indirect and chained", INDIRECT_RULES, errors.IndirectWithNext,
        {0: Descriptor(TABLE, 48, INDIRECT | NEXT, 1), 1: w(STATUS + 1, 1)}, {TABLE: inside(*REQUEST)},
    ),
    _legal(
        "S8", "an indirect table after direct descriptors", INDIRECT_RULES,
        {0: Descriptor(HEADER, 16, NEXT, 3), 3: table_of(2)}, {TABLE: inside(*REQUEST[1:])},
    ),
    _legal(
        "S8", "an indirect table of the status alone", INDIRECT_RULES,
        {0: Descriptor(HEADER, 16, NEXT, 3), 3: Descriptor(DATA, SECTOR, NEXT | WRITE, 1), 1: table_of(1)},
        {TABLE: inside(REQUEST[2])},
    ),
    _hostile("S9", "a table of nothing", INDIRECT_RULES, errors.IndirectLength, {0: Descriptor(TABLE, 0, INDIRECT)}),
    _hostile(
        "S9", "a table of half a descriptor", INDIRECT_RULES, errors.IndirectLength,
        {0: Descriptor(TABLE, 8, INDIRECT)}, {TABLE: inside(*REQUEST)},
    ),
    _hostile(
        "S9", "a table of three and a bit", INDIRECT_RULES, errors.IndirectLength,
        {0: Descriptor(TABLE, 49, INDIRECT)}, {TABLE: inside(*REQUEST)},
    ),
    _legal(
        "S10", "write on the descriptor that names the table", "2.7.5.3.2", {0: table_of(3, flags=INDIRECT | WRITE)},
        {TABLE: inside(*REQUEST)},
    ),
    _legal(
        "S11", "an indirect table across two regions", INDIRECT_RULES, {0: table_of(3, SEAM - 24)},
        {SEAM - 24: inside(*REQUEST)},
    ),
    _hostile(
        "S11", "an indirect table that runs into a hole", INDIRECT_RULES, errors.BadAddress, {0: table_of(3, END - 16)},
        {END - 16: (Descriptor(HEADER, 16, NEXT, 1),)},
    ),
    _hostile("S11", "an indirect table in no memory", INDIRECT_RULES, errors.BadAddress, {0: table_of(3, NOWHERE)}),
    _legal(
        "S12", "an indirect table of 18 in a ring of 8", "what drivers do", {0: table_of(18)},
        {TABLE: inside(r(HEADER, 16), *(w(DATA + 0x20 * n, 0x20) for n in range(16)), w(STATUS, 1))}, demanded=False,
    ),
    _legal(
        "S12", "an indirect table of 514", "what drivers do", {0: table_of(514)},
        {TABLE: inside(r(HEADER, 16), *(w(DATA + 16 * n, 16) for n in range(512)), w(STATUS + 0x1000, 1))},
        {DATA: Sectors(2, 16), STATUS + 0x1000: OK}, 16 * SECTOR + 1, demanded=False,
    ),
    _hostile(
        "S12", "an indirect table over the cap", "a cap of this library", errors.IndirectLength,
        {0: table_of(INDIRECT_MAX + 1)},
        {TABLE: inside(r(HEADER, 16), *(w(DATA + n % 4096, 1) for n in range(INDIRECT_MAX - 1)), w(STATUS, 1))},
    ),
    _hostile(
        "S13", "readable after writable", BUFFER_RULES, errors.ReadableAfterWritable,
        linked(r(HEADER, 16), w(DATA, SECTOR), r(STATUS + 16, 16), w(STATUS, 1)),
    ),
    _hostile(
        "S13", "readable after writable in an indirect table", BUFFER_RULES, errors.ReadableAfterWritable,
        {0: table_of(3)}, {TABLE: inside(w(DATA, SECTOR), r(HEADER, 16), w(STATUS, 1))},
    ),
    _legal(
        "S14", "a descriptor of no length", "2.7.5", linked(r(HEADER, 16), w(DATA, 0), w(DATA, SECTOR), w(STATUS, 1)),
        demanded=False,
    ),
    _legal(
        "S14", "a status and then nothing", "2.7.5", linked(*REQUEST, w(MORE, 0)), demanded=False,
    ),
    _hostile(
        "S14 CVE-2020-10725", "no length at a bad address", TABLE_RULES, errors.BadAddress,
        linked(r(HEADER, 16), w(NOWHERE, 0), w(STATUS, 1)),
    ),
    _hostile(
        "S14 CVE-2016-6490", "a loop of no length", "2.7.5.2", errors.DescriptorLoop,
        {0: Descriptor(HEADER, 0, NEXT, 1), 1: Descriptor(HEADER, 0, NEXT, 0)},
    ),
    _hostile(
        "S14 CVE-2023-5158", "a loop of no length in an indirect table", "2.7.5.2", errors.DescriptorLoop,
        {0: table_of(4)},
        {TABLE: tuple(Descriptor(DATA, 0, NEXT | WRITE, (n + 1) % 4) for n in range(4))},
    ),
    _legal(
        "S14", "an empty chain", "2.7.5", {0: r(HEADER, 0)}, after={}, written=0, demanded=False, applies=ANY,
    ),
    _hostile(
        "S15", "lengths that add up to more than 2^32 - 1", "2.7.5.2", errors.ChainTooLong, {0: table_of(2050)},
        {TABLE: inside(r(HEADER, 16), *(w(SEAM, 0x20_0000) for _ in range(2048)), w(STATUS, 1))},
    ),
    _legal(
        "S16", "a buffer that ends where memory ends", TABLE_RULES,
        linked(r(HEADER, 16), w(END - SECTOR, SECTOR), w(STATUS, 1)), after={END - SECTOR: Sectors(2), STATUS: OK},
    ),
    _legal(
        "S16", "a buffer that fills a region to its end", TABLE_RULES,
        linked(r(HEADER, 16), w(At(Anchor.ISLAND_END, -SECTOR), SECTOR), w(ISLAND, 1)),
        after={At(Anchor.ISLAND_END, -SECTOR): Sectors(2), ISLAND: OK},
    ),
    _hostile(
        "S16", "one byte past the end of memory", TABLE_RULES, errors.BadAddress,
        linked(r(HEADER, 16), w(END - SECTOR + 1, SECTOR), w(STATUS, 1)),
    ),
    _hostile(
        "S16", "one byte before a region", TABLE_RULES, errors.BadAddress,
        linked(r(HEADER, 16), w(ISLAND - 1, SECTOR), w(STATUS, 1)),
    ),
    _hostile(
        "S16", "address and length wrap", TABLE_RULES, errors.BadAddress,
        linked(r(HEADER, 16), w(At(Anchor.ZERO, -0x100), 0x1000), w(STATUS, 1)),
    ),
    _hostile(
        "S16", "address and length wrap into memory", TABLE_RULES, errors.BadAddress,
        linked(r(HEADER, 16), w(At(Anchor.ZERO, -0x1000), 0x20_0000), w(STATUS, 1)),
    ),
    _hostile(
        "S16 S31 CVE-2016-7422", "a length of almost 4 GiB at a good address", TABLE_RULES, errors.BadAddress,
        linked(r(HEADER, 16), w(DATA, 0xFFFF_F000), w(STATUS, 1)),
    ),
    _legal(
        "S17 CVE-2018-1059", "a buffer across two regions", "2.7.4.1",
        linked(r(HEADER, 16), w(SEAM - 0x100, SECTOR), w(STATUS, 1)),
        after={SEAM - 0x100: Sectors(2), STATUS: OK},
    ),
    _legal(
        "S17", "a header across two regions", "2.7.4.1", linked(r(SEAM - 3, 16), *REQUEST[1:]),
        memory={SEAM - 3: header(VIRTIO_BLK_T_IN, 2)},
    ),
    RingCase(
        ("S18", "CVE-2020-14375"), "a descriptor rewritten while its chain is in hand", "2.7.5", BLK,
        table=linked(*REQUEST), memory=READ,
        steps=(Publish((0,)), Take(1), Rewrite(1, Descriptor(NOWHERE, 0xFFFF_FFFF, NEXT | WRITE, 2)), Kick()),
        events=(Served(0, SECTOR + 1),), after=GOT,
    ),
    RingCase(
        ("S18", "CVE-2026-93683"), "a descriptor that flickers while it is read", "2.7.5", BLK,
        table=linked(r(HEADER, 16), w(END - SECTOR, SECTOR), w(STATUS, 1)), memory=READ,
        steps=(Flicker(1, Descriptor(DATA, 8 * SECTOR, NEXT | WRITE, 2), 150),), events=(),
    ),
    _legal("S19", "a read fills its buffers and says so", "2.7.8.2", linked(*REQUEST)),
    _legal(
        "S19 CVE-2024-8612", "an error is no longer than what was written", "2.7.8.2", linked(*REQUEST),
        memory={HEADER: header(VIRTIO_BLK_T_IN, 1 << 55)}, after={STATUS: IOERR}, written=0,
    ),
    RingCase(
        ("S19",), "a write fills the status alone", "2.7.8.2", WRITING, memory={
            HEADER: header(VIRTIO_BLK_T_OUT, 40), DATA: bytes(range(256)) * 2, MORE: header(VIRTIO_BLK_T_IN, 40),
        },
        table=linked(r(HEADER, 16), r(DATA, SECTOR), w(STATUS, 1)) | GOOD,
        steps=(Publish((0,)), Kick(), Publish((5,)), Kick()), events=(Served(0, 1), Served(5, SECTOR + 1)),
        after={STATUS: OK, MORE + 0x200: bytes(range(256)) * 2, MORE + 0x400: OK}, demanded=True,
    ),
    WatchedCase(
        ("S20",), "the used element is there before used.idx", "2.7.14", tests=(
            "tests/virtio/test_order.py::test_s20_s23_entries_are_published_before_their_index_and_read_after_it",
            "tests/virtio/test_tearing.py::test_y1_no_value_is_read_that_was_never_written",
        ),
    ),
    RingCase(
        ("S20", "S21", "S22", "S23"), "a load by kicks and interrupts alone, with the event index", "2.7.7", ANY,
        size=16, features=BOTH, steps=(Load(400, 3),), demanded=True,
    ),
    RingCase(
        ("S21", "S22", "S25"), "a load by kicks and interrupts alone, with flags", "2.7.7", ANY, size=16,
        features=WITH_INDIRECT, steps=(Load(400, 3),), demanded=True,
    ),
    RingCase(
        ("S22",), "one request at a time", "2.7.10", ANY, size=16, features=BOTH, steps=(Load(150, 1),), demanded=True,
    ),
    WatchedCase(
        ("S21", "S22"), "fences stand where they must", "2.7.13.4.1", tests=(
            "tests/virtio/test_suppression.py::test_s21_s22_a_queue_without_its_fence_loses_one_where_there_are_store_buffers",
            "tests/memory/test_fence.py::test_s21_s22_store_buffering_is_seen_without_the_fence_and_never_with_it",
        ),
    ),
    WatchedCase(
        ("S23",), "avail.idx is read before the entries", "2.7.13.3.1", tests=(
            "tests/memory/test_fence.py::test_s23_an_acquire_is_needed_where_loads_are_reordered",
            "tests/virtio/test_order.py::test_s23_both_sides_ask_what_their_processor_needs",
        ),
    ),
    RingCase(
        ("S24",), "an event just met is told of", "2.7.7.2", BLK, features=WITH_EVENT, table=linked(*REQUEST),
        memory=READ, steps=(Interrupts(event=0), Publish((0,)), Kick(), Told()), events=(Served(0, SECTOR + 1),),
        after=GOT, demanded=True,
    ),
    RingCase(
        ("S24",), "an event further on is told of when it is met", "2.7.7.2", BLK, features=WITH_EVENT,
        table=linked(*REQUEST) | GOOD, memory=READ_TWO,
        steps=(
            Interrupts(event=2), Publish((0,)), Kick(), Told(False), Publish((5,)), Kick(), Told(False),
            Publish((0,)), Kick(), Told(),
        ),
        events=(Served(0, SECTOR + 1), Served(5, SECTOR + 1), Served(0, SECTOR + 1)), after=GOT | GOT_OTHER,
        demanded=True,
    ),
    RingCase(
        ("S24",), "after a restart nobody knows what was told", "2.7.7.2", BLK, features=WITH_EVENT,
        table=linked(*REQUEST), memory=READ,
        steps=(
            Interrupts(event=0), Publish((0,)), Kick(), Told(), Restart(1), Interrupts(event=1), Publish((0,)), Kick(),
            Publish((0,)), Kick(), Told(),
        ),
        events=(Served(0, SECTOR + 1),) * 3, after=GOT, demanded=True,
    ),
    RingCase(
        ("S25",), "with the event index flags mean nothing", "2.7.7.2", BLK, features=WITH_EVENT,
        table=linked(*REQUEST), memory=READ, steps=(Interrupts(flags=1, event=0), Publish((0,)), Kick(), Told()),
        events=(Served(0, SECTOR + 1),), after=GOT, demanded=True,
    ),
    RingCase(
        ("S25",), "without it the event means nothing", "2.7.7.2", BLK, features=0, table=linked(*REQUEST),
        memory=READ, steps=(Interrupts(flags=0, event=99), Publish((0,)), Kick(), Told()),
        events=(Served(0, SECTOR + 1),), after=GOT, demanded=True,
    ),
    RingCase(
        ("S25",), "without it the flag is heeded", "2.7.7.2", BLK, features=0, table=linked(*REQUEST),
        memory=READ, steps=(Interrupts(flags=1), Publish((0,)), Kick(), Told(False)),
        events=(Served(0, SECTOR + 1),), after=GOT, demanded=True,
    ),
    RingCase(
        ("S26",), "notify on empty overrides the flag", "legacy", BLK, features=int(Feature.NOTIFY_ON_EMPTY),
        table=linked(*REQUEST), memory=READ, steps=(Interrupts(flags=1), Publish((0,)), Kick(), Told()),
        events=(Served(0, SECTOR + 1),), after=GOT, demanded=True,
    ),
    RingCase(
        ("S27",), "a ring full of malformed chains is gone past", "2.7.13", ANY,
        table=GOOD | {number: Descriptor(NOWHERE, 16, WRITE) for number in range(5)}, memory=READ_TWO,
        steps=(Publish((0, 1, 2, 3, 4)), Kick(), Publish((5,)), Kick()),
        events=(*(Fault(errors.BadAddress),) * 5, Served(5, SECTOR + 1)), after=GOT_OTHER,
    ),
    RingCase(
        ("S27", "S1"), "a malformed chain at index 65535", "2.7.13", ANY, base=0xFFFF,
        table=GOOD | {0: Descriptor(NOWHERE, 16, WRITE)}, memory=READ_TWO,
        steps=(Publish((0,)), Kick(), Publish((5,)), Kick()),
        events=(Fault(errors.BadAddress), Served(5, SECTOR + 1)), after=GOT_OTHER,
    ),
    RingCase(
        ("S28",), "everything is in flight and one comes again", "2.7.13", BLK, size=2,
        table={0: table_of(3), 1: table_of(3, TABLE + 0x100)}, memory=READ,
        indirect={
            TABLE: inside(*REQUEST), TABLE + 0x100: inside(r(HEADER, 16), w(DATA + 0x200, SECTOR), w(STATUS + 1, 1)),
        },
        steps=(Publish((0, 1)), Take(2), Publish((1,)), Take(1), Kick()),
        events=(Fault(errors.HeadInFlight), Served(0, SECTOR + 1), Served(1, SECTOR + 1)),
        after=GOT | {DATA + 0x200: Sectors(2), STATUS + 1: OK},
    ),
    RingCase(
        ("S29", "CVE-2022-26353"), "a head made available again while in flight", "2.7.13", BLK,
        table=linked(*REQUEST), memory=READ, steps=(Publish((0,)), Take(1), Publish((0,)), Take(1), Kick()),
        events=(Fault(errors.HeadInFlight), Served(0, SECTOR + 1)), after=GOT,
    ),
    RingCase(
        ("S29", "CVE-2022-26354"), "the same head twice at once", "2.7.13", ANY,
        table=linked(*REQUEST), memory=READ, steps=(Publish((0, 0)), Kick()),
        events=(Served(0, SECTOR + 1), Served(0, SECTOR + 1)), after=GOT,
    ),
    _legal(
        "S30 CVE-2024-3446", "data into the descriptor table itself", "2.7.4",
        linked(r(HEADER, 16), w(At(Anchor.DESCRIPTORS), SECTOR), w(STATUS, 1)), size=32, demanded=False, after={},
    ),
    _legal(
        "S30", "data into the available ring", "2.7.4",
        linked(r(HEADER, 16), w(At(Anchor.AVAILABLE, 4), SECTOR), w(STATUS, 1)), size=256, demanded=False, after={},
    ),
    _legal(
        "S30", "the status into used.idx", "2.7.4",
        linked(r(HEADER, 16), w(DATA, SECTOR), w(At(Anchor.USED, 2), 1)), demanded=False, after={},
    ),
    _hostile("S30", "a buffer in no memory", TABLE_RULES, errors.BadAddress, {0: w(NOWHERE, SECTOR)}),
    _hostile("S30", "a header in no memory", TABLE_RULES, errors.BadAddress, linked(r(NOWHERE, 16), *REQUEST[1:])),
    _hostile("S30", "a buffer at address 0", TABLE_RULES, errors.BadAddress, {0: w(At(Anchor.ZERO), SECTOR)}),
    RingCase(
        ("S31",), "random bytes without end", "5.4.6", Applies("rng"), table={0: w(SEAM, 0x20_0000)},
        events=(Served(0, None),), demanded=True,
    ),
    RingCase(
        ("S31",), "a get-id of 64 KiB", "5.2.6", BLK, table=linked(r(HEADER, 16), w(SEAM, 0x1_0000), w(STATUS, 1)),
        memory={HEADER: header(8, 0)}, events=(Served(0, None),),
    ),
    RingCase(
        ("S31",), "a read of two megabytes", "5.2.6", BLK,
        table=linked(r(HEADER, 16), w(SEAM, 0x20_0000), w(STATUS, 1)),
        memory={HEADER: header(VIRTIO_BLK_T_IN, 1 << 40)}, events=(Served(0, None),), after={STATUS: IOERR},
    ),
    _layout("S32", "a descriptor table that is not aligned", 8, (8, 0, 0)),
    _layout("S32", "an available ring that is not aligned", 8, (0, 1, 0)),
    _layout("S32", "a used ring that is not aligned", 8, (0, 0, 2)),
    _layout("S32", "a descriptor table in no memory", 8, (0x280_0000, 0, 0)),
    _layout("S32", "a used ring that ends past the end of memory", 8, (0, 0, 0x28_0000 - 0xD8)),
    *map(_cut_header, _SPLIT_HEADERS),
    _legal(
        "S33", "data and status in one buffer", "2.7.4.1", linked(r(HEADER, 16), w(DATA, SECTOR + 1)),
        after={DATA: Sectors(2), DATA + SECTOR: OK},
    ),
    _legal(
        "S33", "data in single bytes around a cut", "2.7.4.1",
        linked(r(HEADER, 16), w(DATA, 1), w(DATA + 1, SECTOR - 2), w(DATA + SECTOR - 1, 1), w(STATUS, 1)),
    ),
    RingCase(
        ("S33",), "the header and the data of a write in one buffer", "2.7.4.1", WRITING,
        memory={
            HEADER: header(VIRTIO_BLK_T_OUT, 41) + b"one-buffer-write" * 32, MORE: header(VIRTIO_BLK_T_IN, 41),
        },
        table=linked(r(HEADER, 16 + SECTOR), w(STATUS, 1)) | GOOD,
        steps=(Publish((0,)), Kick(), Publish((5,)), Kick()), events=(Served(0, 1), Served(5, SECTOR + 1)),
        after={STATUS: OK, MORE + 0x200: b"one-buffer-write" * 32, MORE + 0x400: OK}, demanded=True,
    ),
    RingCase(
        ("S33", "CVE-2023-6693"), "a header too short", "5.2.6", BLK, table=linked(r(HEADER, 8), *REQUEST[1:]),
        memory=READ, events=(Served(0, None),), after={STATUS: IOERR},
    ),
    RingCase(
        ("S33",), "no header", "5.2.6", BLK, table=linked(*REQUEST[1:]), events=(Served(0, None),),
        after={STATUS: IOERR},
    ),
    RingCase(
        ("S33",), "no room for a status", "5.2.6", BLK, table=linked(r(HEADER, 16), r(DATA, SECTOR)),
        memory={HEADER: header(VIRTIO_BLK_T_FLUSH, 0)}, events=(Served(0, 0),),
    ),
    RingCase(
        ("S33",), "a kind of request that there is not", "5.2.6.2", BLK, table=linked(*REQUEST),
        memory={HEADER: header(0x7777, 0)}, events=(Served(0, None),), after={STATUS: b"\2"}, demanded=True,
    ),
    RingCase(
        ("S33",), "a packet in pieces", "5.1.6.2", NET,
        table=linked(r(HEADER, 5), r(HEADER + 5, 7), r(HEADER + 12, 60)),
        memory={HEADER: bytes(12) + b"\xff" * 6 + bytes(54)}, events=(Served(0, 0),), demanded=True,
    ),
    RingCase(
        ("S33", "CVE-2022-2132"), "a packet in single bytes", "5.1.6.2", NET, size=128,
        table=linked(*(r(HEADER + n, 1) for n in range(72))),
        memory={HEADER: bytes(12) + b"\xff" * 6 + bytes(54)}, events=(Served(0, 0),), demanded=True,
    ),
    RingCase(
        ("S33", "CVE-2021-3748"), "a packet that is shorter than its header", "5.1.6.2", NET, table={0: r(HEADER, 7)},
        events=(Served(0, 0),),
    ),
    RingCase(
        ("S33", "CVE-2023-6693"), "a packet that is all header", "5.1.6.2", NET, table={0: r(HEADER, 12)},
        events=(Served(0, 0),),
    ),
    RingCase(
        ("S33", "CVE-2024-11614"), "a checksum past the packet's end", "5.1.6.2", NET, table={0: r(HEADER, 72)},
        memory={HEADER: b"\1\0\0\0\0\0\xf0\xff\xff\xff\0\0" + b"\xff" * 6 + bytes(54)}, events=(Served(0, 0),),
    ),
    RingCase(
        ("S33", "CVE-2021-3748"), "a packet that is to be written to", "5.1.6.2", NET, table={0: w(HEADER, 72)},
        events=(Served(0, None),),
    ),
    WatchedCase(
        ("S34", "CVE-2019-3900"), "an endless supply is taken in batches", "fairness", tests=(
            "tests/virtio/test_split_device.py::test_s34_cve_2019_3900_an_endless_supply_is_taken_in_batches",
        ),
    ),
)  # fmt: skip
"""Every S row."""
