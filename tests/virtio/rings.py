"""A split ring written by hand, as a driver would or as none should, and what a device makes of it."""

import os
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from struct import Struct
from types import FrameType
from typing import Any, NamedTuple

from lguestlib.abi.mmap import address_of
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.region import Region
from lguestlib.virtio import errors
from lguestlib.virtio.chain import Chain, walk
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import DescriptorIndex, QueueLayout

NEXT, WRITE, INDIRECT = 1, 2, 4

PLAIN = int(Feature.VERSION_1)
WITH_INDIRECT = PLAIN | int(Feature.RING_INDIRECT_DESC)
WITH_EVENT = PLAIN | int(Feature.RING_EVENT_IDX)
ALL_FEATURES = WITH_INDIRECT | WITH_EVENT

PAGE = 4096

_DESCRIPTOR = Struct("<QIHH")


class Descriptor(NamedTuple):
    """One entry of a descriptor table, as it lies in memory."""

    address: int
    length: int
    flags: int = 0
    next: int = 0

    def packed(self) -> bytes:
        return _DESCRIPTOR.pack(*self)


class Outcome(NamedTuple):
    """A chain's readable and writable buffers, each as guest-physical address and length."""

    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]
    readable_length: int
    writable_length: int


class Refusal(NamedTuple):
    """The error a chain ends in, with all its numbers."""

    kind: str
    numbers: dict[str, int]


Verdict = Outcome | Refusal


class Ring:
    """The driver's part of the ring at *layout*: nothing is checked, nothing is kept in step."""

    def __init__(self, memory: GuestMemory, layout: QueueLayout, avail_idx: int = 0) -> None:
        self.layout = layout
        self.memory = memory
        self._views = views = memory.views()
        size = layout.size
        self._table = views.slice(layout.descriptors, 16 * size)
        self._avail = views.slice(layout.available, 6 + 2 * size).cast("H")
        used = views.slice(layout.used, 6 + 8 * size)
        self._used_words = used[:4].cast("H")
        self._used_ring = used[4 : 4 + 8 * size].cast("I")
        self._avail_event = used[4 + 8 * size :].cast("H")
        self.avail_idx = avail_idx

    def describe(self, index: int, descriptor: Descriptor) -> None:
        """Put *descriptor* into the table at *index*."""
        self._table[16 * index : 16 * index + 16] = descriptor.packed()

    def described(self, index: int) -> Descriptor:
        """What is in the table at *index*."""
        return Descriptor(*_DESCRIPTOR.unpack_from(self._table, 16 * index))

    def chain(self, *descriptors: Descriptor, at: int = 0) -> int:
        """Put a chain into consecutive entries from *at*, linked as NEXT says; return its head."""
        for index, descriptor in enumerate(descriptors, at):
            last = index == at + len(descriptors) - 1
            flags = descriptor.flags if last else descriptor.flags | NEXT
            self.describe(index, descriptor._replace(flags=flags, next=0 if last else index + 1))
        return at

    def table(self, address: int, descriptors: Sequence[Descriptor]) -> Descriptor:
        """Put an indirect table at *address*; return the descriptor that names it."""
        data = b"".join(descriptor.packed() for descriptor in descriptors)
        self.memory.write(GuestAddress(address), data)
        return Descriptor(address, len(data), INDIRECT)

    def offer(self, *heads: int) -> None:
        """Make the chains at *heads* available."""
        for head in heads:
            self._avail[2 + self.avail_idx % self.layout.size] = head
            self.avail_idx += 1

    @property
    def avail_idx(self) -> int:
        index: int = self._avail[1]
        return index

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self._avail[1] = value & 0xFFFF

    @property
    def avail_flags(self) -> int:
        flags: int = self._avail[0]
        return flags

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self._avail[0] = value

    @property
    def used_event(self) -> int:
        event: int = self._avail[-1]
        return event

    @used_event.setter
    def used_event(self, value: int) -> None:
        self._avail[-1] = value & 0xFFFF

    @property
    def used_flags(self) -> int:
        flags: int = self._used_words[0]
        return flags

    @used_flags.setter
    def used_flags(self, value: int) -> None:
        self._used_words[0] = value

    @property
    def used_idx(self) -> int:
        index: int = self._used_words[1]
        return index

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self._used_words[1] = value & 0xFFFF

    @property
    def avail_event(self) -> int:
        event: int = self._avail_event[0]
        return event

    @avail_event.setter
    def avail_event(self, value: int) -> None:
        self._avail_event[0] = value

    def used(self, position: int) -> tuple[int, int]:
        """Head and length of the used element at free-running *position*."""
        slot = 2 * (position % self.layout.size)
        return self._used_ring[slot], self._used_ring[slot + 1]

    def set_used(self, position: int, head: int, length: int) -> None:
        """Write the used element at *position*, as a device that need not be honest."""
        slot = 2 * (position % self.layout.size)
        self._used_ring[slot], self._used_ring[slot + 1] = head, length

    def release(self) -> None:
        """Let go of guest memory."""
        views = (self._table, self._avail, self._used_words, self._used_ring, self._avail_event)
        for view in views:
            view.release()
        self._views.release()


class Where:
    """Finds out which guest-physical bytes a view shows."""

    def __init__(self, memory: GuestMemory) -> None:
        self._regions = [
            (int(region.host_address), region.size, int(region.base)) for region in memory.regions
        ]

    def __call__(self, view: memoryview) -> tuple[int, int]:
        host = address_of(view)
        for start, size, base in self._regions:
            if start <= host < start + size:
                return base + host - start, len(view)
        raise AssertionError(f"a view of {len(view)} bytes that is not guest memory")

    def outcome(self, chain: Chain) -> Outcome:
        """What a popped chain gives."""
        return Outcome(
            tuple(map(self, chain.readable)),
            tuple(map(self, chain.writable)),
            chain.readable_length,
            chain.writable_length,
        )


def refusal(error: errors.QueueError) -> Refusal:
    """*error* as something to compare."""
    return Refusal(type(error).__name__, dict(vars(error)))


class Oracle:
    """What `walk` says of the chains of a ring."""

    def __init__(self, ring: Ring, features: int) -> None:
        self._ring = ring
        self._views = ring.memory.views()
        self._table = self._views.slice(ring.layout.descriptors, 16 * ring.layout.size)
        self._indirect = bool(features & Feature.RING_INDIRECT_DESC)
        self._where = Where(ring.memory)

    def __call__(self, head: int) -> Verdict:
        layout = self._ring.layout
        try:
            readable, writable, read, written = walk(
                layout.index, DescriptorIndex(head), self._table, layout.size, self._views, self._indirect
            )
        except errors.ChainError as error:
            return refusal(error)
        return Outcome(tuple(map(self._where, readable)), tuple(map(self._where, writable)), read, written)

    def release(self) -> None:
        self._table.release()
        self._views.release()


def memory_of(*ranges: tuple[int, int]) -> GuestMemory:
    """Guest memory of regions, each a base and a size."""
    return GuestMemory(Region.anonymous(GuestAddress(base), size) for base, size in ranges)


def without_frames(error: BaseException) -> None:
    """Forget where *error* came through: its frames keep views of guest memory alive."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__context__


def raised(call: Callable[[], object]) -> errors.QueueError:
    """The error that *call* ends in, without its frames; not to end in one is a failure."""
    try:
        call()
    except errors.QueueError as error:
        without_frames(error)
        return error
    raise AssertionError("no error")


class Cost(NamedTuple):
    """What a call took: lines of Python run, and the most bytes allocated at a time."""

    steps: int
    memory: int


def cost(call: Callable[[], object]) -> Cost:
    """Run *call* and count."""
    steps = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += event == "line"
        return count

    tracing = sys.gettrace()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        sys.settrace(count)
        try:
            call()
        finally:
            sys.settrace(tracing)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return Cost(steps, peak - before)


@contextmanager
def nothing_left() -> Iterator[None]:
    """What runs inside leaves as many threads and descriptors as it found."""

    def held() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = held()
    yield
    assert held() == before
