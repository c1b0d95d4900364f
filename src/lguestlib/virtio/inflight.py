"""The inflight record of a split virtqueue: what a device that was killed had in hand.

It lies in memory that outlives the device, so that the next one goes on where the
last one ended, wherever that was.  A queue's part is a header, `version`,
`desc_num`, `last_batch_head` and `used_idx`, and for each head whether it is in
flight, a counter that tells the order in which they were taken, and `next`, which
links the heads of the last batch that was returned.  The stores are single and
their order is the specification's (vhost-user, "Inflight I/O tracking"): between
any two of them the record can be told from the used ring.  A memory of zeros is a
record not begun.

The other side can write here too: what is read is checked.
"""

from collections.abc import Iterable, Sequence

from lguestlib.virtio.errors import InflightRecordError
from lguestlib.virtio.layout import DescriptorIndex

VERSION = 1

_ALIGN = 64
_HEADER = 16
_ENTRY = 16
# Where the fields are, as indices into views of their width.
_FEATURES = 0
_RECORD_VERSION, _DESC_NUM, _LAST_BATCH_HEAD, _USED_IDX = 4, 5, 6, 7
_INFLIGHT, _INFLIGHT_STEP = 16, 16
_NEXT, _NEXT_STEP = 11, 8
_COUNTER, _COUNTER_STEP = 3, 2

_COUNTER_MAX = 1 << 63
"""No queue gets there; the counters that follow have room."""


def area_size(queues: int, size: int) -> int:
    """Bytes of the records of so many *queues*, each of *size* descriptors at most."""
    return queues * _part_size(size)


def part_of(area: memoryview, index: int, size: int) -> memoryview:
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


class InflightRecord:
    """The record of *queue* in *part*, bytes that `part_of` gave for *size* descriptors.

    `recover` comes first.  One thread at a time may use it.
    """

    def __init__(self, queue: int, part: memoryview, size: int) -> None:
        self._queue = queue
        self._size = size
        whole = part[: _HEADER + _ENTRY * size].cast("B")
        self._bytes = whole
        self._words = whole.cast("H")
        self._counters = whole.cast("Q")
        self._counter = 0
        self._last_batch_head = 0
        self.waiting: list[DescriptorIndex] = []
        """The heads that `recover` found and that are not resumed yet, in the order they were taken."""
        self._resumed: set[DescriptorIndex] = set()

    def recover(self, used: int, size: int) -> int | None:
        """How many are in flight and now `waiting`; None for a record that begins now.

        *used* is used.idx, *size* the queue's.  A batch whose return was cut short
        is brought to its end.  Raises InflightRecordError, and stores nothing then,
        for a record that cannot be, or is one for a smaller queue (CVE-2026-86565).
        """
        words, entries = self._words, self._size
        if size > entries:
            raise self._error("desc_num", entries)
        version = words[_RECORD_VERSION]
        if not version:
            self._begin(used)
            return None
        features, desc_num, batch_head, used_idx = (
            self._counters[_FEATURES], words[_DESC_NUM], words[_LAST_BATCH_HEAD], words[_USED_IDX]
        )  # fmt: skip
        if version != VERSION:
            raise self._error("version", version)
        if features:
            raise self._error("features", features)
        if desc_num != entries:
            raise self._error("desc_num", desc_num)
        if used - used_idx & 0xFFFF > size:
            raise self._error("used_idx", used_idx)
        batch = self._batch(batch_head, used - used_idx & 0xFFFF, size)
        heads = self._in_flight(size)
        returned = set(batch)
        self.returned(batch, used)
        self._last_batch_head = batch_head
        counters = {counter for counter, _ in heads}
        self._counter = max(counters) + 1 if counters else 0
        self.waiting = [DescriptorIndex(head) for _, head in heads if head not in returned]
        return len(self.waiting)

    def take(self, heads: Iterable[DescriptorIndex]) -> None:
        """*heads* are taken from the available ring, in this order."""
        counters, flags, counter = self._counters, self._bytes, self._counter
        for head in heads:
            counters[_COUNTER + _COUNTER_STEP * head] = counter
            self._counter = counter = counter + 1
            flags[_INFLIGHT + _INFLIGHT_STEP * head] = 1

    def resume(self, count: int) -> None:
        """The first *count* of those `waiting` are taken up again; they are in flight as before."""
        self._resumed.update(self.waiting[:count])
        del self.waiting[:count]

    def give_back(self, heads: Sequence[DescriptorIndex]) -> int:
        """*heads* are the last ones taken or resumed, and nothing has been done for them.

        Those resumed are waiting again; the others are no longer in flight, but in
        the available ring, and how many these are is returned.
        """
        resumed = [head for head in heads if head in self._resumed]
        taken = [head for head in heads if head not in self._resumed]
        # From the last one back: what is still marked is then always what comes before the others.
        for head in reversed(taken):
            self._bytes[_INFLIGHT + _INFLIGHT_STEP * head] = 0
        self.waiting[:0] = resumed
        return len(taken)

    def returning(self, heads: Iterable[DescriptorIndex]) -> None:
        """Before used.idx moves past the used elements of *heads*."""
        words, last = self._words, self._last_batch_head
        for head in heads:
            words[_NEXT + _NEXT_STEP * head] = last
            words[_LAST_BATCH_HEAD] = last = head
        self._last_batch_head = last

    def returned(self, heads: Iterable[DescriptorIndex], used: int) -> None:
        """After used.idx, now *used*, has moved past them."""
        for head in heads:
            self._bytes[_INFLIGHT + _INFLIGHT_STEP * head] = 0
        self._words[_USED_IDX] = used
        self._resumed.difference_update(heads)

    def release(self) -> None:
        """Let go of the memory."""
        for view in (self._words, self._counters, self._bytes):
            view.release()

    def _begin(self, used: int) -> None:
        words, flags = self._words, self._bytes
        for at in range(_INFLIGHT, len(flags), _INFLIGHT_STEP):
            flags[at] = 0
        self._counters[_FEATURES] = 0
        words[_DESC_NUM] = self._size
        words[_LAST_BATCH_HEAD] = 0
        words[_USED_IDX] = used
        words[_RECORD_VERSION] = VERSION

    def _batch(self, head: int, count: int, size: int) -> list[DescriptorIndex]:
        """The last *count* heads returned, linked from *head*."""
        batch: list[DescriptorIndex] = []
        seen = bytearray(size)
        field = "last_batch_head"
        for _ in range(count):
            if head >= size or seen[head]:
                raise self._error(field, head)
            seen[head] = 1
            batch.append(DescriptorIndex(head))
            field = f"desc[{head}].next"
            head = self._words[_NEXT + _NEXT_STEP * head]
        return batch

    def _in_flight(self, size: int) -> list[tuple[int, int]]:
        """Counter and head of those that are marked, in order of the counters."""
        heads = []
        for head, flag in enumerate(self._bytes[_INFLIGHT::_INFLIGHT_STEP].tolist()):
            if not flag:
                continue
            if flag != 1 or head >= size:
                raise self._error(f"desc[{head}].inflight", flag)
            counter: int = self._counters[_COUNTER + _COUNTER_STEP * head]
            if counter >= _COUNTER_MAX:
                raise self._error(f"desc[{head}].counter", counter)
            heads.append((counter, head))
        return sorted(heads)

    def _error(self, field: str, value: int) -> InflightRecordError:
        return InflightRecordError(self._queue, field, value)
