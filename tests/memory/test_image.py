"""Which format an image has, flat images, and a great many damaged ones."""

import gzip
from pathlib import Path
from random import Random

import interpreters
import pytest

from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.flat import flat_image
from lguestlib.memory.image.image import Image, ImageError
from lguestlib.memory.image.parse import parse
from lguestlib.memory.region import Region
from memory.images import HEADER_SIZE, SEGMENT_SIZE, Load, bzimage, elf

LOADS = [
    Load(0x1000, bytes(range(200)), 0x400, 0xC000_1000),
    Load(0x3000, b"second", 0x1000, 0xC000_3000),
    Load(0x100000, b"third" * 10, 100, 0xC010_0000),
]
RANGES = ((0, 0x8000), (0x100000, 0x8000))
FILL = {size: bytes([0xA5]) * size for _, size in RANGES}


def filled() -> GuestMemory:
    memory = GuestMemory(Region.anonymous(GuestAddress(base), size) for base, size in RANGES)
    for base, size in RANGES:
        memory.write(GuestAddress(base), FILL[size])
    return memory


def test_a_format_is_known_by_its_magic() -> None:
    formats = [parse(bytes(elf(bits, 0x1000, LOADS))).format for bits in (32, 64)]
    assert [*formats, parse(bytes(bzimage(b"code"))).format] == ["ELF32", "ELF64", "bzImage"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image: empty"),
        (b"\x7f", "starts with 7f, which is neither"),
        (b"070701cpio", "starts with 30 37 30 37 30 31, which is neither"),
        (bytes(10000), "starts with 00 00 00 00 00 00, which is neither"),
        (b"\x7fELF", "ELF: identification: .* cut short"),
        (gzip.compress(b"kernel"), "starts with 6b 65 72 6e 65 6c, which is neither"),
        (gzip.compress(gzip.compress(b"kernel")), "starts with 1f 8b .*, which is neither"),
        (b"\x28\xb5\x2f\xfd kernel", "unpack it with unzstd"),
        (b"\x04\x22\x4d\x18 kernel", "unpack it with unlz4"),
        (b"\x02\x21\x4c\x18 kernel", "unpack it with unlz4"),
    ],
)
def test_t23_what_is_no_kernel_is_refused_with_what_it_is(data: bytes, reason: str) -> None:
    for form in (data, memoryview(data)):
        with pytest.raises(ImageError, match=reason) as caught:
            parse(form)
        assert "\n" not in str(caught.value)


def test_an_image_refers_to_the_callers_view() -> None:
    with memoryview(bytes(elf(32, 0x1000, LOADS))) as view:
        image = parse(view)
        assert image.data is view
    with filled() as memory, pytest.raises(ValueError, match="released"):
        image.place(memory)


def test_a_flat_image_goes_where_it_is_told() -> None:
    image = flat_image(b"flat code", GuestAddress(0x2000))
    assert (image.entry, image.bits, image.occupied) == (0x2000, 32, (GuestRange(GuestAddress(0x2000), 9),))
    assert flat_image(memoryview(b"flat"), GuestAddress(0x2000), GuestAddress(0x2003), 64).entry == 0x2003
    with filled() as memory:
        image.place(memory)
        assert memory.read(GuestAddress(0x1FFF), 11) == b"\xa5flat code\xa5"


@pytest.mark.parametrize("base", [0, (1 << 64) - 4])
def test_s16_a_flat_image_may_be_at_either_end_of_the_addresses(base: int) -> None:
    with GuestMemory.anonymous(4, GuestAddress(base)) as memory:
        flat_image(b"code", GuestAddress(base)).place(memory)
        assert memory.read(GuestAddress(base), 4) == b"code"


@pytest.mark.parametrize(
    ("data", "base", "entry", "reason"),
    [
        (b"", 0, None, "flat image: empty"),
        (b"x", 1 << 64, None, "not in 64 bits"),
        (b"xy", (1 << 64) - 1, None, "not in 64 bits"),
        (b"x", -1, None, "not in 64 bits"),
        (b"xyz", 0x1000, 0xFFF, "entry 0xfff is outside it, 0x1000 to 0x1003"),
        (b"xyz", 0x1000, 0x1003, "entry 0x1003 is outside it"),
    ],
)
def test_t23_an_impossible_flat_image_is_refused(
    data: bytes, base: int, entry: int | None, reason: str
) -> None:
    with pytest.raises(ImageError, match=reason):
        flat_image(data, GuestAddress(base), None if entry is None else GuestAddress(entry))


@pytest.mark.parametrize("base", [0x7FFE, 0x8000, 0x9000, 0xFFFFE, 0x107FFE, 1 << 32, (1 << 64) - 4])
def test_t23_a_flat_image_outside_memory_is_refused(base: int) -> None:
    with filled() as memory, pytest.raises(ImageError, match="not all in guest memory"):
        flat_image(b"code", GuestAddress(base)).place(memory)


def test_t23_more_memory_is_the_advice_only_where_it_would_help() -> None:
    with filled() as memory:
        with pytest.raises(ImageError, match=r"ends at 0x108000: give the guest 2 MiB$"):
            flat_image(b"code", GuestAddress(0x107FFE)).place(memory)
        with pytest.raises(ImageError, match=r"ends at 0x108000$"):
            flat_image(bytes(0x100000), GuestAddress(0x8000)).place(memory)


def test_a_32_bit_interpreter_loads_them_too(tmp_path: Path) -> None:
    python = interpreters.i386_or_skip()
    (tmp_path / "elf").write_bytes(elf(64, 0x1000, LOADS))
    (tmp_path / "bzimage").write_bytes(bzimage(b"code"))
    program = """
import sys
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.file import open_image
from lguestlib.memory.image.linux_boot import LinuxBoot, ram_map
from lguestlib.memory.image.parse import parse
for size in (1 << 31, 1 << 32, 1 << 63):
    try:
        GuestMemory.anonymous(size)
    except ValueError as error:
        print(error)
for name in sys.argv[1:]:
    with open_image(name) as data, GuestMemory.anonymous(4 << 20) as memory:
        image = parse(data)
        image.place(memory)
        told = LinuxBoot(image, ram_map(memory), b"quiet", b"initrd").place(memory)
        where, _, length = image.segments[-1]
        code, initrd = memory.read(where.start, length), memory.read(told.initrd.start, 6)
        print(image.format, hex(image.entry), code, initrd)
"""
    told = interpreters.run(python, "-c", program, str(tmp_path / "elf"), str(tmp_path / "bzimage"))
    refused = "memory region: no range of {:#x} bytes at guest-physical 0x0"
    assert told.splitlines() == [
        *(refused.format(size) for size in (1 << 31, 1 << 32, 1 << 63)),
        f"ELF64 0x1000 {LOADS[-1].content!r} b'initrd'",
        "bzImage 0x100000 b'code' b'initrd'",
    ]


def _damage(random: Random, image: bytes, headers: list[range]) -> bytes:
    """*image* with a few header fields overwritten, by numbers that tend to hurt, and perhaps cut."""
    damaged = bytearray(image)
    for _ in range(random.choice((1, 1, 2, 4))):
        width = random.choice((1, 2, 4, 8))
        place = random.choice(random.choice(headers))
        old = int.from_bytes(damaged[place : place + width], "little")
        ones = (1 << 8 * width) - 1
        nearby = (old + 1, old - 1, old ^ 1 << random.randrange(8 * width))
        limits = (0, 1, ones, ones // 2 + 1, len(image), 0x1000, 0x7FFF, 0x8000, 0x100000)
        value = random.choice((*nearby, *limits, random.getrandbits(64))) & ones
        damaged[place : place + width] = value.to_bytes(width, "little")
    if not random.randrange(10):
        del damaged[random.randrange(len(damaged)) :]
    return bytes(damaged[: len(image)])


def _check_placed(image: Image, memory: GuestMemory) -> None:
    """That each segment is there, and nothing of it is anywhere else."""
    expected = {base: bytearray(FILL[size]) for base, size in RANGES}
    for where, offset, length in image.segments:
        base = max(base for base, _ in RANGES if base <= where.start)
        start = where.start - base
        expected[base][start : start + where.size] = bytes(image.data[offset : offset + length]).ljust(
            where.size, b"\0"
        )
    for base, size in RANGES:
        assert memory.read(GuestAddress(base), size) == expected[base]
        memory.write(GuestAddress(base), FILL[size])
    assert any(where.start <= image.entry < where.end for where, _, _ in image.segments)


def test_t23_ten_thousand_damaged_headers_are_placed_whole_or_refused_with_memory_untouched() -> None:
    random = Random(23)
    bases = [
        (bytes(elf(bits, 0xC000_1010, LOADS)), [range(16), range(HEADER_SIZE[bits]), range(HEADER_SIZE[bits],
         HEADER_SIZE[bits] + 3 * SEGMENT_SIZE[bits])])
        for bits in (32, 64)
    ]  # fmt: skip
    kernel = bzimage(b"protected mode" * 100, pref_address=0x101000, init_size=0x1000)
    bases.append((bytes(kernel), [range(0x1F1, 0x26C), range(0x1F1, 0x220)]))
    outcomes = {"placed": 0, "refused by parse": 0, "refused by place": 0}
    with filled() as memory, memory.views() as views:
        untouched = [bytes(root) for root in views.roots]
        for turn in range(10_000):
            damaged = _damage(random, *bases[turn % len(bases)])
            outcome = "refused by parse"
            try:
                image = parse(damaged)
                outcome = "refused by place"
                image.place(memory)
                outcome = "placed"
            except ImageError as error:
                assert str(error) and "\n" not in str(error)
            outcomes[outcome] += 1
            if outcome == "placed":
                _check_placed(image, memory)
            else:
                assert all(root == before for root, before in zip(views.roots, untouched)), damaged.hex()
    assert min(outcomes.values()) > 200, outcomes
