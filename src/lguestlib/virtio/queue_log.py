"""What of a virtqueue is logged while its guest is copied elsewhere (vhost-user, "Migration")."""

from dataclasses import dataclass

from lguestlib.abi.layout import size_of
from lguestlib.abi.virtio_ring import vring_packed_desc_event
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.dirty_log import DirtyLog
from lguestlib.memory.guest import MemoryViews
from lguestlib.virtio.errors import DirtyLogTooSmall
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout


@dataclass(frozen=True)
class QueueLog:
    """A queue's part in *dirty*, which is shared by the queues and outlives them.

    With *buffers* what the device writes is logged (VHOST_F_LOG_ALL).  *used* is
    the address at which writes to the used ring are, by its first byte
    (VHOST_VRING_F_LOG, log_guest_addr), or None where they are not.  Of a packed
    ring it is the device's event structure's; the descriptors, which the device
    writes over, are logged where they are.
    """

    dirty: DirtyLog
    buffers: bool = False
    used: GuestAddress | None = None

    def check(self, layout: QueueLayout, memory: MemoryViews, features: int = 0) -> None:
        """Raise DirtyLogTooSmall unless there are bits for all of it that is logged (T16).

        *features* tell the kind of ring.
        """
        if self.buffers:
            for region in memory.regions:
                self._check(layout.index, region.base, region.size)
        if self.used is not None and features & Feature.RING_PACKED:
            self._check(layout.index, self.used, size_of(vring_packed_desc_event))
            self._check(layout.index, layout.descriptors, 16 * layout.size)
        elif self.used is not None:
            self._check(layout.index, self.used, layout.end - layout.used)

    def _check(self, queue: int, address: int, length: int) -> None:
        if not self.dirty.covers(address + length):
            raise DirtyLogTooSmall(queue, address, length)
