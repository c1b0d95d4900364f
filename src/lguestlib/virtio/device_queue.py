"""A virtqueue's device side, whichever kind of ring it has."""

from collections.abc import Sequence
from typing import Protocol

from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.errors import QueueStateError
from lguestlib.virtio.features import Feature
from lguestlib.virtio.inflight import InflightRecord, area_size, part_of
from lguestlib.virtio.inflight_packed import PackedInflightRecord, packed_area_size, packed_part_of
from lguestlib.virtio.layout import QueueLayout, RingIndex
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.queue_log import QueueLog
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.split_device import BATCH, SplitDeviceQueue


class DeviceQueue(Protocol):
    """What serves a queue needs of it: see `SplitDeviceQueue` and `PackedDeviceQueue`."""

    index: int
    size: int

    @property
    def state(self) -> QueueState:
        """Where to go on elsewhere."""

    def has_available(self) -> bool:
        """Whether `pop_many` would find anything, a fault included."""

    def pop(self) -> Chain | None:
        """The next available chain, or None.  Raises QueueError."""

    def pop_many(self, limit: int = BATCH, half: bool = False) -> Sequence[Chain]:
        """Up to *limit* available chains, with *half* no more than half of what the driver has out.

        Raises QueueError.
        """

    def put_back(self, chains: Sequence[Chain]) -> None:
        """Return *chains*, the last ones popped and none of them begun, to be popped again."""

    def push(self, chain: Chain, written: int) -> None:
        """Give *chain* back to the driver, *written* bytes filled.  Raises NotInFlight, UsedLengthError."""

    def push_many(self, chains: Sequence[Chain]) -> None:
        """`push` each of *chains*, its `written` set, and let the driver see them all at once."""

    def disable_notifications(self) -> None:
        """Tell the driver that it need not notify."""

    def enable_notifications(self) -> bool:
        """Ask for a notification of the next chain; True if one came meanwhile."""

    def should_interrupt(self) -> bool:
        """Whether the driver is to be told of what was pushed since the last call."""

    def release(self) -> None:
        """Let go of guest memory; the queue and its chains are of no use after."""


AnyInflightRecord = InflightRecord | PackedInflightRecord


def inflight_area_size(queues: int, size: int, features: int) -> int:
    """Bytes of the records of so many *queues*, each of *size* descriptors at most, of the kind *features* say."""
    return (packed_area_size if features & Feature.RING_PACKED else area_size)(queues, size)


def inflight_record(index: int, area: memoryview, size: int, features: int) -> AnyInflightRecord:
    """The record of queue *index* in *area*, where those for *size* descriptors are, of the kind *features* say.

    Raises ValueError where the area does not hold it.
    """
    if features & Feature.RING_PACKED:
        return PackedInflightRecord(index, packed_part_of(area, index, size), size)
    return InflightRecord(index, part_of(area, index, size), size)


def new_device_queue(
    layout: QueueLayout,
    memory: GuestMemory,
    features: int,
    state: QueueState | None = None,
    *,
    inflight: AnyInflightRecord | None = None,
    log: QueueLog | None = None,
) -> DeviceQueue:
    """The device's end of the ring at *layout*, of the kind that the negotiated *features* say.

    It goes on from *state*; None is a new ring.  *inflight* is of that kind, too.
    Raises as the classes do.
    """
    if features & Feature.RING_PACKED:
        assert not isinstance(inflight, InflightRecord)
        return PackedDeviceQueue(layout, memory, features, state, inflight=inflight, log=log)
    assert not isinstance(inflight, PackedInflightRecord)
    begun = state or QueueState.start(features)
    if begun.used:
        raise QueueStateError(layout.index, begun.available, begun.used, layout.size)
    return SplitDeviceQueue(
        layout, memory, features, RingIndex(begun.available), inflight=inflight, log=log
    )
