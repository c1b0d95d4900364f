"""Requests that are begun, carried out by somebody else in his own time, and finished, in any order.

A device that can do so takes a chain apart into one transfer, and is told of its
result.  In between it has nothing to do with it, and the chain stays in flight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from lguestlib.virtio.chain import Buffers, Chain, part


class Operation(IntEnum):
    """What is to be done."""

    READ = 0
    """Fill the buffers from the file at the offset."""
    WRITE = 1
    """Write the buffers to the file at the offset."""
    FLUSH = 2
    """Have on stable storage what was complete when this began."""


class Transfer:
    """What *chain* asks for: *operation* on *buffers*, *length* bytes in all, at byte *offset*.

    A flush has no buffers.
    """

    __slots__ = ("chain", "operation", "buffers", "offset", "length")

    def __init__(
        self, chain: Chain, operation: Operation, buffers: Buffers = (), offset: int = 0, length: int = 0
    ) -> None:
        self.chain = chain
        self.operation = operation
        self.buffers = buffers
        self.offset = offset
        self.length = length

    def advance(self, done: int) -> None:
        """The first *done* bytes are done: the rest is left."""
        self.length -= done
        self.offset += done
        self.buffers = part(self.buffers, done, self.length)


@dataclass(frozen=True)
class Transfers:
    """How a queue's chains are served by transfers on *file*, a number for an open file.

    *begin* gives a chain's transfer, or None where there is none to be made: the
    chain is served then and its `written` set.  *finish* is told the result, the
    bytes moved or a negative errno; it sets the chain's `written`, or returns
    False when the transfer, which is now what is left of it, is to be carried out
    too.  Both may raise what a `Service` may.
    """

    file: int
    begin: Callable[[Chain], Transfer | None]
    finish: Callable[[Transfer, int], bool]
