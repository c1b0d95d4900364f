"""A packed ring written by hand, as a driver would or as none should, and what a device makes of it."""

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from virtio.rings import INDIRECT, NEXT, PLAIN, WITH_EVENT, WITH_INDIRECT, Outcome, Refusal, Verdict, Where, refusal

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import DescriptorIndex, QueueLayout
from lguestlib.virtio.packed_chain import buffer_id, read_row, walk_row

PACKED = PLAIN | int(Feature.RING_PACKED)
PACKED_EVENT = PACKED | WITH_EVENT
PACKED_INDIRECT = PACKED | WITH_INDIRECT
PACKED_ALL = PACKED_EVENT | PACKED_INDIRECT

AVAIL, USED = 1 << 7, 1 << 15

ENABLE, DISABLE, DESC = 0, 1, 2

_DESCRIPTOR = Struct("<QIHH")


class Packed(NamedTuple):
    """One entry of a descriptor ring, or of an indirect table, as it lies in memory."""

    address: int
    length: int
    flags: int = 0
    id: int = 0

    def packed(self) -> bytes:
        return _DESCRIPTOR.pack(self.address, self.length, self.id, self.flags)


class Used(NamedTuple):
    """A used element, as it lies in memory."""

    id: int
    length: int
    flags: int


def wrap_counter(position: int, size: int) -> bool:
    """The wrap counter at the *position*th descriptor ever made available, or used."""
    return position // size % 2 == 0


def off_wrap(position: int, size: int) -> int:
    """That position in 16 bits."""
    return position % size | wrap_counter(position, size) << 15


class PackedRing:
    """The driver's part of the packed ring at *layout*: nothing is checked.

    *position* counts the descriptors made available, without end.
    """

    def __init__(self, memory: GuestMemory, layout: QueueLayout, position: int = 0) -> None:
        self.layout = layout
        self.size = layout.size
        self.memory = memory
        self.position = position
        self._views = views = memory.views()
        self._ring = views.slice(layout.descriptors, 16 * layout.size)
        self._driver_event = views.slice(layout.available, 4).cast("H")
        self._device_event = views.slice(layout.used, 4).cast("H")

    def describe(self, index: int, descriptor: Packed) -> None:
        """Put *descriptor* into the ring at *index*, with flags as they are."""
        self._ring[16 * index : 16 * index + 16] = descriptor.packed()

    def described(self, index: int) -> Packed:
        address, length, number, flags = _DESCRIPTOR.unpack_from(self._ring, 16 * index)
        return Packed(address, length, flags, number)

    def write(self, position: int, descriptor: Packed) -> None:
        """Put it at *position*, available there."""
        marks = AVAIL if wrap_counter(position, self.size) else USED
        self.describe(position % self.size, descriptor._replace(flags=descriptor.flags | marks))

    def offer(self, *descriptors: Packed, id: int = 0) -> int:
        """Make a chain available, linked, its first descriptor last; return its position."""
        first = self.position
        self.position += len(descriptors)
        for step in reversed(range(len(descriptors))):
            more = NEXT if step < len(descriptors) - 1 else 0
            descriptor = descriptors[step]
            self.write(first + step, descriptor._replace(flags=descriptor.flags | more, id=id))
        return first

    def table(self, address: int, descriptors: Sequence[Packed]) -> Packed:
        """Put an indirect table at *address*; return the descriptor that names it."""
        data = b"".join(descriptor.packed() for descriptor in descriptors)
        self.memory.write(GuestAddress(address), data)
        return Packed(address, len(data), INDIRECT)

    def used(self, position: int) -> Used | None:
        """The used element at *position*, if there is one."""
        _, length, flags, number = self.described(position % self.size)
        marks = AVAIL | USED if wrap_counter(position, self.size) else 0
        return Used(number, length, flags) if flags & (AVAIL | USED) == marks else None

    @property
    def driver_event(self) -> tuple[int, int]:
        """off_wrap and flags."""
        return self._driver_event[0], self._driver_event[1]

    @driver_event.setter
    def driver_event(self, event: tuple[int, int]) -> None:
        self._driver_event[0], self._driver_event[1] = event

    @property
    def device_event(self) -> tuple[int, int]:
        return self._device_event[0], self._device_event[1]

    @device_event.setter
    def device_event(self, event: tuple[int, int]) -> None:
        self._device_event[0], self._device_event[1] = event

    def release(self) -> None:
        """Let go of guest memory."""
        for view in (self._ring, self._driver_event, self._device_event):
            view.release()
        self._views.release()


class PackedOracle:
    """What the readable way says of the chain at an index, of a ring with no other in flight."""

    def __init__(self, ring: PackedRing, features: int) -> None:
        self._ring = ring
        self._views = ring.memory.views()
        self._table = self._views.slice(ring.layout.descriptors, 16 * ring.size)
        self._indirect = bool(features & Feature.RING_INDIRECT_DESC)
        self._where = Where(ring.memory)

    def __call__(self, index: int, in_flight: Sequence[int] = (), free: int | None = None) -> tuple[Verdict, int, int]:
        """The verdict, the descriptors it takes, and the buffer ID."""
        queue, first, size = self._ring.layout.index, DescriptorIndex(index), self._ring.size
        row = read_row(self._table, size, index, self._ring.described(index).flags)
        number = row[-1].id
        try:
            buffer_id(queue, first, row, size, size if free is None else free)
            if number in in_flight:
                raise errors.BufferIdInFlight(queue, first, number)
            readable, writable, read, written = walk_row(queue, first, row, self._views, self._indirect)
        except errors.ChainError as error:
            return refusal(error), len(row), number
        found = Outcome(tuple(map(self._where, readable)), tuple(map(self._where, writable)), read, written)
        return found, len(row), number

    def all_from(self, position: int, held: Sequence[Chain] = ()) -> list[Verdict]:
        """The verdicts on all that is available from *position* on, up to a refusal, with the chains *held* in flight."""
        ring, size = self._ring, self._ring.size
        flying = [int(chain.head) for chain in held]
        free = size - sum(chain.slots for chain in held)
        verdicts: list[Verdict] = []
        while ring.described(position % size).flags & (AVAIL | USED) == (AVAIL if wrap_counter(position, size) else USED):
            verdict, slots, number = self(position % size, flying, free)
            verdicts.append(verdict)
            if isinstance(verdict, Refusal):
                break
            flying.append(number)
            free -= slots
            position += slots
        return verdicts

    def release(self) -> None:
        self._table.release()
        self._views.release()


