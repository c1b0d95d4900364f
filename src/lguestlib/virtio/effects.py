"""What a driver's access to a transport asks of the device's owner."""

from dataclasses import dataclass

from lguestlib.virtio.layout import QueueLayout


@dataclass(frozen=True)
class DriverReady:
    """The device is live: start every ready queue, with these features."""

    features: int


@dataclass(frozen=True)
class DriverNear:
    """The driver is about to accept features; if a kick comes before `DriverReady`, start the device then."""


@dataclass(frozen=True)
class DriverFailed:
    """The driver has given up: as `Reset`."""


@dataclass(frozen=True)
class QueueReady:
    """A queue was enabled."""

    layout: QueueLayout


@dataclass(frozen=True)
class QueueStop:
    """Stop this queue, then call the transport's `queue_stopped`."""

    index: int


@dataclass(frozen=True)
class Reset:
    """Stop every queue, then call the transport's `reset_done`."""


@dataclass(frozen=True)
class Notify:
    """The driver notifies a queue."""

    index: int


Effect = DriverReady | DriverNear | DriverFailed | QueueReady | QueueStop | Reset | Notify
