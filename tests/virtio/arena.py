"""Where hostile drivers are let loose: guest memory with a margin around it, and a neighbour on it."""

import os
from types import TracebackType
from typing import Self

from virtio.packed_rings import AVAIL, PACKED_ALL, USED, Packed, PackedRing, off_wrap, wrap_counter
from virtio.rings import ALL_FEATURES, PAGE, Descriptor, Ring

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.region import Region
from lguestlib.virtio.layout import QueueLayout, RingIndex
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.split_device import SplitDeviceQueue

VICTIM_AT = 0x1000
NEIGHBOUR_AT = 0x2000
TABLES_AT = 0x3000
BUFFERS_AT = 0x4000
SEAM = 0x8000
"""Where two regions meet."""
END = 0x28000
"""Where guest memory ends for good; from here to the island there is none."""
ISLAND = 0x100000
"""A page by itself."""

_MARGIN = 4 * PAGE
_CANARY = b"\xa5"


class Enclosure:
    """Regions of guest memory, each a base and a length, cut out of a file whose other bytes are nobody's to touch."""

    def __init__(self, *extents: tuple[int, int]) -> None:
        self._fd = os.memfd_create("arena")
        at, places = _MARGIN, []
        for _, length in extents:
            places.append(at)
            at += length + _MARGIN
        os.ftruncate(self._fd, at)
        self._margins = [(place - _MARGIN, place) for place in [*places, at]]
        for start, end in self._margins:
            os.pwrite(self._fd, _CANARY * (end - start), start)
        self.memory = GuestMemory(
            Region.from_fd(GuestAddress(base), length, self._fd, place)
            for (base, length), place in zip(extents, places)
        )

    def margins_hold(self) -> None:
        """Nothing outside guest memory was touched."""
        for start, end in self._margins:
            assert os.pread(self._fd, end - start, start) == _CANARY * (end - start)

    def _release(self) -> None:
        """Let go of what is in guest memory."""

    def close(self) -> None:
        """Give everything back, which shows that nothing has kept a view (Y4)."""
        self.margins_hold()
        self._release()
        self.memory.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()


class Ground(Enclosure):
    """Three regions of it.  Queue 4 is the neighbour of the one that is attacked."""

    def __init__(self) -> None:
        super().__init__((0, SEAM), (SEAM, END - SEAM), (ISLAND, PAGE))
        self._neighbour = Ring(self.memory, QueueLayout.contiguous(4, 4, GuestAddress(NEIGHBOUR_AT)))
        self._neighbour_device = SplitDeviceQueue(self._neighbour.layout, self.memory, ALL_FEATURES)

    def content(self) -> bytes:
        """All of guest memory."""
        return b"".join(self.memory.read(region.base, region.size) for region in self.memory.regions)

    def neighbour_works(self) -> None:
        """The other queue serves a chain."""
        ring, device = self._neighbour, self._neighbour_device
        for length in (5, 7):
            before = ring.used_idx
            ring.offer(ring.chain(Descriptor(BUFFERS_AT, 16), Descriptor(BUFFERS_AT + 64, length, 2)))
            chain = device.pop()
            assert chain is not None
            device.push(chain, chain.write(b"neighbour"))
            assert ring.used(before) == (0, length) and ring.used_idx == before + 1

    def _release(self) -> None:
        self._neighbour.release()
        self._neighbour_device.release()


class Arena(Ground):
    """With a split ring of *size* that is attacked, queue 3."""

    def __init__(self, size: int = 8, features: int = ALL_FEATURES, next_available: int = 0) -> None:
        super().__init__()
        self.ring = Ring(
            self.memory, QueueLayout.contiguous(3, size, GuestAddress(VICTIM_AT)), next_available
        )
        self.device = self.new_device(features, next_available)

    def new_device(self, features: int, next_available: int = 0) -> SplitDeviceQueue:
        """Another device side of the attacked ring."""
        return SplitDeviceQueue(self.ring.layout, self.memory, features, RingIndex(next_available))

    def _release(self) -> None:
        super()._release()
        self.ring.release()
        self.device.release()


class PackedArena(Ground):
    """With a packed ring of *size* that is attacked, queue 3, of which so many descriptors were used before."""

    def __init__(self, size: int = 8, features: int = PACKED_ALL, position: int = 0) -> None:
        super().__init__()
        self.ring = PackedRing(self.memory, QueueLayout.contiguous(3, size, GuestAddress(VICTIM_AT)), position)
        if position:
            # As the last lap has left it.
            for back in range(1, size + 1):
                marks = AVAIL | USED if wrap_counter(position - back, size) else 0
                self.ring.describe((position - back) % size, Packed(0, 0, marks))
        self.device = self.new_device(features, position)

    def new_device(self, features: int, position: int = 0) -> PackedDeviceQueue:
        """Another device side of the attacked ring, which begins at *position*."""
        where = off_wrap(position, self.ring.size)
        state = QueueState(where, where) if position else None
        return PackedDeviceQueue(self.ring.layout, self.memory, features, state)

    def _release(self) -> None:
        super()._release()
        self.ring.release()
        self.device.release()
