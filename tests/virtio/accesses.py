"""Every access to a ring's shared fields, one by one: recorded, or decided by whoever explores them.

The queues of `lguestlib.virtio` run unchanged; only the views of their live fields
are put away for cells that go through a `Port`.
"""

from typing import Protocol, TypeVar, cast

from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.packed_driver import PackedDriverQueue
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.split_driver import SplitDriverQueue

Token = TypeVar("Token")

Place = tuple[str, int]
"""A field and the index into it."""

FIELDS = (
    "avail_flags",
    "avail_idx",
    "avail_ring",
    "used_event",
    "used_flags",
    "used_idx",
    "used_ring",
    "avail_event",
)

PACKED_FIELDS = ("flags", "ids", "lengths", "driver_event", "device_event")

_WIDE = ("used_ring", "lengths")
"""Of 32 bits."""


class Port(Protocol):
    """One side's way to the shared fields."""

    def load(self, place: Place) -> int: ...

    def store(self, place: Place, value: int) -> None: ...

    def fence(self) -> None: ...

    def order(self) -> None:
        """What stands between an index and its entries where the processor needs it."""


class _Values(list[int]):
    def tolist(self) -> list[int]:
        return self


class _Cells:
    """In place of a cast memoryview."""

    def __init__(self, port: Port, field: str, length: int) -> None:
        self._port = port
        self._field = field
        self._length = length

    def __getitem__(self, index: int | slice) -> int | _Values:
        if isinstance(index, slice):
            positions = range(*index.indices(self._length))
            return _Values(self._port.load((self._field, position)) for position in positions)
        return self._port.load((self._field, index))

    def __setitem__(self, index: int, value: int) -> None:
        assert value in range(1 << 32 if self._field in _WIDE else 1 << 16)
        self._port.store((self._field, index), value)

    def release(self) -> None:
        """Nothing is held."""


AnyQueue = SplitDeviceQueue | SplitDriverQueue[Token] | PackedDeviceQueue | PackedDriverQueue[Token]


def through(queue: AnyQueue[Token], port: Port, ordered: bool = False) -> None:
    """Send *queue*'s accesses through *port*, with *ordered* as on a processor that needs to be told."""
    packed = isinstance(queue, PackedDeviceQueue | PackedDriverQueue)
    for field in PACKED_FIELDS if packed else FIELDS:
        view = getattr(queue, f"_{field}")
        assert isinstance(view, memoryview)
        setattr(queue, f"_{field}", cast(memoryview, _Cells(port, field, len(view))))
        view.release()
    assert callable(queue._fence)
    queue._fence = port.fence
    queue._order = port.order if ordered else None
