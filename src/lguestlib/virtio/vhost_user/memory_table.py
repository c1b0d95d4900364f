"""The guest's memory as a front-end tells of it: guest-physical ranges, and where they are in its process."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lguestlib.abi import vhost_user as abi
from lguestlib.memory.address import GuestAddress, UserAddress
from lguestlib.virtio.vhost_user.message import ProtocolError

REGIONS_MAX = 128
"""Memory slots offered."""

_TOP = 1 << 64


@dataclass(frozen=True)
class MemoryRegion:
    """*size* bytes at guest-physical *guest*: at *user* in the front-end, at byte *offset* of a file."""

    guest: GuestAddress
    size: int
    user: UserAddress
    offset: int

    @classmethod
    def decode(cls, data: bytes) -> "MemoryRegion":
        """From a `vhost_user_mem_region`.  Raises ProtocolError for a range that cannot be (T13)."""
        wire = abi.vhost_user_mem_region.from_buffer_copy(data)
        region = cls(
            GuestAddress(wire.guest_phys_addr), wire.memory_size, UserAddress(wire.userspace_addr),
            wire.mmap_offset,
        )  # fmt: skip
        if not region.size or region.size > _TOP - max(region.guest, region.user, region.offset):
            raise ProtocolError(f"memory region {region}: empty, or past the end of addresses")
        return region

    def encode(self) -> bytes:
        """As a `vhost_user_mem_region`."""
        return bytes(abi.vhost_user_mem_region(self.guest, self.size, self.user, self.offset))

    def __str__(self) -> str:
        return f"at {self.guest:#x} of {self.size:#x} bytes"


class RingAddresses(NamedTuple):
    """Where the parts of a ring are in the front-end's own address space."""

    descriptors: UserAddress
    available: UserAddress
    used: UserAddress


class MemoryTable:
    """The regions, none of which overlap; immutable.  Raises ProtocolError."""

    def __init__(self, regions: Iterable[MemoryRegion] = ()) -> None:
        self.regions = tuple(sorted(regions, key=lambda region: region.guest))
        if len(self.regions) > REGIONS_MAX:
            raise ProtocolError(f"more than {REGIONS_MAX} memory regions")
        for low, high in zip(self.regions, self.regions[1:]):
            if low.guest + low.size > high.guest:
                raise ProtocolError(f"memory regions {low} and {high} overlap")

    def with_region(self, region: MemoryRegion) -> "MemoryTable":
        """One more."""
        return MemoryTable([*self.regions, region])

    def without(self, region: MemoryRegion) -> tuple["MemoryTable", MemoryRegion]:
        """One less, known by its addresses and size, and the one that it was."""
        for held in self.regions:
            if (held.guest, held.size, held.user) == (region.guest, region.size, region.user):
                return MemoryTable(other for other in self.regions if other is not held), held
        raise ProtocolError(f"memory region {region}: not in the table")

    def guest_address(self, user: UserAddress) -> GuestAddress:
        """The guest-physical address of the front-end's *user*.  Raises ProtocolError."""
        for region in self.regions:
            if 0 <= user - region.user < region.size:
                return GuestAddress(region.guest + user - region.user)
        raise ProtocolError(f"no memory region holds the front-end's address {user:#x}")
