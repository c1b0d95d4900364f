"""The feature bits that no device type owns."""

from lguestlib.virtio.device import RING_FEATURES
from lguestlib.virtio.features import Feature


def test_the_bits_are_the_specifications() -> None:
    bits = {feature.name: feature.bit_length() - 1 for feature in Feature}
    assert bits == {
        "NOTIFY_ON_EMPTY": 24, "RING_INDIRECT_DESC": 28, "RING_EVENT_IDX": 29, "VERSION_1": 32, "RING_PACKED": 34,
        "IN_ORDER": 35, "NOTIFICATION_DATA": 38, "RING_RESET": 40,
    }  # fmt: skip


def test_what_every_device_offers_is_what_the_ring_can_do() -> None:
    assert RING_FEATURES == Feature.VERSION_1 | Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX
