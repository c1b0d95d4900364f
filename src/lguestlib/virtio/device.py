"""What a device is: a type, features, a config space, and one service function per queue.

A device does nothing to the outside itself; it is handed a back-end for that.
It has no thread either: whoever runs it calls a queue's service function with
one chain at a time, and one queue's calls never overlap.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lguestlib.virtio.chain import Chain
from lguestlib.virtio.features import Feature
from lguestlib.virtio.transfer import Transfers

Service = Callable[[Chain], int]
"""Do what a chain asks and return the bytes written, from its writable part's start.

It may raise InterruptedError, having done nothing, when it is to stop; and
`SourceEnded`.  Any other exception fails the device.
"""

RING_FEATURES = Feature.VERSION_1 | Feature.RING_INDIRECT_DESC | Feature.RING_EVENT_IDX
"""What a driver of any device of this library takes; devices offer RING_PACKED, IN_ORDER and RING_RESET besides."""

QUEUE_SIZE = 256


class SourceEnded(Exception):
    """A queue's work comes from outside and no more will: the chain goes back, the queue rests."""


class Merging(Protocol):
    """Work that may take several chains at once, such as a packet received into merged buffers."""

    @property
    def room(self) -> int:
        """Device-writable bytes to have at hand before each piece of work; 0 where chains go one by one.

        Asked when the queue starts.
        """

    def serve(self, chains: Sequence[Chain], complete: bool) -> int:
        """Do one piece of work with *chains*, from the first on, and return how many it took.

        The `written` of those is set.  0 means that it needs more chains, and is asked
        again when there are some; when these are *complete* there will be none.  May raise what a
        `Service` may.
        """


@dataclass(frozen=True)
class Queue:
    """One virtqueue of a device: its *name*, its *service* function, the most descriptors.

    With *from_outside* the service blocks until the outside has something, and
    the driver is told of each chain before the next call.  *merging*, where it
    has room, serves instead of *service*; and so do *transfers*, where they are
    given: many chains are then in hand at a time.  Queues of one *party* wake each
    other: what one of them sends out comes back by another.
    """

    name: str
    service: Service
    size: int = QUEUE_SIZE
    from_outside: bool = False
    merging: Merging | None = None
    transfers: Transfers | None = None
    party: int = 0


def _nobody(device: "Device") -> None:
    """Nobody is listening: the device has no transport yet."""


class Device(ABC):
    """Base of all devices.  *name* is for people: "net", "block 2"."""

    device_type: int
    """The virtio device ID (virtio 1.3, 5)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.withheld = int(Feature.RING_PACKED | Feature.IN_ORDER)
        """Feature bits that are not offered although the device has them.

        Packed rings take this library longer than split ones, and a driver has
        whatever it is offered: such are offered only where somebody else may choose.
        """
        self.on_config_change: Callable[[Device], None] = _nobody
        """Called by the device after its config space changed; set by its transport's owner."""

    @property
    def features(self) -> int:
        """The feature bits of this device type that are offered, without `RING_FEATURES`."""
        return 0

    @property
    def legacy_features(self) -> int:
        """The feature bits of this device type that only a driver without VERSION_1 may be offered."""
        return 0

    @property
    def offered(self) -> int:
        """The feature bits a driver is offered, the ring's included."""
        ring = RING_FEATURES | Feature.RING_PACKED | Feature.RING_RESET
        if not any(queue.transfers for queue in self.queues()):
            # One chain after another, and so they come back; transfers do when they are done.
            ring |= Feature.IN_ORDER
        return (self.features | int(ring)) & ~self.withheld

    def config(self) -> bytes:
        """The device configuration space as it is now (virtio 1.3, 2.5)."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes *data* at byte *offset* of the config space: ignored unless overridden."""

    @abstractmethod
    def queues(self) -> Sequence[Queue]:
        """The virtqueues, in the order of their indices."""

    def activate(self, features: int) -> None:
        """The driver is ready and *features* are negotiated; the queues start after this."""

    def deactivate(self) -> None:
        """The device is reset; its queues have stopped."""
