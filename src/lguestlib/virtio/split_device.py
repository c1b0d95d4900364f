"""The device's side of a split virtqueue (virtio 1.3, 2.7).

The life of a request, as the device has it:

1. The driver puts a chain's head into the available ring and moves avail.idx.
2. `pop_many` reads avail.idx, then the heads it announces, then copies the
   descriptor table, once.  Everything is checked on the copy.
3. The device works on the chains' buffers, in place.
4. `push` writes the used element, then used.idx: from here the buffers are the
   driver's again.
5. `should_interrupt` fences, then asks whether the driver wants to be told.

The avail ring and the descriptors are the driver's to write; the used ring is
the device's.  Live fields are read and written whole, through cast views, once.
One thread at a time may use a queue.
"""

from collections.abc import Iterable, Sequence

from lguestlib.abi.virtio_ring import (
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
)
from lguestlib.memory.fence import new_acquire, new_fence
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio import errors
from lguestlib.virtio.chain import DESCRIPTOR, LENGTH_MAX, Chain, walk
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import DescriptorIndex, QueueLayout, RingIndex

BATCH = 64
"""The most chains one `pop_many` takes: what is done of them is signalled before more are."""


class SplitDeviceQueue:
    """The device's end of the ring at *layout* in *memory*.

    *features* are the negotiated ones.  *next_available* is the avail index to go
    on from: 0 for a new ring.  Raises QueueLayoutError.
    """

    def __init__(
        self, layout: QueueLayout, memory: GuestMemory, features: int, next_available: RingIndex = RingIndex(0)
    ) -> None:
        self.index = layout.index
        self.size = size = layout.size
        self._memory = views = memory.views()
        layout.check(views)
        self._descriptors = views.slice(layout.descriptors, 16 * size)
        available = views.slice(layout.available, 6 + 2 * size).cast("B").cast("H")
        self._avail_flags = available[0:1]
        self._avail_idx = available[1:2]
        self._avail_ring = available[2 : 2 + size]
        self._used_event = available[2 + size :]
        used = views.slice(layout.used, 6 + 8 * size)
        self._used_flags = used[0:2].cast("H")
        self._used_idx = used[2:4].cast("H")
        self._used_ring = used[4 : 4 + 8 * size].cast("I")
        self._avail_event = used[4 + 8 * size :].cast("H")

        self._indirect = bool(features & Feature.RING_INDIRECT_DESC)
        self._event_idx = bool(features & Feature.RING_EVENT_IDX)
        self._notify_on_empty = bool(features & Feature.NOTIFY_ON_EMPTY)
        self._fence = new_fence()
        self._acquire = new_acquire()

        self._mask = size - 1
        self._next = int(next_available)
        self._used = self._used_idx[0]
        self._signalled = self._used
        # What was used before this queue object was made may never have been signalled (S24).
        self._signal_once = self._used != 0
        self._broken: errors.QueueError | None = None
        self._chains = [Chain(DescriptorIndex(head)) for head in range(size)]
        # Longer than the table, so that it is found nowhere in it.
        self._undecoded = bytes(16 * size + 1)
        for chain in self._chains:
            chain.decoded = self._undecoded
        # Most buffers are in one region: the short cut knows only that one.
        home = views.largest
        self._home = views.roots[home]
        self._home_base = int(views.regions[home].base)
        self._home_size = views.regions[home].size

    @property
    def next_available(self) -> RingIndex:
        """The avail index of the next chain to take, for resuming elsewhere."""
        return RingIndex(self._next)

    def pop(self) -> Chain | None:
        """The next available chain, or None.  Raises QueueError as `pop_many`."""
        chains = self.pop_many(1)
        return chains[0] if chains else None

    def pop_many(self, limit: int = BATCH) -> Sequence[Chain]:
        """Up to *limit* available chains, in the driver's order; empty when there are none.

        Raises AvailIndexError, now and ever after, for an impossible avail.idx
        (S2), and a ChainError for a malformed chain that is the next in turn: the
        queue has then gone past it (S27).  Good chains before it come first.
        """
        announced: int = self._avail_idx[0]
        position = self._next
        count = announced - position & 0xFFFF
        if not count:
            return ()
        if self._broken or count > self.size:
            self._broken = self._broken or errors.AvailIndexError(self.index, announced, position, self.size)
            raise self._broken
        if self._acquire:
            self._acquire()
        if count > limit:
            count = limit
        start = position & self._mask
        heads = self._avail_ring[start : start + count].tolist()
        if len(heads) < count:
            heads += self._avail_ring[: count - len(heads)].tolist()

        table = bytes(self._descriptors)
        matches = table.startswith
        chains = self._chains
        size = self.size
        popped: list[Chain] = []
        taken = popped.append
        try:
            for head in heads:
                if head >= size:
                    raise errors.HeadOutOfRange(self.index, head, size)
                chain = chains[head]
                if chain.in_flight:
                    raise errors.HeadInFlight(self.index, head)
                # Descriptors that have not changed since have nothing new to check.
                if not matches(chain.decoded, head << 4):
                    self._decode(chain, table)
                chain.in_flight = True
                taken(chain)
        except errors.ChainError:
            if not popped:
                self._next = position + 1 & 0xFFFF
                raise
        self._next = position + len(popped) & 0xFFFF
        return popped

    def put_back(self, chains: Sequence[Chain]) -> None:
        """Return *chains*, the last ones popped and none of them begun, to the available ring."""
        for chain in chains:
            chain.in_flight = False
        self._next = self._next - len(chains) & 0xFFFF

    def push(self, chain: Chain, written: int) -> None:
        """Give *chain* back to the driver, *written* bytes filled from its writable start.

        Raises NotInFlight and UsedLengthError for a mistake of the device's code
        (virtio 1.3, 2.7.8.2; S19, S20).
        """
        if not chain.in_flight or written > chain.writable_length:
            raise self._refuse(chain, written)
        used = self._used
        ring = self._used_ring
        slot = (used & self._mask) << 1
        ring[slot] = chain.head
        ring[slot + 1] = written
        self._used = used = used + 1 & 0xFFFF
        self._used_idx[0] = used
        chain.in_flight = False

    def push_many(self, done: Iterable[tuple[Chain, int]]) -> None:
        """`push` for each of *done*, with used.idx moved once, at the end."""
        used, mask, ring = self._used, self._mask, self._used_ring
        try:
            for chain, written in done:
                if not chain.in_flight or written > chain.writable_length:
                    raise self._refuse(chain, written)
                slot = (used & mask) << 1
                ring[slot] = chain.head
                ring[slot + 1] = written
                used += 1
                chain.in_flight = False
        finally:
            self._used = used = used & 0xFFFF
            self._used_idx[0] = used

    def _refuse(self, chain: Chain, written: int) -> errors.ChainError:
        if not chain.in_flight:
            return errors.NotInFlight(self.index, chain.head)
        return errors.UsedLengthError(self.index, chain.head, written, chain.writable_length)

    def disable_notifications(self) -> None:
        """Tell the driver that it need not notify (virtio 1.3, 2.7.10).

        With the event index there is nothing to say: an event it has passed is
        not met again before `enable_notifications`.
        """
        if not self._event_idx:
            self._used_flags[0] = VRING_USED_F_NO_NOTIFY

    def enable_notifications(self) -> bool:
        """Ask for a notification of the next chain; True if one came meanwhile (S22).

        On True go round again: the notification may not come.
        """
        if self._event_idx:
            self._avail_event[0] = self._next
        else:
            self._used_flags[0] = 0
        self._fence()
        available: int = self._avail_idx[0]
        return available != self._next

    def should_interrupt(self) -> bool:
        """Whether the driver is to be told of what was pushed since the last call (S21, S24 to S26).

        virtio 1.3, 2.7.7: by flag, or by used_event; by emptiness with the
        legacy NOTIFY_ON_EMPTY.
        """
        old, new = self._signalled, self._used
        if old == new and not self._signal_once:
            return False
        self._fence()
        self._signalled = new
        if self._signal_once:
            self._signal_once = False
            return True
        if self._notify_on_empty and self._avail_idx[0] == self._next:
            return True
        if self._event_idx:
            event: int = self._used_event[0]
            return (new - event - 1 & 0xFFFF) < (new - old & 0xFFFF)
        flags: int = self._avail_flags[0]
        return not flags & VRING_AVAIL_F_NO_INTERRUPT

    def release(self) -> None:
        """Let go of guest memory; the queue and its chains are of no use after."""
        for chain in self._chains:
            chain.readable = chain.writable = ()
        for view in (
            self._descriptors, self._avail_flags, self._avail_idx, self._avail_ring, self._used_event,
            self._used_flags, self._used_idx, self._used_ring, self._avail_event,
        ):  # fmt: skip
            view.release()
        self._memory.release()

    def _decode(self, chain: Chain, table: bytes) -> None:
        """Check the chain at *chain*'s head in *table* and give it its buffers.

        The short cut takes direct descriptors that lie in a row, hold something,
        and are in one region, which is what drivers make; `walk` does the rest.
        """
        base, size, home = self._home_base, self._home_size, self._home
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        read = written = 0
        index: int = chain.head
        while True:
            address, length, flags, following = DESCRIPTOR.unpack_from(table, index << 4)
            start = address - base
            if flags & VRING_DESC_F_INDIRECT or start < 0 or not 0 < length <= size - start:
                break
            if flags & VRING_DESC_F_WRITE:
                writable.append(home[start : start + length])
                written += length
            elif writable:
                break
            else:
                readable.append(home[start : start + length])
                read += length
            index += 1
            if not flags & VRING_DESC_F_NEXT:
                if read + written > LENGTH_MAX:
                    break
                chain.readable, chain.writable = tuple(readable), tuple(writable)
                chain.readable_length, chain.writable_length = read, written
                chain.decoded = table[chain.head << 4 : index << 4]
                return
            if following != index or index == self.size:
                break
        chain.decoded = self._undecoded
        readable, writable, read, written = walk(
            self.index, chain.head, table, self.size, self._memory, self._indirect
        )
        chain.readable, chain.writable = tuple(readable), tuple(writable)
        chain.readable_length, chain.writable_length = read, written
