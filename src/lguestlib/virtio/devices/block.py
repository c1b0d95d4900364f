"""The block device (virtio 1.3, 5.2)."""

import errno
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from lguestlib.abi import virtio_blk as abi
from lguestlib.abi.virtio_blk import VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from lguestlib.abi.virtio_ids import VIRTIO_ID_BLOCK
from lguestlib.virtio.chain import Buffers, Chain, part
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.errors import MemoryGone
from lguestlib.virtio.transfer import Operation, Transfer, Transfers

SECTOR = 512
"""The unit of sector numbers and of capacity, in bytes, whatever the block size (5.2.4)."""

SEGMENTS_MAX = 126
"""Data buffers in one request: with header and status, all of a ring of 128, as vhost-user front-ends make them."""

NUM_QUEUES_MAX = 256
"""Request queues: as many as vhost-user can number."""

SEGMENT_SECTORS_MAX = 1 << 16
"""Sectors in one discard or write-zeroes segment."""

_HEADER = struct.Struct("<IIQ")
_HEADER_SIZE, _unpack_header = _HEADER.size, _HEADER.unpack
_SEGMENT = struct.Struct("<QII")
_ID_SIZE = abi.VIRTIO_BLK_ID_BYTES
_BARRIER = abi.VIRTIO_BLK_T_BARRIER
"""The bit of a legacy request's type."""
# A member of an enumeration is found slowly through its class.
_READ, _WRITE, _FLUSH = Operation.READ, Operation.WRITE, Operation.FLUSH
_BY_CALL = (errno.EINVAL, errno.EAGAIN)
"""A transfer that fails so may still be done by a call of the back-end."""


class BlockBackend(Protocol):
    """A disk, addressed in bytes; every method raises OSError for what fails."""

    @property
    def size(self) -> int:
        """Bytes as they are now, a multiple of `SECTOR`."""

    @property
    def block_size(self) -> int:
        """Bytes that are best read and written at once and aligned: `SECTOR` or a larger power of two."""

    @property
    def read_only(self) -> bool:
        """Whether it refuses writing."""

    @property
    def identity(self) -> bytes:
        """What get-id answers: at most 20 bytes."""

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read into *buffers* from byte *offset*; return the bytes read, which may be fewer."""

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write *buffers* at byte *offset*; return the bytes written, which may be fewer."""

    def flush(self) -> None:
        """Return when all that was written is on stable storage."""

    def discard(self, offset: int, length: int) -> None:
        """The *length* bytes at *offset* are no longer needed."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """The *length* bytes at *offset* become zero; with *unmap*, they may be deallocated."""


class _Refused(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


class Block(Device):
    """A disk with *num_queues* request queues, served at the same time.

    Its image is raw, and no request makes it grow (T22, T24).  Raises ValueError
    for a number of queues that there cannot be.  With *transfer_file*, a number for
    an open file that is the disk, reads, writes and flushes may be carried out there
    by who runs the queues (`Queue.transfers`).
    """

    device_type = VIRTIO_ID_BLOCK

    def __init__(
        self,
        backend: BlockBackend,
        name: str = "block",
        num_queues: int = 1,
        transfer_file: int | None = None,
    ) -> None:
        super().__init__(name)
        if not 1 <= num_queues <= NUM_QUEUES_MAX:
            raise ValueError(f"{name}: {num_queues} queues (1 to {NUM_QUEUES_MAX})")
        self.num_queues = num_queues
        self._backend = backend
        self._read_into, self._write_from = backend.read, backend.write
        self._read_only = backend.read_only
        self._transfers: Transfers | None = None
        if transfer_file is not None:
            self._transfers = Transfers(transfer_file, self.begin_request, self.finish_request)
        # The queues' threads read it, each once for a request; only `resized` writes it.
        self._size = backend.size
        self._requests: dict[int, Callable[[int, Buffers, Buffers], int]] = {
            VIRTIO_BLK_T_IN: self._read_all,
            VIRTIO_BLK_T_OUT: self._write,
            abi.VIRTIO_BLK_T_FLUSH: self._flush,
            abi.VIRTIO_BLK_T_GET_ID: self._get_id,
            abi.VIRTIO_BLK_T_DISCARD: self._discard,
            abi.VIRTIO_BLK_T_WRITE_ZEROES: self._write_zeroes,
        }
        self._barriers = False

    @property
    def legacy_features(self) -> int:
        # Not with transfers: a barrier stands between all of them, and here the others go on.
        return 0 if self._transfers else 1 << abi.VIRTIO_BLK_F_BARRIER

    def activate(self, features: int) -> None:
        self._barriers = bool(features & 1 << abi.VIRTIO_BLK_F_BARRIER)

    @property
    def features(self) -> int:
        bits = [abi.VIRTIO_BLK_F_SEG_MAX, abi.VIRTIO_BLK_F_BLK_SIZE, abi.VIRTIO_BLK_F_FLUSH]
        if self._backend.read_only:
            bits.append(abi.VIRTIO_BLK_F_RO)
        else:
            bits += [abi.VIRTIO_BLK_F_DISCARD, abi.VIRTIO_BLK_F_WRITE_ZEROES]
        if self.num_queues > 1:
            bits.append(abi.VIRTIO_BLK_F_MQ)
        return sum(1 << bit for bit in bits)

    def config(self) -> bytes:
        return bytes(
            abi.virtio_blk_config(
                capacity=self._size // SECTOR,
                seg_max=SEGMENTS_MAX,
                blk_size=self._backend.block_size,
                num_queues=self.num_queues,
                max_discard_sectors=SEGMENT_SECTORS_MAX,
                max_discard_seg=1,
                discard_sector_alignment=1,
                max_write_zeroes_sectors=SEGMENT_SECTORS_MAX,
                max_write_zeroes_seg=1,
                write_zeroes_may_unmap=1,
            )
        )

    def queues(self) -> Sequence[Queue]:
        if self.num_queues == 1:
            return (self._queue("requests"),)
        return tuple(self._queue(f"queue{index}") for index in range(self.num_queues))

    def _queue(self, name: str) -> Queue:
        return Queue(name, self.serve_request, transfers=self._transfers)

    def resized(self) -> None:
        """The back-end's size may have changed: if so, tell the driver (virtio 1.3, 5.2.5)."""
        size = self._backend.size
        if size != self._size:
            self._size = size
            self.on_config_change(self)

    def serve_request(self, chain: Chain, begun: list[Transfer] | None = None) -> int:
        """Service of the request queue (virtio 1.3, 5.2.6).

        The header is the first 16 readable bytes and the status the last
        writable one, however the driver cut them (2.7.4.1; S33).  With *begun*, a
        transfer is not carried out but added there.
        """
        room = chain.writable_length
        if not room:
            # Not even a status can be given (S33).
            return 0
        readable, writable = chain.readable, chain.writable
        status = writable[-1]
        if len(status) == 1:
            data = writable[:-1]
        else:
            data, status = part(writable, 0, room - 1), status[-1:]
        try:
            if readable and len(readable[0]) == _HEADER_SIZE:
                kind, _, sector = _unpack_header(readable[0])
            elif chain.readable_length >= _HEADER_SIZE:
                kind, _, sector = _unpack_header(chain.read(_HEADER_SIZE))
            else:
                raise _Refused(abi.VIRTIO_BLK_S_IOERR)
            if begun is not None and (transfer := self._begin(chain, kind, sector, data)):
                begun.append(transfer)
                return 0
            if kind == VIRTIO_BLK_T_IN:
                length, written = room - 1, room
                offset = sector * SECTOR
                if length % SECTOR or length > self._size - offset or self._read_into(data, offset) != length:
                    self._read(sector, data, length)
            elif kind == VIRTIO_BLK_T_OUT and len(readable[0]) == _HEADER_SIZE and not self._read_only:
                length, written = chain.readable_length - _HEADER_SIZE, 1 if room == 1 else 0
                offset = sector * SECTOR
                if length % SECTOR or length > self._size - offset or self._write_from(readable[1:], offset) != length:
                    self._write(sector, readable[1:], data)
            else:
                serve = self._serve_between_flushes if kind & _BARRIER and self._barriers else self._serve
                written = serve(kind, sector, _payload(readable, chain.readable_length), data)
                if written == room - 1:
                    # Counted from the start: a short answer leaves a hole before the status (S19).
                    written = room
            status[0] = VIRTIO_BLK_S_OK
        except InterruptedError:
            raise
        except _Refused as refusal:
            status[0] = refusal.status
            return 1 if room == 1 else 0
        except OSError as error:
            status[0] = _status(error.errno)
            return 1 if room == 1 else 0
        return written

    def _serve(self, kind: int, sector: int, payload: Buffers, data: Buffers) -> int:
        if kind not in self._requests:
            raise _Refused(abi.VIRTIO_BLK_S_UNSUPP)
        return self._requests[kind](sector, payload, data)

    def _serve_between_flushes(self, kind: int, sector: int, payload: Buffers, data: Buffers) -> int:
        """A legacy barrier: all before it is on stable storage before it begins, and it is when it ends."""
        self._backend.flush()
        written = self._serve(kind & ~_BARRIER, sector, payload, data)
        self._backend.flush()
        return written

    def begin_request(self, chain: Chain) -> Transfer | None:
        """The transfer that *chain* asks for; None where it was served at once, its `written` set."""
        begun: list[Transfer] = []
        chain.written = self.serve_request(chain, begun)
        return begun[0] if begun else None

    def _begin(self, chain: Chain, kind: int, sector: int, data: Buffers) -> Transfer | None:
        """The transfer for a request of *kind*; None where there is nothing to transfer."""
        if kind == VIRTIO_BLK_T_IN:
            operation, buffers, length = _READ, data, chain.writable_length - 1
        elif kind == VIRTIO_BLK_T_OUT:
            self._writable()
            operation, length = _WRITE, chain.readable_length - _HEADER_SIZE
            buffers = _payload(chain.readable, length)
        elif kind == abi.VIRTIO_BLK_T_FLUSH:
            return Transfer(chain, _FLUSH)
        else:
            return None
        offset = self._extent(sector, length)
        return Transfer(chain, operation, buffers, offset, length) if length else None

    def finish_request(self, transfer: Transfer, result: int) -> bool:
        """Write the status for *result*, bytes or a negative errno; False if some of it is left to do."""
        status = VIRTIO_BLK_S_OK
        if result != transfer.length:
            if 0 < result < transfer.length:
                transfer.advance(result)
                return False
            status = self._status_by_call(transfer, -result)
        chain = transfer.chain
        room = chain.writable_length
        chain.writable[-1][-1] = status
        whole = transfer.operation is _READ and status == VIRTIO_BLK_S_OK
        chain.written = room if whole or room == 1 else 0
        return True

    def _status_by_call(self, transfer: Transfer, error: int) -> int:
        """The status of *transfer*, which has failed with *error*, after another try where that can help."""
        if error not in _BY_CALL:
            return _status(error)
        try:
            if transfer.operation is _FLUSH:
                self._backend.flush()
            else:
                call = self._backend.read if transfer.operation is _READ else self._backend.write
                self._transfer(call, transfer.buffers, transfer.offset, transfer.length)
        except _Refused as refusal:
            return refusal.status
        except OSError as failure:
            return _status(failure.errno)
        return VIRTIO_BLK_S_OK

    def _extent(self, sector: int, length: int) -> int:
        """The byte offset of *sector* where *length* bytes from it are on the disk (T24)."""
        capacity = self._size // SECTOR
        if length % SECTOR or sector > capacity or length // SECTOR > capacity - sector:
            raise _Refused(abi.VIRTIO_BLK_S_IOERR)
        return sector * SECTOR

    def _writable(self) -> None:
        if self._backend.read_only:
            raise _Refused(abi.VIRTIO_BLK_S_IOERR)

    def _read(self, sector: int, data: Buffers, length: int) -> None:
        """Read with all checks, and in pieces where the disk gives no more at once."""
        self._transfer(self._backend.read, data, self._extent(sector, length), length)

    def _read_all(self, sector: int, payload: Buffers, data: Buffers) -> int:
        length = sum(map(len, data))
        self._read(sector, data, length)
        return length

    def _write(self, sector: int, payload: Buffers, data: Buffers) -> int:
        self._writable()
        length = sum(map(len, payload))
        self._transfer(self._backend.write, payload, self._extent(sector, length), length)
        return 0

    @staticmethod
    def _transfer(
        call: Callable[[Sequence[memoryview], int], int], buffers: Buffers, offset: int, length: int
    ) -> None:
        done = call(buffers, offset) if length else 0
        while done < length:
            more = call(part(buffers, done, length - done), offset + done)
            if not more:
                raise _Refused(abi.VIRTIO_BLK_S_IOERR)
            done += more

    def _flush(self, sector: int, payload: Buffers, data: Buffers) -> int:
        self._backend.flush()
        return 0

    def _get_id(self, sector: int, payload: Buffers, data: Buffers) -> int:
        identity = self._backend.identity[:_ID_SIZE].ljust(_ID_SIZE, b"\0")
        done = 0
        for piece in part(data, 0, _ID_SIZE):
            piece[:] = identity[done : done + len(piece)]
            done += len(piece)
        return done

    def _segment(self, payload: Buffers) -> tuple[int, int, int]:
        """The one segment that the config space allows: offset, length, flags (5.2.6.2)."""
        self._writable()
        raw = b"".join(part(payload, 0, _SEGMENT.size + 1))
        if len(raw) != _SEGMENT.size:
            raise _Refused(abi.VIRTIO_BLK_S_IOERR)
        sector, sectors, flags = _SEGMENT.unpack(raw)
        if flags & ~abi.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP:
            raise _Refused(abi.VIRTIO_BLK_S_UNSUPP)
        if sectors > SEGMENT_SECTORS_MAX:
            raise _Refused(abi.VIRTIO_BLK_S_IOERR)
        return self._extent(sector, sectors * SECTOR), sectors * SECTOR, flags

    def _discard(self, sector: int, payload: Buffers, data: Buffers) -> int:
        offset, length, flags = self._segment(payload)
        if flags:
            raise _Refused(abi.VIRTIO_BLK_S_UNSUPP)
        if length:
            self._backend.discard(offset, length)
        return 0

    def _write_zeroes(self, sector: int, payload: Buffers, data: Buffers) -> int:
        offset, length, flags = self._segment(payload)
        if length:
            self._backend.write_zeroes(offset, length, bool(flags))
        return 0


def _payload(readable: Buffers, length: int) -> Buffers:
    """What of *readable* comes behind the header, *length* bytes at most."""
    if len(readable[0]) == _HEADER_SIZE:
        return readable[1:]
    return part(readable, _HEADER_SIZE, length)


def _status(error: int | None) -> int:
    """The status for the errno *error*.  Raises MemoryGone where it is not the disk's."""
    if error == errno.EFAULT:
        raise MemoryGone
    return abi.VIRTIO_BLK_S_UNSUPP if error in (errno.EOPNOTSUPP, errno.ENOSYS) else abi.VIRTIO_BLK_S_IOERR
