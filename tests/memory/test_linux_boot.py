"""What Linux finds in memory when it is entered: zero page, command line, initrd.

Offsets are written out from Documentation/arch/x86/boot.rst and zero-page.rst.
"""

import struct

import pytest

from lguestlib.abi.bootparam import E820_TYPE_RESERVED, KEEP_SEGMENTS, X86_SUBARCH_LGUEST, setup_header
from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.file import open_image
from lguestlib.memory.image.image import Image, ImageError
from lguestlib.memory.image.linux_boot import E820Entry, LinuxBoot, ram_map
from lguestlib.memory.image.parse import parse
from lguestlib.memory.region import Region
from memory.images import SETUP_FIELDS, Load, bzimage, elf, get, real_kernel

MIB = 1 << 20
SIZE = 4 * MIB
CODE = b"protected mode" * 100


def span(start: int, end: int) -> GuestRange:
    return GuestRange(GuestAddress(start), end - start)


def kernel(**fields: int) -> Image:
    return parse(bytes(bzimage(CODE, **fields)))


def zero_page(memory: GuestMemory, at: int) -> dict[str, int]:
    """The fields of the zero page that a boot loader fills in, and `other`, how many more bytes are set."""
    page = bytearray(memory.read(GuestAddress(at), 4096))
    fields = {"e820_entries": page[0x1E8]}
    for name, field in SETUP_FIELDS.items():
        fields[name] = get(bytes(page), field)
    for name, offset in (("ramdisk_image", 0x218), ("ramdisk_size", 0x21C), ("cmd_line_ptr", 0x228)):
        fields[name] = struct.unpack_from("<I", page, offset)[0]
    entries = 20 * fields["e820_entries"]
    page[0x1E8] = 0
    page[0x1F1:0x26C] = bytes(0x26C - 0x1F1)
    page[0x2D0 : 0x2D0 + entries] = bytes(entries)
    return fields | {"other": 4096 - page.count(0)}


def memory_map(memory: GuestMemory, at: int) -> list[tuple[int, int, int]]:
    count = memory.read(GuestAddress(at + 0x1E8), 1)[0]
    return list(struct.iter_unpack("<QQI", memory.read(GuestAddress(at + 0x2D0), 20 * count)))


def test_a_bzimage_gets_its_own_header_filled_in() -> None:
    image = kernel(initrd_addr_max=0x2FFFFF, hardware_subarch=3)
    initrd = bytes(range(256)) * 20
    with GuestMemory.anonymous(SIZE) as memory:
        image.place(memory)
        told = LinuxBoot(image, ram_map(memory), b"console=ttyS0 quiet", initrd).place(memory)
        assert tuple(told) == (0x7000, (0x20000, 20), (0x2FE000, 5120))
        fields = zero_page(memory, told.address)
        assert memory.read(GuestAddress(0x20000), 20) == b"console=ttyS0 quiet\0"
        assert memory.read(GuestAddress(0x2FE000), 5120) == initrd
        assert memory.read(GuestAddress(0x100000), len(CODE)) == CODE
        assert memory_map(memory, told.address) == [(0, 0xA0000, 1), (MIB, SIZE - MIB, 1)]
    expected = {
        "setup_sects": 2, "boot_flag": 0xAA55, "header": 0x53726448, "version": 0x20F, "loadflags": 1,
        "code32_start": 0x100000, "initrd_addr_max": 0x2FFFFF, "kernel_alignment": 0x1000,
        "cmdline_size": 2047, "hardware_subarch": 3, "pref_address": 0x104000, "init_size": 0x8000,
        "type_of_loader": 0xFF, "ramdisk_image": 0x2FE000, "ramdisk_size": 5120, "cmd_line_ptr": 0x20000,
        "e820_entries": 2, "other": 0,
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected
    assert image.setup is not None and image.setup.cmd_line_ptr == 0, "the image's own header is not touched"


def test_without_an_initrd_none_is_told() -> None:
    with GuestMemory.anonymous(SIZE) as memory:
        told = LinuxBoot(kernel(), ram_map(memory)).place(memory)
        fields = zero_page(memory, told.address)
        assert memory.read(told.command_line.start, 1) == b"\0"
    assert told.initrd is None
    assert (fields["ramdisk_image"], fields["ramdisk_size"]) == (0, 0)


def test_an_elf_kernel_gets_a_plain_header() -> None:
    image = parse(bytes(elf(32, 0x100000, [Load(0x100000, CODE, 0x2000)])))
    with GuestMemory.anonymous(SIZE) as memory:
        told = LinuxBoot(image, ram_map(memory), b"x" * 2047, b"initrd").place(memory)
        fields = zero_page(memory, told.address)
        with pytest.raises(ImageError, match="command line: 2048 bytes, this kernel takes 2047"):
            LinuxBoot(image, ram_map(memory), b"x" * 2048).place(memory)
    assert (fields["boot_flag"], fields["header"], fields["version"]) == (0xAA55, 0x53726448, 0x206)
    assert fields["kernel_alignment"] == 16 * MIB
    assert (fields["loadflags"], fields["hardware_subarch"], fields["type_of_loader"]) == (1, 0, 0xFF)
    assert told.initrd == (SIZE - 4096, 6)


def test_lguests_variant_is_a_matter_of_parameters() -> None:
    """As the lguest launcher has it: all at guest-physical 0, protocol 2.07, initrd at the top of RAM."""
    image = parse(bytes(elf(32, 0x100000, [Load(0x100000, CODE, 0x2000)])))
    header = setup_header(
        version=0x207, loadflags=KEEP_SEGMENTS, hardware_subarch=X86_SUBARCH_LGUEST,
        kernel_alignment=0x1000000, cmdline_size=2047, initrd_addr_max=0xFFFFFFFF,
    )  # fmt: skip
    ram, devices = span(0, 2 * MIB), 1 * MIB
    with GuestMemory.anonymous(ram.size + devices) as memory:
        told = LinuxBoot(
            image, [E820Entry(ram)], b"root=/dev/vda", b"initrd" * 1000, header,
            parameters_at=GuestAddress(0), command_line_at=GuestAddress(0x1000),
        ).place(memory)  # fmt: skip
        page = memory.read(GuestAddress(0), 4096)
        assert memory.read(GuestAddress(0x1000), 14) == b"root=/dev/vda\0"
    assert told.initrd == (2 * MIB - 2 * 4096, 6000)
    assert page[0x1E8] == 1
    assert struct.unpack_from("<QQI", page, 0x2D0) == (0, 2 * MIB, 1)
    assert struct.unpack_from("<H", page, 0x206) == (0x207,)
    assert (page[0x210], page[0x211]) == (0xFF, 0x40)
    assert struct.unpack_from("<II", page, 0x218) == (2 * MIB - 2 * 4096, 6000)
    assert struct.unpack_from("<I", page, 0x228) == (0x1000,)
    assert struct.unpack_from("<I", page, 0x230) == (0x1000000,)
    assert struct.unpack_from("<I", page, 0x23C) == (1,)


def test_a_loader_that_has_a_number_keeps_it() -> None:
    header = setup_header(type_of_loader=0xD0, cmdline_size=100)
    with GuestMemory.anonymous(SIZE) as memory:
        LinuxBoot(kernel(), ram_map(memory), setup=header).place(memory)
        assert memory.read(GuestAddress(0x7210), 1) == b"\xd0"
    assert header.cmd_line_ptr == 0


@pytest.mark.parametrize(
    ("regions", "ram"),
    [
        (((0, 0x9000),), [span(0, 0x9000)]),
        (((0, 4 * MIB),), [span(0, 0xA0000), span(MIB, 4 * MIB)]),
        (((0, 0xB0000), (0xB0000, 2 * MIB)), [span(0, 0xA0000), span(MIB, 0xB0000 + 2 * MIB)]),
        (((0, 0x80000), (0x80000, 0x20000), (MIB, MIB)), [span(0, 0xA0000), span(MIB, 2 * MIB)]),
        (((0xC0000, 0x1000), (2 * MIB, MIB), (3 * MIB, MIB)), [span(2 * MIB, 4 * MIB)]),
        (
            ((0, 2 * MIB), (1 << 32, MIB)),
            [span(0, 0xA0000), span(MIB, 2 * MIB), span(1 << 32, (1 << 32) + MIB)],
        ),
    ],
)
def test_ram_is_all_of_memory_but_the_hole_of_a_pc(
    regions: tuple[tuple[int, int], ...], ram: list[GuestRange]
) -> None:
    with GuestMemory(Region.anonymous(GuestAddress(base), size) for base, size in regions) as memory:
        assert ram_map(memory) == [(where, 1) for where in ram]


def test_the_memory_map_may_tell_of_more_than_ram() -> None:
    with GuestMemory.anonymous(3 * MIB) as memory:
        told = (span(0xFEC00000, 0xFEC01000), span((1 << 64) - 1, 1 << 64))
        entries = [*ram_map(memory), *(E820Entry(where, E820_TYPE_RESERVED) for where in told)]
        LinuxBoot(kernel(), entries).place(memory)
        ram = [(0, 0xA0000, 1), (MIB, 2 * MIB, 1)]
        assert memory_map(memory, 0x7000) == [*ram, *((*where, 2) for where in told)]


def test_a_whole_table_of_ranges_fits() -> None:
    with GuestMemory.anonymous(SIZE) as memory:
        entries = [E820Entry(span(0x4000 * index, 0x4000 * index + 0x4000)) for index in range(128)]
        told = LinuxBoot(kernel(), entries).place(memory)
        assert memory_map(memory, told.address) == [(0x4000 * index, 0x4000, 1) for index in range(128)]
        assert zero_page(memory, told.address)["other"] == 0


def test_the_initrd_avoids_the_first_mib_the_kernel_and_where_it_unpacks_itself() -> None:
    with GuestMemory.anonymous(SIZE) as memory:
        unpacks_high = kernel(pref_address=0x300000, init_size=0x100000)
        assert LinuxBoot(unpacks_high, ram_map(memory), initrd=bytes(5000)).place(memory).initrd == (
            0x2FE000,
            5000,
        )
        low = kernel(pref_address=0x101000, init_size=SIZE - 0x101000)
        with pytest.raises(ImageError, match=r"initrd: .* beside what is at 0x0 to 0x100000, .* more memory"):
            LinuxBoot(low, ram_map(memory), initrd=bytes(5000)).place(memory)


def test_a_kernel_that_does_not_say_reaches_896_mib() -> None:
    regions = ((0, SIZE), (0x37F00000, 2 * MIB))
    with GuestMemory(Region.anonymous(GuestAddress(base), size) for base, size in regions) as memory:
        boot = LinuxBoot(kernel(initrd_addr_max=0), ram_map(memory), initrd=b"initrd")
        assert boot.place(memory).initrd == (0x37FFF000, 6)


def test_the_initrd_avoids_a_command_line_at_the_top() -> None:
    with GuestMemory.anonymous(SIZE) as memory:
        told = LinuxBoot(
            kernel(), ram_map(memory), b"quiet", b"initrd", command_line_at=GuestAddress(SIZE - 6)
        ).place(memory)
        assert told.initrd == (SIZE - 2 * 4096, 6)


@pytest.mark.parametrize(("given", "most"), [(2047, 2047), (100, 100), (0, 255)])
def test_the_command_line_is_as_long_as_the_kernel_takes(given: int, most: int) -> None:
    with GuestMemory.anonymous(SIZE) as memory:
        image = kernel(cmdline_size=given)
        LinuxBoot(image, ram_map(memory), b"x" * most).place(memory)
        assert memory.read(GuestAddress(0x20000), most + 1) == b"x" * most + b"\0"
        with pytest.raises(ImageError, match=f"command line: {most + 1} bytes, this kernel takes {most}"):
            LinuxBoot(image, ram_map(memory), b"y" * (most + 1)).place(memory)
        assert memory.read(GuestAddress(0x20000), most + 1) == b"x" * most + b"\0"


RAM = [E820Entry(span(0, MIB)), E820Entry(span(MIB, SIZE))]
AT = GuestAddress
REFUSED: dict[str, tuple[LinuxBoot, str]] = {
    "nul": (LinuxBoot(kernel(), RAM, b"a\0b"), "command line: has a NUL at byte 1"),
    "no-map": (LinuxBoot(kernel(), []), "memory map: 0 entries, this kernel takes 2 to 128"),
    "1-entry": (LinuxBoot(kernel(), RAM[:1]), "memory map: 1 entries, this kernel takes 2 to 128"),
    "129-entries": (LinuxBoot(kernel(), RAM[:1] * 129), "memory map: 129 entries"),
    "empty-entry": (LinuxBoot(kernel(), [E820Entry(span(0, 0)), *RAM]), "memory map: entry 0, .* no range"),
    "negative-entry": (
        LinuxBoot(kernel(), [*RAM, E820Entry(span(-1, 9))]),
        "memory map: entry 2, .* no range",
    ),
    "65-bit-entry": (
        LinuxBoot(kernel(), [*RAM, E820Entry(span(16, (1 << 64) + 1), E820_TYPE_RESERVED)]),
        "memory map: entry 2, .* no range of 64-bit addresses",
    ),
    "64-bit-size": (
        LinuxBoot(kernel(), [*RAM, E820Entry(span(0, 1 << 64), E820_TYPE_RESERVED)]),
        "memory map: entry 2, .* no range of 64-bit addresses",
    ),
    "ram-that-is-not": (
        LinuxBoot(kernel(), [E820Entry(span(0, SIZE + 1)), *RAM]),
        "memory map: entry 0: 0x0 to 0x400001 is not all in guest memory, which ends at 0x400000: .* 5 MiB",
    ),
    "parameters-outside": (
        LinuxBoot(kernel(), RAM, parameters_at=AT(SIZE - 4095)),
        "boot parameters: .* not all in guest memory",
    ),
    "parameters-negative": (
        LinuxBoot(kernel(), RAM, parameters_at=AT(-4096)),
        "boot parameters: .* not all in guest memory",
    ),
    "parameters-past-4-gib": (LinuxBoot(kernel(), RAM, parameters_at=AT(1 << 32)), "past the 32 bits"),
    "line-outside": (
        LinuxBoot(kernel(), RAM, b"12", command_line_at=AT(SIZE - 2)),
        "command line: .* not all in guest",
    ),
    "line-past-4-gib": (LinuxBoot(kernel(), RAM, command_line_at=AT(1 << 64)), "past the 32 bits"),
    "line-in-parameters": (
        LinuxBoot(kernel(), RAM, command_line_at=AT(0x7FFF)),
        r"boot parameters \(0x7000 to 0x8000\) and command line \(0x7fff to 0x8000\) overlap",
    ),
    "parameters-in-kernel": (LinuxBoot(kernel(), RAM, parameters_at=AT(0x0FF001)), "the kernel .* overlap"),
    "line-in-unpacked-kernel": (
        LinuxBoot(kernel(), RAM, command_line_at=AT(0x104000)),
        "the kernel .* overlap",
    ),
    "no-initrd": (LinuxBoot(kernel(), RAM, initrd=b""), "initrd: empty"),
    "initrd-larger-than-memory": (
        LinuxBoot(kernel(), RAM, initrd=bytes(SIZE + 1)),
        "initrd: 0x400001 bytes do not",
    ),
    "initrd-on-kernel": (LinuxBoot(kernel(), RAM, initrd=bytes(SIZE - MIB)), "initrd: .* beside what is at"),
    "initrd-out-of-reach": (
        LinuxBoot(kernel(initrd_addr_max=0x10FFFF), RAM, initrd=bytes(0x8000)),
        "memory up to 0x10ffff",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_t23_what_cannot_be_is_refused_before_a_byte_is_written(case: str) -> None:
    boot, reason = REFUSED[case]
    with GuestMemory.anonymous(SIZE) as memory:
        with pytest.raises(ImageError, match=reason) as caught:
            boot.place(memory)
        assert "\n" not in str(caught.value)
        assert memory.read(GuestAddress(0), SIZE) == bytes(SIZE)


def test_a_real_kernel_is_told_what_its_header_allows() -> None:
    with open_image(real_kernel()) as data:
        content = bytes(data[:0x300])
        image = parse(data)
        assert image.unpacked is not None
        with GuestMemory.anonymous(image.unpacked.end + 16 * MIB) as memory:
            image.place(memory)
            with pytest.raises(ImageError, match="initrd: .* beside what is at"):
                LinuxBoot(image, ram_map(memory), initrd=bytes(17 * MIB)).place(memory)
            told = LinuxBoot(image, ram_map(memory), b"console=ttyS0", bytes(5 * MIB)).place(memory)
            page = memory.read(told.address, 4096)
            assert memory.read(GuestAddress(0x100000), 4096) == data[image.segments[0].offset :][:4096]
    assert told.initrd is not None and told.initrd.start >= image.unpacked.end
    length = 0x202 + content[0x201] - 0x1F1
    header, original = bytearray(page[0x1F1 : 0x1F1 + length]), bytearray(content[0x1F1 : 0x1F1 + length])
    for field, size in ((0x210, 1), (0x218, 8), (0x228, 4)):
        start = field - 0x1F1
        assert original[start : start + size] == bytes(size)
        header[start : start + size] = bytes(size)
    assert header == original


def test_the_zero_page_names_the_acpi_tables() -> None:
    with GuestMemory.anonymous(SIZE) as memory:
        for rsdp in (None, GuestAddress(0xE0000)):
            told = LinuxBoot(kernel(), ram_map(memory), rsdp=rsdp).place(memory)
            assert struct.unpack("<Q", memory.read(GuestAddress(told.address + 0x70), 8)) == (rsdp or 0,)
