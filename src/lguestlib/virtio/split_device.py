"""The device's side of a split virtqueue (virtio 1.3, 2.7).

The life of a request, as the device has it:

1. The driver puts a chain's head into the available ring and moves avail.idx.
2. `pop_many` reads avail.idx, then the heads it announces, then their
   descriptors, each once.  What is checked is what was read, and it alone is used.
3. The device works on the chains' buffers, in place.
4. `push_many` writes the used elements, then used.idx: from here the buffers are the
   driver's again.
5. `should_interrupt` fences, then asks whether the driver wants to be told.

The avail ring and the descriptors are the driver's to write; the used ring is
the device's.  Live fields are read and written whole, through cast views, once.
One thread at a time may use a queue.
"""

import struct
from collections.abc import Collection, Sequence

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
from lguestlib.virtio.chain import LENGTH_MAX, Chain, walk
from lguestlib.virtio.features import Feature
from lguestlib.virtio.inflight import InflightRecord
from lguestlib.virtio.layout import DescriptorIndex, QueueLayout, RingIndex
from lguestlib.virtio.queue_log import QueueLog
from lguestlib.virtio.queue_state import QueueState

# Descriptors, with flags and next as one word, the link: only the last one's flags stand alone.
_ONE = struct.Struct("<QII").unpack_from
_TWO = struct.Struct("<QII QIHH").unpack_from
_THREE = struct.Struct("<QII QII QIHH").unpack_from
_THREE_SIZE = 3 * 16
_NEXT_OR_INDIRECT = VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT
_NEXT_ROW = 1 << 16
_NEXT_ROW_WRITE = _NEXT_ROW | VRING_DESC_F_WRITE
_FIRST_ROW = VRING_DESC_F_NEXT | _NEXT_ROW

BATCH = 64
"""The most chains one `pop_many` takes: what is done of them is signalled before more are."""


class SplitDeviceQueue:
    """The device's end of the ring at *layout* in *memory*.

    *features* are the negotiated ones.  *next_available* is the avail index to go
    on from: 0 for a new ring.

    With *inflight*, the queue goes on where that record's last device ended: what
    it had in flight comes first, and used.idx and the record say where to go on in
    the available ring, whatever *next_available* is.  The record can only tell
    chains that are in flight from those that were used, so a malformed one is not
    gone past: it stays the next in turn.  With *log*, what the device writes is
    marked there.  The record is the queue's to `release`, unless this raises:
    QueueLayoutError, InflightRecordError, DirtyLogTooSmall.
    """

    # Without it, an instance with 30 attributes or more is slower: a chain takes 1.15 times as long.
    __slots__ = (
        "index", "size",
        "_memory", "_descriptors", "_avail_flags", "_avail_idx", "_avail_ring", "_used_event",
        "_used_flags", "_used_idx", "_used_ring", "_avail_event",
        "_indirect", "_event_idx", "_notify_on_empty", "_fence", "_order",
        "_mask", "_next", "_used", "_signalled", "_signal_once", "_fault", "_chains",
        "_home", "_home_base", "_home_size", "_inflight", "_log", "_recorded", "_half",
    )  # fmt: skip

    def __init__(
        self,
        layout: QueueLayout,
        memory: GuestMemory,
        features: int,
        next_available: RingIndex = RingIndex(0),
        *,
        inflight: InflightRecord | None = None,
        log: QueueLog | None = None,
    ) -> None:
        self.index = layout.index
        self.size = size = layout.size
        self._memory = views = memory.views()
        try:
            layout.check(views)
            if log is not None:
                log.check(layout, views)
            # Chains used and chains signalled: not cut to 16 bits, so that their difference never is.
            self._used: int = views.slice(GuestAddress(layout.used + 2), 2).cast("H")[0]
            resumed = None if inflight is None else inflight.recover(self._used, size)
        except errors.QueueError:
            views.release()
            raise
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
        if self._event_idx:
            # The driver ignores them then, and the specification wants them 0 (S25).
            self._used_flags[0] = 0
        self._fence = new_fence()
        # Off x86 it is a full fence, which stands before an index that is written, too (S20, S23).
        self._order = new_acquire()

        self._mask = size - 1
        # Chains the last pop took of what there was: by now they may be back with the driver.
        self._half = 0
        self._next = int(next_available) if resumed is None else self._used + resumed & 0xFFFF
        self._signalled = self._used
        self._inflight, self._log = inflight, log
        self._recorded = inflight is not None or log is not None
        # The last device may have been killed between a write here and its mark.
        self._mark_used(0, layout.end - layout.used)
        # What was used before this queue object was made may never have been signalled (S24).
        self._signal_once = bool(self._used or next_available)
        self._fault: errors.QueueError | None = None
        self._chains = [Chain(DescriptorIndex(head)) for head in range(size)]
        # Most buffers are in one region: the short cut knows only that one.
        home = views.largest
        self._home = views.roots[home]
        self._home_base = int(views.regions[home].base)
        self._home_size = views.regions[home].size

    @property
    def next_available(self) -> RingIndex:
        """The avail index of the next chain to take, for resuming elsewhere.

        Chains that an inflight record brought and that are not taken yet come before it.
        """
        return RingIndex(self._next)

    @property
    def state(self) -> QueueState:
        """Where to go on elsewhere: `next_available` as a queue of any kind has it."""
        return QueueState(self._next)

    def has_available(self) -> bool:
        """Whether `pop_many` would find anything, a fault included; for a look now and then."""
        available: int = self._avail_idx[0]
        return available != self._next or self._inflight is not None and bool(self._inflight.waiting)

    def pop(self) -> Chain | None:
        """The next available chain, or None.  Raises QueueError as `pop_many`."""
        chains = self.pop_many(1)
        return chains[0] if chains else None

    def pop_many(self, limit: int = BATCH, half: bool = False) -> Sequence[Chain]:
        """Up to *limit* available chains, in the driver's order; empty when there are none.

        With *half*, no more than half of what the driver has out, rounded up, the last
        ones popped so among it: it sees to one half while the device works on the other.

        Raises AvailIndexError, now and ever after, for an impossible avail.idx
        (S2), and a ChainError for a malformed chain that is the next in turn: the
        queue has then gone past it (S27).  Good chains before it come first.
        """
        inflight = self._inflight
        if inflight is not None and inflight.waiting:
            return self._pop_waiting(inflight, limit)
        announced: int = self._avail_idx[0]
        position = self._next
        count = announced - position & 0xFFFF
        if self._fault or count > self.size:
            raise self._take_fault(announced)
        if not count:
            self._half = 0
            return ()
        if self._order:
            self._order()
        if half:
            count = min(count, count + self._half + 1 >> 1, limit)
            self._half = count
        if count > limit:
            count = limit
        start = position & self._mask
        if count == 1:
            heads = [self._avail_ring[start]]
        else:
            heads = self._avail_ring[start : start + count].tolist()
            if len(heads) < count:
                heads += self._avail_ring[: count - len(heads)].tolist()

        popped: list[Chain] = []
        try:
            self._decode_each(heads, popped)
        except errors.ChainError as error:
            if popped and not popped[-1].in_flight:
                popped.pop()
            if not popped:
                if inflight is None:
                    self._next = position + 1 & 0xFFFF
                raise
            if inflight is None:
                # The good ones before it come first; what was found is reported all the same (S29).
                error.__traceback__ = error.__context__ = None
                self._fault = error
        self._next = position + len(popped) & 0xFFFF
        if inflight is not None:
            inflight.take([chain.head for chain in popped])
        return popped

    def _decode_each(self, heads: Sequence[int], popped: list[Chain]) -> None:
        """Check the chains at *heads*, give them their buffers and add them to *popped*.

        One pass without a call or an object per descriptor for the chains that
        drivers make most: one buffer; or three in a row, in the table or in an
        indirect one, as a block request's header, data and status.  Each is judged
        on the one copy of its descriptors that is taken (S18).  The other shapes
        are `_decode`'s.  Raises ChainError at the first that breaks a rule.
        """
        size, chains, table, taken = self.size, self._chains, self._descriptors, popped.append
        home, base, room, indirect = self._home, self._home_base, self._home_size, self._indirect
        # Three buffers in it cannot add up to too much (S15).
        small = 3 * room <= LENGTH_MAX
        for head in heads:
            if head >= size:
                raise errors.HeadOutOfRange(self.index, head, size)
            chain = chains[head]
            if chain.in_flight:
                raise errors.HeadInFlight(self.index, head)
            chain.in_flight = True
            taken(chain)
            row = chain.row
            # Descriptors that have not changed since have nothing new to check.
            if chain.three:
                three = _THREE(table, chain.offset)
                if three == chain.three:
                    continue
                address, length, link, address1, length1, link1, address2, length2, flags2, _ = three
            else:
                one = _ONE(table, chain.offset)
                if one == chain.one:
                    continue
                address, length, link = one
                start = address - base
                end = start + length
                if start < 0 or not length or end > room:
                    self._decode(chain)
                    continue
                if not link & _NEXT_OR_INDIRECT:
                    if link & VRING_DESC_F_WRITE:
                        chain.readable, chain.writable = (), (home[start:end],)
                        chain.readable_length, chain.writable_length = 0, length
                    else:
                        chain.readable, chain.writable = (home[start:end],), ()
                        chain.readable_length, chain.writable_length = length, 0
                    chain.one = one
                    continue
                if link == row and head + 3 <= size:
                    two = address1, length1, link1, address2, length2, flags2, _ = _TWO(table, chain.offset + 16)
                    three = one + two
                elif link & 0xFFFF == VRING_DESC_F_INDIRECT and length == _THREE_SIZE and indirect:
                    address, length, link, address1, length1, link1, address2, length2, flags2, _ = _THREE(home, start)
                    row = _FIRST_ROW
                    chain.one = three = ()
                else:
                    self._decode(chain)
                    continue
            start = address - base
            start1 = address1 - base
            start2 = address2 - base
            end = start + length
            end1 = start1 + length1
            end2 = start2 + length2
            if (
                link == row and flags2 == VRING_DESC_F_WRITE and length and length1 and length2
                and start >= 0 and start1 >= 0 and start2 >= 0 and end <= room and end1 <= room and end2 <= room
                and (small or length + length1 + length2 <= LENGTH_MAX)
            ):  # fmt: skip
                if link1 == row + _NEXT_ROW_WRITE:
                    chain.readable, chain.writable = (home[start:end],), (home[start1:end1], home[start2:end2])
                    chain.readable_length, chain.writable_length = length, length1 + length2
                    chain.three = three
                    continue
                if link1 == row + _NEXT_ROW:
                    chain.readable, chain.writable = (home[start:end], home[start1:end1]), (home[start2:end2],)
                    chain.readable_length, chain.writable_length = length + length1, length2
                    chain.three = three
                    continue
            self._decode(chain)

    def _pop_waiting(self, inflight: InflightRecord, limit: int) -> Sequence[Chain]:
        """`pop_many` while chains wait that were in flight already, marked as they are."""
        popped: list[Chain] = []
        try:
            self._decode_each(inflight.waiting[:limit], popped)
        except errors.ChainError:
            # The last one: its head was in range, and not in flight here, but its descriptors are bad.
            popped.pop()
            if not popped:
                raise
        inflight.resume(len(popped))
        return popped

    def _take_fault(self, announced: int) -> errors.QueueError:
        """What `pop_many` raises: a malformed chain's error once, for an impossible index always."""
        fault = self._fault
        if fault is None:
            fault = self._fault = errors.AvailIndexError(self.index, announced, self._next, self.size)
        elif isinstance(fault, errors.ChainError):
            self._fault = None
            self._next = self._next + 1 & 0xFFFF
        # Or each raising would add to it.
        return fault.with_traceback(None)

    def put_back(self, chains: Sequence[Chain]) -> None:
        """Return *chains*, the last ones popped and none of them begun, to the available ring.

        What an inflight record brought is the first to come again, and stays marked.
        """
        for chain in chains:
            chain.in_flight = False
        count = len(chains)
        if self._inflight is not None:
            count = self._inflight.give_back([chain.head for chain in chains])
        self._next = self._next - count & 0xFFFF
        if isinstance(self._fault, errors.ChainError):
            # It comes behind them, and is found again.
            self._fault = None

    def push(self, chain: Chain, written: int) -> None:
        """Give *chain* back to the driver, *written* bytes filled from its writable start.

        Raises NotInFlight and UsedLengthError for a mistake of the device's code
        (virtio 1.3, 2.7.8.2; S19, S20).
        """
        if not chain.in_flight or not 0 <= written <= chain.writable_length:
            raise self._refuse(chain, written)
        if self._recorded:
            self._return_recorded([(chain, written)])
            return
        used = self._used
        ring = self._used_ring
        slot = (used & self._mask) << 1
        ring[slot] = chain.head
        ring[slot + 1] = written
        chain.in_flight = False
        self._used = used = used + 1
        if self._order:
            self._order()
        self._used_idx[0] = used & 0xFFFF

    def push_many(self, chains: Sequence[Chain]) -> None:
        """`push` each of *chains*, its `written` set, with used.idx moved once, at the end.

        Of chains that are refused, and those after them, none is returned.
        """
        if self._recorded:
            self._push_many_recorded(chains)
            return
        used, mask, ring = self._used, self._mask, self._used_ring
        try:
            for chain in chains:
                written = chain.written
                if written > chain.writable_length or not chain.in_flight:
                    raise self._refuse(chain, written)
                slot = (used & mask) << 1
                ring[slot] = chain.head
                ring[slot + 1] = written
                used += 1
                chain.in_flight = False
        except ValueError:
            # No 32-bit word holds a negative one.
            if written < 0:
                raise self._refuse(chain, written) from None
            raise  # Of a queue that is released.
        finally:
            self._used = used
            if self._order:
                self._order()
            self._used_idx[0] = used & 0xFFFF

    def _push_many_recorded(self, chains: Sequence[Chain]) -> None:
        """`push_many` where a record or a log is kept."""
        batch: dict[DescriptorIndex, tuple[Chain, int]] = {}
        refused: Chain | None = None
        for chain in chains:
            good = chain.in_flight and chain.head not in batch and 0 <= chain.written <= chain.writable_length
            if not good:
                refused = chain
                break
            batch[chain.head] = chain, chain.written
        if batch:
            self._return_recorded(batch.values())
        if refused is not None:
            raise self._refuse(refused, refused.written)

    def _return_recorded(self, batch: Collection[tuple[Chain, int]]) -> None:
        """Return *batch*, chains that are in flight and what was written to each, step by step.

        A device killed between any two steps has left what the next one, and who
        copies the guest, can go on from (T16, T17).
        """
        inflight, log, ring = self._inflight, self._log, self._used_ring
        heads = [chain.head for chain, _ in batch]
        if log is not None and log.buffers:
            # All of a chain: what is written does not have to be at its writable start.
            address = self._memory.guest_address
            log.dirty.mark_all([(address(view), len(view)) for chain, _ in batch for view in chain.writable])
        if inflight is not None:
            inflight.returning(heads)
        used = self._used
        for chain, written in batch:
            slot = (used & self._mask) << 1
            ring[slot] = chain.head
            ring[slot + 1] = written
            chain.in_flight = False
            used += 1
        if log is not None:
            first = self._used & self._mask
            count = min(len(batch), self.size - first)
            self._mark_used(4 + 8 * first, 8 * count)
            self._mark_used(4, 8 * (len(batch) - count))
        self._used = used
        if self._order:
            self._order()
        self._used_idx[0] = used & 0xFFFF
        if log is not None:
            self._mark_used(2, 2)
        if inflight is not None:
            inflight.returned(heads, used & 0xFFFF)

    def _mark_used(self, offset: int, length: int) -> None:
        """Mark *length* bytes at byte *offset* of the used ring, which are written, in the log."""
        if self._log is not None and self._log.used is not None:
            self._log.dirty.mark(GuestAddress(self._log.used + offset), length)

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
            if self._log is not None:
                self._mark_used(0, 2)

    def enable_notifications(self) -> bool:
        """Ask for a notification of the next chain; True if one came meanwhile (S22).

        On True go round again: the notification may not come.
        """
        if self._event_idx:
            self._avail_event[0] = self._next
        else:
            self._used_flags[0] = 0
        if self._log is not None:
            self._mark_used(4 + 8 * self.size if self._event_idx else 0, 2)
        self._fence()
        return self.has_available()

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
            return (new - event - 1 & 0xFFFF) < new - old
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
        if self._inflight is not None:
            self._inflight.release()

    def _decode(self, chain: Chain) -> None:
        """Check the chain at *chain*'s head and give it its buffers, whatever its shape."""
        chain.one = chain.three = ()
        try:
            readable, writable, read, written = walk(
                self.index, chain.head, self._descriptors, self.size, self._memory, self._indirect
            )
        except errors.ChainError:
            chain.in_flight = False
            raise
        chain.readable, chain.writable = tuple(readable), tuple(writable)
        chain.readable_length, chain.writable_length = read, written
