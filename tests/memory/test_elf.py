"""ELF executables: what is taken, and how a hostile one is refused before it is placed (T23)."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.file import open_image
from lguestlib.memory.image.image import ImageError
from lguestlib.memory.image.parse import parse
from memory.images import (
    HEADER_FIELDS,
    HEADER_SIZE,
    MACHINE,
    SEGMENT_SIZE,
    Load,
    elf,
    note_elf,
    put,
    put_segment,
)

SIZE = 0x20000
FILL = 0xA5

CODE = Load(0x2000, bytes(range(1, 101)), 0x1800)
DATA = Load(0x8000, b"data" * 300, 1200)


def filled() -> GuestMemory:
    memory = GuestMemory.anonymous(SIZE)
    memory.write(GuestAddress(0), bytes([FILL]) * SIZE)
    return memory


def refused(image: bytes | bytearray, reason: str) -> None:
    """Assert that *image* is refused for *reason*, in one line, with memory untouched."""
    with filled() as memory:
        with pytest.raises(ImageError, match=reason) as caught:
            parse(bytes(image)).place(memory)
        assert memory.read(GuestAddress(0), SIZE) == bytes([FILL]) * SIZE
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [32, 64])
def test_segments_go_to_their_physical_addresses_with_zeros_behind(bits: int) -> None:
    image = parse(bytes(elf(bits, 0x2010, [DATA, CODE])))
    assert (image.format, image.bits, image.entry) == (f"ELF{bits}", bits, 0x2010)
    assert [segment.where.start for segment in image.segments] == [0x2000, 0x8000]
    assert image.setup is None
    expected = bytearray([FILL]) * SIZE
    expected[0x2000:0x3800] = CODE.content.ljust(0x1800, b"\0")
    expected[0x8000 : 0x8000 + 1200] = DATA.content
    with filled() as memory:
        image.place(memory)
        assert memory.read(GuestAddress(0), SIZE) == expected


@pytest.mark.parametrize("bits", [32, 64])
def test_nothing_is_placed_by_parsing_and_it_may_be_placed_twice(bits: int) -> None:
    image = parse(bytes(elf(bits, 0x2000, [CODE])))
    contents = []
    for _ in range(2):
        with filled() as memory:
            image.place(memory)
            contents.append(memory.read(GuestAddress(0), SIZE))
    assert contents[0] == contents[1]


@pytest.mark.parametrize(("bits", "virtual"), [(32, 0xC000_0000), (64, 0xFFFF_FFFF_8000_0000)])
def test_a_virtual_entry_is_the_same_place_in_its_segment(bits: int, virtual: int) -> None:
    loads = [load._replace(virtual=virtual + load.physical) for load in (CODE, DATA)]
    assert parse(bytes(elf(bits, virtual + 0x8004, loads))).entry == 0x8004
    assert parse(bytes(elf(bits, 0x8004, loads))).entry == 0x8004
    for past in (virtual, virtual + 0x1FFF, virtual + 0x3800, virtual + 0x8000 + 1200, 0x1FFF, 0x3800):
        refused(elf(bits, past, loads), f"entry {past:#x} is in none")


@pytest.mark.parametrize("bits", [32, 64])
def test_a_physical_entry_is_one_even_where_another_segment_has_it_as_virtual(bits: int) -> None:
    loads = [CODE, DATA._replace(virtual=0x2000)]
    assert parse(bytes(elf(bits, 0x2004, loads))).entry == 0x2004


@pytest.mark.parametrize("bits", [32, 64])
def test_other_program_headers_and_empty_segments_place_nothing(bits: int) -> None:
    note = Load(0x100000000 // 16, b"note", 4)
    image = elf(bits, 0x2000, [note, Load(0x2000, b"", 0), CODE])
    put_segment(image, bits, 0, "p_type", 4)
    assert [segment.where.start for segment in parse(bytes(image)).segments] == [0x2000]


@pytest.mark.parametrize("bits", [32, 64])
def test_a_segment_of_zeros_alone_may_name_any_offset(bits: int) -> None:
    image = elf(bits, 0x2000, [CODE, Load(0x6000, b"", 0x1000)])
    put_segment(image, bits, 1, "p_offset", len(image) + 0x1000)
    with filled() as memory:
        parse(bytes(image)).place(memory)
        assert memory.read(GuestAddress(0x5FFF), 0x1002) == bytes([FILL]) + bytes(0x1000) + bytes([FILL])


@pytest.mark.parametrize("bits", [32, 64])
def test_segments_may_touch_and_end_with_guest_memory(bits: int) -> None:
    loads = [Load(0x1F000, b"low", 0x800), Load(0x1F800, b"high", 0x800)]
    with filled() as memory:
        parse(bytes(elf(bits, 0x1F000, loads))).place(memory)
        assert memory.read(GuestAddress(0x1F800), 0x800) == b"high".ljust(0x800, b"\0")
    refused(
        elf(bits, 0x1F000, [loads[0], Load(0x1F800, b"high", 0x801)]), "segment 1: .* give the guest 1 MiB"
    )


FOR_BOTH_CLASSES: dict[str, tuple[dict[str, int], str]] = {
    "type-relocatable": ({"e_type": 1}, "type 1 .* -static"),
    "type-shared": ({"e_type": 3}, "type 3 .* -no-pie"),
    "type-core": ({"e_type": 4}, "type 4"),
    "machine-arm": ({"e_machine": 40}, "machine 40 is not x86"),
    "machine-aarch64": ({"e_machine": 183}, "machine 183 is not x86"),
    "headers-none": ({"e_phnum": 0}, "0 program headers"),
    "headers-too-many": ({"e_phnum": 0xFFFF}, "65535 program headers, not 1 to"),
    "headers-past-the-file": ({"e_phnum": 1000}, "program headers: .* cut short"),
    "headers-of-size-0": ({"e_phentsize": 0}, "program headers of 0 bytes"),
    "headers-of-odd-size": ({"e_phentsize": 33}, "program headers of 33 bytes"),
    "header-offset-at-the-end": ({"e_phoff": 0x100000}, "at offset 0x100000 of a file"),
    "header-offset-wraps-32": ({"e_phoff": 0xFFFFFFF0}, "at offset 0xfffffff0 of a file"),
    "entry-zero": ({"e_entry": 0}, "entry 0x0 is in none"),
    "entry-past": ({"e_entry": 0x3800}, "entry 0x3800 is in none"),
    "entry-huge": ({"e_entry": 0xFFFFFFFF}, "entry 0xffffffff is in none"),
}


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("case", FOR_BOTH_CLASSES)
def test_t23_a_hostile_header_is_refused(bits: int, case: str) -> None:
    fields, reason = FOR_BOTH_CLASSES[case]
    image = elf(bits, 0x2000, [CODE, DATA])
    for name, value in fields.items():
        put(image, HEADER_FIELDS[bits][name], value)
    refused(image, reason)


SEGMENTS: dict[str, tuple[dict[str, int], str]] = {
    "file-size-over-memory-size": ({"p_memsz": 99}, "0x64 bytes in the file, 0x63 in memory"),
    "file-size-past-the-file": ({"p_filesz": 0x1001, "p_memsz": 0x1800}, "cut short"),
    "file-size-huge": ({"p_filesz": 0xFFFFFFFF, "p_memsz": 0xFFFFFFFF}, "cut short"),
    "offset-past-the-file": ({"p_offset": 0x10000}, "at offset 0x10000 of a file"),
    "offset-wraps-32": ({"p_offset": 0xFFFFFFF0}, "at offset 0xfffffff0 of a file"),
    "outside-memory": ({"p_paddr": 0x20000, "p_vaddr": 0x2000}, "not all in guest memory"),
    "across-the-end-of-memory": ({"p_paddr": 0x1F000, "p_vaddr": 0x2000}, "not all in guest memory"),
    "huge": ({"p_memsz": 0x7FFF0000}, "overlap"),
    "over-its-neighbour": ({"p_memsz": 0x6001}, "segment 0 .* and .* segment 1 .* overlap"),
    "at-its-neighbour": ({"p_paddr": 0x8000, "p_vaddr": 0x2000}, "overlap"),
    "inside-its-neighbour": ({"p_paddr": 0x8100, "p_vaddr": 0x2000, "p_memsz": 100}, "overlap"),
    "an-interpreter": ({"p_type": 3}, "wants an interpreter: link with -static"),
}


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("case", SEGMENTS)
def test_t23_a_hostile_segment_is_refused(bits: int, case: str) -> None:
    fields, reason = SEGMENTS[case]
    image = elf(bits, 0x2000, [CODE, DATA])
    for name, value in fields.items():
        put_segment(image, bits, 0, name, value)
    refused(image, reason)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", ["p_paddr", "p_vaddr"])
def test_t23_s16_addresses_do_not_wrap_around(bits: int, name: str) -> None:
    image = elf(bits, 0x8000, [CODE, DATA])
    put_segment(image, bits, 0, name, (1 << bits) - 0x1000)
    refused(image, f"go past {bits} bits")
    put_segment(image, bits, 0, "p_memsz", 0x1000)
    if name == "p_paddr":
        refused(image, "not all in guest memory")
    else:
        parse(bytes(image))


@pytest.mark.parametrize("field", ["p_offset", "p_filesz", "p_memsz", "p_paddr"])
def test_t23_s16_64_bit_fields_of_all_ones_are_refused(field: str) -> None:
    image = elf(64, 0x8000, [CODE, DATA])
    put_segment(image, 64, 0, field, (1 << 64) - 1)
    refused(image, r"cut short|go past 64 bits|in the file")
    image = elf(64, 0x8000, [CODE, DATA])
    put(image, HEADER_FIELDS[64]["e_phoff"], (1 << 64) - 8)
    refused(image, "program headers: .* cut short")


@pytest.mark.parametrize("bits", [32, 64])
def test_t23_no_loadable_segment_is_no_executable(bits: int) -> None:
    image = elf(bits, 0x2000, [CODE])
    put_segment(image, bits, 0, "p_type", 4)
    refused(image, "none of 1 program headers")


@pytest.mark.parametrize("bits", [32, 64])
def test_t23_the_other_classes_machine_is_refused(bits: int) -> None:
    image = elf(bits, 0x2000, [CODE])
    put(image, HEADER_FIELDS[bits]["e_machine"], MACHINE[96 - bits])
    refused(image, f"ELF{bits}: machine")


@pytest.mark.parametrize(
    ("index", "value", "reason"),
    [
        (4, 0, "class 0"),
        (4, 3, "class 3"),
        (5, 2, "byte order 2"),
        (5, 0, "byte order 0"),
        (6, 0, "version 0"),
    ],
)
def test_t23_another_class_byte_order_or_version_is_refused(index: int, value: int, reason: str) -> None:
    image = elf(32, 0x2000, [CODE])
    image[index] = value
    refused(image, reason)


@pytest.mark.parametrize("bits", [32, 64])
def test_t23_a_header_of_the_other_class_is_refused(bits: int) -> None:
    image = elf(bits, 0x2000, [CODE, DATA])
    image[4] = 3 - bits // 32
    refused(image, r"ELF")


@pytest.mark.parametrize("bits", [32, 64])
def test_t23_cut_anywhere_it_is_refused(bits: int) -> None:
    image = elf(bits, 0x2000, [CODE, DATA])
    headers = HEADER_SIZE[bits] + 2 * SEGMENT_SIZE[bits]
    for length in (*range(4, headers + 1), headers + 50, len(image) - 1):
        refused(image[:length], "cut short")


def test_t23_the_most_segments_are_looked_at_quickly_and_one_more_is_refused() -> None:
    most = 65536 // SEGMENT_SIZE[32]
    loads = [Load(16 * index, b"x", 16) for index in range(most)]
    assert len(parse(bytes(elf(32, 0, loads))).segments) == most
    refused(elf(32, 0, [*loads, Load(16 * most, b"x", 16)]), "program headers, not 1 to 2048")


def _tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"no {name} (apt-get install gcc binutils)")


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """Build a small kernel with a .bss, *virtual* bytes above its physical place, with gcc options."""
    gcc = _tool("gcc")
    source = """
        char data[5000] = "initialised";
        char zeroed[9000];
        const char constant[] = "read-only";
        void _start(void) { data[1] = zeroed[1] = constant[1]; for (;;); }
    """
    (tmp_path / "kernel.c").write_text(source)

    def make(virtual: int, *options: str) -> Path:
        script = tmp_path / "kernel.lds"
        script.write_text(f"""
            ENTRY(_start)
            SECTIONS {{
                . = {virtual:#x} + 0x10000;
                .text : AT(ADDR(.text) - {virtual:#x}) {{ *(.text*) *(.rodata*) }}
                .data ALIGN(0x1000) : AT(ADDR(.data) - {virtual:#x}) {{ *(.data*) }}
                .bss : AT(ADDR(.bss) - {virtual:#x}) {{ *(.bss*) }}
                /DISCARD/ : {{ *(.note*) *(.eh_frame*) *(.comment*) }}
            }}
        """)
        made = tmp_path / "kernel"
        done = subprocess.run(
            [gcc, "-O1", "-nostdlib", "-static", "-no-pie", "-fno-pic", "-ffreestanding",
             "-fno-asynchronous-unwind-tables", *options, f"-Wl,-T,{script}", "-Wl,--build-id=none",
             "-o", str(made), str(tmp_path / "kernel.c")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return made

    return make


@pytest.mark.parametrize(
    ("bits", "virtual", "options"),
    [
        (32, 0, ("-m32",)),
        (32, 0xC0000000, ("-m32",)),
        (64, 0, ()),
        (64, 0xFFFFFFFF80000000, ("-mcmodel=kernel",)),
    ],
)
def test_what_gcc_makes_is_placed_as_objcopy_lays_it_out(
    bits: int, virtual: int, options: tuple[str, ...], build: Callable[..., Path], tmp_path: Path
) -> None:
    kernel = build(virtual, *options)
    symbols = subprocess.run([_tool("nm"), kernel], check=True, capture_output=True, text=True).stdout
    places = {name: int(address, 16) - virtual for address, _, name in map(str.split, symbols.splitlines())}
    with filled() as memory:
        with open_image(kernel) as data:
            image = parse(data)
            image.place(memory)
        assert (image.bits, image.entry) == (bits, places["_start"])
        for section, place in ((".text", 0x10000), (".data", places["data"])):
            subprocess.run(
                [_tool("objcopy"), "-O", "binary", "-j", section, kernel, tmp_path / "section"], check=True
            )
            content = (tmp_path / "section").read_bytes()
            assert content
            assert memory.read(GuestAddress(place), len(content)) == content
        assert memory.read(GuestAddress(places["constant"]), 10) == b"read-only\0"
        assert memory.read(GuestAddress(places["data"]), 5000) == b"initialised".ljust(5000, b"\0")
        assert memory.read(GuestAddress(places["zeroed"]), 9000) == bytes(9000)
        before = memory.read(GuestAddress(0), 0x10000)
        after = memory.read(image.segments[-1].where.end, SIZE - image.segments[-1].where.end)
        assert set(before + after) == {FILL}


def test_a_programs_own_interpreter_or_position_independence_is_told(tmp_path: Path) -> None:
    for program in (Path("/bin/sh"), Path("/usr/bin/env")):
        with open_image(program) as data, pytest.raises(ImageError, match="-static"):
            parse(data)


def test_an_executable_without_xens_note_has_no_pvh_entry() -> None:
    image = parse(bytes(elf(64, 0x1000, [Load(0x1000, b"code", 4)])))
    assert (image.pvh_entry, image.long_entry) == (None, 0x1000)
    assert parse(bytes(elf(32, 0x1000, [Load(0x1000, b"code", 4)]))).long_entry is None


def test_t23_a_pvh_entry_outside_the_segments_is_refused() -> None:
    with pytest.raises(ImageError, match="the PVH entry 0x2000 is in none of its segments"):
        parse(note_elf(0x1000, [Load(0x1000, b"code", 4)], 0x2000))


@pytest.mark.parametrize("length", [0, 11, 12, 35, 36, 51])
def test_t23_notes_that_are_cut_short_name_nothing(length: int) -> None:
    image = bytearray(note_elf(0x1000, [Load(0x1000, b"code", 4)], 0x1000))
    put_segment(image, 64, 1, "p_filesz", length)
    assert parse(bytes(image)).pvh_entry is None
    put_segment(image, 64, 1, "p_offset", len(image))
    put_segment(image, 64, 1, "p_filesz", 1)
    with pytest.raises(ImageError, match="cut short"):
        parse(bytes(image))
