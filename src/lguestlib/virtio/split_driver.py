"""The driver's side of a split virtqueue (virtio 1.3, 2.7): for guests, front-ends and tests.

Addresses are guest-physical; what they point to is the caller's.  One thread at
a time may use a queue.  A device that misbehaves raises QueueError.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Generic, NamedTuple, TypeVar

from lguestlib.abi.virtio_ring import (
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
)
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.fence import new_acquire, new_fence
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio import errors
from lguestlib.virtio.chain import DESCRIPTOR
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import DescriptorIndex, QueueLayout

Token = TypeVar("Token")


class Buffer(NamedTuple):
    """*length* bytes at guest-physical *address*."""

    address: GuestAddress
    length: int


class _InFlight(NamedTuple, Generic[Token]):
    token: Token
    descriptors: list[int]
    room: int


class QueueFull(Exception):
    """There are not enough free descriptors for a chain: reap some first."""


class SplitDriverQueue(Generic[Token]):
    """The driver's end of the ring at *layout* in *memory*, which it clears.

    What `add` was given as token comes back from `reap`.  With IN_ORDER descriptors are
    used in the order of the table, round and round (2.7.5.2).  Raises QueueLayoutError.
    """

    def __init__(self, layout: QueueLayout, memory: GuestMemory, features: int) -> None:
        self.layout = layout
        self.index = layout.index
        self.size = size = layout.size
        self._memory = views = memory.views()
        try:
            layout.check(views)
        except errors.QueueLayoutError:
            views.release()
            raise
        # Descriptors are written whole before avail.idx announces them.
        self._descriptors = views.slice(layout.descriptors, 16 * size)
        available = views.slice(layout.available, 6 + 2 * size)
        used = views.slice(layout.used, 6 + 8 * size)
        for part in (self._descriptors, available, used):
            part[:] = bytes(len(part))
        words = available.cast("H")
        self._avail_flags = words[0:1]
        self._avail_idx = words[1:2]
        self._avail_ring = words[2 : 2 + size]
        self._used_event = words[2 + size :]
        self._used_flags = used[0:2].cast("H")
        self._used_idx = used[2:4].cast("H")
        self._used_ring = used[4 : 4 + 8 * size].cast("I")
        self._avail_event = used[4 + 8 * size :].cast("H")
        self._event_idx = bool(features & Feature.RING_EVENT_IDX)
        self._in_order = bool(features & Feature.IN_ORDER)
        self._fence = new_fence()
        # Off x86 it is a full fence, which stands before an index that is written, too (S20, S23).
        self._order = new_acquire()
        self._free = list(range(size - 1, -1, -1))
        self._in_flight: dict[int, _InFlight[Token]] = {}
        # Chains made available, and how many of them when `kick_needed` last looked: not cut to 16 bits.
        self._available = 0
        self._announced = 0
        self._used = 0
        self._fault: errors.ChainError | None = None

    @property
    def free(self) -> int:
        """Descriptors that are in no chain."""
        return len(self._free)

    @property
    def in_flight(self) -> int:
        """Chains the device has."""
        return len(self._in_flight)

    @property
    def next_available(self) -> int:
        """Where the next chain will be made available, as a notification tells it, 16 bits (virtio 1.3, 2.9)."""
        return self._available & 0xFFFF

    def add(
        self,
        readable: Sequence[Buffer],
        writable: Sequence[Buffer],
        token: Token,
        table: GuestAddress | None = None,
    ) -> DescriptorIndex:
        """Make a chain of buffers available and return its head (virtio 1.3, 2.7.13).

        With *table* the descriptors go into an indirect table there, 16 bytes
        for each buffer.  Raises QueueFull, ValueError for a chain of no buffer,
        AddressError for a table outside memory, struct.error for a buffer that
        no descriptor can tell of; nothing has been added then.
        """
        buffers = [(buffer, 0) for buffer in readable]
        buffers += [(buffer, VRING_DESC_F_WRITE) for buffer in writable]
        if not buffers:
            raise ValueError(f"queue {self.index}: a chain needs a buffer")
        needed = 1 if table is not None else len(buffers)
        if needed > len(self._free):
            raise QueueFull(f"queue {self.index}: {needed} descriptors wanted, {len(self._free)} free")
        taken = self._free[: -needed - 1 : -1]
        if table is None:
            self._write(self._descriptors, taken, buffers)
        else:
            with self._memory.slice(table, 16 * len(buffers)) as indirect:
                self._write(indirect, list(range(len(buffers))), buffers)
            DESCRIPTOR.pack_into(
                self._descriptors, 16 * taken[0], table, 16 * len(buffers), VRING_DESC_F_INDIRECT, 0
            )
        del self._free[-needed:]
        head = taken[0]
        room = sum(buffer.length for buffer in writable)
        self._in_flight[head] = _InFlight(token, taken, room)
        self._avail_ring[self._available & (self.size - 1)] = head
        self._available += 1
        if self._order:
            self._order()
        self._avail_idx[0] = self._available & 0xFFFF
        return DescriptorIndex(head)

    @staticmethod
    def _write(table: memoryview, indices: list[int], buffers: list[tuple[Buffer, int]]) -> None:
        for position, (index, (buffer, flags)) in enumerate(zip(indices, buffers)):
            last = position + 1 == len(buffers)
            following = 0 if last else indices[position + 1]
            chained = 0 if last else VRING_DESC_F_NEXT
            DESCRIPTOR.pack_into(table, 16 * index, buffer.address, buffer.length, flags | chained, following)

    def kick_needed(self) -> bool:
        """Whether the device is to be notified of what was added since the last call (2.7.13.4)."""
        old, new = self._announced, self._available
        if old == new:
            return False
        self._fence()
        self._announced = new
        if self._event_idx:
            event: int = self._avail_event[0]
            return (new - event - 1 & 0xFFFF) < new - old
        flags: int = self._used_flags[0]
        return not flags & VRING_USED_F_NO_NOTIFY

    def reap(self) -> list[tuple[Token, int]]:
        """The tokens of the chains used since the last call, each with the bytes written (2.7.14).

        Raises UsedIndexError, NotInFlight or UsedLengthError for a device that
        returns what it was not given; UsedOutOfOrder with IN_ORDER.  Good ones before
        it come first, and but for the impossible index the queue has gone past it.
        With IN_ORDER a device may tell of the last chain of a batch alone: those before
        it count as written in full (2.7.9).
        """
        reaped = [] if self._fault else self._reap()
        if self._fault and not reaped:
            fault, self._fault = self._fault, None
            self._used = self._used + 1 & 0xFFFF
            raise fault
        return reaped

    def _reap(self) -> list[tuple[Token, int]]:
        """The good ones that are next; of one that is not, the error in `_fault`."""
        announced: int = self._used_idx[0]
        count = announced - self._used & 0xFFFF
        if not count:
            return []
        if count > len(self._in_flight):
            raise errors.UsedIndexError(self.index, announced, self._used)
        if self._order:
            self._order()
        if self._in_order:
            return self._reap_batches(count)
        reaped: list[tuple[Token, int]] = []
        freed: list[int] = []
        for position in range(self._used, self._used + count):
            slot = (position & (self.size - 1)) << 1
            head: int = self._used_ring[slot]
            written: int = self._used_ring[slot + 1]
            entry = self._in_flight.pop(head, None)
            if entry is None:
                self._fault = errors.NotInFlight(self.index, head)
                break
            freed += entry.descriptors
            if written > entry.room:
                self._fault = errors.UsedLengthError(self.index, head, written, entry.room)
                break
            reaped.append((entry.token, written))
        # The next chains get the same descriptors in the same order: a steady load stays in few cache lines.
        self._free.extend(reversed(freed))
        self._used = self._used + len(reaped) & 0xFFFF
        return reaped

    def _reap_batches(self, count: int) -> list[tuple[Token, int]]:
        """As `_reap`, where each element may stand for several of the *count* chains."""
        reaped: list[tuple[Token, int]] = []
        freed: list[int] = []
        while len(reaped) < count:
            slot = (self._used + len(reaped) & (self.size - 1)) << 1
            head: int = self._used_ring[slot]
            written: int = self._used_ring[slot + 1]
            if head not in self._in_flight:
                self._fault = errors.NotInFlight(self.index, head)
                break
            # A dictionary is in the order in which its keys were added.
            heads = [*takewhile(lambda other: other != head, self._in_flight), head]
            if len(heads) > count - len(reaped):
                self._fault = errors.UsedOutOfOrder(self.index, head, len(heads) - 1)
                break
            *skipped, last = [self._in_flight.pop(each) for each in heads]
            for entry in (*skipped, last):
                freed += entry.descriptors
            reaped += [(entry.token, entry.room) for entry in skipped]
            if written > last.room:
                self._fault = errors.UsedLengthError(self.index, head, written, last.room)
                break
            reaped.append((last.token, written))
        # They are next when all others have been.
        self._free[:0] = reversed(freed)
        self._used = self._used + len(reaped) & 0xFFFF
        return reaped

    def disable_interrupts(self) -> None:
        """Tell the device that it need not interrupt (virtio 1.3, 2.7.7).

        With the event index, an event just passed is not met again for 65535 chains.
        """
        if self._event_idx:
            self._used_event[0] = self._used - 1 & 0xFFFF
        else:
            self._avail_flags[0] = VRING_AVAIL_F_NO_INTERRUPT

    def enable_interrupts(self) -> bool:
        """Ask to be interrupted at the next used chain; True if one came meanwhile."""
        if self._event_idx:
            self._used_event[0] = self._used
        else:
            self._avail_flags[0] = 0
        self._fence()
        used: int = self._used_idx[0]
        return used != self._used

    def release(self) -> None:
        """Let go of guest memory; the queue is of no use after."""
        for view in (
            self._descriptors, self._avail_flags, self._avail_idx, self._avail_ring, self._used_event,
            self._used_flags, self._used_idx, self._used_ring, self._avail_event,
        ):  # fmt: skip
            view.release()
        self._memory.release()
