"""Who serves the rings of a conversation: what it asks for, whether threads or processes do it."""

from collections.abc import Callable
from typing import Protocol

from lguestlib.memory.mapping import MappingLost
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.vhost_user.backend import MapInflight, MapLog, MapMemory, QueueSetup
from lguestlib.virtio.vhost_user.message import Message

OnFailure = Callable[[str], None]
"""Told, on whatever thread, that a ring has failed, and why."""


class RingsLost(Exception):
    """Rings can be served no more, and people have been told: the connection comes to its end."""


class ServedRing(Protocol):
    """A ring that is served."""

    def exchange(self, before: QueueSetup, setup: QueueSetup) -> None:
        """Go on as *setup* says, between two chains, where that differs from *before* (T10, T12)."""

    def request_stop(self) -> None:
        """Have nothing more begun, and return at once or nearly; `stop` has to follow.  Any thread may."""

    def stop(self) -> QueueState:
        """Stop serving; return when the ring has been let go of, with the avail index to go on from (T9)."""


class Rings(Protocol):
    """Serves the rings of one conversation.  Any of this may raise `RingsLost`."""

    @property
    def loss(self) -> MappingLost | None:
        """Why nothing more can be served: what the front-end has shared is not there any more."""

    def open(self, on_lost: Callable[[], None]) -> None:
        """The conversation begins.

        *on_lost* is called, on whatever thread and in the middle of whatever it does, when
        `RingsLost` or a `loss` is all there is left.
        """

    def take(self, effect: MapMemory | MapLog | MapInflight, message: Message) -> None:
        """Have this, which *message* has brought, from now on; what it replaces is there until `let_go`.

        Raises OSError, ValueError, having changed nothing.
        """

    def let_go(self) -> None:
        """No ring uses what was replaced any more."""

    def forget_inflight(self) -> None:
        """The driver begins its rings anew, and so does the record of them; none is served."""

    def start(self, index: int, setup: QueueSetup, on_failure: OnFailure) -> ServedRing:
        """Serve ring *index*.  Raises VirtioError for one that cannot be."""

    def close(self) -> None:
        """The conversation is over: every ring is stopped, and nothing held any more."""
