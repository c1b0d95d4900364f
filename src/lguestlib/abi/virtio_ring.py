"""The split and the packed virtqueue, linux/virtio_ring.h (virtio 1.3, 2.7 and 2.8)."""

from lguestlib.abi.layout import Structure, u16, u32, u64

VIRTIO_RING_F_INDIRECT_DESC = 28
VIRTIO_RING_F_EVENT_IDX = 29

VRING_DESC_F_NEXT = 1
VRING_DESC_F_WRITE = 2
VRING_DESC_F_INDIRECT = 4

VRING_AVAIL_F_NO_INTERRUPT = 1
VRING_USED_F_NO_NOTIFY = 1

VRING_PACKED_DESC_F_AVAIL = 7
VRING_PACKED_DESC_F_USED = 15
"""Numbers of the bits in vring_packed_desc.flags whose meaning turns with the wrap counters."""

VRING_PACKED_EVENT_FLAG_ENABLE = 0
VRING_PACKED_EVENT_FLAG_DISABLE = 1
VRING_PACKED_EVENT_FLAG_DESC = 2
"""Values of vring_packed_desc_event.flags."""

VRING_PACKED_EVENT_F_WRAP_CTR = 15
"""Number of the bit in vring_packed_desc_event.off_wrap that is a wrap counter."""

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


class vring_packed_desc(Structure):
    """linux/virtio_ring.h: a buffer of the packed ring; the driver writes it, the device writes it over."""

    addr: u64
    len: u32
    id: u16
    flags: u16


class vring_packed_desc_event(Structure):
    """linux/virtio_ring.h: when its one writer, the driver or the device, wants to be told."""

    off_wrap: u16
    flags: u16
