"""A PCI function's configuration space: a type 0 header, its BARs, its capabilities.

An access is to each of its bytes: every width and alignment means something, and
what is read-only stays as it is (T5).  Bytes past the end read as ones.
"""

from dataclasses import dataclass

from lguestlib.abi import pci as abi
from lguestlib.memory.address import GuestAddress

_WRITABLE_COMMANDS = (
    abi.PCI_COMMAND_MEMORY | abi.PCI_COMMAND_MASTER | abi.PCI_COMMAND_PARITY | abi.PCI_COMMAND_SERR
    | abi.PCI_COMMAND_INTX_DISABLE
)  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """Who a function is: numbers of 16 bits, *class_code* of 24, *revision* of 8.

    *interrupt_pin*: 1 to 4 for INTA to INTD, 0 for none.
    """

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0
    interrupt_pin: int = 0


class ConfigSpace:
    """The configuration space of the function *identity*, 256 bytes, with none of the extended ones' capabilities."""

    def __init__(self, identity: Identity) -> None:
        self._bytes = bytearray(abi.PCI_CFG_SPACE_SIZE)
        self._writable = bytearray(abi.PCI_CFG_SPACE_SIZE)
        self._last_capability = abi.PCI_CAPABILITY_LIST
        self._free = abi.PCI_STD_HEADER_SIZEOF
        self._bars: dict[int, int] = {}
        self.pin_asserted = False
        """Whether the status register says that the function interrupts by its pin."""
        for offset, size, value in (
            (abi.PCI_VENDOR_ID, 2, identity.vendor),
            (abi.PCI_DEVICE_ID, 2, identity.device),
            (abi.PCI_CLASS_REVISION, 4, identity.class_code << 8 | identity.revision),
            (abi.PCI_SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor),
            (abi.PCI_SUBSYSTEM_ID, 2, identity.subsystem),
            (abi.PCI_INTERRUPT_PIN, 1, identity.interrupt_pin),
        ):
            self._put(self._bytes, offset, size, value)
        for offset, size, value in (
            (abi.PCI_COMMAND, 2, _WRITABLE_COMMANDS),
            (abi.PCI_CACHE_LINE_SIZE, 1, 0xFF),
            (abi.PCI_INTERRUPT_LINE, 1, 0xFF),
        ):
            self._put(self._writable, offset, size, value)

    @staticmethod
    def _put(target: bytearray, offset: int, size: int, value: int) -> None:
        target[offset : offset + size] = value.to_bytes(size, "little")

    def _get(self, offset: int, size: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def add_bar(self, index: int, size: int) -> None:
        """Make BARs *index* and *index* + 1 one of *size* bytes of memory anywhere in 64 bits.

        The BAR's bits below *size*, a power of two from 16 on, stay as they are: that
        is how a driver finds the size, writing ones.
        """
        if size < 16 or size & size - 1 or not 0 <= index < abi.PCI_STD_NUM_BARS - 1:
            raise ValueError(f"PCI: no BAR {index} of {size:#x} bytes")
        at = abi.PCI_BASE_ADDRESS_0 + 4 * index
        self._put(self._bytes, at, 8, abi.PCI_BASE_ADDRESS_MEM_TYPE_64)
        self._put(self._writable, at, 8, (1 << 64) - size)
        self._bars[index] = size

    def add_capability(self, identity: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability whose bytes after ID and link are *body*; its offset.

        *writable* has the bits of *body* that a driver may write, from its start.
        Raises ValueError where there is no room.
        """
        offset = self._free
        end = offset + 2 + len(body)
        if end > len(self._bytes):
            raise ValueError(f"PCI: no room for a capability of {2 + len(body)} bytes")
        self._bytes[offset:end] = bytes([identity, 0]) + body
        self._writable[offset + 2 : offset + 2 + len(writable)] = writable
        # The list's head is the link itself; in a capability it is the second byte.
        link = self._last_capability + (self._last_capability != abi.PCI_CAPABILITY_LIST)
        self._bytes[link] = offset
        self._last_capability = offset
        self._bytes[abi.PCI_STATUS] |= abi.PCI_STATUS_CAP_LIST
        self._free = -(-end // 4) * 4
        return offset

    @property
    def command(self) -> int:
        """The command register."""
        return self._get(abi.PCI_COMMAND, 2)

    def bar(self, index: int) -> GuestAddress | None:
        """Where BAR *index* is; None while the function does not decode memory.

        Nor is it anywhere while its size is asked for, up at the end of the 64 bits.
        """
        size = self._bars[index]
        at = self._get(abi.PCI_BASE_ADDRESS_0 + 4 * index, 8) & -size
        if not self.command & abi.PCI_COMMAND_MEMORY or at == 0 or at == (1 << 64) - size:
            return None
        return GuestAddress(at)

    def read(self, offset: int, size: int) -> bytes:
        """*size* bytes at *offset*."""
        if offset >= len(self._bytes):
            # The first extended capability would be here: there is none.
            return bytes(size) if offset + size <= abi.PCI_CFG_SPACE_EXP_SIZE else b"\xff" * size
        data = bytearray(self._bytes[offset : offset + size].ljust(size, b"\0"))
        if self.pin_asserted and offset <= abi.PCI_STATUS < offset + size:
            data[abi.PCI_STATUS - offset] |= abi.PCI_STATUS_INTERRUPT
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Write the bits of *data*, at *offset*, that can be written."""
        for at, byte in enumerate(data, offset):
            if at >= len(self._bytes):
                break
            mask = self._writable[at]
            self._bytes[at] = self._bytes[at] & ~mask | byte & mask
