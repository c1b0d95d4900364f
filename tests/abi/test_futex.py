"""futex(2) as an atomic OR."""

import mmap
from collections.abc import Iterator

import pytest

from lguestlib.abi.futex import set_all_bits, set_bit
from lguestlib.abi.mmap import address_of

PAGE = mmap.PAGESIZE


@pytest.fixture
def words() -> Iterator[memoryview]:
    """Three words of memory that another process could share."""
    with mmap.mmap(-1, PAGE) as area, memoryview(area)[:12] as part, part.cast("I") as view:
        yield view


@pytest.mark.parametrize("bit", range(32))
def test_a_bit_is_set_beside_the_others_and_in_no_other_word(words: memoryview, bit: int) -> None:
    words[1] = 0x1000_0001
    set_bit(address_of(words) + 4, bit)
    assert list(words) == [0, 0x1000_0001 | 1 << bit, 0]
    set_bit(address_of(words) + 4, bit)
    assert list(words) == [0, 0x1000_0001 | 1 << bit, 0]


def test_all_bits_of_a_word_are_set_at_once(words: memoryview) -> None:
    words[1] = 0x8000_0001
    set_all_bits(address_of(words) + 4)
    assert list(words) == [0, 0xFFFF_FFFF, 0]


@pytest.mark.parametrize("bit", [-1, 32, 1 << 40])
def test_a_bit_that_no_word_has_is_refused(words: memoryview, bit: int) -> None:
    with pytest.raises(ValueError, match="32-bit word"):
        set_bit(address_of(words), bit)
    assert list(words) == [0, 0, 0]


def test_a_bad_address_is_an_error_that_says_so(words: memoryview) -> None:
    with pytest.raises(OSError, match="futex: Bad address: '0x1000'"):
        set_bit(0x1000, 0)
    with pytest.raises(OSError, match="futex: Invalid argument"):
        set_bit(address_of(words) + 1, 0)
    with pytest.raises(OverflowError, match="futex address"):
        set_all_bits(1 << 64)
    assert list(words) == [0, 0, 0]
