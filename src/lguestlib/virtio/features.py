"""Feature bits that belong to no device type, and their negotiation (virtio 1.3, 2.2 and 6)."""

from enum import IntFlag

from lguestlib.abi import virtio_config, virtio_ring


class Feature(IntFlag):
    """Transport and ring features; device features are bits of the same word."""

    NOTIFY_ON_EMPTY = 1 << virtio_config.VIRTIO_F_NOTIFY_ON_EMPTY
    RING_INDIRECT_DESC = 1 << virtio_ring.VIRTIO_RING_F_INDIRECT_DESC
    RING_EVENT_IDX = 1 << virtio_ring.VIRTIO_RING_F_EVENT_IDX
    VERSION_1 = 1 << virtio_config.VIRTIO_F_VERSION_1
    RING_PACKED = 1 << virtio_config.VIRTIO_F_RING_PACKED
    IN_ORDER = 1 << virtio_config.VIRTIO_F_IN_ORDER
    NOTIFICATION_DATA = 1 << virtio_config.VIRTIO_F_NOTIFICATION_DATA
    RING_RESET = 1 << virtio_config.VIRTIO_F_RING_RESET
