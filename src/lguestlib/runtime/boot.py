"""What a launcher knows of a machine, whatever the guest runs on."""

from collections.abc import Sequence
from typing import Protocol, Self

from lguestlib.runtime.machine import Outcome
from lguestlib.runtime.runner import Served


class Boot(Protocol):
    """A machine from its first instruction to its end."""

    @property
    def runners(self) -> Sequence[Served]:
        """Its devices at work, in bus order."""

    def start(self) -> None:
        """Start the guest."""

    def wait(self) -> Outcome:
        """Sleep until the guest ends, and return how it did."""

    def finish(self) -> None:
        """The guest has ended by itself: see its last requests through, until `request_stop`."""

    def request_stop(self) -> None:
        """Ask the guest to end with `Stopped`, and return at once; any thread may call this."""

    def close(self) -> None:
        """Stop everything and give back what it took."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *details: object) -> None: ...
