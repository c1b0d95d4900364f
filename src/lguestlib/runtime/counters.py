"""What a queue has done so far."""

from dataclasses import dataclass


@dataclass(slots=True)
class QueueCounters:
    """Running totals of one queue over all its starts; written by its thread alone."""

    chains: int = 0
    """Chains returned to the driver."""
    bytes: int = 0
    """Bytes in those chains: read from them, or reported as written to them."""
    kicks: int = 0
    """Notifications the driver sent; some may have come together in one wake-up."""
    wakeups: int = 0
    """Returns from sleep on the kick."""
    interrupts: int = 0
    """Interrupts sent."""
    suppressed: int = 0
    """Times the driver did not want the interrupt it could have had."""
    errors: int = 0
    """Times the queue's thread has died of an exception."""
