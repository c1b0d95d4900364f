"""A network with nobody else in it: every frame comes back to who sent it."""

import os
import socket
from collections.abc import Sequence

from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.runtime.trace import Tracer


class Loopback(PacketNetwork):
    """A cable plugged into its own card.  It holds a few hundred frames; more are refused until some are received."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        # Or a driver that sends and does not receive would hold the transmit queue's thread up.
        far.setblocking(False)
        super().__init__(near.detach(), "loopback", tracer)
        self._far = far.detach()

    def send(self, buffers: Sequence[memoryview]) -> int:
        if self.tracer is None:
            return os.writev(self._far, buffers)
        return self.tracer.traced("writev", "loopback", os.writev, self._far, buffers)

    def close(self) -> None:
        super().close()
        os.close(self._far)
