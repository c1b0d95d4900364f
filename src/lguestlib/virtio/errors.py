"""How a driver misbehaves, each way a type of its own with its numbers.

Every error names the queue, and the head of the chain where there is one; the
ring has advanced past that chain, so that nothing loops on it.  The IDs and
clauses are in the docstrings.
"""

from dataclasses import dataclass
from typing import ClassVar


class VirtioError(Exception):
    """Base of everything a driver or a device can be told it did wrong."""


class MemoryGone(VirtioError):
    """A system call has not found the guest memory it was given (EFAULT): it is not there any more (T13)."""

    def __init__(self) -> None:
        super().__init__("guest memory is not there any more")


@dataclass(eq=False)
class QueueError(VirtioError):
    """A virtqueue the other side has broken; *queue* is its index in the device."""

    queue: int
    reason: ClassVar[str] = "broken"

    def __str__(self) -> str:
        numbers = {name: value for name, value in vars(self).items() if name != "queue"}
        detail = ", ".join(
            f"{name} {value:#x}" if name in ("address", "length") else f"{name} {value}"
            for name, value in numbers.items()
        )
        return f"queue {self.queue}: {self.reason}" + (f" ({detail})" if detail else "")


@dataclass(eq=False)
class QueueLayoutError(QueueError):
    """A ring that cannot be: size, alignment or place (virtio 1.3, 2.7 and 2.8; S1, S32)."""

    size: int
    address: int
    part: str
    reason: ClassVar[str] = "impossible ring"


@dataclass(eq=False)
class QueueStateError(QueueError):
    """A position to go on from that the ring does not have (vhost-user, SET_VRING_BASE; T15)."""

    available: int
    used: int
    size: int
    reason: ClassVar[str] = "no position in this ring"


@dataclass(eq=False)
class AvailIndexError(QueueError):
    """avail.idx is further ahead than the queue is long (virtio 1.3, 2.7.13.3; S2)."""

    index: int
    last: int
    size: int
    reason: ClassVar[str] = "avail index runs ahead of the queue"


@dataclass(eq=False)
class ChainError(QueueError):
    """A descriptor chain that breaks a rule; *head* is its first descriptor's index.

    Where a packed ring's chain is given back, its buffer ID.
    """

    head: int


@dataclass(eq=False)
class HeadOutOfRange(ChainError):
    """The avail ring names a descriptor past the table (virtio 1.3, 2.7.6; S3)."""

    size: int
    reason: ClassVar[str] = "head outside the descriptor table"


@dataclass(eq=False)
class HeadInFlight(ChainError):
    """A chain made available again before it was used (virtio 1.3, 2.7.13; S28, S29)."""

    reason: ClassVar[str] = "head is in flight already"


@dataclass(eq=False)
class BufferIdOutOfRange(ChainError):
    """A packed ring's buffer ID that is no smaller than the ring's size (virtio 1.3, 2.8.5; P4)."""

    id: int
    size: int
    reason: ClassVar[str] = "buffer ID past the ring's size"


@dataclass(eq=False)
class BufferIdInFlight(ChainError):
    """A buffer ID made available again before it was used (virtio 1.3, 2.8.5; S29, P4)."""

    id: int
    reason: ClassVar[str] = "buffer ID is in flight already"


@dataclass(eq=False)
class RingOverrun(ChainError):
    """More descriptors of a packed ring made available than are not in flight (virtio 1.3, 2.8.13; S28)."""

    slots: int
    free: int
    reason: ClassVar[str] = "descriptors that are in flight made available"


@dataclass(eq=False)
class NextOutOfRange(ChainError):
    """A descriptor's next is past the table it is in (virtio 1.3, 2.7.5; S3)."""

    next: int
    size: int
    reason: ClassVar[str] = "next outside the descriptor table"


@dataclass(eq=False)
class DescriptorLoop(ChainError):
    """More descriptors in a chain than its table has (virtio 1.3, 2.7.5.2; S4)."""

    seen: int
    reason: ClassVar[str] = "descriptors form a loop"


@dataclass(eq=False)
class IndirectNotNegotiated(ChainError):
    """VIRTQ_DESC_F_INDIRECT without the feature (virtio 1.3, 2.7.5.3.1; S5)."""

    reason: ClassVar[str] = "indirect table without VIRTIO_F_INDIRECT_DESC"


@dataclass(eq=False)
class NestedIndirect(ChainError):
    """An indirect table inside an indirect table (virtio 1.3, 2.7.5.3.1; S6)."""

    reason: ClassVar[str] = "indirect table inside an indirect table"


@dataclass(eq=False)
class IndirectWithNext(ChainError):
    """INDIRECT and NEXT in one descriptor (virtio 1.3, 2.7.5.3.1; S7); in a packed ring's chain (2.8.19)."""

    reason: ClassVar[str] = "descriptor is both indirect and chained"


@dataclass(eq=False)
class IndirectLength(ChainError):
    """A table of no, of partial, or of too many descriptors (virtio 1.3, 2.7.5.3; S9, S12)."""

    length: int
    reason: ClassVar[str] = "bad length of an indirect table"


@dataclass(eq=False)
class ReadableAfterWritable(ChainError):
    """Device-readable buffers come first (virtio 1.3, 2.7.4.2; S13)."""

    reason: ClassVar[str] = "device-readable descriptor after a device-writable one"


@dataclass(eq=False)
class ChainTooLong(ChainError):
    """More than 2^32 - 1 bytes in all (virtio 1.3, 2.7.5.2; S15)."""

    length: int
    reason: ClassVar[str] = "buffers add up to more than 2^32 - 1 bytes"


@dataclass(eq=False)
class BadAddress(ChainError):
    """A buffer or table that is not in guest memory (virtio 1.3, 2.7.5; S11, S14, S16, S30)."""

    address: int
    length: int
    reason: ClassVar[str] = "outside guest memory"


@dataclass(eq=False)
class UsedLengthError(ChainError):
    """A used length the chain has no room for (virtio 1.3, 2.7.8.2; S19)."""

    length: int
    room: int
    reason: ClassVar[str] = "used length exceeds the device-writable bytes"


@dataclass(eq=False)
class NotInFlight(ChainError):
    """A chain returned that is not out: by this device's code, or by the device to a driver."""

    reason: ClassVar[str] = "returned but not in flight"


@dataclass(eq=False)
class UsedOutOfOrder(ChainError):
    """With IN_ORDER: a chain returned with fewer used than were made available up to it (virtio 1.3, 2.7.9)."""

    ahead: int
    reason: ClassVar[str] = "returned ahead of chains that come before it"


@dataclass(eq=False)
class UsedIndexError(QueueError):
    """used.idx is further ahead than there are chains in flight, seen by a driver."""

    index: int
    last: int
    reason: ClassVar[str] = "used index runs ahead of what is in flight"


@dataclass(eq=False)
class InflightRecordError(QueueError):
    """A field of the inflight record that no device leaves so (vhost-user, "Inflight I/O tracking"; T17)."""

    field: str
    value: int
    reason: ClassVar[str] = "impossible inflight record"


@dataclass(eq=False)
class DirtyLogTooSmall(QueueError):
    """A dirty log without bits for all that the device may write (vhost-user, "Migration"; T16)."""

    address: int
    length: int
    reason: ClassVar[str] = "outside the dirty log"
