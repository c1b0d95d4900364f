"""Where an initrd goes."""

from random import Random

import pytest

from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.image.image import ImageError
from lguestlib.memory.image.initrd import initrd_range

PAGE = 4096
MIB = 1 << 20


def span(start: int, end: int) -> GuestRange:
    return GuestRange(GuestAddress(start), end - start)


def test_it_goes_page_aligned_to_the_top_of_memory() -> None:
    assert initrd_range(5000, [span(0, 64 * MIB)], 0xFFFFFFFF, []) == (64 * MIB - 2 * PAGE, 5000)
    assert initrd_range(2 * PAGE, [span(0, 64 * MIB)], 0xFFFFFFFF, []) == (64 * MIB - 2 * PAGE, 2 * PAGE)
    assert initrd_range(1, [span(0, 64 * MIB + 100)], 0xFFFFFFFF, []) == (64 * MIB - PAGE, 1)


def test_its_last_byte_is_at_most_the_kernels_limit() -> None:
    ram = [span(0, 64 * MIB)]
    assert initrd_range(PAGE, ram, 0x2FFFFFF, []) == (0x2FFF000, PAGE)
    assert initrd_range(PAGE, ram, 0x2FFFFFE, []) == (0x2FFE000, PAGE)
    assert initrd_range(PAGE, ram, 0x3000000, []) == (0x2FFF000, PAGE)


def test_it_goes_below_what_is_in_the_way() -> None:
    ram, kernel = [span(0, 64 * MIB)], span(48 * MIB, 64 * MIB - PAGE)
    assert initrd_range(PAGE, ram, 0xFFFFFFFF, [kernel]).start == 64 * MIB - PAGE
    assert initrd_range(PAGE + 1, ram, 0xFFFFFFFF, [kernel]) == (48 * MIB - 2 * PAGE, PAGE + 1)


def test_it_stays_in_one_range_of_memory() -> None:
    ram = [span(0, 16 * MIB), span(32 * MIB, 33 * MIB), span(1 << 32, (1 << 32) + 16 * MIB)]
    assert initrd_range(MIB, ram, 0xFFFFFFFF, []).start == 32 * MIB
    assert initrd_range(MIB + 1, ram, 0xFFFFFFFF, []).start == 15 * MIB - PAGE
    assert initrd_range(16 * MIB, ram, 0xFFFFFFFF, []).start == 0


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (0, "initrd: empty"),
        (16 * MIB + 1, r"0x1000001 bytes do not fit into 0x1000000 bytes of memory up to 0xffffffff: give"),
        (1 << 64, r"do not fit into 0x1000000 bytes of memory"),
        (
            12 * MIB,
            r"do not fit .* beside what is at 0x0 to 0x100000, 0x600000 to 0x800000: give the guest more",
        ),
    ],
)
def test_t23_what_does_not_fit_is_refused_with_the_numbers(size: int, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        initrd_range(size, [span(0, 16 * MIB)], 0xFFFFFFFF, [span(0, MIB), span(6 * MIB, 8 * MIB)])


def test_t23_what_the_kernel_cannot_reach_does_not_count() -> None:
    ram = [span(0, 16 * MIB)]
    with pytest.raises(ImageError, match="fit into 0x200000 bytes of memory up to 0x1fffff: give"):
        initrd_range(2 * MIB + 1, ram, 2 * MIB - 1, [])
    with pytest.raises(ImageError, match="of memory up to 0x1fffff beside what is at 0x0 to 0x1: give"):
        initrd_range(2 * MIB, ram, 2 * MIB - 1, [span(0, 1)])
    assert initrd_range(2 * MIB, ram, 2 * MIB - 1, []) == (0, 2 * MIB)


def test_t23_no_memory_within_reach_is_refused() -> None:
    for ram in ([], [span(1 << 32, 1 << 33)]):
        with pytest.raises(ImageError, match="fit into 0x0 bytes of memory up to 0x37ffffff"):
            initrd_range(1, ram, 0x37FFFFFF, [])


def test_the_place_is_the_highest_there_is() -> None:
    random = Random(5)
    pages = 24
    for _ in range(3000):
        cuts = sorted(random.sample(range(pages * 4), 4))
        ram = [span(cuts[0] * PAGE // 4, cuts[1] * PAGE // 4), span(cuts[2] * PAGE // 4, cuts[3] * PAGE // 4)]
        taken = []
        for _ in range(random.randrange(4)):
            start = random.randrange(pages * PAGE)
            taken.append(span(start, start + random.randrange(1, 3 * PAGE)))
        size, last = random.randrange(1, 8 * PAGE), random.randrange(pages * PAGE)
        whole = -(-size // PAGE) * PAGE
        fits = [
            start
            for start in range(0, pages * PAGE, PAGE)
            if start + whole - 1 <= last
            and any(run.start <= start and start + whole <= run.end for run in ram)
            and not any(other.start < start + whole and start < other.end for other in taken)
        ]
        if fits:
            assert initrd_range(size, ram, last, taken) == (max(fits), size)
        else:
            with pytest.raises(ImageError, match="do not fit"):
                initrd_range(size, ram, last, taken)
