"""The inflight record of a packed virtqueue: what a device that was killed had in hand.

As `lguestlib.virtio.inflight`, for the other kind of ring.  There used elements are
written over descriptors, so the record has copies of those of the chains in flight:
entries, linked from a free list and back to it.  A chain is known by its first entry.
The stores and their order are the specification's (vhost-user, "Inflight I/O
tracking"), and what has to change together changes in one store, so that between any
two of them the record can be told from the ring.  A memory of zeros is a record not
begun.

The other side can write here too: what is read is checked.
"""

from collections.abc import Iterable, Sequence

from lguestlib.virtio.errors import InflightRecordError
from lguestlib.virtio.layout import DescriptorIndex
from lguestlib.virtio.packed_chain import PackedDescriptor
from lguestlib.virtio.packed_ring import AVAIL, BOTH, USED

VERSION = 1

_ALIGN = 64
_HEADER = 32
_ENTRY = 32
# Where the fields are, as indices into views of their width.
_FEATURES = 0
_RECORD_VERSION, _DESC_NUM = 4, 5
_FREE_HEADS = 3
"""free_head and old_free_head, in one."""
_POSITIONS = 2
"""used_idx, old_used_idx, and used_wrap_counter and old_used_wrap_counter of 8 bits, in one."""
_INFLIGHT, _INFLIGHT_STEP = 32, 32
_NEXT, _LAST, _NUM, _ID, _FLAGS, _WORD_STEP = 17, 18, 19, 24, 25, 16
_LEN, _LEN_STEP = 13, 8
_COUNTER, _ADDR, _QUAD_STEP = 5, 7, 4

_COUNTER_MAX = 1 << 63
"""No queue gets there; the counters that follow have room."""


def packed_area_size(queues: int, size: int) -> int:
    """Bytes of the records of so many *queues*, each of *size* descriptors at most."""
    return queues * _part_size(size)


def packed_part_of(area: memoryview, index: int, size: int) -> memoryview:
    """The part of queue *index* in *area*, of records for *size* descriptors.

    Raises ValueError where the area does not hold it.
    """
    start = index * _part_size(size)
    end = start + _part_size(size)
    if index < 0 or size <= 0 or end > len(area):
        raise ValueError(f"inflight record {index} of {size} descriptors: the area has {len(area):#x} bytes")
    return area[start:end]


def _part_size(size: int) -> int:
    return -(-(_HEADER + _ENTRY * size) // _ALIGN) * _ALIGN


class PackedInflightRecord:
    """The record of *queue* in *part*, bytes that `packed_part_of` gave for *size* descriptors.

    `recover` comes first.  One thread at a time may use it.  A chain's buffer ID
    says which is meant: no two in flight have the same.
    """

    def __init__(self, queue: int, part: memoryview, size: int) -> None:
        self._queue = queue
        self._entries = size
        whole = part[: _HEADER + _ENTRY * size].cast("B")
        self._bytes = whole
        self._words = whole.cast("H")
        self._halves = whole.cast("I")
        self._quads = whole.cast("Q")
        self._size = self._counter = 0
        # What is known without reading again: the free list, its head last; the entries of each chain.
        self._free: list[int] = []
        self._taken: dict[int, list[int]] = {}
        self._used = self._used_next = 0
        self.waiting: list[list[PackedDescriptor]] = []
        """The chains that `recover` found and that are not resumed yet, in the order they were taken."""
        self._resumed: dict[int, list[PackedDescriptor]] = {}

    def recover(self, size: int, used: int, flags: memoryview) -> tuple[int, int] | None:
        """Where to return chains to, and the descriptors of those in flight, which are now `waiting`.

        None for a record that begins now, at position *used* of a ring of *size*
        whose descriptors have these *flags*.  A batch whose return was cut short is
        brought to its end, or undone.  Raises InflightRecordError, and stores nothing
        then, for a record that cannot be, or is one for a smaller queue (CVE-2026-86565).
        """
        words, entries = self._words, self._entries
        if size > entries:
            raise self._error("desc_num", entries)
        self._size = size
        version = words[_RECORD_VERSION]
        if not version:
            self._begin(used)
            return None
        for name, found, good in (
            ("version", version, VERSION), ("features", self._quads[_FEATURES], 0),
            ("desc_num", words[_DESC_NUM], entries),
        ):  # fmt: skip
            if found != good:
                raise self._error(name, found)
        heads, positions = self._halves[_FREE_HEADS], self._quads[_POSITIONS]
        free, old_free = heads & 0xFFFF, heads >> 16
        now = self._position("used_idx", positions & 0xFFFF, positions >> 32 & 0xFF)
        old = self._position("old_used_idx", positions >> 16 & 0xFFFF, positions >> 40 & 0xFF)
        undone: Sequence[int] = ()
        if now != old:
            slot, available = (old, AVAIL) if old < size else (old - size, USED)
            if flags[slot] & BOTH != available:
                # The driver has it back.
                old_free, old = free, now
            else:
                undone = [(old + step) % (2 * size) for step in range(1, (now - old) % (2 * size))]
        unused = self._free_list(old_free)
        chains = self._in_flight(unused)
        slots = sum(len(row) for _, _, row in chains)
        if slots > size:
            raise self._error("num", slots)
        for position in undone:
            # Its flags may be a used element's, which the driver would take for one behind the next that is.
            slot, available = (position, AVAIL) if position < size else (position - size, USED)
            flags[slot] = available
        for entry in unused:
            self._bytes[_INFLIGHT + _INFLIGHT_STEP * entry] = 0
        self._free = unused[::-1]
        self._set_free()
        self._set_used(old, old)
        self._counter = chains[-1][0] + 1 if chains else 0
        self._taken = {row[-1].id: taken for _, taken, row in chains}
        self.waiting = [row for _, _, row in chains]
        return old, slots

    def take(self, row: Sequence[PackedDescriptor]) -> None:
        """The chain of the descriptors in *row* is taken from the ring; in the ring's order."""
        words = self._words
        entries = self._free[: -len(row) - 1 : -1]
        first = entries[0]
        words[_NUM + _WORD_STEP * first] = 0
        self._quads[_COUNTER + _QUAD_STEP * first] = self._counter
        self._counter += 1
        self._bytes[_INFLIGHT + _INFLIGHT_STEP * first] = 1
        for number, (entry, descriptor) in enumerate(zip(entries, row), 1):
            if number == len(row):
                words[_LAST + _WORD_STEP * first] = entry
            words[_NUM + _WORD_STEP * first] = number
            self._quads[_ADDR + _QUAD_STEP * entry] = descriptor.address
            self._halves[_LEN + _LEN_STEP * entry] = descriptor.length
            words[_FLAGS + _WORD_STEP * entry] = descriptor.flags
            words[_ID + _WORD_STEP * entry] = descriptor.id
        # From here it is taken: before, its entries are free ones.
        del self._free[-len(row) :]
        self._set_free()
        self._taken[row[-1].id] = entries

    def resume(self, count: int) -> None:
        """The first *count* of those `waiting` are taken up again; they are in flight as before."""
        self._resumed |= {row[-1].id: row for row in self.waiting[:count]}
        del self.waiting[:count]

    def give_back(self, ids: Sequence[DescriptorIndex]) -> set[DescriptorIndex]:
        """These are the last ones taken or resumed, and nothing has been done for them.

        Those resumed are waiting again; the others are no longer in flight, but in
        the ring, and these are returned.
        """
        resumed = [number for number in ids if number in self._resumed]
        taken = [number for number in ids if number not in self._resumed]
        # From the last one back: what is still taken is then always what comes before the others.
        for number in reversed(taken):
            entries = self._taken.pop(number)
            self._link(entries)
            self._set_free()
            self._bytes[_INFLIGHT + _INFLIGHT_STEP * entries[0]] = 0
        self.waiting[:0] = [self._resumed.pop(number) for number in resumed]
        return set(taken)

    def returning(self, ids: Iterable[DescriptorIndex], used: int) -> None:
        """Before the first of the used elements of these is to be seen; the next one's position is *used* then."""
        old = self._free_head
        for number in ids:
            self._link(self._taken[number])
            self._halves[_FREE_HEADS] = self._free_head | old << 16
        self._set_used(used, self._used)

    def returned(self, ids: Iterable[DescriptorIndex]) -> None:
        """After the driver could see them."""
        for number in ids:
            self._bytes[_INFLIGHT + _INFLIGHT_STEP * self._taken.pop(number)[0]] = 0
            self._resumed.pop(number, None)
        self._set_free()
        self._set_used(self._used_next, self._used_next)

    def release(self) -> None:
        """Let go of the memory."""
        for view in (self._words, self._halves, self._quads, self._bytes):
            view.release()

    def _begin(self, used: int) -> None:
        for entry in range(self._entries):
            self._bytes[_INFLIGHT + _INFLIGHT_STEP * entry] = 0
            self._words[_NEXT + _WORD_STEP * entry] = entry + 1
        self._quads[_FEATURES] = 0
        self._words[_DESC_NUM] = self._entries
        self._free = list(range(self._entries - 1, -1, -1))
        self._set_free()
        self._set_used(used, used)
        self._words[_RECORD_VERSION] = VERSION

    @property
    def _free_head(self) -> int:
        return self._free[-1] if self._free else self._entries

    def _link(self, entries: list[int]) -> None:
        """Put the *entries* of a chain, which are linked, before the free ones."""
        self._words[_NEXT + _WORD_STEP * entries[-1]] = self._free_head
        self._free += entries[::-1]

    def _set_free(self) -> None:
        """free_head and old_free_head, at once."""
        head = self._free_head
        self._halves[_FREE_HEADS] = head | head << 16

    def _set_used(self, used: int, old: int) -> None:
        """used_idx and old_used_idx and their wrap counters, at once; *old* is what is known to be seen."""
        size = self._size
        now, now_wrap = (used, 1) if used < size else (used - size, 0)
        before, before_wrap = (old, 1) if old < size else (old - size, 0)
        self._used_next, self._used = used, old
        self._quads[_POSITIONS] = now | before << 16 | now_wrap << 32 | before_wrap << 40

    def _position(self, field: str, index: int, wrap: int) -> int:
        if index >= self._size or wrap > 1:
            raise self._error(field, index)
        return index if wrap else index + self._size

    def _free_list(self, head: int) -> list[int]:
        """The entries linked from *head*, to the one past the last; or all there are, when none is in flight."""
        found: list[int] = []
        seen = bytearray(self._entries)
        field = "free_head"
        while head != self._entries:
            if head > self._entries or seen[head]:
                raise self._error(field, head)
            seen[head] = 1
            found.append(head)
            field = f"desc[{head}].next"
            head = self._words[_NEXT + _WORD_STEP * head]
        return found

    def _in_flight(self, unused: Iterable[int]) -> list[tuple[int, list[int], list[PackedDescriptor]]]:
        """Counter, entries and descriptors of the chains that are marked, in order of the counters.

        Those of *unused* entries are marked by mistake.
        """
        seen = bytearray(self._entries)
        for entry in unused:
            seen[entry] = 1
        free = bytes(seen)
        chains = []
        ids = set()
        for first, mark in enumerate(self._bytes[_INFLIGHT::_INFLIGHT_STEP].tolist()):
            if not mark or free[first]:
                continue
            counter: int = self._quads[_COUNTER + _QUAD_STEP * first]
            if mark != 1:
                raise self._error(f"desc[{first}].inflight", mark)
            if counter >= _COUNTER_MAX:
                raise self._error(f"desc[{first}].counter", counter)
            entries = self._chain(first, seen)
            row = [self._descriptor(entry) for entry in entries]
            if row[-1].id in ids:
                raise self._error(f"desc[{first}].id", row[-1].id)
            ids.add(row[-1].id)
            chains.append((counter, entries, row))
        return sorted(chains, key=lambda chain: chain[0])

    def _chain(self, first: int, seen: bytearray) -> list[int]:
        """The entries of the chain from entry *first* on, none of which was *seen* before."""
        words = self._words
        number, last = words[_NUM + _WORD_STEP * first], words[_LAST + _WORD_STEP * first]
        if not number:
            raise self._error(f"desc[{first}].num", number)
        entries: list[int] = []
        entry = first
        for _ in range(number):
            if entry >= self._entries or seen[entry]:
                raise self._error(f"desc[{first}].next", entry)
            seen[entry] = 1
            entries.append(entry)
            entry = words[_NEXT + _WORD_STEP * entry]
        if entries[-1] != last:
            raise self._error(f"desc[{first}].last", last)
        return entries

    def _descriptor(self, entry: int) -> PackedDescriptor:
        return PackedDescriptor(
            self._quads[_ADDR + _QUAD_STEP * entry], self._halves[_LEN + _LEN_STEP * entry],
            self._words[_ID + _WORD_STEP * entry], self._words[_FLAGS + _WORD_STEP * entry],
        )  # fmt: skip

    def _error(self, field: str, value: int) -> InflightRecordError:
        return InflightRecordError(self._queue, field, value)
