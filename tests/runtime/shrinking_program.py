"""A front-end that makes what it has shared shorter while its disk is busy with it, again and again.

Arguments: the socket, how many times, and the queues.  Each time it prints what it has
made shorter, when the back-end has ended the connection.
"""

import os
import random
import struct
import sys
import time
from contextlib import ExitStack

from runtime.test_vhost_user_conversation import DiskLoad
from runtime.vhost_user_rig import BUFFERS_AT, FEATURES, GUEST, LOG_ALL, MEMORY, FrontEnd, u64

from lguestlib.abi import vhost_user as abi
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.region import Region

WHAT = ("rings", "buffers", "log", "inflight")
_LOG_SIZE, _RECORD_SIZE = (GUEST + MEMORY) // 4096 // 8, 0x4000


class Careless(DiskLoad):
    """Goes on with whatever comes back from when it is `spoilt`."""

    spoilt = False

    def answered(self, token: int, number: int, written: int) -> None:
        if self.spoilt:
            self.versions[token] += 1
        else:
            super().answered(token, number, written)


def unsealable(name: str, size: int) -> int:
    """A file in memory that anybody may make shorter."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd




def visit(path: str, what: str, queues: int, wait: float) -> None:
    """Connect, be busy for *wait* seconds, and make *what* shorter."""
    fd, log, record = unsealable("memory", MEMORY), unsealable("log", _LOG_SIZE), unsealable("record", _RECORD_SIZE)
    region = Region.from_fd(GuestAddress(GUEST), MEMORY, fd)
    region.fd = fd
    with FrontEnd(path, shared=region) as front:
        front.negotiate(FEATURES | (LOG_ALL if what == "log" else 0))
        if what == "inflight":
            payload = struct.pack("=QQHH", _RECORD_SIZE, 0, queues, 64)
            front.set(abi.VHOST_USER_SET_INFLIGHT_FD, payload, [record])
        if what == "log":
            front.get(abi.VHOST_USER_SET_LOG_BASE, u64(_LOG_SIZE) + u64(0), [log])
        loads = [Careless(front.start(index), 8) for index in range(queues)]
        for load in loads:
            load.reach(4)
        time.sleep(wait)
        with ExitStack() as held:
            for load in loads:
                held.enter_context(load.lock)
                load.spoilt = True
            if what == "rings":
                os.ftruncate(fd, 0)
            elif what == "buffers":
                os.ftruncate(fd, BUFFERS_AT - GUEST)
            else:
                os.ftruncate(log if what == "log" else record, 0)
        for load in loads:
            # Whatever has become of the driver here: the back-end has to look.
            load.ring.notify()
        assert front.closed()
        for load in loads:
            load.abandon()
    os.close(log)
    os.close(record)


def main() -> None:
    path, times, queues = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(5)
    for turn in range(times):
        what = WHAT[turn % len(WHAT)]
        visit(path, what, queues, rng.random() * 0.004)
        print(what, flush=True)


if __name__ == "__main__":
    main()
