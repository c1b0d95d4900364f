"""The driver's side of a packed virtqueue (virtio 1.3, 2.8): for guests, front-ends and tests.

Addresses are guest-physical; what they point to is the caller's.  One thread at
a time may use a queue.  A device that misbehaves raises QueueError.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Generic, NamedTuple, TypeVar

from lguestlib.abi.virtio_ring import (
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE,
    VRING_PACKED_EVENT_FLAG_ENABLE,
)
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.fence import new_acquire, new_fence
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio import errors
from lguestlib.virtio.chain import DESCRIPTOR
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import DescriptorIndex, QueueLayout
from lguestlib.virtio.packed_ring import AVAIL, BOTH, FLAGS, OFF_WRAP, USED, off_wrap, wants_to_know
from lguestlib.virtio.split_driver import Buffer, QueueFull

Token = TypeVar("Token")


class _InFlight(NamedTuple, Generic[Token]):
    token: Token
    slots: int
    room: int


class PackedDriverQueue(Generic[Token]):
    """The driver's end of the packed ring at *layout* in *memory*, which it clears.

    What `add` was given as token comes back from `reap`.  Raises QueueLayoutError.
    """

    def __init__(self, layout: QueueLayout, memory: GuestMemory, features: int) -> None:
        self.layout = layout
        self.index = layout.index
        self.size = size = layout.size
        self._memory = views = memory.views()
        try:
            layout.check(views, Feature.RING_PACKED)
        except errors.QueueLayoutError:
            views.release()
            raise
        self._descriptors = views.slice(layout.descriptors, 16 * size)
        driver_event = views.slice(layout.available, 4)
        device_event = views.slice(layout.used, 4)
        for part in (self._descriptors, driver_event, device_event):
            part[:] = bytes(len(part))
        words = self._descriptors.cast("H")
        self._flags = words[7::8]
        self._ids = words[6::8]
        self._lengths = self._descriptors.cast("I")[2::4]
        self._addresses = self._descriptors.cast("Q")[0::2]
        self._driver_event = driver_event.cast("H")
        self._device_event = device_event.cast("H")
        self._event_idx = bool(features & Feature.RING_EVENT_IDX)
        self._in_order = bool(features & Feature.IN_ORDER)
        self._fence = new_fence()
        # Off x86 it is a full fence, which stands before flags that are written, too (S20, S23).
        self._order = new_acquire()
        self._free_ids = list(range(size - 1, -1, -1))
        self._in_flight: dict[int, _InFlight[Token]] = {}
        # Positions, of those of two laps: the next descriptor to write, and the next used one.
        self._next = 0
        self._used = 0
        self._free = size
        # Descriptors made available since `kick_needed` last looked.
        self._added = 0
        self._fault: errors.ChainError | None = None

    @property
    def free(self) -> int:
        """Descriptors that are in no chain."""
        return self._free

    @property
    def in_flight(self) -> int:
        """Chains the device has."""
        return len(self._in_flight)

    @property
    def next_available(self) -> int:
        """Where the next chain will be made available, as a notification tells it, 16 bits (virtio 1.3, 2.9)."""
        return off_wrap(self._next, self.size)

    def add(
        self,
        readable: Sequence[Buffer],
        writable: Sequence[Buffer],
        token: Token,
        table: GuestAddress | None = None,
    ) -> DescriptorIndex:
        """Make a chain of buffers available and return its buffer ID (virtio 1.3, 2.8.21).

        With *table* the descriptors go into an indirect table there, 16 bytes
        for each buffer.  Raises QueueFull, ValueError for a chain of no buffer,
        AddressError for a table outside memory, struct.error for a buffer that
        no descriptor can tell of; nothing has been added then.
        """
        buffers = [(buffer, 0) for buffer in readable]
        buffers += [(buffer, VRING_DESC_F_WRITE) for buffer in writable]
        if not buffers:
            raise ValueError(f"queue {self.index}: a chain needs a buffer")
        if table is not None:
            entries = b"".join(_packed(buffer, 0, flags) for buffer, flags in buffers)
            with self._memory.slice(table, len(entries)) as indirect:
                indirect[:] = entries
            buffers = [(Buffer(table, len(entries)), VRING_DESC_F_INDIRECT)]
        else:
            # Or what no descriptor can tell of would be found half-way.
            for buffer, flags in buffers:
                _packed(buffer, 0, flags)
        slots = len(buffers)
        if slots > self._free:
            raise QueueFull(f"queue {self.index}: {slots} descriptors wanted, {self._free} free")
        number = self._free_ids.pop()
        room = sum(buffer.length for buffer in writable)
        self._in_flight[number] = _InFlight(token, slots, room)
        first, first_flags = -1, 0
        position, size = self._next, self.size
        for left, (buffer, flags) in zip(range(slots - 1, -1, -1), buffers):
            slot, lap = (position, AVAIL) if position < size else (position - size, USED)
            self._addresses[slot] = buffer.address
            self._lengths[slot] = buffer.length
            self._ids[slot] = number
            flags |= lap | (VRING_DESC_F_NEXT if left else 0)
            if first < 0:
                first, first_flags = slot, flags
            else:
                self._flags[slot] = flags
            position = (position + 1) % (2 * size)
        if self._order:
            self._order()
        self._flags[first] = first_flags
        self._next = position
        self._free -= slots
        self._added += slots
        return DescriptorIndex(number)

    def kick_needed(self) -> bool:
        """Whether the device is to be notified of what was added since the last call (2.8.21.3)."""
        added, self._added = self._added, 0
        if not added:
            return False
        self._fence()
        old = (self._next - added) % (2 * self.size)
        return wants_to_know(self._device_event, self._event_idx, self._order, self.size, old, added)

    def _is_used(self) -> bool:
        """Whether there is another used element: flags that equal the wrap counter both (P1)."""
        used, size = self._used, self.size
        flags: int = self._flags[used if used < size else used - size]
        return flags & BOTH == (BOTH if used < size else 0)

    def reap(self) -> list[tuple[Token, int]]:
        """The tokens of the chains used since the last call, each with the bytes written (2.8.22).

        Raises NotInFlight or UsedLengthError for a device that returns what it was
        not given.  Good ones before it come first.  The queue has gone past it, by as
        many descriptors as the chain has, or as one element takes.  With IN_ORDER a
        device may tell of the last chain of a batch alone: those before it count as
        written in full (2.8.8).
        """
        reaped = [] if self._fault else self._reap()
        if self._fault and not reaped:
            fault, self._fault = self._fault, None
            raise fault
        return reaped

    def _reap(self) -> list[tuple[Token, int]]:
        """The good ones that are next; of one that is not, the error in `_fault`."""
        reaped: list[tuple[Token, int]] = []
        freed: list[int] = []
        while self._is_used():
            if self._order:
                self._order()
            slot = self._used % self.size
            number: int = self._ids[slot]
            written: int = self._lengths[slot]
            if self._in_order and number in self._in_flight:
                # A dictionary is in the order in which its keys were added.
                for other in [*takewhile(lambda other: other != number, self._in_flight)]:
                    skipped = self._in_flight.pop(other)
                    self._used = (self._used + skipped.slots) % (2 * self.size)
                    self._free += skipped.slots
                    freed.append(other)
                    reaped.append((skipped.token, skipped.room))
            entry = self._in_flight.pop(number, None)
            slots = entry.slots if entry else 1
            self._used = (self._used + slots) % (2 * self.size)
            if entry is None:
                self._fault = errors.NotInFlight(self.index, number)
                break
            self._free += slots
            freed.append(number)
            if written > entry.room:
                self._fault = errors.UsedLengthError(self.index, number, written, entry.room)
                break
            reaped.append((entry.token, written))
        self._free_ids.extend(reversed(freed))
        return reaped

    def disable_interrupts(self) -> None:
        """Tell the device that it need not interrupt (virtio 1.3, 2.8.10)."""
        self._driver_event[FLAGS] = VRING_PACKED_EVENT_FLAG_DISABLE

    def enable_interrupts(self) -> bool:
        """Ask to be interrupted at the next used chain; True if one came meanwhile."""
        event = self._driver_event
        if self._event_idx:
            event[OFF_WRAP] = off_wrap(self._used, self.size)
            if self._order:
                self._order()
            event[FLAGS] = VRING_PACKED_EVENT_FLAG_DESC
        else:
            event[FLAGS] = VRING_PACKED_EVENT_FLAG_ENABLE
        self._fence()
        return self._is_used()

    def release(self) -> None:
        """Let go of guest memory; the queue is of no use after."""
        for view in (
            self._flags, self._ids, self._lengths, self._addresses, self._descriptors,
            self._driver_event, self._device_event,
        ):  # fmt: skip
            view.release()
        self._memory.release()


def _packed(buffer: Buffer, number: int, flags: int) -> bytes:
    return DESCRIPTOR.pack(buffer.address, buffer.length, number, flags)
