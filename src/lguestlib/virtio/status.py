"""The device status field as a state machine (virtio 1.3, 2.1 and 3.1.1).

      0 --> ACKNOWLEDGE --> DRIVER --> FEATURES_OK --> DRIVER_OK
                                          |               |
                                (refused: reads back      v
                                      clear)        DEVICE_NEEDS_RESET

The driver sets bits one after another, each only on top of those before it;
FAILED at any time; writing 0 is a reset, which is done when the device says so.
Whatever is written, the field holds a state of this picture, and FAILED or
NEEDS_RESET beside it: either leaves nothing to do but the reset.
"""

from collections.abc import Callable
from enum import IntFlag

from lguestlib.abi import virtio_config


class Status(IntFlag):
    """The bits of the device status field."""

    ACKNOWLEDGE = virtio_config.VIRTIO_CONFIG_S_ACKNOWLEDGE
    DRIVER = virtio_config.VIRTIO_CONFIG_S_DRIVER
    DRIVER_OK = virtio_config.VIRTIO_CONFIG_S_DRIVER_OK
    FEATURES_OK = virtio_config.VIRTIO_CONFIG_S_FEATURES_OK
    NEEDS_RESET = virtio_config.VIRTIO_CONFIG_S_NEEDS_RESET
    FAILED = virtio_config.VIRTIO_CONFIG_S_FAILED


LADDER = (Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK)


def advance(current: Status, written: int, features_acceptable: Callable[[], bool]) -> Status:
    """The status after a driver, finding *current*, writes a non-zero *written*.

    A bit cannot be taken back but by a reset, nor set before the one below it;
    FEATURES_OK stays clear where *features_acceptable* says no (T1).  After
    FAILED or NEEDS_RESET, none is set any more (2.1.1, 2.1.2).
    """
    current |= Status.FAILED & written
    if current & (Status.FAILED | Status.NEEDS_RESET):
        return current
    reached = current
    for bit in LADDER:
        if reached & bit:
            continue
        if not written & bit or (bit is Status.FEATURES_OK and not features_acceptable()):
            break
        reached |= bit
    return reached
