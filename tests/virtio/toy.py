"""A device that does nothing, for its transport to be looked at."""

from collections.abc import Sequence

from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Device, Queue

SIZES = (8, 256, 1)


class Toy(Device):
    """Three queues, two features of its own, and a config space for tests to change."""

    device_type = 42

    def __init__(self) -> None:
        super().__init__("toy")
        self.space = bytes(range(1, 11))
        self.written: list[tuple[int, bytes]] = []

    @property
    def features(self) -> int:
        return 1 << 0 | 1 << 5

    def config(self) -> bytes:
        return self.space

    def write_config(self, offset: int, data: bytes) -> None:
        self.written.append((offset, data))

    def queues(self) -> Sequence[Queue]:
        return [Queue(f"queue {index}", self.serve, size) for index, size in enumerate(SIZES)]

    def serve(self, chain: Chain) -> int:
        """Take anything, give nothing."""
        return 0
