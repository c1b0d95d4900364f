"""MSI-X: a table of messages, and of which interrupts pend (PCI Local Bus 3.0, 6.8.2).

A masked vector's interrupt pends, and is sent when it is unmasked.  Where it pends is
its owner's: `pending` tells, and unmasking is an effect (T8).
"""

from collections.abc import Callable

from lguestlib.abi import pci as abi
from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.pci.effects import Message, VectorChanged

VECTORS_MAX = abi.PCI_MSIX_FLAGS_QSIZE + 1


def _nothing(vector: int) -> bool:
    return False


class MsixTable:
    """*count* vectors, all of them masked at first.

    Table and pending bits are read and written in aligned dwords or qwords; any other
    access reads as zeros or does nothing, and is *refused* (T5).
    """

    def __init__(self, count: int) -> None:
        if not 0 < count <= VECTORS_MAX:
            raise ValueError(f"MSI-X: {count} vectors, not 1 to {VECTORS_MAX}")
        self.count = count
        self.pending: Callable[[int], bool] = _nothing
        """Whether a vector's interrupt pends; set by whoever keeps them."""
        self.refused = 0
        self._entries = bytearray(abi.PCI_MSIX_ENTRY_SIZE * count)
        self._enabled = self._function_masked = False
        self.reset()

    @property
    def enabled(self) -> bool:
        """Whether the function interrupts by messages."""
        return self._enabled

    @property
    def table_size(self) -> int:
        """Bytes of the table."""
        return len(self._entries)

    @property
    def pending_size(self) -> int:
        """Bytes of the pending bits."""
        return -(-self.count // 64) * 8

    def reset(self) -> None:
        """As after power-on: every vector masked, its message zero."""
        self._entries[:] = bytes(len(self._entries))
        for vector in range(self.count):
            at = abi.PCI_MSIX_ENTRY_SIZE * vector + abi.PCI_MSIX_ENTRY_VECTOR_CTRL
            self._entries[at] = abi.PCI_MSIX_ENTRY_CTRL_MASKBIT

    def message(self, vector: int) -> Message | None:
        """What *vector* sends; None while it is masked, or MSI-X is not enabled."""
        entry = self._entries[abi.PCI_MSIX_ENTRY_SIZE * vector : abi.PCI_MSIX_ENTRY_SIZE * (vector + 1)]
        masked = entry[abi.PCI_MSIX_ENTRY_VECTOR_CTRL]
        if masked or self._function_masked or not self._enabled:
            return None
        address = GuestAddress(int.from_bytes(entry[:8], "little"))
        return Message(address, int.from_bytes(entry[8:12], "little"))

    def control(self, flags: int) -> list[VectorChanged]:
        """The message control register holds *flags* from now on: the vectors that have changed by it."""
        before = [self.message(vector) for vector in range(self.count)]
        self._enabled = bool(flags & abi.PCI_MSIX_FLAGS_ENABLE)
        self._function_masked = bool(flags & abi.PCI_MSIX_FLAGS_MASKALL)
        after = (self.message(vector) for vector in range(self.count))
        return [
            VectorChanged(vector, new)
            for vector, (old, new) in enumerate(zip(before, after, strict=True))
            if old != new
        ]

    def _allowed(self, offset: int, size: int, end: int) -> bool:
        if size in (4, 8) and offset % size == 0 and offset + size <= end:
            return True
        self.refused += 1
        return False

    def read(self, offset: int, size: int) -> bytes:
        """*size* bytes of the table at *offset*."""
        if not self._allowed(offset, size, len(self._entries)):
            return bytes(size)
        return bytes(self._entries[offset : offset + size])

    def read_pending(self, offset: int, size: int) -> bytes:
        """*size* bytes of the pending bits at *offset*: one for each vector that is masked and has an interrupt."""
        if not self._allowed(offset, size, self.pending_size):
            return bytes(size)
        bits = 0
        for vector in range(8 * offset, min(8 * (offset + size), self.count)):
            if self.message(vector) is None and self.pending(vector):
                bits |= 1 << vector - 8 * offset
        return bits.to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> list[VectorChanged]:
        """The driver writes *data* into the table at *offset*: the vector that has changed by it, if any.

        Of a vector's control only the mask bit can be set.
        """
        if not self._allowed(offset, len(data), len(self._entries)):
            return []
        vector = offset // abi.PCI_MSIX_ENTRY_SIZE
        before = self.message(vector)
        self._entries[offset : offset + len(data)] = data
        control = abi.PCI_MSIX_ENTRY_SIZE * vector + abi.PCI_MSIX_ENTRY_VECTOR_CTRL
        self._entries[control : control + 4] = bytes(
            [self._entries[control] & abi.PCI_MSIX_ENTRY_CTRL_MASKBIT, 0, 0, 0]
        )
        after = self.message(vector)
        return [VectorChanged(vector, after)] if before != after else []
