"""A block request as a transfer: the driver sees what `serve_request` would have left."""

import errno
import struct
from collections.abc import Sequence
from random import Random

import pytest
from virtio.devices.chains import UNTOUCHED, Request, all_cuts

from lguestlib.abi import virtio_blk as abi
from lguestlib.virtio.devices.block import SECTOR, Block
from lguestlib.virtio.errors import MemoryGone
from lguestlib.virtio.transfer import Operation, Transfer, Transfers

SECTORS = 8
SIZE = SECTORS * SECTOR
FILE = 77

IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES = (
    abi.VIRTIO_BLK_T_IN, abi.VIRTIO_BLK_T_OUT, abi.VIRTIO_BLK_T_FLUSH, abi.VIRTIO_BLK_T_GET_ID,
    abi.VIRTIO_BLK_T_DISCARD, abi.VIRTIO_BLK_T_WRITE_ZEROES,
)  # fmt: skip
OK, IOERR, UNSUPP = abi.VIRTIO_BLK_S_OK, abi.VIRTIO_BLK_S_IOERR, abi.VIRTIO_BLK_S_UNSUPP


class Disk:
    """A disk of a few sectors that knows who asks."""

    def __init__(self, read_only: bool = False) -> None:
        self.content = bytearray(Random(1).randbytes(SIZE))
        self.size = SIZE
        self.block_size = SECTOR
        self.read_only = read_only
        self.identity = b"a disk"
        self.error: OSError | None = None
        self.called: list[str] = []

    def _called(self, name: str) -> None:
        self.called.append(name)
        if self.error:
            raise self.error

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        self._called("read")
        return self.fill(buffers, offset)

    def fill(self, buffers: Sequence[memoryview], offset: int) -> int:
        done = offset
        for buffer in buffers:
            buffer[:] = self.content[done : done + len(buffer)]
            done += len(buffer)
        return done - offset

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        self._called("write")
        return self.store(buffers, offset)

    def store(self, buffers: Sequence[memoryview], offset: int) -> int:
        data = b"".join(buffers)
        self.content[offset : offset + len(data)] = data
        return len(data)

    def flush(self) -> None:
        self._called("flush")

    def discard(self, offset: int, length: int) -> None:
        self._called("discard")

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self._called("zero")
        self.content[offset : offset + length] = bytes(length)


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def transfers_of(disk: Disk) -> Transfers:
    [queue] = Block(disk, transfer_file=FILE).queues()
    assert queue.transfers and queue.transfers.file == FILE
    return queue.transfers


def begun(disk: Disk, request: Request) -> tuple[Transfers, Transfer]:
    """The transfer of a request, on its way."""
    transfers = transfers_of(disk)
    transfer = transfers.begin(request.chain)
    assert transfer and transfer.chain is request.chain
    return transfers, transfer


def carried_out(disk: Disk, transfer: Transfer, most: int = SIZE) -> int:
    """Do what *transfer* says, *most* bytes of it, as a kernel would."""
    left = most
    buffers = []
    for buffer in transfer.buffers:
        buffers.append(buffer[:left])
        left -= len(buffers[-1])
    if transfer.operation == Operation.READ:
        return disk.fill(buffers, transfer.offset)
    if transfer.operation == Operation.WRITE:
        return disk.store(buffers, transfer.offset)
    return 0


def answer(disk: Disk, request: Request, most: int = SIZE) -> tuple[int, int]:
    """The status and the used length of *request*, by transfers of *most* bytes where it can be done so."""
    transfers = transfers_of(disk)
    transfer = transfers.begin(request.chain)
    if transfer:
        if request.writable:
            assert request.writable[-1] == UNTOUCHED, "no status before the end"
        while not transfers.finish(transfer, carried_out(disk, transfer, most)):
            assert transfer.length
    return request.writable[-1], request.chain.written


def test_a_queue_has_transfers_only_where_there_is_a_file_for_them() -> None:
    [queue] = Block(Disk()).queues()
    assert queue.transfers is None
    several = Block(Disk(), num_queues=3, transfer_file=FILE).queues()
    assert len({queue.transfers for queue in several}) == 1 and several[0].transfers


@pytest.mark.parametrize("sector", [0, 3, SECTORS - 1])
def test_s33_every_cut_of_a_request_is_the_same_transfer(sector: int) -> None:
    data = Random(9).randbytes(SECTOR)
    for cuts in [*all_cuts(16, 3), (16,), (20, 300)]:
        for room_cuts in ((), (1,), (SECTOR,), (5, SECTOR)):
            if max(cuts, default=0) < 16:
                disk = Disk()
                request = Request(header(IN, sector), SECTOR + 1, cuts, room_cuts)
                _, transfer = begun(disk, request)
                assert (transfer.operation, transfer.offset, transfer.length) == (
                    Operation.READ, sector * SECTOR, SECTOR,
                )  # fmt: skip
                assert answer(disk, request) == (OK, SECTOR + 1)
                assert request.writable[:-1] == disk.content[sector * SECTOR :][:SECTOR]
                assert disk.called == []
        disk = Disk()
        expected = bytearray(disk.content)
        expected[sector * SECTOR : (sector + 1) * SECTOR] = data
        assert answer(disk, Request(header(OUT, sector) + data, 1, cuts)) == (OK, 1)
        assert disk.content == expected and disk.called == []


def test_a_flush_is_a_transfer_of_nothing() -> None:
    disk = Disk()
    request = Request(header(FLUSH), 1)
    transfers, transfer = begun(disk, request)
    assert (transfer.operation, transfer.buffers, transfer.length) == (Operation.FLUSH, (), 0)
    assert transfers.finish(transfer, 0)
    assert (request.writable[0], request.chain.written, disk.called) == (OK, 1, [])


def test_what_is_no_transfer_is_served_at_once() -> None:
    disk = Disk(read_only=True)
    bad: list[tuple[bytes, int, int]] = [
        (header(GET_ID), 21, OK),
        (header(99), 1, UNSUPP),
        (header(OUT) + bytes(SECTOR), 1, IOERR),
        (header(DISCARD) + struct.pack("<QII", 0, 1, 0), 1, IOERR),
        (header(IN, SECTORS), SECTOR + 1, IOERR),
        (header(IN, 1 << 63), SECTOR + 1, IOERR),
        (header(IN), SECTOR, IOERR),
        (header(IN), 1, OK),
        (header(IN)[:15], SECTOR + 1, IOERR),
    ]
    for readable, room, status in bad:
        request, oracle = Request(readable, room), Request(readable, room)
        assert transfers_of(disk).begin(request.chain) is None
        assert request.writable[-1] == status
        assert request.chain.written == Block(disk).serve_request(oracle.chain)
    request = Request(header(IN), 0)
    assert transfers_of(disk).begin(request.chain) is None and request.chain.written == 0
    assert disk.called == ["read"] * 2, "of no bytes, by each of the two"


@pytest.mark.parametrize("most", [1, 100, 511, 512, 700])
def test_a_short_transfer_goes_on_with_the_rest(most: int) -> None:
    disk = Disk()
    for room_cuts in ((), (5, 600), tuple(range(100, 2048, 100))):
        request = Request(header(IN, 2), 2049, (), room_cuts)
        assert answer(disk, request, most) == (OK, 2049)
        assert request.writable[:-1] == disk.content[2 * SECTOR : 6 * SECTOR]
    data = Random(most).randbytes(2048)
    assert answer(disk, Request(header(OUT, 1) + data, 1, (8, 20, 900)), most) == (OK, 1)
    assert disk.content[SECTOR : 5 * SECTOR] == data and disk.called == []


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (0, IOERR),
        (SECTOR + 1, IOERR),
        (-errno.EIO, IOERR),
        (-errno.ENOSPC, IOERR),
        (-errno.ECANCELED, IOERR),
        (-errno.EINTR, IOERR),
        (-errno.EOPNOTSUPP, UNSUPP),
        (-errno.ENOSYS, UNSUPP),
    ],
)
def test_t24_an_error_is_in_the_status(result: int, status: int) -> None:
    disk = Disk()
    for readable, room in ((header(IN), SECTOR + 1), (header(OUT) + bytes(SECTOR), 1), (header(FLUSH), 1)):
        if result == 0 and readable == header(FLUSH):
            continue
        request = Request(readable, room)
        transfers, transfer = begun(disk, request)
        assert transfers.finish(transfer, result)
        assert (request.writable[-1], request.chain.written) == (status, 1 if room == 1 else 0)
        assert set(request.writable[:-1]) <= {UNTOUCHED}
    assert disk.called == [], "a failed disk is not asked again"


def test_t13_memory_that_is_not_there_any_more_is_no_error_of_the_disk() -> None:
    for readable, room in ((header(IN), SECTOR + 1), (header(OUT) + bytes(SECTOR), 1)):
        transfers, transfer = begun(Disk(), Request(readable, room))
        with pytest.raises(MemoryGone):
            transfers.finish(transfer, -errno.EFAULT)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EAGAIN])
@pytest.mark.parametrize("done", [0, 100])
def test_what_the_kernel_does_not_take_so_is_done_by_a_call(number: int, done: int) -> None:
    disk = Disk()
    read, write = Request(header(IN, 1), 2 * SECTOR + 1), Request(header(OUT, 4) + b"x" * 2 * SECTOR, 1)
    for request in (read, write):
        transfers, transfer = begun(disk, request)
        if done:
            assert not transfers.finish(transfer, carried_out(disk, transfer, done))
        assert transfers.finish(transfer, -number)
        assert request.writable[-1] == OK
    assert (read.chain.written, write.chain.written) == (2 * SECTOR + 1, 1)
    assert read.writable[:-1] == disk.content[SECTOR : 3 * SECTOR]
    assert disk.content[4 * SECTOR : 6 * SECTOR] == b"x" * 2 * SECTOR
    flush = Request(header(FLUSH), 1)
    transfers, transfer = begun(disk, flush)
    assert transfers.finish(transfer, -number) and flush.writable[0] == OK
    assert disk.called == ["read", "write", "flush"]


@pytest.mark.parametrize(
    ("number", "status"), [(errno.EINVAL, IOERR), (errno.EIO, IOERR), (errno.EOPNOTSUPP, UNSUPP)]
)
def test_what_fails_by_a_call_too_has_failed(number: int, status: int) -> None:
    disk = Disk()
    disk.error = OSError(number, "")
    for readable, room in ((header(IN), SECTOR + 1), (header(OUT) + bytes(SECTOR), 1), (header(FLUSH), 1)):
        request = Request(readable, room)
        transfers, transfer = begun(disk, request)
        assert transfers.finish(transfer, -errno.EINVAL)
        assert (request.writable[-1], request.chain.written) == (status, 1 if room == 1 else 0)


def test_a_disk_that_gives_nothing_by_a_call_is_an_error() -> None:
    class Empty(Disk):
        def read(self, buffers: Sequence[memoryview], offset: int) -> int:
            self._called("read")
            return 0

    disk = Empty()
    request = Request(header(IN), SECTOR + 1)
    transfers, transfer = begun(disk, request)
    assert transfers.finish(transfer, -errno.EINVAL)
    assert request.writable[-1] == IOERR and len(disk.called) < 4


def test_random_requests_by_transfer_are_as_by_service() -> None:
    seed = 8
    random = Random(seed)
    by_transfer, by_service = Disk(), Disk()
    for turn in range(4000):
        kind = random.choice((IN, IN, OUT, OUT, FLUSH, GET_ID, ZEROES, DISCARD, 77))
        sector, sectors = random.randrange(SECTORS + 2), random.randrange(4)
        payload, room = b"", random.choice((0, 0, 1, 20))
        if kind == IN:
            room = sectors * SECTOR + random.choice((0, 0, 0, 1))
        elif kind == OUT:
            payload = random.randbytes(sectors * SECTOR + random.choice((0, 0, 0, 1)))
        elif kind in (ZEROES, DISCARD):
            payload = struct.pack("<QII", sector, sectors, 0)
        readable = (header(kind, sector) + payload)[: random.choice((99999, 99999, 99999, 10))]
        cuts = sorted(random.sample(range(1, len(readable)), random.randrange(4)))
        room_cuts = sorted(random.sample(range(1, room + 1), min(room, random.randrange(4))))
        one, other = (Request(readable, room + 1, cuts, room_cuts) for _ in range(2))
        expected = Block(by_service).serve_request(other.chain)
        status, used = answer(by_transfer, one, random.choice((SIZE, SIZE, 700)))
        assert (status, used, one.writable) == (other.writable[-1], expected, other.writable), (seed, turn)
        assert by_transfer.content == by_service.content, (seed, turn)
