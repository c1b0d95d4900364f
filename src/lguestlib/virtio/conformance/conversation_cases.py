"""Transports and life cycle as a vhost-user front-end meets them: rows T1 to T24 (QEMU's vhost-user.rst)."""

import struct

from lguestlib.abi import vhost_user as abi
from lguestlib.abi.virtio_blk import VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from lguestlib.virtio.conformance.case import (
    ANY,
    BLK,
    BOTH,
    DATA,
    FLUSHING,
    HEADER,
    MORE,
    READ_ONLY,
    STATUS,
    WRITING,
    Applies,
    Begin,
    Case,
    ConversationCase,
    ConversationStep,
    Do,
    Fd,
    Kick,
    Load,
    Publish,
    Raw,
    RingCase,
    Say,
    Served,
    WatchedCase,
)
from lguestlib.virtio.conformance.place import END, ISLAND, ISLAND_SIZE, SEAM, START, USER
from lguestlib.virtio.conformance.split_cases import GOOD, IOERR, OK, READ, REQUEST, SECTOR, header, linked, r, w
from lguestlib.virtio.features import Feature
from lguestlib.virtio.vhost_user.message import u64

NEED_REPLY = abi.VHOST_USER_VERSION | abi.VHOST_USER_NEED_REPLY_MASK
NO_FD = abi.VHOST_USER_VRING_NOFD_MASK
LOG_ALL = 1 << abi.VHOST_F_LOG_ALL
PROTOCOL = 1 << abi.VHOST_USER_F_PROTOCOL_FEATURES
ALL_ONES = (1 << 64) - 1

LOG_SHMFD = (abi.VHOST_USER_PROTOCOL_F_LOG_SHMFD,)
INFLIGHT_SHMFD = (abi.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,)
MEM_SLOTS = (abi.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,)
REPLY_ACK = (abi.VHOST_USER_PROTOCOL_F_REPLY_ACK,)

RING = "Ring states"
MEMORY = "Memory regions description"
HEADERS = "Header"
ANCILLARY = "Communication"


def state(index: int, number: int = 0) -> bytes:
    """The payload of most messages about a ring."""
    return bytes(abi.vhost_vring_state(index, number))


def address(index: int, descriptors: int, used: int, available: int, flags: int = 0, log: int = 0) -> bytes:
    """SET_VRING_ADDR's payload."""
    return bytes(abi.vhost_vring_addr(index, flags, descriptors, used, available, log))


def region(guest: int = START, size: int = SEAM - START, user: int = START + USER, offset: int = 0) -> bytes:
    """A memory region."""
    return bytes(abi.vhost_user_mem_region(guest, size, user, offset))


def table(*regions: bytes, count: int | None = None) -> bytes:
    """SET_MEM_TABLE's payload."""
    return bytes(abi.vhost_user_mem_table(len(regions) if count is None else count, 0)) + b"".join(regions)


def log(size: int, offset: int) -> bytes:
    """SET_LOG_BASE's payload."""
    return bytes(abi.vhost_user_log(size, offset))


def record(size: int, offset: int, queues: int, queue_size: int) -> bytes:
    """The payload of messages about the inflight record."""
    return struct.pack("=QQHH", size, offset, queues, queue_size)


def _bad(
    ids: str,
    title: str,
    clause: str,
    *steps: ConversationStep,
    begin: Begin = Begin.SHARED,
    needs: tuple[int, ...] = (),
    vhost: int = 0,
    refused: bool = True,
) -> ConversationCase:
    """What a back-end may refuse, or end the connection over, and has to survive."""
    return ConversationCase(
        tuple(ids.split()), title, clause, ANY, begin, needs, vhost=vhost, steps=steps, refused=refused
    )


def _good(
    ids: str,
    title: str,
    clause: str,
    *steps: ConversationStep,
    begin: Begin = Begin.RUNNING,
    needs: tuple[int, ...] = (),
    without: tuple[int, ...] = (),
    vhost: int = 0,
    applies: Applies = ANY,
) -> ConversationCase:
    """What breaks no rule: the ring is served after it."""
    return ConversationCase(
        tuple(ids.split()), title, clause, applies, begin, needs, without, vhost, steps, served=True
    )


_LATER_RING = (
    Say(abi.VHOST_USER_SET_VRING_NUM, state(0, 8)),
    Say(abi.VHOST_USER_SET_VRING_BASE, state(0, 0)),
    Say(abi.VHOST_USER_SET_VRING_ADDR, address(0, START + USER, START + USER + 0x2000, START + USER + 0x1000)),
)

CONVERSATION_CASES: tuple[Case, ...] = (
    # T1, T2: features.
    _bad(
        "T1", "features that were not offered", "2.2.2", Say(abi.VHOST_USER_SET_FEATURES, u64(ALL_ONES)),
        begin=Begin.CONNECTED,
    ),
    _bad(
        "T1", "features changed while the ring is served", "3.1.1",
        Say(abi.VHOST_USER_SET_FEATURES, u64(int(Feature.VERSION_1) | PROTOCOL)), Do.REQUEST, begin=Begin.RUNNING,
        refused=False,
    ),
    _bad(
        "T1", "protocol features that were not offered", "Protocol features",
        Say(abi.VHOST_USER_SET_PROTOCOL_FEATURES, u64(ALL_ONES)), begin=Begin.CONNECTED,
    ),
    _bad(
        "T2", "a driver of before version 1", "2.2.3", Say(abi.VHOST_USER_SET_FEATURES, u64(PROTOCOL)),
        begin=Begin.CONNECTED,
    ),
    # T3, T4, T7, T9: stopping and resetting.
    _good(
        "T3 CVE-2026-45782", "a reset with requests in flight", "RESET_DEVICE", Do.UNKICKED, Do.KICK,
        Say(abi.VHOST_USER_RESET_DEVICE), Do.AGAIN, Do.REQUEST, needs=(abi.VHOST_USER_PROTOCOL_F_RESET_DEVICE,),
    ),
    _good(
        "T3 CVE-2026-45782", "the front-end goes with requests in flight and another comes", "Communication",
        Load(60, 6), Do.UNKICKED, Do.KICK, Do.LEAVE, Do.COME, Do.REQUEST,
    ),
    _good(
        "T3", "it comes and goes", "Communication", *(Do.LEAVE, Do.COME, Do.REQUEST) * 5,
    ),
    _good("T4", "one queue is reset and used again", RING, Load(20, 2), Do.STOP, Do.START, Load(20, 2)),
    _good("T9", "stopped when idle", RING, Do.REQUEST, Do.REQUEST, Do.STOP, Do.START, Do.REQUEST),
    _good(
        "T9 T7", "stopped with a request on its way", RING, Do.UNKICKED, Do.KICK, Do.STOP, Do.START, Do.KICK,
        Do.ANSWERED,
    ),
    _good("T9", "stopped and started under load", RING, *(Load(30, 6), Do.STOP, Do.START) * 4),
    _bad("T9", "stopped twice", RING, Do.STOP, Do.STOP, begin=Begin.RUNNING, refused=False),
    _bad("T9", "stopped before it was set up", RING, Say(abi.VHOST_USER_GET_VRING_BASE, state(0)), refused=False),
    # T6: what is not there.
    *(
        _bad(ids, title, RING, Say(request, payload, fds))
        for ids, title, request, payload, fds in (
            ("T6 CVE-2011-2512", "the size of a ring that is not there",
             abi.VHOST_USER_SET_VRING_NUM, state(0x7FFF, 8), ()),
            ("T6 CVE-2020-10723", "the base of a ring numbered past 16 bits",
             abi.VHOST_USER_SET_VRING_BASE, state(0x1_0000, 0), ()),
            ("T6 CVE-2013-4150", "where a ring is that is not there",
             abi.VHOST_USER_SET_VRING_ADDR, address(0x7FFF_FFFF, START + USER, START + USER, START + USER), ()),
            ("T6 CVE-2014-0150", "a ring numbered -1 is enabled",
             abi.VHOST_USER_SET_VRING_ENABLE, state(0xFFFF_FFFF, 1), ()),
            ("T6", "the base of a ring that is not there is asked for",
             abi.VHOST_USER_GET_VRING_BASE, state(0x7FFF, 0), ()),
            ("T6", "the kick of a ring that is not there", abi.VHOST_USER_SET_VRING_KICK, u64(0xFF), (Fd.EVENT,)),
            ("T6", "the call of a ring that is not there", abi.VHOST_USER_SET_VRING_CALL, u64(0xFF), (Fd.EVENT,)),
            ("T6", "the error of a ring that is not there", abi.VHOST_USER_SET_VRING_ERR, u64(0xFF), (Fd.EVENT,)),
        )
    ),
    # T8: early kicks.
    _good(
        "T8 CVE-2024-4693", "a kick before anything is set up", RING, Do.UNKICKED, Do.KICK, Do.SET_UP, Do.ENABLE,
        Do.ANSWERED, Do.REQUEST, begin=Begin.SHARED,
    ),
    _good(
        "T8", "a kick before the ring is enabled", RING, Do.SET_UP, Do.UNKICKED, Do.KICK, Do.ENABLE, Do.ANSWERED,
        begin=Begin.SHARED, applies=BLK,
    ),
    _bad(
        "T8", "a request without a kick when the ring starts", RING, Do.UNKICKED, Do.SET_UP, Do.ENABLE, Do.ANSWERED,
        refused=False,
    ),
    _good("T8", "disabled and enabled again", RING, Do.REQUEST, Do.DISABLE, Do.ENABLE, Do.REQUEST, applies=BLK),
    # T10, T11, T20: descriptors.
    _good("T10", "another kick and another call", RING, Do.NEW_KICK, Do.REQUEST, Do.NEW_CALL, Do.REQUEST),
    _good("T10", "another kick and another call under load", RING, *(Load(20, 4), Do.NEW_KICK, Do.NEW_CALL) * 4),
    _good("T11", "no call, and the driver looks", RING, Do.NO_CALL, Do.REQUEST, Do.REQUEST),
    _bad(
        "T11", "no kick, and the back-end would have to look", RING, *_LATER_RING,
        Say(abi.VHOST_USER_SET_VRING_KICK, u64(0 | NO_FD)),
    ),
    _bad("T11", "a kick that should be there is not", ANCILLARY, Say(abi.VHOST_USER_SET_VRING_KICK, u64(0))),
    _bad("T11", "a kick that is no eventfd", RING, Say(abi.VHOST_USER_SET_VRING_KICK, u64(0), (Fd.NULL,))),
    _good("T20", "kicks for nothing", RING, Do.KICK, Do.KICK, Do.KICK, Do.REQUEST, Do.KICK, Do.REQUEST),
    _good("T20", "a kick whose counter is full", RING, Do.FULL_KICK, Do.REQUEST, Do.REQUEST),
    ConversationCase(
        ("T20",), "a call whose counter is full", RING, steps=(Do.FULL_CALL, Do.REQUEST, Do.UNKICKED, Do.KICK, Do.STOP),
    ),
    # T12, T13: memory.
    _good("T12", "the memory table is replaced", MEMORY, Do.REQUEST, Do.MEMORY_AGAIN, Do.REQUEST),
    _good("T12", "the memory table is replaced under load", MEMORY, *(Load(20, 4), Do.MEMORY_AGAIN) * 3, Load(20, 4)),
    _bad(
        "T12", "memory without the rings", MEMORY,
        Say(abi.VHOST_USER_SET_MEM_TABLE, table(region(ISLAND, ISLAND_SIZE, ISLAND + USER)), (Fd.MEMORY,)),
        begin=Begin.RUNNING, refused=False,
    ),
    *(
        _bad("T13", title, MEMORY, Say(abi.VHOST_USER_SET_MEM_TABLE, payload, fds), begin=Begin.NEGOTIATED)
        for title, payload, fds in (
            ("a region of no size", table(region(size=0)), (Fd.MEMORY,)),
            ("regions that overlap", table(region(), region(START + 0x1000)), (Fd.MEMORY, Fd.MEMORY)),
            ("a region past the end of addresses", table(region(ALL_ONES - 0xFFF, 0x2000)), (Fd.MEMORY,)),
            ("a region past the end of the front-end's", table(region(user=ALL_ONES - 0xFFF)), (Fd.MEMORY,)),
            ("offset and size that wrap", table(region(offset=ALL_ONES - 0xFFF)), (Fd.MEMORY,)),
            ("an offset past the file's end", table(region(offset=1 << 40)), (Fd.MEMORY,)),
            ("a region longer than its file", table(region(size=1 << 30)), (Fd.MEMORY,)),
            ("a region that is a device", table(region()), (Fd.NULL,)),
            ("more regions than there are in the message", table(region(), count=8), (Fd.MEMORY,)),
            ("more regions than can be", table(region(), count=0xFFFF_FFFF), (Fd.MEMORY,)),
            ("two regions and one file", table(region(), region(SEAM, END - SEAM, SEAM + USER)), (Fd.MEMORY,)),
        )
    ),
    _bad(
        "T13", "the ring past the end of its file", MEMORY,
        Say(abi.VHOST_USER_SET_MEM_TABLE, table(region(size=0x10_0000)), (Fd.SMALL,)), *_LATER_RING,
        Say(abi.VHOST_USER_SET_VRING_CALL, u64(0), (Fd.EVENT,)),
        Say(abi.VHOST_USER_SET_VRING_KICK, u64(0), (Fd.EVENT,)),
        Say(abi.VHOST_USER_SET_VRING_ENABLE, state(0, 1)), begin=Begin.NEGOTIATED,
    ),
    _bad(
        "T13", "a region whose file shrinks after mapping", MEMORY,
        Say(abi.VHOST_USER_SET_MEM_TABLE, table(region()), (Fd.SHRINKABLE,)), Do.SET_UP, Do.ENABLE,
        Do.SHRINK, Do.KICK, refused=False,
    ),
    _bad(
        "T13", "a region is added twice", MEMORY, *(
            Say(abi.VHOST_USER_ADD_MEM_REG, table(region())[:8].replace(b"\1", b"\0") + region(), (Fd.MEMORY,)),
        ) * 2, begin=Begin.NEGOTIATED, needs=MEM_SLOTS,
    ),
    _bad(
        "T13", "a region is removed that was never there", MEMORY,
        Say(abi.VHOST_USER_REM_MEM_REG, bytes(8) + region(0x5000_0000)), needs=MEM_SLOTS,
    ),
    # T14: messages.
    _bad("T14", "half a number", HEADERS, Say(abi.VHOST_USER_SET_FEATURES, bytes(4))),
    _bad("T14", "a payload too short for a ring's state", HEADERS, Say(abi.VHOST_USER_SET_VRING_NUM, bytes(4))),
    _bad("T14", "a payload too long for a ring's state", HEADERS, Say(abi.VHOST_USER_SET_VRING_NUM, bytes(64))),
    _bad("T14", "a question with a payload", HEADERS, Say(abi.VHOST_USER_GET_FEATURES, bytes(8))),
    _bad("T14", "ring addresses cut short", HEADERS, Say(abi.VHOST_USER_SET_VRING_ADDR, bytes(24))),
    _bad(
        "T14", "a payload of 4 GiB is announced", HEADERS, Say(abi.VHOST_USER_SET_FEATURES, bytes(8), size=0xFFFF_FFFF),
        Do.LEAVE, refused=False,
    ),
    _bad(
        "T14", "a payload of 64 KiB is announced and comes", HEADERS,
        Say(abi.VHOST_USER_SET_MEM_TABLE, bytes(0x1_0000)),
    ),
    _bad("T14", "another version", HEADERS, Say(abi.VHOST_USER_GET_FEATURES, flags=2)),
    _bad("T14", "a reply that nobody waits for", HEADERS, Say(abi.VHOST_USER_GET_FEATURES, flags=5)),
    _bad("T14", "a request that there is not", HEADERS, Say(0x7777)),
    _bad("T14", "request 0", HEADERS, Say(0)),
    _bad("T14", "a header in pieces and no more", HEADERS, Raw(b"\1\0\0\0\1"), Do.LEAVE, refused=False),
    _bad(
        "T14", "a payload that never comes", HEADERS, Say(abi.VHOST_USER_SET_FEATURES, bytes(3), size=8), Do.LEAVE,
        refused=False,
    ),
    _bad("T14", "no message at all", HEADERS, Raw(bytes(range(256))), Do.LEAVE, refused=False),
    _bad("T14", "config space past its end", HEADERS,
         Say(abi.VHOST_USER_GET_CONFIG, bytes(abi.vhost_user_config(250, 64, 0)) + bytes(64)), refused=False),
    _bad("T14", "more config space than is announced", HEADERS,
         Say(abi.VHOST_USER_GET_CONFIG, bytes(abi.vhost_user_config(0, 0xFFFF_FFFF, 0)) + bytes(8)), refused=False),
    _bad(
        "T14 CVE-2019-14818", "a descriptor with a message that carries none", ANCILLARY,
        Say(abi.VHOST_USER_GET_FEATURES, fds=(Fd.EVENT,)), refused=False,
    ),
    _bad(
        "T14", "eight descriptors with a message that carries none", ANCILLARY,
        Say(abi.VHOST_USER_SET_VRING_NUM, state(0, 8), (Fd.EVENT,) * 8),
    ),
    _bad(
        "T14 CVE-2020-10726", "descriptors with a question about the inflight record", ANCILLARY,
        *(Say(abi.VHOST_USER_GET_INFLIGHT_FD, record(0, 0, 1, 8), (Fd.EVENT,) * 4),), needs=INFLIGHT_SHMFD,
    ),
    _bad(
        "T14 CVE-2022-0669", "more descriptors than one with an inflight record", ANCILLARY,
        Say(abi.VHOST_USER_SET_INFLIGHT_FD, record(4096, 0, 1, 8), (Fd.SMALL,) * 5), needs=INFLIGHT_SHMFD,
    ),
    _bad("T14", "three calls for a ring", ANCILLARY, Say(abi.VHOST_USER_SET_VRING_CALL, u64(0), (Fd.EVENT,) * 3)),
    _bad(
        "T14", "more descriptors than any message carries", ANCILLARY,
        Say(abi.VHOST_USER_SET_MEM_TABLE, table(region()), (Fd.MEMORY,) * 30),
    ),
    _good(
        "T14", "a message in single bytes", HEADERS,
        *(Raw(bytes([byte])) for byte in bytes(abi.vhost_user_header(abi.VHOST_USER_SET_OWNER, 1, 0))), Do.REQUEST,
    ),
    # T15: rings that cannot be.
    *(
        _bad("T15", f"a ring of {size}", RING, Say(abi.VHOST_USER_SET_VRING_NUM, state(0, size)))
        for size in (0, 12, 65536, 0xFFFF_FFFF)
    ),
    _bad(
        "T15", "another size while the ring is served", RING, Say(abi.VHOST_USER_SET_VRING_NUM, state(0, 4096)),
        Do.KICK, begin=Begin.RUNNING,
    ),
    _bad("T15", "a base past 16 bits", RING, Say(abi.VHOST_USER_SET_VRING_BASE, state(0, 0x7FFF_FFFF))),
    _bad(
        "T15 S32", "a ring in no memory", RING,
        Say(abi.VHOST_USER_SET_VRING_ADDR, address(0, 0x10, 0x20, 0x30)),
    ),
    _bad(
        "T15 S32 CVE-2026-86565", "a ring larger than its inflight record", "Inflight I/O tracking",
        Say(abi.VHOST_USER_GET_INFLIGHT_FD, record(0, 0, 1, 2)),
        Say(abi.VHOST_USER_SET_INFLIGHT_FD, record(4096, 0, 1, 2), (Fd.INFLIGHT,)), Do.SET_UP, Do.ENABLE, Do.UNKICKED,
        Do.KICK, needs=INFLIGHT_SHMFD, refused=False,
    ),
    # T16: the dirty log.
    _good(
        "T16", "what is written is marked", "Migration", Say(abi.VHOST_USER_SET_LOG_BASE, log(0x1_0000, 0), (Fd.LOG,)),
        Do.SET_UP, Do.ENABLE, Do.REQUEST, Do.LOGGED, begin=Begin.SHARED, needs=LOG_SHMFD, vhost=LOG_ALL, applies=BLK,
    ),
    _bad(
        "T16", "a log too small for memory", "Migration",
        Say(abi.VHOST_USER_SET_LOG_BASE, log(16, 0), (Fd.SMALL,)), Do.SET_UP, Do.ENABLE, Do.UNKICKED, Do.KICK,
        needs=LOG_SHMFD, vhost=LOG_ALL, refused=False,
    ),
    _bad(
        "T16 CVE-2020-10722", "a log whose size and offset wrap", "Migration",
        Say(abi.VHOST_USER_SET_LOG_BASE, log(ALL_ONES - 0xFFF, 0x2000), (Fd.SMALL,)), needs=LOG_SHMFD, vhost=LOG_ALL,
    ),
    _bad(
        "T16", "a log longer than its file", "Migration",
        Say(abi.VHOST_USER_SET_LOG_BASE, log(0x10_0000, 0), (Fd.SMALL,)), Do.SET_UP, Do.ENABLE, Do.UNKICKED, Do.KICK,
        needs=LOG_SHMFD, vhost=LOG_ALL, refused=False,
    ),
    _bad(
        "T16", "a log of nothing", "Migration", Say(abi.VHOST_USER_SET_LOG_BASE, log(0, 0), (Fd.SMALL,)),
        needs=LOG_SHMFD, vhost=LOG_ALL,
    ),
    WatchedCase(
        ("S14", "T16", "CVE-2019-14835"), "no length is nothing to be marked", "Migration", tests=(
            "tests/memory/test_dirty_log.py::test_cve_2019_14835_a_length_of_zero_marks_nothing_not_even_at_the_end",
        ),
    ),
    WatchedCase(
        ("T16",), "marks come after the writes", "Migration", tests=(
            "tests/virtio/test_queue_log.py"
            "::test_t16_marks_come_after_the_writes_and_buffers_and_elements_before_the_index",
        ),
    ),
    # T17: the inflight record.
    _good(
        "T17", "a request in flight is taken up again", "Inflight I/O tracking", Do.RESUME, Do.ANSWERED, Do.REQUEST,
        begin=Begin.SHARED, needs=INFLIGHT_SHMFD, applies=BLK,
    ),
    *(
        _bad("T17", title, "Inflight I/O tracking", Say(abi.VHOST_USER_SET_INFLIGHT_FD, payload, (fd,)),
             needs=INFLIGHT_SHMFD)
        for title, payload, fd in (
            ("a record longer than its file", record(1 << 40, 0, 1, 8), Fd.SMALL),
            ("a record of no rings", record(4096, 0, 0, 8), Fd.SMALL),
            ("a record of rings of no size", record(4096, 0, 1, 0), Fd.SMALL),
            ("a record of more rings than there are", record(4096, 0, 0xFFFF, 8), Fd.SMALL),
            ("a record past its file's end", record(4096, 1 << 40, 1, 8), Fd.SMALL),
            ("a record too small for its rings", record(16, 0, 1, 1024), Fd.SMALL),
        )
    ),
    _bad(
        "T17", "a record for rings without a size is asked for", "Inflight I/O tracking",
        Say(abi.VHOST_USER_GET_INFLIGHT_FD, record(0, 0, 1, 0)), needs=INFLIGHT_SHMFD,
    ),
    _bad(
        "T17", "a record for more rings than there are is asked for", "Inflight I/O tracking",
        Say(abi.VHOST_USER_GET_INFLIGHT_FD, record(0, 0, 0xFFFF, 0xFFFF)), needs=INFLIGHT_SHMFD,
    ),
    WatchedCase(
        ("T17",), "killed at every store", "Inflight I/O tracking", tests=(
            "tests/virtio/test_inflight.py"
            "::test_t17_killed_at_every_store_and_started_again_each_request_is_completed_once",
            "tests/guests/test_killed.py::test_t17_nothing_is_lost_when_a_back_end_is_killed_under_load",
        ),
    ),
    # T18, T19: who answers whom.
    _good(
        "T18", "a reply is wanted of a message that has one", "REPLY_ACK",
        Say(abi.VHOST_USER_GET_FEATURES, flags=NEED_REPLY), Do.ONE_REPLY,
        Say(abi.VHOST_USER_GET_VRING_BASE, state(1), flags=NEED_REPLY), Do.ONE_REPLY, Do.REQUEST, needs=REPLY_ACK,
        applies=Applies("any", queues=2),
    ),
    _good(
        "T18", "a reply is wanted of each message about a ring", "REPLY_ACK",
        Say(abi.VHOST_USER_SET_VRING_ENABLE, state(0, 1), flags=NEED_REPLY), Do.ONE_REPLY, Do.REQUEST, needs=REPLY_ACK,
        applies=BLK,
    ),
    ConversationCase(
        ("T18",), "a reply is wanted though that was not negotiated", "REPLY_ACK", BLK, without=REPLY_ACK,
        steps=(Say(abi.VHOST_USER_SET_VRING_ENABLE, state(0, 1), flags=NEED_REPLY), Do.ONE_REPLY),
    ),
    _good("T18", "no replies but those that have to be", "REPLY_ACK", Do.ONE_REPLY, Do.REQUEST, without=REPLY_ACK),
    _good(
        "T19", "a channel that nobody reads", "Back-end communication",
        Say(abi.VHOST_USER_SET_BACKEND_REQ_FD, fds=(Fd.SOCKET,)), Do.REQUEST, Load(50, 4), Do.STOP, Do.START,
        Do.REQUEST,
        needs=(abi.VHOST_USER_PROTOCOL_F_BACKEND_REQ,),
    ),
    _bad(
        "T19", "a channel that is none", "Back-end communication",
        Say(abi.VHOST_USER_SET_BACKEND_REQ_FD, fds=(Fd.NULL,)), needs=(abi.VHOST_USER_PROTOCOL_F_BACKEND_REQ,),
    ),
    # S34: one queue and its neighbour.
    _good(
        "S34 CVE-2019-3900", "one queue that never runs dry and its neighbour", "fairness", Do.FLOOD, Do.REQUEST,
        applies=Applies("blk", queues=2),
    ),
    # T21 to T24: devices and loaders.
    WatchedCase(
        ("T21",), "what lguest's device page holds", "linux/lguest_launcher.h", tests=(
            "tests/abi/test_lguest.py::test_the_requests_are_those_of_the_kernel_without_the_two_it_refuses",
            "tests/abi/test_lguest.py::test_a_descriptor_with_what_follows_it_is_as_long_as_the_c_launchers",
        ),
    ),
    RingCase(
        ("T22", "CVE-2026-27211"), "a guest writes an image's header into its own disk", "raw images", WRITING,
        memory={
            HEADER: header(VIRTIO_BLK_T_OUT, 0), DATA: b"QFI\xfb\0\0\0\3".ljust(SECTOR, b"\0"),
            MORE: header(VIRTIO_BLK_T_IN, 0),
        },
        table=linked(r(HEADER, 16), r(DATA, SECTOR), w(STATUS, 1)) | GOOD,
        steps=(Publish((0,)), Kick(), Publish((5,)), Kick()), events=(Served(0, 1), Served(5, SECTOR + 1)),
        after={STATUS: OK, MORE + 0x200: b"QFI\xfb\0\0\0\3".ljust(SECTOR, b"\0"), MORE + 0x400: OK}, demanded=True,
    ),
    WatchedCase(
        ("T22",), "an image is raw whatever is in it", "raw images", tests=(
            "tests/virtio/devices/test_block.py"
            "::test_t22_cve_2026_27211_an_image_is_raw_whatever_the_guest_writes_into_it",
        ),
    ),
    WatchedCase(
        ("T23",), "what cannot be loaded is refused before memory is written", "boot protocols", tests=(
            "tests/memory/test_elf.py::test_t23_a_hostile_header_is_refused",
            "tests/memory/test_image.py"
            "::test_t23_ten_thousand_damaged_headers_are_placed_whole_or_refused_with_memory_untouched",
        ),
    ),
    RingCase(
        ("T24",), "a read past the end of the disk", "5.2.6.2", BLK, table=linked(*REQUEST),
        memory={HEADER: header(VIRTIO_BLK_T_IN, 1 << 40)}, events=(Served(0, None),), after={STATUS: IOERR},
        demanded=True,
    ),
    RingCase(
        ("T24",), "a sector whose byte does not fit 64 bits", "5.2.6.2", BLK, table=linked(*REQUEST),
        memory={HEADER: header(VIRTIO_BLK_T_IN, (1 << 64) - 1)}, events=(Served(0, None),), after={STATUS: IOERR},
        demanded=True,
    ),
    RingCase(
        ("T24",), "a read of part of a sector", "5.2.6.1", BLK, table=linked(r(HEADER, 16), w(DATA, 100), w(STATUS, 1)),
        memory=READ, events=(Served(0, None),), after={STATUS: IOERR},
    ),
    RingCase(
        ("T24",), "a write past the end of the disk", "5.2.6.2", WRITING,
        table=linked(r(HEADER, 16), r(DATA, SECTOR), w(STATUS, 1)), memory={HEADER: header(VIRTIO_BLK_T_OUT, 1 << 40)},
        events=(Served(0, None),), after={STATUS: IOERR}, demanded=True,
    ),
    RingCase(
        ("T24",), "a write of part of a sector", "5.2.6.1", WRITING,
        table=linked(r(HEADER, 16), r(DATA, 100), w(STATUS, 1)), memory={HEADER: header(VIRTIO_BLK_T_OUT, 44)},
        events=(Served(0, None),), after={STATUS: IOERR},
    ),
    RingCase(
        ("T24",), "a write to a read-only disk", "5.2.6.2", READ_ONLY,
        table=linked(r(HEADER, 16), r(DATA, SECTOR), w(STATUS, 1)), memory={HEADER: header(VIRTIO_BLK_T_OUT, 2)},
        events=(Served(0, None),), after={STATUS: IOERR}, demanded=True,
    ),
    RingCase(
        ("T24",), "a flush", "5.2.6.2", FLUSHING, features=BOTH, table=linked(r(HEADER, 16), w(STATUS, 1)),
        memory={HEADER: header(VIRTIO_BLK_T_FLUSH, 0)}, events=(Served(0, 1),), after={STATUS: OK}, demanded=True,
    ),
    WatchedCase(
        ("T24",), "a full disk and a flush that has returned", "5.2.6.2", tests=(
            "tests/runtime/test_transfer_thread.py::test_t24_a_full_file_system_is_an_error_status",
            "tests/virtio/devices/test_block.py::test_t24_flush_has_returned_before_its_status",
            "tests/virtio/devices/test_block.py::test_t24_beyond_the_disk_there_is_nothing_and_it_does_not_grow",
        ),
    ),
)  # fmt: skip
"""Every T row, as far as it is met in a conversation or in what comes over it."""
