"""The block device: what it answers to every request a driver can make, over a disk that can fail."""

import errno
import struct
from collections.abc import Sequence
from itertools import product
from random import Random

import pytest
from virtio.devices.chains import UNTOUCHED, Request, all_cuts, only_its_own

from lguestlib.abi import virtio_blk as abi
from lguestlib.virtio.devices.block import NUM_QUEUES_MAX, SECTOR, SEGMENT_SECTORS_MAX, SEGMENTS_MAX, Block
from lguestlib.virtio.errors import MemoryGone

SECTORS = 8
SIZE = SECTORS * SECTOR

IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES = (
    abi.VIRTIO_BLK_T_IN, abi.VIRTIO_BLK_T_OUT, abi.VIRTIO_BLK_T_FLUSH, abi.VIRTIO_BLK_T_GET_ID,
    abi.VIRTIO_BLK_T_DISCARD, abi.VIRTIO_BLK_T_WRITE_ZEROES,
)  # fmt: skip
OK, IOERR, UNSUPP = abi.VIRTIO_BLK_S_OK, abi.VIRTIO_BLK_S_IOERR, abi.VIRTIO_BLK_S_UNSUPP


class Disk:
    """A disk of a few sectors; with *most*, no call transfers more bytes than that."""

    def __init__(self, read_only: bool = False, most: int = SIZE) -> None:
        self.content = bytearray(Random(1).randbytes(SIZE))
        self.size = SIZE
        self.block_size = SECTOR
        self.read_only = read_only
        self.identity = b"a disk of many letters"
        self.most = most
        self.error: OSError | None = None
        self.calls: list[tuple[str, int, int]] = []

    def _called(self, name: str, offset: int, length: int) -> None:
        assert 0 <= offset and length >= 0 and offset + length <= SIZE, "the device checks, and nothing grows"
        self.calls.append((name, offset, length))
        if self.error:
            raise self.error

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        self._called("read", offset, sum(map(len, buffers)))
        done = 0
        for buffer in buffers:
            length = min(len(buffer), self.most - done)
            buffer[:length] = self.content[offset + done : offset + done + length]
            done += length
        return done

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        data = b"".join(buffers)
        self._called("write", offset, len(data))
        data = data[: self.most]
        self.content[offset : offset + len(data)] = data
        return len(data)

    def flush(self) -> None:
        self._called("flush", 0, 0)

    def discard(self, offset: int, length: int) -> None:
        self._called("discard", offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._called("unmap" if unmap else "zero", offset, length)
        self.content[offset : offset + length] = bytes(length)


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, sectors, flags)


def served(disk: Disk, request: Request) -> tuple[int, int]:
    """The status the request ends in, and the bytes reported used."""
    sent = bytes(request.readable)
    used = Block(disk).serve_request(request.chain)
    assert request.readable == sent
    assert 0 <= used <= len(request.writable)
    return request.writable[-1], used


def ask(disk: Disk, kind: int, sector: int = 0, payload: bytes = b"", room: int = 0) -> tuple[int, int]:
    """`served` for a request in one piece each way, with *room* bytes beside the status."""
    return served(disk, Request(header(kind, sector) + payload, room + 1))


# What it is.


def test_the_config_space_is_the_kernels_structure() -> None:
    space = Block(Disk()).config()
    assert space[0:8] == struct.pack("<Q", SECTORS) and space[36:40] == struct.pack("<I", SEGMENT_SECTORS_MAX)
    config = abi.virtio_blk_config.from_buffer_copy(space)
    assert (config.capacity, config.seg_max, config.blk_size, config.num_queues) == (
        SECTORS,
        SEGMENTS_MAX,
        SECTOR,
        1,
    )
    assert (config.max_discard_sectors, config.max_discard_seg) == (SEGMENT_SECTORS_MAX, 1)
    assert (config.max_write_zeroes_sectors, config.max_write_zeroes_seg) == (SEGMENT_SECTORS_MAX, 1)
    assert (config.discard_sector_alignment, config.write_zeroes_may_unmap) == (1, 1)
    assert (config.size_max, config.geometry.cylinders, config.wce, config.opt_io_size) == (0, 0, 0, 0)


def test_a_disk_offers_what_can_be_done_with_it() -> None:
    def offered(disk: Disk) -> set[int]:
        return {bit for bit in range(64) if Block(disk).features & 1 << bit}

    always = {abi.VIRTIO_BLK_F_SEG_MAX, abi.VIRTIO_BLK_F_BLK_SIZE, abi.VIRTIO_BLK_F_FLUSH}
    assert offered(Disk()) == always | {abi.VIRTIO_BLK_F_DISCARD, abi.VIRTIO_BLK_F_WRITE_ZEROES}
    assert offered(Disk(read_only=True)) == always | {abi.VIRTIO_BLK_F_RO}
    assert only_its_own(Block(Disk()))


BARRIER = abi.VIRTIO_BLK_T_BARRIER


def test_t2_a_legacy_barrier_is_between_two_flushes() -> None:
    disk = Disk()
    block = Block(disk)
    assert block.legacy_features == 1 << abi.VIRTIO_BLK_F_BARRIER and not block.offered & block.legacy_features
    block.activate(1 << abi.VIRTIO_BLK_F_BARRIER)
    write = Request(header(OUT | BARRIER, 1) + b"x" * SECTOR, 1)
    assert (block.serve_request(write.chain), bytes(write.writable)) == (1, b"\0")
    assert disk.content[SECTOR : 2 * SECTOR] == b"x" * SECTOR
    read = Request(header(IN | BARRIER, 1), SECTOR + 1)
    used = block.serve_request(read.chain)
    assert (used, bytes(read.writable)) == (SECTOR + 1, b"x" * SECTOR + b"\0")
    flush = ("flush", 0, 0)
    assert disk.calls == [flush, ("write", SECTOR, SECTOR), flush, flush, ("read", SECTOR, SECTOR), flush]
    past = Request(header(OUT | BARRIER, SECTORS) + bytes(SECTOR), 1)
    block.serve_request(past.chain)
    assert past.writable == bytes([IOERR])


def test_t2_without_the_feature_a_barrier_is_no_request() -> None:
    disk = Disk()
    assert ask(disk, OUT | BARRIER, 0, bytes(SECTOR)) == (UNSUPP, 1)
    assert disk.calls == []
    assert Block(disk, transfer_file=3).legacy_features == 0


@pytest.mark.parametrize("barrier", [0, BARRIER])
def test_t2_legacy_scsi_commands_are_not_supported(barrier: int) -> None:
    disk = Disk()
    block = Block(disk)
    block.activate(1 << abi.VIRTIO_BLK_F_BARRIER)
    for kind in (abi.VIRTIO_BLK_T_SCSI_CMD, abi.VIRTIO_BLK_T_SCSI_CMD | OUT):
        request = Request(header(kind | barrier) + bytes(96), 1)
        block.serve_request(request.chain)
        assert request.writable == bytes([UNSUPP])
    assert {call for call, _, _ in disk.calls} <= {"flush"}


def test_there_is_one_queue_for_requests() -> None:
    device = Block(Disk())
    assert (device.name, Block(Disk(), "block 2").name) == ("block", "block 2")
    [queue] = device.queues()
    assert queue.service == device.serve_request and not queue.from_outside
    assert SEGMENTS_MAX <= queue.size - 2


@pytest.mark.parametrize("count", [2, 5, NUM_QUEUES_MAX])
def test_or_as_many_as_it_was_made_with_and_the_driver_is_told(count: int) -> None:
    device = Block(Disk(), num_queues=count)
    assert device.features == Block(Disk()).features | 1 << abi.VIRTIO_BLK_F_MQ and only_its_own(device)
    assert abi.virtio_blk_config.from_buffer_copy(device.config()).num_queues == count
    queues = device.queues()
    assert [queue.name for queue in queues] == [f"queue{index}" for index in range(count)]
    assert {queue.service for queue in queues} == {device.serve_request}


@pytest.mark.parametrize("count", [-1, 0, NUM_QUEUES_MAX + 1])
def test_a_number_of_queues_that_there_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"block 2: {count} queues .1 to 256"):
        Block(Disk(), "block 2", count)


def test_a_disk_that_has_changed_its_size_is_told_of_once_and_served_as_it_is() -> None:
    disk = Disk()
    device = Block(disk)
    told: list[int] = []
    device.on_config_change = lambda changed: told.append(int.from_bytes(changed.config()[:8], "little"))
    device.resized()
    assert told == []
    for sectors in (5, 0, 8):
        disk.size = sectors * SECTOR
        device.resized()
        device.resized()
        request = Request(header(IN, 0), 5 * SECTOR + 1)
        device.serve_request(request.chain)
        assert request.writable[-1] == (OK if sectors >= 5 else IOERR)
        past = Request(header(OUT, sectors) + bytes(SECTOR), 1)
        assert device.serve_request(past.chain) == 1 and past.writable[-1] == IOERR
    assert told == [5, 0, 8]


# Good requests, however they are cut.


@pytest.mark.parametrize("sectors", [1, 2])
def test_s33_every_cut_of_a_read_gives_the_same(sectors: int) -> None:
    disk = Disk()
    length = sectors * SECTOR
    tails = [
        (),
        (1,),
        (length,),
        (length - 1,),
        (1, length),
        (17, 300),
        (length - 1, length),
        (1, 2, 3, length),
    ]
    for cuts, room_cuts in product(all_cuts(16, 3), tails):
        request = Request(header(IN, 3), length + 1, cuts, room_cuts)
        assert served(disk, request) == (OK, length + 1), (cuts, room_cuts)
        assert request.writable[:-1] == disk.content[3 * SECTOR :][:length]


def test_s33_cve_2022_2132_every_cut_of_a_write_gives_the_same() -> None:
    for cuts in [*all_cuts(16, 4), (4, 16), (16,), (15, 17), (20,), (16, 100), (1, 8, 300, 527), (527,)]:
        for room in (1, 4):
            disk = Disk()
            expected = bytearray(disk.content)
            data = Random(len(cuts)).randbytes(SECTOR)
            expected[5 * SECTOR : 6 * SECTOR] = data
            assert served(disk, Request(header(OUT, 5) + data, room, cuts)) == (OK, 1 if room == 1 else 0)
            assert disk.content == expected, cuts


def test_s33_every_header_byte_in_a_buffer_of_its_own() -> None:
    disk = Disk()
    cuts = range(1, 16)
    assert served(disk, Request(header(IN, 7), SECTOR + 1, cuts, range(1, SECTOR + 1))) == (OK, SECTOR + 1)
    assert served(disk, Request(header(GET_ID), 21, cuts, range(1, 21))) == (OK, 21)
    assert served(disk, Request(header(OUT, 7) + bytes(SECTOR), 1, range(1, 16 + SECTOR))) == (OK, 1)
    assert served(disk, Request(header(DISCARD) + segment(2, 3), 1, range(1, 32))) == (OK, 1)
    assert disk.calls[-1] == ("discard", 2 * SECTOR, 3 * SECTOR)


def test_requests_of_no_data_are_done() -> None:
    disk = Disk()
    assert ask(disk, IN, SECTORS) == (OK, 1)
    assert ask(disk, OUT, SECTORS) == (OK, 1)
    assert ask(disk, IN, SECTORS + 1) == (IOERR, 1)
    assert ask(disk, OUT, SECTORS + 1) == (IOERR, 1)


def test_t24_flush_has_returned_before_its_status() -> None:
    disk = Disk()
    assert ask(disk, FLUSH) == (OK, 1)
    assert disk.calls == [("flush", 0, 0)]
    disk.error = OSError(errno.EIO, "")
    assert ask(disk, FLUSH) == (IOERR, 1)


@pytest.mark.parametrize("kind", [IN, OUT])
def test_t13_memory_that_is_not_there_any_more_is_no_error_of_the_disk(kind: int) -> None:
    disk = Disk()
    disk.error = OSError(errno.EFAULT, "")
    with pytest.raises(MemoryGone, match="not there any more"):
        ask(disk, kind, 0, bytes(SECTOR) if kind == OUT else b"", SECTOR if kind == IN else 0)


@pytest.mark.parametrize("room", [0, 1, 19, 20, 21, 512])
@pytest.mark.parametrize("identity", [b"", b"short", b"exactly twenty chars", b"more than twenty characters"])
def test_s19_get_id_writes_twenty_bytes_or_what_there_is_room_for(identity: bytes, room: int) -> None:
    disk = Disk()
    disk.identity = identity
    for room_cuts in ((), (1,), (3, 7), (room,)):
        request = Request(
            header(GET_ID), room + 1, (), room_cuts if max(room_cuts, default=0) <= room else ()
        )
        status, used = served(disk, request)
        assert status == OK
        expected = identity[:20].ljust(20, b"\0")[:room]
        assert request.writable[: len(expected)] == expected
        assert set(request.writable[len(expected) : room]) <= {UNTOUCHED}
        assert used == (room + 1 if room <= 20 else 20)


def test_s19_a_status_behind_a_hole_is_not_counted() -> None:
    disk = Disk()
    assert ask(disk, FLUSH, room=100) == (OK, 0)
    assert ask(disk, OUT, 0, bytes(SECTOR), room=7) == (OK, 0)
    assert ask(disk, GET_ID, room=30) == (OK, 20)
    assert ask(disk, IN, SECTORS, room=SECTOR) == (IOERR, 0)
    assert ask(disk, 99, room=SECTOR) == (UNSUPP, 0)
    assert ask(disk, 99) == (UNSUPP, 1)


# Malformed ones.


@pytest.mark.parametrize("length", range(16))
@pytest.mark.parametrize("room", [1, 2, 513])
def test_s33_cve_2023_6693_a_header_too_short_is_an_error_status(length: int, room: int) -> None:
    disk = Disk()
    for cuts in ((), (length // 2,), tuple(range(1, length))):
        request = Request(header(OUT)[:length], room, cuts)
        assert served(disk, request) == (IOERR, 1 if room == 1 else 0)
        assert set(request.writable[:-1]) <= {UNTOUCHED}
    assert disk.calls == []


def test_s33_without_room_for_a_status_nothing_is_done() -> None:
    disk = Disk()
    for readable in (b"", header(OUT), header(OUT) + bytes(SECTOR), header(FLUSH), b"\xff" * 600):
        request = Request(readable, 0, ())
        assert Block(disk).serve_request(request.chain) == 0
    assert disk.calls == []


@pytest.mark.parametrize("kind", [2, 3, 5, 7, 9, 10, 12, 14, 255, 0x8000_0000, 0x8000_0001, 0xFFFF_FFFF])
def test_what_is_not_offered_is_unsupported(kind: int) -> None:
    disk = Disk()
    assert ask(disk, kind, 0, bytes(SECTOR)) == (UNSUPP, 1)
    assert disk.calls == []


BEYOND = [
    (SECTORS, 1), (SECTORS - 1, 2), (0, SECTORS + 1), (SECTORS + 1, 1), (1 << 32, 1), (1 << 55, 1),
    ((1 << 55) - 1, 1), ((1 << 55) - 1, 2), ((1 << 64) - 1, 1), ((1 << 64) - 1, 2), (1 << 63, 8),
]  # fmt: skip
"""Sectors and counts that are not all on the disk, some of which wrap in bytes."""


@pytest.mark.parametrize(("sector", "sectors"), BEYOND)
def test_t24_beyond_the_disk_there_is_nothing_and_it_does_not_grow(sector: int, sectors: int) -> None:
    disk = Disk()
    before = bytes(disk.content)
    request = Request(header(IN, sector), sectors * SECTOR + 1)
    assert served(disk, request) == (IOERR, 0)
    assert set(request.writable[:-1]) == {UNTOUCHED}
    assert ask(disk, OUT, sector, b"\xff" * sectors * SECTOR) == (IOERR, 1)
    assert ask(disk, DISCARD, 0, segment(sector, sectors)) == (IOERR, 1)
    assert ask(disk, ZEROES, 0, segment(sector, sectors)) == (IOERR, 1)
    assert disk.content == before and not disk.calls


@pytest.mark.parametrize("length", [1, 511, 513, 1023, SIZE - 1, SIZE + 1])
def test_t24_an_unaligned_length_is_an_error(length: int) -> None:
    disk = Disk()
    assert served(disk, Request(header(IN), length + 1)) == (IOERR, 0)
    assert ask(disk, OUT, 0, bytes(length)) == (IOERR, 1)
    assert disk.calls == []


def test_t24_a_read_only_disk_is_not_written() -> None:
    disk = Disk(read_only=True)
    before = bytes(disk.content)
    for kind, payload in (
        (OUT, bytes(SECTOR)),
        (OUT, b""),
        (DISCARD, segment(0, 1)),
        (ZEROES, segment(0, 1, 1)),
    ):
        assert ask(disk, kind, 0, payload) == (IOERR, 1)
    assert disk.content == before and not disk.calls
    assert ask(disk, IN, room=SECTOR) == (OK, SECTOR + 1)
    assert ask(disk, FLUSH) == (OK, 1)


@pytest.mark.parametrize("kind", [DISCARD, ZEROES])
@pytest.mark.parametrize("length", [0, 1, 15, 17, 31, 32, 48, 4096])
def test_a_segment_is_sixteen_bytes_and_there_is_one(kind: int, length: int) -> None:
    disk = Disk()
    assert ask(disk, kind, 0, (segment(0, 1) * 256)[:length]) == (IOERR, 1)
    assert disk.calls == []


@pytest.mark.parametrize("flags", range(8))
@pytest.mark.parametrize("high", [0, 1 << 8, 1 << 31])
def test_flags_of_a_segment(flags: int, high: int) -> None:
    disk = Disk()
    good = flags | high
    assert ask(disk, ZEROES, 0, segment(1, 2, good)) == ((OK, 1) if good in (0, 1) else (UNSUPP, 1))
    assert ask(disk, DISCARD, 0, segment(1, 2, good)) == ((OK, 1) if good == 0 else (UNSUPP, 1))
    calls = {0: [("zero", 512, 1024), ("discard", 512, 1024)], 1: [("unmap", 512, 1024)]}
    assert disk.calls == calls.get(good, [])


def test_a_segment_of_no_sectors_is_done_and_one_of_too_many_refused() -> None:
    disk = Disk()
    for kind in (DISCARD, ZEROES):
        assert ask(disk, kind, 0, segment(SECTORS, 0)) == (OK, 1)
        assert ask(disk, kind, 0, segment(0, SEGMENT_SECTORS_MAX + 1)) == (IOERR, 1)
        assert ask(disk, kind, 0, segment(0, 0xFFFF_FFFF)) == (IOERR, 1)
    assert disk.calls == []
    assert ask(disk, ZEROES, 0, segment(0, SECTORS, 1)) == (OK, 1)
    assert disk.content == bytes(SIZE)


@pytest.mark.parametrize("kind", [DISCARD, ZEROES])
def test_a_segment_may_have_as_many_sectors_as_the_config_space_says(kind: int) -> None:
    class Large(Disk):
        def __init__(self) -> None:
            super().__init__()
            self.size = SECTOR << 32
            self.cleared: list[tuple[int, int]] = []

        def discard(self, offset: int, length: int) -> None:
            self.cleared.append((offset, length))

        def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
            self.cleared.append((offset, length))

    disk = Large()
    assert ask(disk, kind, 0, segment(3, SEGMENT_SECTORS_MAX)) == (OK, 1)
    assert ask(disk, kind, 0, segment(3, SEGMENT_SECTORS_MAX + 1)) == (IOERR, 1)
    assert disk.cleared == [(3 * SECTOR, SEGMENT_SECTORS_MAX * SECTOR)]


def test_t22_cve_2026_27211_an_image_is_raw_whatever_the_guest_writes_into_it() -> None:
    disk = Disk()
    magic = b"QFI\xfb\0\0\0\3" + b"/etc/passwd".ljust(SECTOR - 8, b"\0")
    assert ask(disk, OUT, 0, magic) == (OK, 1)
    again = Block(disk)
    request = Request(header(IN), SECTOR + 1)
    assert again.serve_request(request.chain) == SECTOR + 1
    assert request.writable[:-1] == magic
    assert again.config() == Block(Disk()).config()


# A disk that fails.


@pytest.mark.parametrize("most", [1, 100, 511, 512, 513, 2047])
def test_a_disk_that_gives_or_takes_little_at_a_time(most: int) -> None:
    disk = Disk(most=most)
    for room_cuts in ((), (5, 600, 2048), tuple(range(256, 2048, 256))):
        request = Request(header(IN, 2), 2049, (), room_cuts)
        assert served(disk, request) == (OK, 2049)
        assert request.writable[:-1] == disk.content[2 * SECTOR : 6 * SECTOR]
        data = Random(most).randbytes(2048)
        assert served(disk, Request(header(OUT, 1) + data, 1, (8, 20, 900))) == (OK, 1)
        assert disk.content[SECTOR : 5 * SECTOR] == data


def test_a_disk_that_gives_or_takes_nothing_is_no_endless_loop() -> None:
    disk = Disk(most=0)
    assert ask(disk, IN, room=SECTOR) == (IOERR, 0)
    assert ask(disk, OUT, 0, bytes(SECTOR)) == (IOERR, 1)
    assert len(disk.calls) < 6


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (errno.EIO, IOERR),
        (errno.ENOSPC, IOERR),
        (errno.EFBIG, IOERR),
        (errno.EBADF, IOERR),
        (errno.EACCES, IOERR),
        (errno.EOPNOTSUPP, UNSUPP),
        (errno.ENOSYS, UNSUPP),
    ],
)
def test_t24_an_error_of_the_disk_is_in_the_status(number: int, status: int) -> None:
    disk = Disk()
    disk.error = OSError(number, "")
    assert ask(disk, IN, room=SECTOR) == (status, 0)
    for kind, payload in (
        (OUT, bytes(SECTOR)),
        (FLUSH, b""),
        (DISCARD, segment(0, 1)),
        (ZEROES, segment(0, 1)),
    ):
        assert ask(disk, kind, 0, payload) == (status, 1)
    assert len(disk.calls) >= 5


def test_an_interrupted_call_is_no_failure_and_leaves_the_status_alone() -> None:
    disk = Disk()
    disk.error = InterruptedError(errno.EINTR, "")
    for kind, payload, room in ((IN, b"", SECTOR), (OUT, bytes(SECTOR), 0), (FLUSH, b"", 0)):
        request = Request(header(kind) + payload, room + 1)
        with pytest.raises(InterruptedError):
            Block(disk).serve_request(request.chain)
        assert set(request.writable) == {UNTOUCHED}


def test_any_other_exception_is_the_backends_fault_and_not_hidden() -> None:
    class Broken(Disk):
        def flush(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask(Broken(), FLUSH)


def test_random_requests_do_what_a_disk_does() -> None:
    seed = 5
    random = Random(seed)
    disk = Disk(most=700)
    expected = bytearray(disk.content)
    for turn in range(4000):
        kind = random.choice((IN, IN, OUT, OUT, FLUSH, GET_ID, ZEROES, DISCARD, 77))
        sector, sectors = random.randrange(SECTORS + 2), random.randrange(4)
        inside = sector + sectors <= SECTORS
        payload, room, answer = b"", 0, (OK if inside else IOERR)
        if kind == IN:
            room = sectors * SECTOR
        elif kind == OUT:
            payload = random.randbytes(sectors * SECTOR)
        elif kind in (ZEROES, DISCARD):
            payload = segment(sector, sectors)
        else:
            answer = UNSUPP if kind == 77 else OK
            room = 20 * (kind == GET_ID)
        readable = header(kind, sector) + payload
        cuts = sorted(random.sample(range(1, len(readable)), random.randrange(4)))
        room_cuts = sorted(random.sample(range(1, room + 1), min(room, random.randrange(4))))
        request = Request(readable, room + 1, cuts, room_cuts)
        status, used = served(disk, request)
        assert (status, used) == (answer, room + 1 if answer == OK or not room else 0), (seed, turn)
        if inside and kind == OUT:
            expected[sector * SECTOR : (sector + sectors) * SECTOR] = payload
        elif inside and kind == ZEROES:
            expected[sector * SECTOR : (sector + sectors) * SECTOR] = bytes(sectors * SECTOR)
        elif inside and kind == IN:
            assert request.writable[:-1] == expected[sector * SECTOR : (sector + sectors) * SECTOR], (
                seed,
                turn,
            )
        assert disk.content == expected, (seed, turn)
