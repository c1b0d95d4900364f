"""The console device, one port (virtio 1.3, 5.3)."""

import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from lguestlib.abi.virtio_console import VIRTIO_CONSOLE_F_SIZE
from lguestlib.abi.virtio_ids import VIRTIO_ID_CONSOLE
from lguestlib.virtio.chain import LENGTH_MAX, Chain, part
from lguestlib.virtio.device import Device, Queue, SourceEnded

_CONFIG = struct.Struct("<HHII")


class ConsoleBackend(Protocol):
    """The other end of the line."""

    def read(self, buffers: Sequence[memoryview]) -> int:
        """Wait for input, put it into *buffers* and return its length; 0 at its end.

        May raise InterruptedError.
        """

    def write(self, buffers: Sequence[memoryview]) -> int:
        """Write from the start of *buffers*, and return the bytes written, at least one.

        May raise InterruptedError, having written nothing.
        """

    def size(self) -> tuple[int, int]:
        """Columns and rows, 0 where they are not known."""


class Output:
    """What the guest has to say goes out together, in few writes, however it is cut."""

    room = LENGTH_MAX
    """All that there is."""

    def __init__(self, write: Callable[[Sequence[memoryview]], int]) -> None:
        self._write = write
        self._begun = 0

    def serve(self, chains: Sequence[Chain], complete: bool = False) -> int:
        """Write the *chains* out, or those that one call takes: the next goes on in the midst of a chain."""
        buffers = tuple([buffer for chain in chains for buffer in chain.readable])
        length = sum([chain.readable_length for chain in chains])
        for chain in chains:
            chain.written = 0
        while True:
            if self._begun < length:
                left = part(buffers, self._begun, length - self._begun) if self._begun else buffers
                self._begun += self._write(left)
            if self._begun == length:
                self._begun = 0
                return len(chains)
            done = 0
            while self._begun >= chains[done].readable_length:
                self._begun -= chains[done].readable_length
                done += 1
            if done:
                return done

    def start_over(self) -> None:
        """The driver does: nothing is begun."""
        self._begun = 0


class Console(Device):
    """Port 0: queue 0 brings input to the guest, queue 1 takes its output."""

    device_type = VIRTIO_ID_CONSOLE

    def __init__(self, backend: ConsoleBackend, name: str = "console") -> None:
        super().__init__(name)
        self._backend = backend
        self.output = Output(backend.write)
        """The transmit queue's work."""

    @property
    def features(self) -> int:
        return 1 << VIRTIO_CONSOLE_F_SIZE

    def config(self) -> bytes:
        columns, rows = self._backend.size()
        return _CONFIG.pack(columns, rows, 1, 0)

    def activate(self, features: int) -> None:
        # Linux looks at the size when it is told of a change, and not before.
        self.resized()

    def deactivate(self) -> None:
        self.output.start_over()

    def resized(self) -> None:
        """The back-end's size has changed: tell the driver (virtio 1.3, 5.3.5)."""
        self.on_config_change(self)

    def queues(self) -> Sequence[Queue]:
        return (
            Queue("receive", self.serve_input, from_outside=True),
            Queue("transmit", self.serve_output, merging=self.output),
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
        """Service of transmitq(port0), for one chain alone."""
        self.output.serve([chain])
        return 0
