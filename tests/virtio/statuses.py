"""The states of a device that the specification knows (virtio 1.3, 2.1)."""

from lguestlib.virtio.status import LADDER, Status

RUNGS = [Status(sum(LADDER[:count])) for count in range(5)]
"""The states a driver goes through, from reset to ready."""

STATES = [
    rung | failed | needs_reset
    for rung in RUNGS
    for failed in (Status(0), Status.FAILED)
    for needs_reset in (Status(0), Status.NEEDS_RESET)
]
"""Those, and what may be said beside them."""
