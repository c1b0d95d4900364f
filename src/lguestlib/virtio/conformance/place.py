"""Guest memory for cases: what their places are, their rings laid out by hand, and what may be written to.

The driver here checks nothing and keeps nothing in step: it writes what a case says.

      START      BUFFERS    TABLES     PLAIN       SEAM           END   hole   ISLAND
        | rings    | 64 K    | 128 K    | 256 K      | 2 MiB        |            | 64 K |
        +----------- first region ------------------+--- second ---+            +------+
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import AddressError, GuestMemory
from lguestlib.memory.region import Region
from lguestlib.virtio import errors
from lguestlib.virtio.chain import DESCRIPTOR, walk
from lguestlib.virtio.conformance.case import (
    WRITE,
    Anchor,
    At,
    Descriptor,
    DriverEvent,
    Fill,
    Interrupts,
    PackedCase,
    PackedDescriptor,
    Publish,
    RingCase,
)
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import DescriptorIndex, QueueLayout

START = 0x10_0000
RING_ROOM = 0x4000
"""Bytes for each queue's ring, from START on."""
BUFFERS, TABLES, PLAIN, SEAM = START + 0x1_0000, START + 0x2_0000, START + 0x4_0000, START + 0x8_0000
SECOND_SIZE = 0x20_0000
END = SEAM + SECOND_SIZE
ISLAND, ISLAND_SIZE = 0x4000_0000, 0x1_0000

_EXTENTS = ((START, SEAM - START), (SEAM, SECOND_SIZE), (ISLAND, ISLAND_SIZE))
_FILL = b"\xa5"
"""What is in buffers before anybody writes to them."""
_PACKED = struct.Struct("<QIHH")
_AVAIL, _USED = 1 << 7, 1 << 15
_TOP = 1 << 64

USER = 0x7000_0000_0000
"""What a front-end adds to a guest-physical address: its own addresses are a matter of words."""

MakeRegion = Callable[[GuestAddress, int], Region]


def new_memory(make: MakeRegion = Region.anonymous) -> GuestMemory:
    """The memory that cases play in, of regions that *make* makes: anonymous ones, or to be handed over."""
    regions: list[Region] = []
    try:
        for base, size in _EXTENTS:
            regions.append(make(GuestAddress(base), size))
        return GuestMemory(regions)
    except BaseException:
        for region in regions:
            region.close()
        raise


@dataclass(frozen=True)
class Touched:
    """*address*, the first byte that has changed and was nobody's to write."""

    address: int

    def __str__(self) -> str:
        return f"wrote outside the buffers, at {self.address:#x}"


class Place:
    """One queue's ring in *memory*, and what a case puts there; *index* is the queue's."""

    def __init__(self, memory: GuestMemory, index: int = 0, size: int = 8, base: int = 0, packed: bool = False) -> None:
        self.memory = memory
        self.base = base
        at = GuestAddress(START + RING_ROOM * index)
        if packed:
            self.layout = QueueLayout(
                index, size, at, GuestAddress(at + 16 * size), GuestAddress(at + 16 * size + 4)
            )
        else:
            self.layout = QueueLayout.contiguous(index, size, at)
        self._anchors = {
            Anchor.ZERO: 0, Anchor.BUFFERS: BUFFERS, Anchor.TABLES: TABLES, Anchor.SEAM: SEAM, Anchor.END: END,
            Anchor.ISLAND: ISLAND, Anchor.ISLAND_END: ISLAND + ISLAND_SIZE,
            Anchor.DESCRIPTORS: self.layout.descriptors, Anchor.AVAILABLE: self.layout.available,
            Anchor.USED: self.layout.used,
        }  # fmt: skip
        # A ring of no size has a first entry all the same.
        self._slots = size or 1
        self._writable: list[tuple[int, int]] = []
        self._before: list[bytes] = []
        self.available = base
        """avail.idx, not cut to 16 bits."""

    def misplace(self, by: tuple[int, int, int]) -> None:
        """Say that the ring's parts are so many bytes from where they were laid out."""
        layout = self.layout
        self.layout = QueueLayout(
            layout.index, layout.size, GuestAddress(layout.descriptors + by[0]),
            GuestAddress(layout.available + by[1]), GuestAddress(layout.used + by[2]),
        )  # fmt: skip
        self._writable.append((self.layout.used, self.layout.used + 6 + 8 * layout.size))

    def address(self, at: At) -> int:
        """The guest-physical address of a place."""
        return self._anchors[at.anchor] + at.offset & _TOP - 1

    def _put(self, address: int, data: bytes) -> None:
        self.memory.write(GuestAddress(address), data)

    def word(self, address: int) -> int:
        """The 16-bit word at *address*, read whole."""
        with self.memory.views() as views, views.slice(GuestAddress(address), 2) as field, field.cast("H") as word:
            return int(word[0])

    def set_word(self, address: int, value: int) -> None:
        """Write the 16-bit word at *address* whole."""
        with self.memory.views() as views, views.slice(GuestAddress(address), 2) as field, field.cast("H") as word:
            word[0] = value & 0xFFFF

    # A split ring.

    def lay_out(self, case: RingCase) -> None:
        """Memory as it is before the first step."""
        for base, size in _EXTENTS:
            self._put(base, _FILL * size)
        self._put(START, bytes(BUFFERS - START))
        self.set_word(self.layout.available + 2, case.base)
        self.set_word(self.layout.used + 2, case.base)
        self.put_all(case.memory)
        for at, entries in case.indirect.items():
            self._put(self.address(at), b"".join(map(self._packed, entries)))
        for index, descriptor in case.table.items():
            self.describe(index, descriptor)
        self._writable = [*self._ranges([*case.table.values(), *(d for each in case.indirect.values() for d in each)])]
        used, size = self.layout.used, 6 + 8 * self.layout.size
        self._writable.append((used, used + size))

    def put_all(self, memory: Mapping[At, bytes]) -> None:
        """Put data where a case has it."""
        for at, data in memory.items():
            self._put(self.address(at), data)

    def allow(self, descriptors: Iterable[Descriptor]) -> None:
        """The device may write to these, too."""
        self._writable += self._ranges(descriptors)

    def _ranges(self, descriptors: Iterable[Descriptor | PackedDescriptor]) -> list[tuple[int, int]]:
        return [
            (start, start + each.length)
            for each in descriptors if each.flags & WRITE
            for start in [self.address(each.address)]
        ]  # fmt: skip

    def _packed(self, descriptor: Descriptor) -> bytes:
        return DESCRIPTOR.pack(
            self.address(descriptor.address), descriptor.length, descriptor.flags, descriptor.next
        )

    def describe(self, index: int, descriptor: Descriptor) -> None:
        """Put *descriptor* into the ring's table at *index*."""
        self._put(self.layout.descriptors + 16 * index, self._packed(descriptor))

    def publish(self, step: Publish) -> None:
        """Make heads available, and move avail.idx."""
        for head in step.heads:
            self.set_word(self.layout.available + 4 + 2 * (self.available % self._slots), head)
            self.available += 1
        self.available += step.ahead
        self.set_word(self.layout.available + 2, self.available)

    def ask(self, step: Interrupts) -> None:
        """Say which interrupts are wanted."""
        self.set_word(self.layout.available, step.flags)
        self.set_word(self.layout.available + 4 + 2 * self.layout.size, self.used_index + step.event)

    @property
    def used_index(self) -> int:
        """used.idx."""
        return self.word(self.layout.used + 2)

    def used(self, position: int) -> tuple[int, int]:
        """Head and length of the used element at free-running *position*."""
        at = GuestAddress(self.layout.used + 4 + 8 * (position % self._slots))
        with self.memory.views() as views, views.slice(at, 8) as field, field.cast("I") as words:
            return int(words[0]), int(words[1])

    def room(self, head: int, features: int) -> int | None:
        """The device-writable bytes of the chain at *head*; None where it is malformed."""
        with self.memory.views() as views:
            try:
                with views.slice(self.layout.descriptors, 16 * self.layout.size) as table:
                    _, _, _, room = walk(
                        self.layout.index, DescriptorIndex(head), bytes(table), self.layout.size, views,
                        bool(features & Feature.RING_INDIRECT_DESC),
                    )  # fmt: skip
            except (errors.ChainError, AddressError):
                return None
        return room

    # A packed ring.

    def lay_out_packed(self, case: PackedCase) -> None:
        """Memory as it is before the first step."""
        for base, size in _EXTENTS:
            self._put(base, _FILL * size)
        self._put(START, bytes(BUFFERS - START))
        self.put_all(case.memory)
        for at, entries in case.indirect.items():
            self._put(self.address(at), b"".join(self._packed_entry(each, each.flags) for each in entries))
            self._writable += self._ranges(entries)
        # The descriptor ring and the device's event structure are the device's to write, too.
        self._writable.append((self.layout.descriptors, self.layout.descriptors + 16 * self.layout.size))
        self._writable.append((self.layout.used, self.layout.used + 4))

    def _packed_entry(self, descriptor: PackedDescriptor, flags: int) -> bytes:
        return _PACKED.pack(self.address(descriptor.address), descriptor.length, descriptor.id, flags)

    def fill(self, step: Fill) -> None:
        """Write descriptors into the ring, the flags of the first one last."""
        self._writable += self._ranges(step.descriptors)
        for number, descriptor in reversed(list(enumerate(step.descriptors))):
            laps, slot = divmod(step.slot + number, self.layout.size)
            wrap = step.wrap ^ bool(laps & 1)
            flags = descriptor.flags if descriptor.raw else descriptor.flags | (_AVAIL if wrap else _USED)
            at = self.layout.descriptors + 16 * slot
            self._put(at, self._packed_entry(descriptor, 0)[:14])
            self.set_word(at + 14, flags)

    def packed_used(self, slot: int, wrap: bool) -> tuple[int, int] | None:
        """Buffer ID and length of the used element at *slot*; None where there is none for that wrap counter."""
        at = GuestAddress(self.layout.descriptors + 16 * slot)
        flags = self.word(at + 14)
        if bool(flags & _AVAIL) is not wrap or bool(flags & _USED) is not wrap:
            return None
        _, length, buffer, _ = _PACKED.unpack(self.memory.read(at, 16))
        return buffer, length

    def ask_by_event(self, step: DriverEvent) -> None:
        """Write the driver's event structure."""
        self.set_word(self.layout.available, step.off_wrap)
        self.set_word(self.layout.available + 2, step.flags)

    # What has come of it.

    def content(self, at: At, length: int) -> bytes:
        """What is in memory at a place."""
        return self.memory.read(GuestAddress(self.address(at)), length)

    def remember(self) -> None:
        """What memory holds now is what `touched` compares with."""
        self._before = [self.memory.read(region.base, region.size) for region in self.memory.regions]

    def touched(self, rings: bool = False) -> Touched | None:
        """The first byte that was changed since `remember` outside what may be written to.

        That is every device-writable buffer and the used ring; with *rings*, which the
        driver has written to meanwhile, all of them.
        """
        allowed = [*self._writable, (START, BUFFERS)] if rings else self._writable
        for region, before in zip(self.memory.regions, self._before):
            now = self.memory.read(region.base, region.size)
            if now == before:
                continue
            masked = [bytearray(before), bytearray(now)]
            for start, end in allowed:
                low, high = max(start, region.base) - region.base, min(end, region.end) - region.base
                if low < high:
                    for each in masked:
                        each[low:high] = bytes(high - low)
            if masked[0] != masked[1]:
                differing = next(n for n, (old, new) in enumerate(zip(*masked)) if old != new)
                return Touched(region.base + differing)
        return None
