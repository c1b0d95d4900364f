"""What of a virtqueue is logged while its guest is copied elsewhere (vhost-user, "Migration")."""

from dataclasses import dataclass

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.dirty_log import DirtyLog
from lguestlib.memory.guest import MemoryViews
from lguestlib.virtio.errors import DirtyLogTooSmall
from lguestlib.virtio.layout import QueueLayout


@dataclass(frozen=True)
class QueueLog:
    """A queue's part in *dirty*, which is shared by the queues and outlives them.

    With *buffers* what the device writes is logged (VHOST_F_LOG_ALL).  *used* is
    the address at which writes to the used ring are, by its first byte
    (VHOST_VRING_F_LOG, log_guest_addr), or None where they are not.
    """

    dirty: DirtyLog
    buffers: bool = False
    used: GuestAddress | None = None

    def check(self, layout: QueueLayout, memory: MemoryViews) -> None:
        """Raise DirtyLogTooSmall unless there are bits for all of it that is logged (T16)."""
        if self.buffers:
            for region in memory.regions:
                self._check(layout.index, region.base, region.size)
        if self.used is not None:
            self._check(layout.index, self.used, layout.end - layout.used)

    def _check(self, queue: int, address: int, length: int) -> None:
        if not self.dirty.covers(address + length):
            raise DirtyLogTooSmall(queue, address, length)
