"""Features by the names they have in the specification: "event_idx", "mrg_rxbuf"."""

from types import ModuleType

from lguestlib.abi import virtio_blk, virtio_console, virtio_ids, virtio_net
from lguestlib.virtio.features import Feature

_TYPES: dict[int, tuple[ModuleType, str]] = {
    virtio_ids.VIRTIO_ID_NET: (virtio_net, "VIRTIO_NET_F_"),
    virtio_ids.VIRTIO_ID_BLOCK: (virtio_blk, "VIRTIO_BLK_F_"),
    virtio_ids.VIRTIO_ID_CONSOLE: (virtio_console, "VIRTIO_CONSOLE_F_"),
}


def feature_names(device_type: int, features: int) -> dict[str, int]:
    """The names of those *features* that can be told, with their bits."""
    names = {
        "indirect_desc": int(Feature.RING_INDIRECT_DESC),
        "event_idx": int(Feature.RING_EVENT_IDX),
        "ring_packed": int(Feature.RING_PACKED),
        "in_order": int(Feature.IN_ORDER),
        "ring_reset": int(Feature.RING_RESET),
    }
    if device_type in _TYPES:
        module, prefix = _TYPES[device_type]
        for name, number in vars(module).items():
            if name.startswith(prefix):
                names[name.removeprefix(prefix).lower()] = 1 << number
    return {name: bit for name, bit in names.items() if bit & features}
