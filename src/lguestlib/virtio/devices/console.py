"""The console device, one port (virtio 1.3, 5.3)."""

import struct
from collections.abc import Sequence
from typing import Protocol

from lguestlib.abi.virtio_console import VIRTIO_CONSOLE_F_SIZE
from lguestlib.abi.virtio_ids import VIRTIO_ID_CONSOLE
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Device, Queue, SourceEnded

_CONFIG = struct.Struct("<HHII")


class ConsoleBackend(Protocol):
    """The other end of the line."""

    def read(self, buffers: Sequence[memoryview]) -> int:
        """Wait for input, put it into *buffers* and return its length; 0 at its end.

        May raise InterruptedError.
        """

    def write(self, buffers: Sequence[memoryview]) -> None:
        """Write all of *buffers*.  May raise InterruptedError, with nothing more written since."""

    def size(self) -> tuple[int, int]:
        """Columns and rows, 0 where they are not known."""


class Console(Device):
    """Port 0: queue 0 brings input to the guest, queue 1 takes its output."""

    device_type = VIRTIO_ID_CONSOLE

    def __init__(self, backend: ConsoleBackend, name: str = "console") -> None:
        super().__init__(name)
        self._backend = backend

    @property
    def features(self) -> int:
        return 1 << VIRTIO_CONSOLE_F_SIZE

    def config(self) -> bytes:
        columns, rows = self._backend.size()
        return _CONFIG.pack(columns, rows, 1, 0)

    def activate(self, features: int) -> None:
        # Linux looks at the size when it is told of a change, and not before.
        self.resized()

    def resized(self) -> None:
        """The back-end's size has changed: tell the driver (virtio 1.3, 5.3.5)."""
        self.on_config_change(self)

    def queues(self) -> Sequence[Queue]:
        return (
            Queue("receive", self.serve_input, from_outside=True),
            Queue("transmit", self.serve_output),
        )

    def serve_input(self, chain: Chain) -> int:
        """Service of receiveq(port0)."""
        if not chain.writable_length:
            return 0
        length = self._backend.read(chain.writable)
        if not length:
            raise SourceEnded("end of console input")
        return length

    def serve_output(self, chain: Chain) -> int:
        """Service of transmitq(port0)."""
        if chain.readable:
            self._backend.write(chain.readable)
        return 0
