"""Where a ring's parts are, and which places cannot be."""

from dataclasses import replace

import pytest
from virtio.rings import PAGE, memory_of

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio.errors import QueueLayoutError
from lguestlib.virtio.layout import QUEUE_SIZE_MAX, QueueLayout


def refused(layout: QueueLayout, memory: GuestMemory) -> str | None:
    """The part that *layout* is refused for, if it is."""
    with memory.views() as views:
        try:
            layout.check(views)
        except QueueLayoutError as error:
            error.__traceback__ = None
            assert (error.queue, error.size) == (layout.index, layout.size)
            return error.part
        return None


@pytest.mark.parametrize("size", [0, -1, -8, 3, 6, 100, 255, 257, 32767, 32769, 65536, 1 << 31])
def test_s1_cve_2017_17381_a_size_is_a_power_of_two_from_1_to_32768(size: int) -> None:
    with memory_of((0, 8 << 20)) as memory:
        layout = QueueLayout(7, size, GuestAddress(0), GuestAddress(2 << 20), GuestAddress(4 << 20))
        assert refused(layout, memory) == "size"


def test_s1_every_power_of_two_from_1_to_32768_is_a_size() -> None:
    with memory_of((0, 1 << 20)) as memory:
        sizes = [1 << bit for bit in range(16)]
        assert sizes[-1] == QUEUE_SIZE_MAX == 32768
        for size in sizes:
            assert refused(QueueLayout.contiguous(0, size, GuestAddress(0)), memory) is None


@pytest.mark.parametrize(
    ("part", "alignment", "name"),
    [("descriptors", 16, "descriptor table"), ("available", 2, "available ring"), ("used", 4, "used ring")],
)
def test_s32_each_part_has_its_alignment(part: str, alignment: int, name: str) -> None:
    layout = QueueLayout(0, 4, GuestAddress(0x100), GuestAddress(0x200), GuestAddress(0x300))
    with memory_of((0, PAGE)) as memory:
        for offset in range(32):
            moved = replace(layout, **{part: GuestAddress(0x400 + offset)})
            assert refused(moved, memory) == (name if offset % alignment else None)


@pytest.mark.parametrize(
    ("part", "alignment", "length", "name"),
    [
        ("descriptors", 16, 16 * 8, "descriptor table"),
        ("available", 2, 6 + 2 * 8, "available ring"),
        ("used", 4, 6 + 8 * 8, "used ring"),
    ],
)
def test_s32_each_part_is_inside_one_region_to_its_last_byte(
    part: str, alignment: int, length: int, name: str
) -> None:
    layout = QueueLayout(0, 8, GuestAddress(0x100), GuestAddress(0x200), GuestAddress(0x300))
    with memory_of((0, PAGE), (PAGE, PAGE), (1 << 32, PAGE)) as memory:
        for end in (PAGE, 2 * PAGE, (1 << 32) + PAGE):
            last = (end - length) // alignment * alignment
            assert refused(replace(layout, **{part: GuestAddress(last)}), memory) is None
            assert refused(replace(layout, **{part: GuestAddress(last + alignment)}), memory) == name
        for address in (3 * PAGE, (1 << 32) - 16, (1 << 64) - 16, (1 << 64) - (1 << 32), 1 << 63):
            assert refused(replace(layout, **{part: GuestAddress(address)}), memory) == name


@pytest.mark.parametrize("size", [1, 2, 64, 32768])
@pytest.mark.parametrize("align", [4, 64, PAGE])
def test_contiguous_parts_are_aligned_and_do_not_overlap(size: int, align: int) -> None:
    layout = QueueLayout.contiguous(1, size, GuestAddress(0x40), align)
    assert layout.descriptors == 0x40
    assert layout.available == 0x40 + 16 * size
    assert layout.used % align == 0 and 0 <= layout.used - (layout.available + 6 + 2 * size) < align
    assert layout.end == layout.used + 6 + 8 * size
    with memory_of((0, layout.end)) as memory:
        assert refused(layout, memory) is None
    with memory_of((0, layout.end - 1)) as memory:
        assert refused(layout, memory) == "used ring"
