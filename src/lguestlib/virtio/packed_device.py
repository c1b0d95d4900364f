"""The device's side of a packed virtqueue (virtio 1.3, 2.8).

There is one ring, of descriptors.  The life of a request, as the device has it:

1. The driver writes a chain's descriptors, one after another, the flags of the
   first one last: by these the chain is available (P1, P3).
2. `pop_many` reads flags, then the descriptors of the chains they announce, each
   once.  What is checked is what was read, and it alone is used.
3. The device works on the chains' buffers, in place.
4. `push_many` writes a used element for each chain, over descriptors that it has
   read, the flags of the first one last: from here the buffers are the driver's
   again.  The element takes one descriptor's place, and the chain's length is
   passed over (P5).
5. `should_interrupt` fences, then asks whether the driver wants to be told.

One thread at a time may use a queue.
"""

import struct
from bisect import bisect_left
from collections.abc import Sequence

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
from lguestlib.virtio.chain import LENGTH_MAX, Chain
from lguestlib.virtio.features import Feature
from lguestlib.virtio.inflight_packed import PackedInflightRecord
from lguestlib.virtio.layout import DescriptorIndex, QueueLayout
from lguestlib.virtio.packed_chain import FIRST, PackedDescriptor, buffer_id, read_row, walk_row
from lguestlib.virtio.packed_ring import (
    AVAIL,
    BOTH,
    FLAGS,
    OFF_WRAP,
    USED,
    off_wrap,
    position_of,
    wants_to_know,
)
from lguestlib.virtio.queue_log import QueueLog
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.split_device import BATCH

_FIRST = FIRST.unpack_from
# Three in a row: but for the first one's flags, which were read before, and what only the last one has.
_THREE = struct.Struct("<QI4x QI2xH QIHH").unpack_from
# Three entries of an indirect table, which have no ID.
_TABLE = struct.Struct("<QI2xH QI2xH QI2xH").unpack_from
_TABLE_SIZE = 3 * 16
_NEXT_OR_INDIRECT = VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT
_SHAPE = _NEXT_OR_INDIRECT | VRING_DESC_F_WRITE
_EVENT_SIZE = 4


class PackedDeviceQueue:
    """The device's end of the packed ring at *layout* in *memory*.

    *features* are the negotiated ones.  *state* is where to go on; None for a new
    ring, and so are zeros for a ring that was never used.

    With *inflight*, the queue goes on where that record's last device ended: what
    it had in flight comes first, whatever *state* is.  A malformed chain is not gone
    past then: it stays the next in turn.  With *log*, what the device writes is
    marked there.  The record is the queue's to `release`, unless this raises:
    QueueLayoutError, QueueStateError, InflightRecordError, DirtyLogTooSmall.
    """

    __slots__ = (
        "index", "size",
        "_memory", "_descriptors", "_flags", "_ids", "_lengths", "_driver_event", "_device_event",
        "_indirect", "_event_idx", "_fence", "_order",
        "_next", "_available", "_used", "_returned", "_out", "_half",
        "_signal_once", "_fault", "_fault_slots", "_chains",
        "_home", "_home_base", "_home_size", "_inflight", "_log", "_ring_at", "_event_at",
    )  # fmt: skip

    def __init__(
        self,
        layout: QueueLayout,
        memory: GuestMemory,
        features: int,
        state: QueueState | None = None,
        *,
        inflight: PackedInflightRecord | None = None,
        log: QueueLog | None = None,
    ) -> None:
        self.index = layout.index
        self.size = size = layout.size
        begun = state or QueueState.start(Feature.RING_PACKED)
        self._memory = views = memory.views()
        try:
            layout.check(views, Feature.RING_PACKED)
            if log is not None:
                log.check(layout, views, Feature.RING_PACKED)
            try:
                # The next chain's, and the next used element's, among those of two laps.
                self._next = position_of(begun.available, size)
                self._used = position_of(begun.used, size)
            except ValueError:
                raise errors.QueueStateError(self.index, begun.available, begun.used, size) from None
        except errors.QueueError:
            views.release()
            raise
        self._descriptors = views.slice(layout.descriptors, 16 * size)
        words = self._descriptors.cast("H")
        self._flags = words[7::8]
        self._ids = words[6::8]
        if not begun.base and not any(flags & USED for flags in self._flags.tolist()):
            # User-mode Linux says so of a new ring; at this place of a ring in use there is a used element.
            self._next = self._used = 0
        # Descriptors of the chains in flight.
        self._out = 0
        self._inflight = inflight
        if inflight is not None:
            try:
                resumed = inflight.recover(size, self._used, self._flags)
            except errors.QueueError:
                for view in (self._flags, self._ids, self._descriptors, words):
                    view.release()
                views.release()
                raise
            if resumed is not None:
                self._used, self._out = resumed
                self._next = (self._used + self._out) % (2 * size)
        self._lengths = self._descriptors.cast("I")[2::4]
        self._driver_event = views.slice(layout.available, _EVENT_SIZE).cast("H")
        self._device_event = views.slice(layout.used, _EVENT_SIZE).cast("H")
        self._indirect = bool(features & Feature.RING_INDIRECT_DESC)
        self._event_idx = bool(features & Feature.RING_EVENT_IDX)
        self._fence = new_fence()
        # Off x86 it is a full fence, which stands before flags that are written, too (S20, S23).
        self._order = new_acquire()

        # What AVAIL and USED are together in the next available descriptor's flags.
        self._available = AVAIL if self._next < size else USED
        # Descriptors passed over by used elements since `should_interrupt` last looked.
        self._returned = 0
        # Descriptors the last pop took of half of what there was: by now they may be back with the driver.
        self._half = 0
        self._log, self._ring_at, self._event_at = log, layout.descriptors, layout.used
        # The last device may have been killed between a write here and its mark.
        self._mark_ring(0, size)
        self._mark_event()
        # What was used before this queue object was made may never have been signalled (S24).
        self._signal_once = state is not None
        self._fault: errors.ChainError | None = None
        self._fault_slots = 0
        self._chains = [Chain(DescriptorIndex(number)) for number in range(size)]
        # Most buffers are in one region: the short cut knows only that one.
        home = views.largest
        self._home = views.roots[home]
        self._home_base = int(views.regions[home].base)
        self._home_size = views.regions[home].size

    @property
    def state(self) -> QueueState:
        """Where to go on elsewhere."""
        return QueueState(off_wrap(self._next, self.size), off_wrap(self._used, self.size))

    def has_available(self) -> bool:
        """Whether `pop_many` would find anything, a fault included; for a look now and then."""
        next_ = self._next
        flags: int = self._flags[next_ if next_ < self.size else next_ - self.size]
        return flags & BOTH == self._available or self._inflight is not None and bool(self._inflight.waiting)

    def pop(self) -> Chain | None:
        """The next available chain, or None.  Raises ChainError as `pop_many`."""
        chains = self.pop_many(1)
        return chains[0] if chains else None

    def pop_many(self, limit: int = BATCH, half: bool = False) -> Sequence[Chain]:
        """Up to *limit* available chains, in the driver's order; empty when there are none.

        With *half*, no more than half of what the driver has out, rounded up, the last
        ones popped so among it: it sees to one half while the device works on the other.
        The half is of the descriptors, and a chain begun in it is taken.

        Raises a ChainError for a malformed chain that is the next in turn: the queue
        has then gone past all its descriptors (S27).  Good chains before it come first.
        """
        if self._fault is not None:
            fault, self._fault = self._fault, None
            self._pass_over(self._fault_slots)
            # Or each raising would add to it.
            raise fault.with_traceback(None)
        inflight = self._inflight
        if inflight is not None and inflight.waiting:
            return self._pop_waiting(inflight, limit)
        size, next_ = self.size, self._next
        slot = next_ if next_ < size else next_ - size
        flags: int = self._flags[slot]
        if flags & BOTH != self._available:
            self._half = 0
            return ()
        announced = [flags] if limit == 1 else self._announced(slot, flags, 4 * limit)
        if self._order:
            self._order()
        if half:
            # Where chains are alike, half of the descriptors are half of them.
            available = self._available
            count = bisect_left(announced, True, key=lambda flags: flags & BOTH != available)
            del announced[count + self._half + 1 >> 1 :]
        popped: list[Chain] = []
        try:
            if inflight is None:
                slots = self._decode_each(slot, announced, limit, popped)
            else:
                slots = self._decode_recorded(inflight, slot, announced, limit, popped)
        except errors.ChainError as error:
            if not popped:
                if inflight is None:
                    self._pass_over(self._fault_slots)
                raise
            if inflight is None:
                # The good ones before it come first; what was found is reported all the same (S29).
                error.__traceback__ = error.__context__ = None
                self._fault = error
            slots = sum([chain.slots for chain in popped])
        self._out += slots
        if half:
            self._half = slots
        next_ += slots
        self._next = next_ = next_ if next_ < 2 * size else next_ - 2 * size
        self._available = AVAIL if next_ < size else USED
        return popped

    def _announced(self, slot: int, first: int, most: int) -> list[int]:
        """The flags, *first* and those behind it, of *most* descriptors or of what may be available.

        Those behind the ring's end are given as if they were of the same lap.
        """
        flags, size, available = self._flags, self.size, self._available
        most = min(most, size - self._out)
        # Twice as far while there is more: of many that are not available the flags would be read in vain.
        window = 1
        while window < most:
            at = slot + window
            if (flags[at] if at < size else flags[at - size] ^ BOTH) & BOTH != available:
                break
            window <<= 1
        if window == 1:
            return [first]
        window = min(window, most)
        announced: list[int] = flags[slot : slot + window].tolist()
        if slot + window > size:
            announced += [beyond ^ BOTH for beyond in flags[: slot + window - size].tolist()]
        announced[0] = first
        return announced

    def _pass_over(self, slots: int) -> None:
        position = self._next + slots
        size = self.size
        self._next = position if position < 2 * size else position - 2 * size
        self._available = AVAIL if self._next < size else USED

    def _decode_each(self, slot: int, announced: list[int], limit: int, popped: list[Chain]) -> int:
        """Check up to *limit* chains from descriptor *slot* on, give them their buffers, add them to *popped*.

        *announced* are the flags from there on.  Returns how many descriptors they
        take.  One pass without a call or an object per descriptor for the chains
        that drivers make most: one buffer; or three in a row, or in an indirect
        table, as a block request's header, data and status.  Each is judged on the
        one copy of its descriptors that is taken (S18).  The other shapes are
        `_decode`'s.  Raises ChainError at the first that breaks a rule.
        """
        size, chains, table, taken = self.size, self._chains, self._descriptors, popped.append
        home, base, room, indirect = self._home, self._home_base, self._home_size, self._indirect
        available, free = self._available, size - self._out
        # Three buffers in it cannot add up to too much (S15).
        small = 3 * room <= LENGTH_MAX
        at, end_of_flags = 0, len(announced)
        while at < end_of_flags and limit:
            flags = announced[at]
            if flags & BOTH != available:
                break
            limit -= 1
            shape = flags & _SHAPE
            slots = 1
            number = size
            if not shape & _NEXT_OR_INDIRECT:
                if at < free:
                    one = address, length, id1 = _FIRST(table, slot << 4)
                    start = address - base
                    end = start + length
                    if id1 < size and start >= 0 and length and end <= room and not chains[id1].in_flight:
                        chain = chains[id1]
                        # What has not changed since has nothing new to check.
                        if one != chain.one or not (chain.writable if shape else chain.readable):
                            if shape:
                                chain.readable, chain.writable = (), (home[start:end],)
                                chain.readable_length, chain.writable_length = 0, length
                            else:
                                chain.readable, chain.writable = (home[start:end],), ()
                                chain.readable_length, chain.writable_length = length, 0
                            chain.one, chain.three = one, ()
                            chain.slots = 1
                        chain.in_flight = True
                        taken(chain)
                        at += 1
                        slot += 1
                        if slot == size:
                            slot = 0
                        continue
            elif shape == VRING_DESC_F_NEXT:
                if slot + 3 <= size and at + 3 <= free:
                    three = address, length, address1, length1, flags1, address2, length2, id3, flags2 = _THREE(
                        table, slot << 4
                    )
                    if flags1 & _NEXT_OR_INDIRECT == VRING_DESC_F_NEXT and not flags2 & _NEXT_OR_INDIRECT:
                        slots, number = 3, id3
            elif shape & ~VRING_DESC_F_WRITE == VRING_DESC_F_INDIRECT and indirect and at < free:
                address, length, id1 = _FIRST(table, slot << 4)
                start = address - base
                if length == _TABLE_SIZE and start >= 0 and start + length <= room:
                    address, length, flags, address1, length1, flags1, address2, length2, flags2 = _TABLE(home, start)
                    three = ()
                    if not flags & VRING_DESC_F_WRITE:
                        number = id1
            if number < size and flags2 & VRING_DESC_F_WRITE:
                chain = chains[number]
                start = address - base
                start1 = address1 - base
                start2 = address2 - base
                end = start + length
                end1 = start1 + length1
                end2 = start2 + length2
                if (
                    length and length1 and length2 and start >= 0 and start1 >= 0 and start2 >= 0
                    and end <= room and end1 <= room and end2 <= room and not chain.in_flight
                    and (small or length + length1 + length2 <= LENGTH_MAX)
                ):  # fmt: skip
                    if not three or three != chain.three:
                        if flags1 & VRING_DESC_F_WRITE:
                            chain.readable, chain.writable = (home[start:end],), (home[start1:end1], home[start2:end2])
                            chain.readable_length, chain.writable_length = length, length1 + length2
                        else:
                            chain.readable, chain.writable = (home[start:end], home[start1:end1]), (home[start2:end2],)
                            chain.readable_length, chain.writable_length = length + length1, length2
                        chain.one, chain.three = (), three
                        chain.slots = slots
                    chain.in_flight = True
                    taken(chain)
                    at += slots
                    slot += slots
                    if slot >= size:
                        slot -= size
                    continue
            chain = self._decode(slot, announced[at], free - at)
            taken(chain)
            at += chain.slots
            slot += chain.slots
            if slot >= size:
                slot -= size
        return at

    def _decode(self, slot: int, flags: int, free: int) -> Chain:
        """The chain whose first descriptor, with *flags*, is at *slot*, checked, whatever its shape.

        So many descriptors are *free*: not in flight.
        """
        size, first = self.size, DescriptorIndex(slot)
        row = read_row(self._descriptors, size, slot, flags)
        self._fault_slots = len(row)
        return self._judge(first, row, free)

    def _decode_recorded(
        self, inflight: PackedInflightRecord, slot: int, announced: list[int], limit: int, popped: list[Chain]
    ) -> int:
        """As `_decode_each`, and the chains are in the record when this returns or raises."""
        size, at = self.size, 0
        while at < len(announced) and len(popped) < limit and announced[at] & BOTH == self._available:
            first = (slot + at) % size
            # Those behind the ring's end as they are there, which is what the record has to say.
            flags = announced[at] if slot + at < size else announced[at] ^ BOTH
            row = read_row(self._descriptors, size, first, flags)
            popped.append(self._judge(DescriptorIndex(first), row, size - self._out - at))
            inflight.take(row)
            at += len(row)
        return at

    def _pop_waiting(self, inflight: PackedInflightRecord, limit: int) -> Sequence[Chain]:
        """`pop_many` while chains wait that were in flight already, marked as they are."""
        popped: list[Chain] = []
        try:
            for row in inflight.waiting[:limit]:
                popped.append(self._judge(DescriptorIndex(0), row, self.size))
        except errors.ChainError:
            if not popped:
                raise
        inflight.resume(len(popped))
        return popped

    def _judge(self, first: DescriptorIndex, row: list[PackedDescriptor], free: int) -> Chain:
        """The chain of the descriptors in *row*, checked."""
        number = buffer_id(self.index, first, row, self.size, free)
        chain = self._chains[number]
        if chain.in_flight:
            raise errors.BufferIdInFlight(self.index, first, number)
        readable, writable, read, written = walk_row(self.index, first, row, self._memory, self._indirect)
        chain.readable, chain.writable = tuple(readable), tuple(writable)
        chain.readable_length, chain.writable_length = read, written
        chain.in_flight = True
        chain.one = chain.three = ()
        chain.slots = len(row)
        return chain

    def put_back(self, chains: Sequence[Chain]) -> None:
        """Return *chains*, the last ones popped and none of them begun: they are available again."""
        for chain in chains:
            chain.in_flight = False
        if self._inflight is not None:
            # What the record brought is the first to come again, and stays marked.
            given = self._inflight.give_back([chain.head for chain in chains])
            chains = [chain for chain in chains if chain.head in given]
        slots = sum([chain.slots for chain in chains])
        self._out -= slots
        self._pass_over(2 * self.size - slots)
        # It comes behind them, and is found again.
        self._fault = None

    def push(self, chain: Chain, written: int) -> None:
        """Give *chain* back to the driver, *written* bytes filled from its writable start.

        Raises NotInFlight and UsedLengthError for a mistake of the device's code
        (virtio 1.3, 2.8.10; S19, S20).
        """
        chain.written = written
        self.push_many((chain,))

    def push_many(self, chains: Sequence[Chain]) -> None:
        """Return each of *chains*, its `written` set, which the driver sees all at once.

        Of chains that are refused, and those after them, none is returned.  The
        flags of the first element are written last, before them the others'.
        """
        inflight = self._inflight
        if inflight is None:
            self._push_many(chains)
            return
        good: dict[DescriptorIndex, Chain] = {}
        refused: Chain | None = None
        for chain in chains:
            if not chain.in_flight or chain.head in good or not 0 <= chain.written <= chain.writable_length:
                refused = chain
                break
            good[chain.head] = chain
        if good:
            slots = sum([chain.slots for chain in good.values()])
            inflight.returning(good, (self._used + slots) % (2 * self.size))
            self._push_many(list(good.values()))
            inflight.returned(good)
        if refused is not None:
            raise self._refuse(refused, refused.written)

    def _push_many(self, chains: Sequence[Chain]) -> None:
        size, used = self.size, self._used
        flags, ids, lengths, log = self._flags, self._ids, self._lengths, self._log
        slot, lap = (used, BOTH) if used < size else (used - size, 0)
        first, first_flags, slots = -1, 0, 0
        try:
            for chain in chains:
                written = chain.written
                if not chain.in_flight or not 0 <= written <= chain.writable_length:
                    raise self._refuse(chain, written)
                if log is not None and log.buffers:
                    # All of it: what is written does not have to be at its writable start.
                    address = self._memory.guest_address
                    log.dirty.mark_all([(address(view), len(view)) for view in chain.writable])
                ids[slot] = chain.head
                lengths[slot] = written
                if first < 0:
                    first, first_flags = slot, lap | VRING_DESC_F_WRITE if written else lap
                else:
                    flags[slot] = lap | VRING_DESC_F_WRITE if written else lap
                    if log is not None:
                        self._mark_ring(slot, 1)
                chain.in_flight = False
                slots += chain.slots
                slot += chain.slots
                if slot >= size:
                    slot -= size
                    lap ^= BOTH
        finally:
            if first >= 0:
                if log is not None:
                    self._mark_ring(first, 1)
                if self._order:
                    self._order()
                flags[first] = first_flags
                if log is not None:
                    self._mark_ring(first, 1)
                self._used = slot if lap else slot + size
                self._out -= slots
                self._returned += slots

    def _refuse(self, chain: Chain, written: int) -> errors.ChainError:
        if not chain.in_flight:
            return errors.NotInFlight(self.index, chain.head)
        return errors.UsedLengthError(self.index, chain.head, written, chain.writable_length)

    def disable_notifications(self) -> None:
        """Tell the driver that it need not notify (virtio 1.3, 2.8.10)."""
        self._device_event[FLAGS] = VRING_PACKED_EVENT_FLAG_DISABLE
        self._mark_event()

    def enable_notifications(self) -> bool:
        """Ask for a notification of the next chain; True if one came meanwhile (S22).

        On True go round again: the notification may not come.
        """
        event = self._device_event
        if self._event_idx:
            event[OFF_WRAP] = off_wrap(self._next, self.size)
            if self._order:
                self._order()
            event[FLAGS] = VRING_PACKED_EVENT_FLAG_DESC
        else:
            event[FLAGS] = VRING_PACKED_EVENT_FLAG_ENABLE
        self._mark_event()
        self._fence()
        return self.has_available()

    def should_interrupt(self) -> bool:
        """Whether the driver is to be told of what was pushed since the last call (S21, S24, P6).

        virtio 1.3, 2.8.10.
        """
        moved, self._returned = self._returned, 0
        if self._signal_once:
            self._signal_once = False
            return True
        if not moved:
            return False
        self._fence()
        old = self._used - moved
        return wants_to_know(self._driver_event, self._event_idx, self._order, self.size, old, moved)

    def _mark_ring(self, slot: int, count: int) -> None:
        """Mark *count* descriptors from *slot* on, which are written, in the log."""
        if self._log is not None and self._log.used is not None:
            self._log.dirty.mark(GuestAddress(self._ring_at + 16 * slot), 16 * count)

    def _mark_event(self) -> None:
        """Mark the device's event structure, which is written, in the log."""
        if self._log is not None and self._log.used is not None:
            self._log.dirty.mark(self._log.used, _EVENT_SIZE)

    def release(self) -> None:
        """Let go of guest memory; the queue and its chains are of no use after."""
        for chain in self._chains:
            chain.readable = chain.writable = ()
        for view in (
            self._flags, self._ids, self._lengths, self._descriptors, self._driver_event, self._device_event,
        ):  # fmt: skip
            view.release()
        self._memory.release()
        if self._inflight is not None:
            self._inflight.release()
