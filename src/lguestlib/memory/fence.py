"""The StoreLoad fence that a virtqueue's two sides need, and the acquire of a load.

Publishing an index and then reading what the other side published is the one
place where x86-64 reorders: the load may pass the store, both sides see the old
value, and a notification is lost (virtio 1.3, 2.7.13.4.1 and 2.7.14).

On x86 any locked instruction is a full fence, and taking a free lock is one:
about 100 ns.  Elsewhere a lock only acquires and releases, so the kernel is
asked: membarrier(2), about 1 µs.  It is the global command, because the other
side may be another process: the private one orders this process's threads
against each other, and does nothing at all where there is only one.
"""

import platform
import sys
import threading
from collections.abc import Callable

from lguestlib.abi.membarrier import MEMBARRIER_CMD_GLOBAL_EXPEDITED, membarrier

Fence = Callable[[], object]

STRONGLY_ORDERED = platform.machine() in ("x86_64", "AMD64", "i386", "i486", "i586", "i686")
"""Whether loads are not reordered with loads, nor stores with stores (x86)."""


def new_fence() -> Fence:
    """A full fence for the use of one thread.

    It is that thread's own because a lock that another one holds would block.
    Off x86 and off Linux the lock is the best there is: enough for threads of one
    interpreter, which its own locks order.
    """
    if STRONGLY_ORDERED or sys.platform != "linux":
        lock = threading.Lock()
        acquire, release = lock.acquire, lock.release

        def locked() -> None:
            acquire()
            release()

        return locked
    return lambda: membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED)


def new_acquire() -> Fence | None:
    """What must stand between an index that is read and the entries it announces, and between
    entries that are written and their index; None on x86, which keeps both orders.
    """
    return None if STRONGLY_ORDERED else new_fence()
