"""Linux's bzImage: made by hand, hostile, and a real one."""

import tracemalloc

import pytest

from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.file import open_image
from lguestlib.memory.image.image import ImageError
from lguestlib.memory.image.parse import parse
from lguestlib.memory.region import Region
from memory.images import SETUP_FIELDS, bzimage, get, real_kernel

LOW, HIGH, HIGH_SIZE = 0x10000, 0x100000, 0x10000
FILL = 0xA5
CODE = bytes(range(256)) * 9


def filled() -> GuestMemory:
    memory = GuestMemory(
        [Region.anonymous(GuestAddress(0), LOW), Region.anonymous(GuestAddress(HIGH), HIGH_SIZE)]
    )
    for region in memory.regions:
        memory.write(region.base, bytes([FILL]) * region.size)
    return memory


def refused(image: bytes | bytearray, reason: str) -> None:
    with filled() as memory:
        with pytest.raises(ImageError, match=reason) as caught:
            parse(bytes(image)).place(memory)
        for region in memory.regions:
            assert memory.read(region.base, region.size) == bytes([FILL]) * region.size
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sectors", [0, 1, 4, 27, 255])
def test_the_code_behind_the_setup_sectors_goes_to_one_mib(sectors: int) -> None:
    image = parse(bytes(bzimage(CODE, sectors, code32_start=0x100200)))
    assert (image.format, image.bits, image.entry) == ("bzImage", 32, 0x100200)
    with filled() as memory:
        image.place(memory)
        assert memory.read(GuestAddress(HIGH), HIGH_SIZE) == CODE + bytes([FILL]) * (HIGH_SIZE - len(CODE))
        assert memory.read(GuestAddress(0), LOW) == bytes([FILL]) * LOW


def test_a_real_setup_sects_of_0_means_4() -> None:
    image = bytes(bzimage(CODE, 0))
    assert image[0x1F1] == 0
    assert parse(image).segments[0].offset == 5 * 512


@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000])
def test_the_last_paragraph_need_not_be_whole(length: int) -> None:
    assert parse(bytes(bzimage(CODE[:length]))).segments[0].length == length


def test_what_is_appended_is_loaded_too_and_no_syssize_is_no_claim() -> None:
    signed = bzimage(CODE) + b"signature"
    assert parse(bytes(signed)).segments[0].length == len(CODE) + 9
    assert parse(bytes(bzimage(CODE, syssize=0))).segments[0].length == len(CODE)


def test_the_setup_header_is_copied_as_far_as_it_says_it_goes() -> None:
    whole = parse(bytes(bzimage(CODE, kernel_info_offset=0x1234, hardware_subarch=7))).setup
    assert whole is not None
    assert (whole.kernel_info_offset, whole.hardware_subarch, whole.version) == (0x1234, 7, 0x20F)
    # Boot protocol 2.06 ends with cmdline_size: what is behind it there is code.
    short = parse(bytes(bzimage(CODE, version=0x206, jump_length=0x3A, hardware_subarch=7))).setup
    assert short is not None
    assert (short.cmdline_size, short.hardware_subarch, short.init_size) == (2047, 0, 0)
    # Headers grow: a longer one than is known here is known as far as it is.
    longer = parse(bytes(bzimage(CODE, version=0x2FF, jump_length=0x7F, kernel_info_offset=0x1234))).setup
    assert longer is not None
    assert longer.kernel_info_offset == 0x1234


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({}, 0x104000),
        ({"pref_address": 0x10_4001}, 0x105000),
        ({"pref_address": 0x1000}, 0x100000),
        ({"pref_address": 0x1000, "kernel_alignment": 0x200000}, 0x200000),
        ({"pref_address": 0x103000, "kernel_alignment": 0}, 0x103000),
        ({"pref_address": 0x8123, "relocatable_kernel": 0}, 0x8123),
    ],
)
def test_where_the_kernel_unpacks_itself_is_known(fields: dict[str, int], start: int) -> None:
    image = parse(bytes(bzimage(CODE, **fields)))
    assert image.unpacked == GuestRange(GuestAddress(start), 0x8000)
    assert image.occupied == (image.segments[0].where, image.unpacked)


def test_before_boot_protocol_2_10_it_is_not() -> None:
    image = parse(bytes(bzimage(CODE, version=0x209, jump_length=0x56)))
    assert image.unpacked is None
    assert image.occupied == (image.segments[0].where,)


HOSTILE: dict[str, tuple[dict[str, int], str]] = {
    "protocol-2.00": ({"version": 0x200}, r"boot protocol 2\.00: 2\.06 is the oldest"),
    "protocol-2.05": ({"version": 0x205}, r"boot protocol 2\.05: 2\.06 is the oldest"),
    "zimage": ({"loadflags": 0x80}, "a zImage, for low memory: make bzImage"),
    "header-short": (
        {"jump_length": 0x39},
        r"a header of 0x4a bytes, 0x4b at least with boot protocol 2\.15",
    ),
    "header-none": ({"jump_length": 0}, "a header of 0x11 bytes"),
    "sectors-past-the-file": ({"setup_sects": 255}, "255 setup sectors end at 0x20000, the file at 0xf00"),
    "syssize-one-too-many": ({"syssize": len(CODE) // 16 + 1}, "protected-mode code: .* cut short"),
    "syssize-huge": ({"syssize": 0xFFFFFFFF}, "protected-mode code: 0xfffffffe1 bytes .* cut short"),
    "entry-zero": ({"code32_start": 0}, "entry 0x0 is outside the code"),
    "entry-before": ({"code32_start": 0xFFFFF}, "entry 0xfffff is outside"),
    "entry-past": ({"code32_start": 0x100900}, "entry 0x100900 is outside"),
    "entry-all-ones": ({"code32_start": 0xFFFFFFFF}, "entry 0xffffffff is outside"),
    "needs-more": ({"init_size": 0xD000}, "unpacked kernel: 0x104000 to 0x111000 .* give the guest 2 MiB"),
    "needs-4-gib": ({"init_size": 0xFFFFFFFF}, "unpacked kernel: .* give the guest 4098 MiB"),
    "prefers-nowhere": ({"pref_address": (1 << 64) - 1}, "unpacked kernel: .* not all in guest memory"),
    "aligned-out-of-memory": (
        {"kernel_alignment": 0xFFFFFFFF},
        "unpacked kernel: .* not all in guest memory",
    ),
    "unpacks-in-a-hole": (
        {"pref_address": 0x20000, "relocatable_kernel": 0},
        "unpacked kernel: .* not all in guest memory",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_t23_a_hostile_setup_header_is_refused(case: str) -> None:
    fields, reason = HOSTILE[case]
    refused(bzimage(CODE, **fields), reason)


def test_t23_setup_sectors_up_to_the_last_byte_are_refused() -> None:
    assert parse(bytes(bzimage(b"\x90"))).segments[0].length == 1
    refused(bzimage(b""), "it is cut short or damaged")


def test_t23_cut_anywhere_it_is_refused() -> None:
    image = bzimage(CODE)
    for length in (*range(0x206, 0x26E), 0x3FF, 0x600, 0x601, len(image) - 16):
        refused(image[:length], "cut short")
    for length in range(1, 0x206):
        refused(image[:length], r"neither an ELF file nor a bzImage|boot sector")


def test_t23_more_code_than_memory_is_refused() -> None:
    refused(bzimage(bytes(HIGH_SIZE + 1), init_size=0), "segment 0: .* give the guest 2 MiB")


def test_a_boot_sector_without_linux_is_told_apart() -> None:
    refused(bzimage(CODE, header=0), r"a boot sector without Linux's header: .* boot protocol 2\.00")


def test_a_real_kernel_is_placed_without_a_second_copy_in_memory() -> None:
    kernel = real_kernel()
    content = kernel.read_bytes()
    sectors = get(content, SETUP_FIELDS["setup_sects"])
    code = content[(sectors + 1) * 512 :]
    preferred = get(content, SETUP_FIELDS["pref_address"])
    needed = preferred + get(content, SETUP_FIELDS["init_size"])
    tracemalloc.start()
    try:
        with GuestMemory.anonymous(-(-needed // 4096) * 4096) as memory:
            with open_image(kernel) as data:
                image = parse(data)
                image.place(memory)
            _, peak = tracemalloc.get_traced_memory()
            with memory.views() as views, views.slice(GuestAddress(0x100000), len(code)) as placed:
                assert placed == code
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert image.entry == 0x100000
    assert image.unpacked == GuestRange(GuestAddress(preferred), needed - preferred)
    assert image.setup is not None
    length = 0x202 + content[0x201] - 0x1F1
    assert bytes(image.setup)[:length] == content[0x1F1 : 0x1F1 + length]
    assert image.setup.version >= 0x20C


def test_t23_a_real_kernel_in_too_little_memory_is_told_how_much_it_needs() -> None:
    kernel = real_kernel()
    content = kernel.read_bytes()
    needed = get(content, SETUP_FIELDS["pref_address"]) + get(content, SETUP_FIELDS["init_size"])
    mib = -(-needed // 2**20)
    with open_image(kernel) as data, GuestMemory.anonymous((mib - 1) << 20) as memory:
        with pytest.raises(ImageError, match=f"give the guest {mib} MiB"):
            parse(data).place(memory)
        with memory.views() as views, views.slice(GuestAddress(0x100000), 4096) as start:
            assert start == bytes(4096)


def test_t23_a_real_kernel_cut_short_is_refused() -> None:
    content = memoryview(real_kernel().read_bytes())
    end = (get(content, SETUP_FIELDS["setup_sects"]) + 1) * 512 + get(content, SETUP_FIELDS["syssize"]) * 16
    parse(content[:end])  # what follows is a signature
    for length in (0x300, 0x4000, len(content) // 2, end - 16):
        with pytest.raises(ImageError, match="cut short"):
            parse(content[:length])


@pytest.mark.parametrize(("flags", "length", "expected"), [(1, 0x201, 0x100200), (1, 0x200, None), (0x7E, 0x300, None)])
def test_the_64_bit_entry_is_512_bytes_behind_the_other_where_there_is_one(
    flags: int, length: int, expected: int | None
) -> None:
    assert parse(bytes(bzimage(bytes(length), xloadflags=flags))).long_entry == expected


def test_a_real_kernel_has_a_64_bit_entry() -> None:
    with open_image(real_kernel()) as data:
        assert parse(data).long_entry == 0x100200
