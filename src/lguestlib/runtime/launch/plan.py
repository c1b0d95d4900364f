"""What a machine is made of, whatever its guest runs on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.image import ImageError
from lguestlib.memory.region import Region
from lguestlib.runtime.attachments import Attachment, Say
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.boot import Boot
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.options import MEBIBYTE, MachineOptions
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.device import Device


@dataclass(frozen=True)
class Plan:
    """What *options* ask for, and what has been opened for it, for as many boots as the guest wants.

    *say* is given lines for people at once, *note* those that are shown when it boots.
    """

    options: MachineOptions
    attachments: Sequence[Attachment]
    terminal: Terminal
    say: Say
    note: Say
    tracer: Tracer | None

    @property
    def shares_memory(self) -> bool:
        """Whether another process is to have the guest's memory."""
        return any(attachment.shares_memory for attachment in self.attachments)

    @property
    def device_words(self) -> list[str]:
        """What a guest that is ours is told of its devices."""
        return [word for attachment in self.attachments for word in attachment.guest_parameters()]

    @property
    def words(self) -> list[str]:
        """The command line, without the devices: a kernel of the user's is told nothing else."""
        if self.options.kernel is not None:
            return list(self.options.arguments)
        return [*self.device_words, *self.options.arguments]

    def memory(self) -> GuestMemory:
        """Fresh memory, in one piece.  Raises LaunchError."""
        try:
            if self.shares_memory:
                return GuestMemory([Region.memfd(GuestAddress(0), self.options.memory)])
            return GuestMemory.anonymous(self.options.memory)
        except OSError as error:
            raise self.no_memory(error) from None

    def no_memory(self, error: OSError) -> LaunchError:
        """What the user is told of *error*."""
        return LaunchError(f"--memory {self.options.memory // MEBIBYTE}: {error.strerror}")

    def add_devices(self, add: Callable[[Device], object]) -> None:
        """*add* a fresh device of each attachment."""
        counts: dict[str, int] = {}
        for attachment in self.attachments:
            number = counts[attachment.kind] = counts.get(attachment.kind, -1) + 1
            add(attachment.device(number))

    def take_early_text(self, text: bytes) -> None:
        """Show what the guest says before it has a console on what will be that."""
        left = memoryview(bytearray(text))
        try:
            while left:
                left = left[self.terminal.write([left]) :]
        except InterruptedError:
            pass


class Way(Protocol):
    """A module of this package."""

    def check(self, options: MachineOptions) -> None:
        """Raise LaunchError where no machine can be made of them: for size and number."""

    def build(self, plan: Plan) -> Boot:
        """A machine with fresh memory and devices, ready to start.  Raises LaunchError."""


class _Closed(Protocol):
    def close(self) -> None: ...


Made = TypeVar("Made", bound=_Closed)


@contextmanager
def closed_on_error(made: Made) -> Iterator[Made]:
    """Gives *made* back should something go wrong with it; an ImageError is the user's."""
    try:
        yield made
    except BaseException as error:
        made.close()
        if isinstance(error, ImageError):
            raise LaunchError(str(error)) from None
        raise
