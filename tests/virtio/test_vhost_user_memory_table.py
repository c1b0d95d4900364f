"""What a front-end may tell of the guest's memory, and where an address of its own is there (T13)."""

from itertools import permutations
from random import Random

import pytest

from lguestlib.abi import vhost_user as abi
from lguestlib.memory.address import GuestAddress, UserAddress
from lguestlib.virtio.vhost_user.memory_table import REGIONS_MAX, MemoryRegion, MemoryTable
from lguestlib.virtio.vhost_user.message import ProtocolError

TOP = 1 << 64


def region(guest: int, size: int = 0x1000, user: int = 0x7F00_0000_0000, offset: int = 0) -> MemoryRegion:
    return MemoryRegion(GuestAddress(guest), size, UserAddress(user), offset)


def wire(guest: int, size: int, user: int, offset: int) -> bytes:
    return bytes(abi.vhost_user_mem_region(guest, size, user, offset))


def test_a_region_on_the_wire_is_guest_address_size_user_address_and_offset() -> None:
    data = b"".join(number.to_bytes(8, "little") for number in (0x1000, 0x2000, 0x3000, 0x4000))
    decoded = MemoryRegion.decode(data)
    assert decoded == region(0x1000, 0x2000, 0x3000, 0x4000)
    assert decoded.encode() == data
    assert str(decoded) == "at 0x1000 of 0x2000 bytes"


@pytest.mark.parametrize(
    ("guest", "size", "user", "offset"),
    [
        (0x1000, 0, 0x1000, 0),
        (0, 0, 0, 0),
        (TOP - 1, 0, 0, 0),
        (TOP - 0x1000, 0x1001, 0, 0),
        (0, 0x1001, TOP - 0x1000, 0),
        (0, 0x1001, 0, TOP - 0x1000),
        (2, TOP - 1, 0, 0),
        (0, TOP - 1, 2, 0),
        (TOP - 1, TOP - 1, TOP - 1, TOP - 1),
    ],
)
def test_t13_an_empty_region_and_one_past_the_end_of_addresses_are_refused(
    guest: int, size: int, user: int, offset: int
) -> None:
    with pytest.raises(ProtocolError, match=f"at {guest:#x} of {size:#x} bytes: empty, or past the end"):
        MemoryRegion.decode(wire(guest, size, user, offset))


@pytest.mark.parametrize(
    ("guest", "size", "user", "offset"),
    [(TOP - 0x1000, 0x1000, 0, 0), (0, 1, TOP - 1, 0), (0, 1, 0, TOP - 1), (0, TOP - 1, 1, 1)],
)
def test_t13_a_region_may_end_with_the_addresses(guest: int, size: int, user: int, offset: int) -> None:
    assert MemoryRegion.decode(wire(guest, size, user, offset)) == region(guest, size, user, offset)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (region(0, 0x1000), region(0, 0x1000)),
        (region(0, 0x1001), region(0x1000, 0x1000)),
        (region(0x1000, 0x1000), region(0, 0x1001)),
        (region(0, 0x10000), region(0x4000, 0x1000)),
        (region(TOP - 0x1000, 0x1000), region(TOP - 1, 1)),
    ],
)
def test_t13_regions_that_overlap_are_refused_in_either_order(
    first: MemoryRegion, second: MemoryRegion
) -> None:
    for regions in ([first, second], [second, first]):
        with pytest.raises(ProtocolError, match="overlap"):
            MemoryTable(regions)
    with pytest.raises(ProtocolError, match="overlap"):
        MemoryTable([first]).with_region(second)


def test_regions_that_touch_are_two_and_in_the_order_of_their_addresses() -> None:
    three = [region(0), region(0x1000), region(0x2000)]
    for order in permutations(three):
        assert MemoryTable(order).regions == tuple(three)


def test_there_are_as_many_slots_as_are_offered_and_no_more() -> None:
    full = MemoryTable(region(0x1000 * slot) for slot in range(REGIONS_MAX))
    assert len(full.regions) == REGIONS_MAX == 128
    with pytest.raises(ProtocolError, match="more than 128"):
        full.with_region(region(0x1000 * REGIONS_MAX))


def test_a_table_never_changes() -> None:
    before = MemoryTable([region(0)])
    after = before.with_region(region(0x1000))
    shorter, gone = after.without(region(0))
    assert (len(before.regions), len(after.regions), len(shorter.regions)) == (1, 2, 1)
    assert gone is before.regions[0]
    assert shorter.regions == (region(0x1000),)


def test_a_region_to_remove_is_known_by_addresses_and_size_and_not_by_its_offset() -> None:
    table = MemoryTable([region(0x1000, 0x1000, 0x5000, 0x40)])
    shorter, gone = table.without(region(0x1000, 0x1000, 0x5000, 0))
    assert gone == region(0x1000, 0x1000, 0x5000, 0x40) and shorter.regions == ()
    for other in (
        region(0x1001, 0x1000, 0x5000, 0x40),
        region(0x1000, 0xFFF, 0x5000, 0x40),
        region(0x1000, 0x1000, 0x5001, 0x40),
    ):
        with pytest.raises(ProtocolError, match="not in the table"):
            table.without(other)
    with pytest.raises(ProtocolError, match="not in the table"):
        MemoryTable().without(region(0))


def test_a_user_address_is_translated_from_a_regions_first_byte_to_its_last() -> None:
    table = MemoryTable([region(0x4000_0000, 0x2000, 0x1_0000), region(0, 0x1000, 0x8_0000)])
    for user, guest in (
        (0x1_0000, 0x4000_0000), (0x1_1FFF, 0x4000_1FFF), (0x8_0000, 0), (0x8_0FFF, 0xFFF),
    ):  # fmt: skip
        assert table.guest_address(UserAddress(user)) == guest
    for user in (0, 0xFFFF, 0x1_2000, 0x7_FFFF, 0x8_1000, TOP - 1):
        with pytest.raises(ProtocolError, match=f"holds the front-end's address {user:#x}"):
            table.guest_address(UserAddress(user))


def test_random_tables_translate_as_a_byte_by_byte_map_does() -> None:
    random = Random(5)
    for _ in range(200):
        regions, guest, user = [], random.randrange(8), random.randrange(8)
        expected: dict[int, int] = {}
        for _ in range(random.randrange(1, 5)):
            size = random.randrange(1, 9)
            regions.append(region(guest, size, user))
            expected.update({user + byte: guest + byte for byte in range(size)})
            guest += size + random.randrange(4)
            user += size + random.randrange(4)
        random.shuffle(regions)
        table = MemoryTable(regions)
        for address in range(user + 8):
            try:
                found: int | None = table.guest_address(UserAddress(address))
            except ProtocolError:
                found = None
            assert found == expected.get(address)
