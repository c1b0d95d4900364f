"""lguest's page with this library's own devices, byte for byte, worked out from their tables of features.

All of them offer NOTIFY_ON_EMPTY 24, INDIRECT_DESC 28 and EVENT_IDX 29: 31 in the last
byte.  What a guest of Linux makes of it is `lguest_guest`'s to say.
"""

from collections.abc import Sequence

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.net import Net
from lguestlib.virtio.lguest import LguestBus

RAM = 0x400_0000


class Outside:
    """Whatever is outside of these devices, which nobody starts."""

    offloads = 0x3B83
    """CSUM 0, GUEST_CSUM 1, GUEST_TSO4 7, TSO6 8, ECN 9, HOST_TSO4 11, TSO6 12, ECN 13."""
    block_size = 512
    identity = b"disk"

    def __init__(self, size: int = 0, read_only: bool = False) -> None:
        self.bytes = size
        self.read_only = read_only


class Disk(Outside):
    """10 MiB."""

    @property
    def size(self) -> int:
        return self.bytes

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        return 0

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        return 0

    def flush(self) -> None:
        """Nothing is written."""

    def discard(self, offset: int, length: int) -> None:
        """Nothing is there."""

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Nothing is there."""


class Line(Outside):
    """A terminal of 80 columns and 25 rows, a network, and a source of numbers."""

    def activate(self, features: int) -> None:
        """Nothing is carried."""

    def send(self, buffers: Sequence[memoryview]) -> int:
        return 0

    def receive(self, buffers: Sequence[memoryview]) -> int:
        return 0

    def read(self, buffers: Sequence[memoryview]) -> int:
        return 0

    def write(self, buffers: Sequence[memoryview]) -> int:
        return 0

    def fill(self, buffers: Sequence[memoryview]) -> int:
        return 0

    def size(self) -> tuple[int, int]:
        return 80, 25


NET = (
    "01 02 04 08 00"
    "0001 0100 01400000"  # 256 entries, interrupt 1, page 0x4001: behind RAM and the descriptors'
    "0001 0200 04400000"
    "a3 bb 01 31 00000000"  # with MAC 5, MRG_RXBUF 15 and STATUS 16; nothing accepted
    "0200c0a81302 0100"  # the address, and the link is up
)
BLOCK = (
    "02 01 04 48 00"
    "0001 0300 07400000"
    "45 62 00 31 00000000"  # BARRIER 0, SEG_MAX 2, BLK_SIZE 6, FLUSH 9, DISCARD 13, WRITE_ZEROES 14
    "0050000000000000 00000000 7e000000 00000000 00020000"  # sectors, -, 126 segments, -, bytes of a block
    "00 00 0000 00000000 00 00 0100"  # one queue
    "00000100 01000000 01000000 00000100 01000000 01 000000"  # what a discard and a write of zeroes may be
    "00000000 00000000 00000000"
)
READ_ONLY = (
    "02 01 04 48 00"
    "0001 0400 0a400000"
    "65 02 00 31 00000000"  # RO 5, and neither DISCARD nor WRITE_ZEROES
    "0100000000000000 00000000 7e000000 00000000 00020000"
    "00 00 0000 00000000 00 00 0100"
    "00000100 01000000 01000000 00000100 01000000 01 000000"
    "00000000 00000000 00000000"
)
RNG = "04 01 04 00 00" "0001 0500 0d400000" "00 00 00 31 00000000"
CONSOLE = (
    "03 02 04 0c 00"
    "0001 0600 10400000"
    "0001 0700 13400000"
    "01 00 00 31 00000000"  # SIZE 0
    "5000 1900 01000000 00000000"  # 80 columns, 25 rows, one port
)


def test_the_page_of_all_devices() -> None:
    with GuestMemory.anonymous(RAM + 256 * 4096) as memory:
        bus = LguestBus(memory, RAM)
        bus.add(Net(Line(), bytes.fromhex("0200c0a81302")))
        bus.add(Block(Disk(10 << 20)))
        bus.add(Block(Disk(512, read_only=True)))
        bus.add(Entropy(Line()))
        bus.add(Console(Line()))
        expected = bytes.fromhex(NET + BLOCK + READ_ONLY + RNG + CONSOLE)
        assert len(expected) == 37 + 93 + 93 + 21 + 41
        assert memory.read(GuestAddress(RAM), 4096) == expected.ljust(4096, b"\0")
        assert bus.end == RAM + 22 * 4096
