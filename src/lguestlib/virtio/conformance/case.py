"""What a case is: guest memory as it is at first, the peer's steps, and what has to come of them.

A case knows no machine.  Addresses are places (`At`), which whoever runs it
resolves; what he cannot do makes him skip the case and say so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from lguestlib.abi.virtio_blk import VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO
from lguestlib.abi.virtio_ring import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from lguestlib.virtio.errors import QueueError
from lguestlib.virtio.features import Feature

NEXT, WRITE, INDIRECT = VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT

WITH_INDIRECT = int(Feature.RING_INDIRECT_DESC)
WITH_EVENT = int(Feature.RING_EVENT_IDX)
BOTH = WITH_INDIRECT | WITH_EVENT


class Anchor(Enum):
    """A part of guest memory that a case may name."""

    ZERO = "address 0, where there is no memory"
    BUFFERS = "room for buffers"
    TABLES = "room for indirect tables"
    SEAM = "where one region ends and the next begins"
    END = "the end of that region, with a hole behind it"
    ISLAND = "the start of a small region by itself"
    ISLAND_END = "its end"
    DESCRIPTORS = "the attacked ring's descriptor table"
    AVAILABLE = "its available ring"
    USED = "its used ring"


@dataclass(frozen=True)
class At:
    """*offset* bytes from an anchor, backwards too; modulo 2^64."""

    anchor: Anchor
    offset: int = 0

    def __add__(self, more: int) -> "At":
        return At(self.anchor, self.offset + more)

    def __sub__(self, less: int) -> "At":
        return At(self.anchor, self.offset - less)

    def __str__(self) -> str:
        return f"{self.anchor.name}{self.offset:+#x}" if self.offset else self.anchor.name


HEADER = At(Anchor.BUFFERS)
"""Where a block request's header is, as a rule, and its data and status."""
DATA = At(Anchor.BUFFERS, 0x1000)
STATUS = At(Anchor.BUFFERS, 0x8000)
MORE = At(Anchor.BUFFERS, 0x9000)
TABLE = At(Anchor.TABLES)
SEAM, END, ISLAND = At(Anchor.SEAM), At(Anchor.END), At(Anchor.ISLAND)
NOWHERE = At(Anchor.END, 0x1000)
"""In the hole behind guest memory."""


@dataclass(frozen=True)
class Descriptor:
    """One entry of a split ring's table, or of an indirect one."""

    address: At
    length: int
    flags: int = 0
    next: int = 0


@dataclass(frozen=True)
class PackedDescriptor:
    """One entry of a packed ring; AVAIL and USED are the runner's to set, unless *raw* flags have them as they are."""

    address: At
    length: int
    flags: int = 0
    id: int = 0
    raw: bool = False


@dataclass(frozen=True)
class Sectors:
    """What the disk has there, *count* sectors from *first*: as a plain request reads it."""

    first: int
    count: int = 1


Content = bytes | Sectors


# Steps on a ring.


@dataclass(frozen=True)
class Publish:
    """The driver makes these heads available; *ahead* moves avail.idx further than that, past nothing."""

    heads: tuple[int, ...] = ()
    ahead: int = 0


@dataclass(frozen=True)
class Kick:
    """The driver notifies, and waits until nothing more comes of it."""


@dataclass(frozen=True)
class Take:
    """The device takes so many chains and has them in hand; only a sans-IO runner can tell it to."""

    count: int


@dataclass(frozen=True)
class Rewrite:
    """The driver writes a descriptor of its table over."""

    index: int
    descriptor: Descriptor


@dataclass(frozen=True)
class Flicker:
    """So many times: the chain at 0 is made available while descriptor *index* goes to and fro."""

    index: int
    other: Descriptor
    rounds: int


@dataclass(frozen=True)
class Interrupts:
    """What the driver asks for: avail.flags, and used_event relative to the next used entry."""

    flags: int = 0
    event: int = 0


@dataclass(frozen=True)
class Told:
    """Since the last such step the driver has been interrupted, or may not have been (*expected* None: no matter)."""

    expected: bool | None = True


@dataclass(frozen=True)
class Restart:
    """The queue is stopped and goes on from where it says it was; *base*: where that has to be."""

    base: int | None = None


@dataclass(frozen=True)
class Load:
    """So many plain requests, *depth* at a time, by kicks and interrupts alone: none is lost."""

    requests: int = 200
    depth: int = 4


RingStep = Publish | Kick | Take | Rewrite | Flicker | Interrupts | Told | Restart | Load


# Steps of a packed ring, beside Kick.


@dataclass(frozen=True)
class Fill:
    """The driver writes these into consecutive slots from *slot*, the first one's flags last.

    *wrap* is the driver's wrap counter there; it turns at the ring's end.  They are a
    chain that is *available* then, or are not.
    """

    slot: int
    descriptors: tuple[PackedDescriptor, ...]
    wrap: bool = True
    available: bool = True


@dataclass(frozen=True)
class DriverEvent:
    """The driver's event structure: off_wrap and flags as they are in memory."""

    off_wrap: int
    flags: int


PackedStep = Fill | DriverEvent | Kick | Take | Told | Restart


# What comes of it.


@dataclass(frozen=True)
class Served:
    """A chain is returned, *written* bytes from its writable start; None where that is the device's to say."""

    head: int
    written: int | None = None


@dataclass(frozen=True)
class Fault:
    """A queue of this library raises this error; any other device may do what keeps it alive."""

    error: type[QueueError]


Event = Served | Fault


@dataclass(frozen=True)
class Applies:
    """What a case is about."""

    device: str = "blk"
    """"blk", "net", "console", "rng", or "any": hostile to whatever the device is."""
    writes: bool = False
    """Whether it writes to the disk."""
    feature: int = 0
    """Bits of the device's own without which there is nothing to it; they are negotiated."""
    queues: int = 1
    """Queues that there have to be, from the attacked one on."""


ANY = Applies("any")
BLK = Applies("blk")
WRITING = Applies("blk", writes=True)
NET = Applies("net")
READ_ONLY = Applies("blk", feature=1 << VIRTIO_BLK_F_RO)
FLUSHING = Applies("blk", feature=1 << VIRTIO_BLK_F_FLUSH)


@dataclass(frozen=True)
class Case:
    """Base of all: *ids* are rows of the list of traps and CVE numbers, the first one names it."""

    ids: tuple[str, ...]
    title: str
    clause: str
    """virtio 1.3 section, chapter of the vhost-user specification, or what else demands it."""

    @property
    def name(self) -> str:
        """ "S3 next just past the table": the first ID and the title."""
        return f"{self.ids[0]} {self.title}"

    @property
    def runners(self) -> tuple[str, ...]:
        """Who can run it: "ring" alone, a queue's "thread", "vhost-user", "registers", or this library's "tests"."""
        return ()


@dataclass(frozen=True)
class RingCase(Case):
    """A split ring of *size* with these tables, which a driver works off in *steps*.

    *demanded*: what *events* and *after* say is every device's duty, as nothing here
    breaks a rule.  Otherwise it is what this library does, and another device may
    refuse, end the ring or the connection, but has to live.
    """

    applies: Applies = BLK
    size: int = 8
    features: int = BOTH
    """Ring features that are negotiated: these, where they are offered, and no others; but see `needs`."""
    base: int = 0
    """The index that both rings begin at."""
    misplaced: tuple[int, int, int] = (0, 0, 0)
    """Bytes by which descriptor table, available and used ring are not where they should be."""
    table: Mapping[int, Descriptor] = field(default_factory=dict)
    indirect: Mapping[At, tuple[Descriptor, ...]] = field(default_factory=dict)
    memory: Mapping[At, bytes] = field(default_factory=dict)
    steps: tuple[RingStep, ...] = (Publish((0,)), Kick())
    events: tuple[Event, ...] = ()
    after: Mapping[At, Content] = field(default_factory=dict)
    demanded: bool = False

    @property
    def is_hostile(self) -> bool:
        """Whether the driver breaks a rule in it."""
        return not self.demanded

    @property
    def needs(self) -> int:
        """The ring features without which there is nothing to it."""
        entries = [*self.table.values(), *(entry for table in self.indirect.values() for entry in table)]
        return _needed(self.features, any(entry.flags & INDIRECT for entry in entries), any(
            isinstance(step, Interrupts | Load) for step in self.steps
        ))  # fmt: skip

    @property
    def runners(self) -> tuple[str, ...]:
        return _runners(self.steps)


@dataclass(frozen=True)
class PackedCase(Case):
    """A packed ring of *size*, as `RingCase`."""

    applies: Applies = BLK
    size: int = 8
    features: int = BOTH
    base: int | None = None
    """Where both sides go on, as SET_VRING_BASE has it (P8); None for a new ring."""
    memory: Mapping[At, bytes] = field(default_factory=dict)
    indirect: Mapping[At, tuple[PackedDescriptor, ...]] = field(default_factory=dict)
    steps: tuple[PackedStep, ...] = ()
    events: tuple[Event, ...] = ()
    after: Mapping[At, Content] = field(default_factory=dict)
    demanded: bool = False

    @property
    def is_hostile(self) -> bool:
        """As a `RingCase`'s."""
        return not self.demanded

    @property
    def needs(self) -> int:
        """As a `RingCase`'s."""
        entries = [entry for step in self.steps if isinstance(step, Fill) for entry in step.descriptors]
        return _needed(self.features, any(entry.flags & INDIRECT for entry in entries), any(
            isinstance(step, DriverEvent) for step in self.steps
        ))  # fmt: skip

    @property
    def runners(self) -> tuple[str, ...]:
        return _runners(self.steps)


def _runners(steps: Sequence[RingStep | PackedStep]) -> tuple[str, ...]:
    """Chains taken in hand one by one can be had from a ring alone."""
    alone = any(isinstance(step, Take) for step in steps)
    return ("ring",) if alone else ("ring", "thread", "vhost-user")


def _needed(features: int, has_table: bool, has_event: bool) -> int:
    optional = (0 if has_table else WITH_INDIRECT) | (0 if has_event else WITH_EVENT)
    return features & ~optional


# Steps of a conversation.


class Fd(Enum):
    """A descriptor that goes with a message."""

    MEMORY = "guest memory's file, its first region's"
    SMALL = "a file of one page"
    SHRINKABLE = "a file as long as guest memory's, of zeros, that cannot be sealed against shrinking"
    EVENT = "an eventfd"
    NULL = "/dev/null"
    SOCKET = "a socket that nobody reads"
    INFLIGHT = "the record that the back-end has made, or one made by hand"
    LOG = "a file for the dirty log of all of memory"


@dataclass(frozen=True)
class Say:
    """A request is sent, and its reply taken if it has one.

    *size* is what the header announces, if not the payload's; *payload* may be cut short of it.
    Without *flags* they are a request's as it should be, which asks for a reply where that may be.
    """

    request: int
    payload: bytes = b""
    fds: tuple[Fd, ...] = ()
    flags: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Raw:
    """Bytes of no message."""

    data: bytes


class Do(Enum):
    """What needs no numbers."""

    REQUEST = "one plain request, which is served"
    UNKICKED = "a request is made available, without a kick"
    KICK = "the kick descriptor is written to"
    ANSWERED = "what was made available is served"
    STOP = "GET_VRING_BASE, whose answer is the index of the next to take; then nothing of the ring is touched"
    START = "the ring is set up and enabled, from where it stopped"
    SET_UP = "the ring is set up, and not enabled"
    ENABLE = "the ring is enabled"
    DISABLE = "the ring is disabled"
    NEW_KICK = "SET_VRING_KICK with another descriptor"
    NEW_CALL = "SET_VRING_CALL with another descriptor"
    NO_CALL = "SET_VRING_CALL without a descriptor"
    FULL_CALL = "the call descriptor's counter is full"
    FULL_KICK = "the kick descriptor's counter is full"
    MEMORY_AGAIN = "SET_MEM_TABLE with the same memory, mapped anew"
    SHRINK = "the file that can be made shorter is empty"
    LEAVE = "the connection ends"
    COME = "and another begins, as far as the first one was"
    ONE_REPLY = "GET_FEATURES is answered next, and by nothing else"
    LOGGED = "the pages that were written are marked in the dirty log"
    AGAIN = "features, memory and the ring are told once more, and the ring is served"
    RESUME = "the inflight record, with a request in flight in it, is handed over and the ring started"
    FLOOD = "the first ring never runs dry while the second one's request is served"


ConversationStep = Say | Raw | Do | Load


class Begin(Enum):
    """How far the conversation is before the first step."""

    CONNECTED = "connected"
    NEGOTIATED = "features agreed"
    SHARED = "memory handed over"
    RUNNING = "the ring is served"


@dataclass(frozen=True)
class ConversationCase(Case):
    """A vhost-user conversation from *begin* on, in *steps*.

    *served* where the ring has to be served after them, in the same connection; else
    the back-end may refuse or end it.  *refused* is what this library's does with the last message.
    """

    applies: Applies = ANY
    begin: Begin = Begin.RUNNING
    needs: tuple[int, ...] = ()
    """Protocol features without which there is nothing to it; they are negotiated beside the usual ones."""
    without: tuple[int, ...] = ()
    """Protocol features that are not negotiated."""
    vhost: int = 0
    """Bits of vhost's own that are negotiated, where they are offered (VHOST_F_LOG_ALL)."""
    steps: tuple[ConversationStep, ...] = ()
    served: bool = False
    refused: bool = False

    @property
    def runners(self) -> tuple[str, ...]:
        return ("vhost-user",)


@dataclass(frozen=True)
class Access:
    """A register access: *write* a value, or read and find *expect*; *notifies* is a queue, -1 for none."""

    offset: int
    write: int | None = None
    expect: int | None = None
    size: int = 4
    notifies: int = -1


@dataclass(frozen=True)
class RegisterCase(Case):
    """Accesses to the registers of a virtio-mmio device with three queues of 8, 256 and 1 (virtio 1.3, 4.2.2)."""

    accesses: tuple[Access, ...] = ()

    @property
    def runners(self) -> tuple[str, ...]:
        return ("registers",)


@dataclass(frozen=True)
class WatchedCase(Case):
    """What shows only inside this library: *tests* are its tests that run it."""

    tests: tuple[str, ...] = ()

    @property
    def runners(self) -> tuple[str, ...]:
        return ("tests",)
