"""The two kinds of address: the guest's and this process's.

To a type checker they are distinct from each other and from ``int``, so that
an address of one kind cannot be passed where the other is meant.
"""

from typing import NewType

GuestAddress = NewType("GuestAddress", int)
"""A guest-physical address, in bytes from guest-physical 0."""

HostAddress = NewType("HostAddress", int)
"""A virtual address in this process, in bytes."""
