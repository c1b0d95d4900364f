"""Ranges of guest-physical addresses."""

from random import Random

from lguestlib.memory.address import GuestAddress, GuestRange


def test_ranges_overlap_where_they_share_an_address() -> None:
    random = Random(1)
    for _ in range(2000):
        one, other = (GuestRange(GuestAddress(random.randrange(12)), random.randrange(6)) for _ in range(2))
        shared = set(range(one.start, one.end)) & set(range(other.start, other.end))
        assert one.overlaps(other) is other.overlaps(one) is bool(shared), (one, other)


def test_a_range_reads_as_its_bounds() -> None:
    assert str(GuestRange(GuestAddress(0x1000), 0x234)) == "0x1000 to 0x1234"
