"""The kinds of address, the guest's, this process's and another's, and a range of the guest's.

To a type checker the addresses are distinct from each other and from ``int``, so
that one of one kind cannot be passed where the other is meant.
"""

from typing import NamedTuple, NewType

GuestAddress = NewType("GuestAddress", int)
"""A guest-physical address, in bytes from guest-physical 0."""

HostAddress = NewType("HostAddress", int)
"""A virtual address in this process, in bytes."""

UserAddress = NewType("UserAddress", int)
"""A virtual address in the vhost-user front-end's process, in bytes."""


class GuestRange(NamedTuple):
    """*size* bytes of guest-physical addresses from *start* on."""

    start: GuestAddress
    size: int

    @property
    def end(self) -> GuestAddress:
        """The first address past the range."""
        return GuestAddress(self.start + self.size)

    def overlaps(self, other: "GuestRange") -> bool:
        """Whether an address is in both."""
        return max(self.start, other.start) < min(self.end, other.end)

    def __str__(self) -> str:
        return f"{self.start:#x} to {self.end:#x}"
