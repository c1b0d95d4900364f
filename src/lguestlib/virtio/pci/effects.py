"""What an access to a PCI function asks of its owner, beside the effects of every transport."""

from dataclasses import dataclass
from typing import NamedTuple

from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.effects import Effect


class Message(NamedTuple):
    """What a message-signalled interrupt writes, and where."""

    address: GuestAddress
    data: int


CONFIG = -1
"""Stands for the config space where otherwise a queue's index does: a source of interrupts."""


@dataclass(frozen=True)
class VectorChanged:
    """Vector *vector* sends *message* from now on; None where it is masked, and what comes has to pend."""

    vector: int
    message: Message | None


@dataclass(frozen=True)
class VectorAssigned:
    """*source*, a queue's index or `CONFIG`, interrupts by *vector* from now on; None for by none."""

    source: int
    vector: int | None


@dataclass(frozen=True)
class MsixEnabled:
    """Whether interrupts are messages, or the level of a pin."""

    enabled: bool


@dataclass(frozen=True)
class PinLevel:
    """The function asserts its interrupt pin, or does not any more."""

    asserted: bool


@dataclass(frozen=True)
class BarMoved:
    """The function's registers are at *address* from now on; None where they are nowhere."""

    address: GuestAddress | None


PciEffect = Effect | VectorChanged | VectorAssigned | MsixEnabled | PinLevel | BarMoved
