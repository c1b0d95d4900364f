"""The block device, linux/virtio_blk.h (virtio 1.3, 5.2)."""

import ctypes
from typing import Annotated

from lguestlib.abi.layout import PackedStructure, Structure, u8, u16, u32, u64

VIRTIO_BLK_F_BARRIER = 0
VIRTIO_BLK_F_SIZE_MAX = 1
VIRTIO_BLK_F_SEG_MAX = 2
VIRTIO_BLK_F_GEOMETRY = 4
VIRTIO_BLK_F_RO = 5
VIRTIO_BLK_F_BLK_SIZE = 6
VIRTIO_BLK_F_SCSI = 7
VIRTIO_BLK_F_FLUSH = 9
VIRTIO_BLK_F_TOPOLOGY = 10
VIRTIO_BLK_F_CONFIG_WCE = 11
VIRTIO_BLK_F_MQ = 12
VIRTIO_BLK_F_DISCARD = 13
VIRTIO_BLK_F_WRITE_ZEROES = 14
VIRTIO_BLK_F_SECURE_ERASE = 16

VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_SCSI_CMD = 2
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13
VIRTIO_BLK_T_SECURE_ERASE = 14
VIRTIO_BLK_T_BARRIER = 0x80000000

VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2

VIRTIO_BLK_ID_BYTES = 20
VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1


class virtio_blk_geometry(PackedStructure):
    """linux/virtio_blk.h: cylinders, heads and sectors, for partitioning tools; read-only to the driver."""

    cylinders: u16
    heads: u8
    sectors: u8


class virtio_blk_config(PackedStructure):
    """linux/virtio_blk.h: the configuration, in 512-byte sectors; the driver may write *wce* alone."""

    capacity: u64
    size_max: u32
    seg_max: u32
    geometry: virtio_blk_geometry
    blk_size: u32
    physical_block_exp: u8
    alignment_offset: u8
    min_io_size: u16
    opt_io_size: u32
    wce: u8
    unused: u8
    num_queues: u16
    max_discard_sectors: u32
    max_discard_seg: u32
    discard_sector_alignment: u32
    max_write_zeroes_sectors: u32
    max_write_zeroes_seg: u32
    write_zeroes_may_unmap: u8
    unused1: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 3]
    max_secure_erase_sectors: u32
    max_secure_erase_seg: u32
    secure_erase_sector_alignment: u32


class virtio_blk_outhdr(Structure):
    """linux/virtio_blk.h: the head of every request, *sector* of 512 bytes; written by the driver."""

    type: u32
    ioprio: u32
    sector: u64


class virtio_blk_discard_write_zeroes(Structure):
    """linux/virtio_blk.h: one range of such a request, in sectors of 512 bytes; written by the driver."""

    sector: u64
    num_sectors: u32
    flags: u32
