"""What a machine knows of a device at work, whoever serves its queues."""

from collections.abc import Callable, Sequence
from typing import Protocol

from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.interrupt import EventfdInterrupt
from lguestlib.runtime.kick import EventfdKick
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.mmio import MmioTransport


class Served(Protocol):
    """A device with its queues, and what they have done."""

    @property
    def device(self) -> Device:
        """The device."""

    @property
    def queues(self) -> Sequence[Queue]:
        """Its virtqueues, in the order of their indices."""

    @property
    def counters(self) -> Sequence[QueueCounters]:
        """What each queue has done; none where that is not known here."""


class Runner(Served, Protocol):
    """A device that does as its driver asks through a transport, and can be ended."""

    @property
    def failure(self) -> Exception | None:
        """What the device failed of, until it is reset."""

    def finish(self, give_up: Callable[[], bool]) -> None:
        """Serve what the driver has made available and then no more; *give_up* is asked now and then."""

    def stop(self) -> None:
        """Stop every queue; what was begun is finished."""

    def close(self) -> None:
        """Stop, and close the descriptors; the hypervisor has let go of them."""


class MmioRunner(Runner, Protocol):
    """A device behind registers.

    `MmioDeviceRunner` has a thread for each queue; `ExternalDeviceRunner` has another
    process serve them.
    """

    @property
    def transport(self) -> MmioTransport:
        """Its registers."""

    @property
    def kicks(self) -> Sequence[EventfdKick]:
        """Where the driver's notifications go, for each queue."""

    @property
    def interrupt(self) -> EventfdInterrupt:
        """Where all its interrupts come from."""

    def read(self, offset: int, size: int) -> bytes:
        """The driver reads *size* bytes of the registers at *offset*."""

    def write(self, offset: int, data: bytes) -> None:
        """The driver writes *data* to the registers at *offset*; done when this returns."""
