"""The split virtqueue, linux/virtio_ring.h (virtio 1.3, 2.7)."""

from lguestlib.abi.layout import Structure, u16, u32, u64

VIRTIO_RING_F_INDIRECT_DESC = 28
VIRTIO_RING_F_EVENT_IDX = 29

VRING_DESC_F_NEXT = 1
VRING_DESC_F_WRITE = 2
VRING_DESC_F_INDIRECT = 4

VRING_AVAIL_F_NO_INTERRUPT = 1
VRING_USED_F_NO_NOTIFY = 1

VRING_DESC_ALIGN_SIZE = 16
VRING_AVAIL_ALIGN_SIZE = 2
VRING_USED_ALIGN_SIZE = 4


class vring_desc(Structure):
    """linux/virtio_ring.h: a buffer, or a table of them; written by the driver alone."""

    addr: u64
    len: u32
    flags: u16
    next: u16


class vring_avail(Structure):
    """linux/virtio_ring.h: the available ring's header; written by the driver alone.

    The ring of u16 heads follows, then the used_event (virtio 1.3, 2.7.6).
    """

    flags: u16
    idx: u16


class vring_used_elem(Structure):
    """linux/virtio_ring.h: a completion, *len* the bytes written; written by the device alone."""

    id: u32
    len: u32


class vring_used(Structure):
    """linux/virtio_ring.h: the used ring's header; written by the device alone.

    The ring of vring_used_elem follows, then the avail_event (virtio 1.3, 2.7.8).
    """

    flags: u16
    idx: u16
