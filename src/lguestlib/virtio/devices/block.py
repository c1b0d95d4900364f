"""The block device (virtio 1.3, 5.2)."""

import errno
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from lguestlib.abi import virtio_blk as abi
from lguestlib.abi.virtio_blk import VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN
from lguestlib.abi.virtio_ids import VIRTIO_ID_BLOCK
from lguestlib.virtio.chain import Buffers, Chain, part
from lguestlib.virtio.device import QUEUE_SIZE, Device, Queue

SECTOR = 512
"""The unit of sector numbers and of capacity, in bytes, whatever the block size (5.2.4)."""

SEGMENTS_MAX = QUEUE_SIZE - 2
"""Data buffers in one request: the queue less header and status."""

SEGMENT_SECTORS_MAX = 1 << 16
"""Sectors in one discard or write-zeroes segment."""

_HEADER = struct.Struct("<IIQ")
_HEADER_SIZE, _unpack_header = _HEADER.size, _HEADER.unpack
_SEGMENT = struct.Struct("<QII")
_ID_SIZE = abi.VIRTIO_BLK_ID_BYTES


class BlockBackend(Protocol):
    """A disk, addressed in bytes; every method raises OSError for what fails."""

    @property
    def size(self) -> int:
        """Bytes, a multiple of `SECTOR`."""

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
    """A disk.  Its image is raw and never grows (T22, T24)."""

    device_type = VIRTIO_ID_BLOCK

    def __init__(self, backend: BlockBackend, name: str = "block") -> None:
        super().__init__(name)
        self._backend = backend
        self._read_into = backend.read
        self._size = backend.size
        self._capacity = backend.size // SECTOR
        self._requests: dict[int, Callable[[int, Buffers, Buffers], int]] = {
            abi.VIRTIO_BLK_T_OUT: self._write,
            abi.VIRTIO_BLK_T_FLUSH: self._flush,
            abi.VIRTIO_BLK_T_GET_ID: self._get_id,
            abi.VIRTIO_BLK_T_DISCARD: self._discard,
            abi.VIRTIO_BLK_T_WRITE_ZEROES: self._write_zeroes,
        }

    @property
    def features(self) -> int:
        bits = [abi.VIRTIO_BLK_F_SEG_MAX, abi.VIRTIO_BLK_F_BLK_SIZE, abi.VIRTIO_BLK_F_FLUSH]
        if self._backend.read_only:
            bits.append(abi.VIRTIO_BLK_F_RO)
        else:
            bits += [abi.VIRTIO_BLK_F_DISCARD, abi.VIRTIO_BLK_F_WRITE_ZEROES]
        return sum(1 << bit for bit in bits)

    def config(self) -> bytes:
        return bytes(
            abi.virtio_blk_config(
                capacity=self._capacity,
                seg_max=SEGMENTS_MAX,
                blk_size=SECTOR,
                num_queues=1,
                max_discard_sectors=SEGMENT_SECTORS_MAX,
                max_discard_seg=1,
                discard_sector_alignment=1,
                max_write_zeroes_sectors=SEGMENT_SECTORS_MAX,
                max_write_zeroes_seg=1,
                write_zeroes_may_unmap=1,
            )
        )

    def queues(self) -> Sequence[Queue]:
        return (Queue("requests", self.serve_request),)

    def serve_request(self, chain: Chain) -> int:
        """Service of the request queue (virtio 1.3, 5.2.6).

        The header is the first 16 readable bytes and the status the last
        writable one, however the driver cut them (2.7.4.1; S33).
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
            if kind == VIRTIO_BLK_T_IN:
                written = length = room - 1
                offset = sector * SECTOR
                if length % SECTOR or length > self._size - offset or self._read_into(data, offset) != length:
                    self._read(sector, data, length)
            elif kind not in self._requests:
                raise _Refused(abi.VIRTIO_BLK_S_UNSUPP)
            else:
                payload = part(readable, _HEADER_SIZE, chain.readable_length)
                written = self._requests[kind](sector, payload, data)
            status[0] = VIRTIO_BLK_S_OK
        except InterruptedError:
            raise
        except _Refused as refusal:
            status[0] = refusal.status
            return 1 if room == 1 else 0
        except OSError as error:
            unsupported = error.errno in (errno.EOPNOTSUPP, errno.ENOSYS)
            status[0] = abi.VIRTIO_BLK_S_UNSUPP if unsupported else abi.VIRTIO_BLK_S_IOERR
            return 1 if room == 1 else 0
        # The bytes written are counted from the start: a short answer leaves a hole before the status (S19).
        return room if written == room - 1 else written

    def _extent(self, sector: int, length: int) -> int:
        """The byte offset of *sector* where *length* bytes from it are on the disk (T24)."""
        if length % SECTOR or sector > self._capacity or length // SECTOR > self._capacity - sector:
            raise _Refused(abi.VIRTIO_BLK_S_IOERR)
        return sector * SECTOR

    def _writable(self) -> None:
        if self._backend.read_only:
            raise _Refused(abi.VIRTIO_BLK_S_IOERR)

    def _read(self, sector: int, data: Buffers, length: int) -> None:
        """Read with all checks, and in pieces where the disk gives no more at once."""
        self._transfer(self._backend.read, data, self._extent(sector, length), length)

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
