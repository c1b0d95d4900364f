"""What a Linux kernel finds in memory as lguest's guest: the bytes that lguest's own launcher left there."""

import pytest

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.image import Image, ImageError
from lguestlib.memory.image.lguest_boot import LguestBoot
from lguestlib.memory.image.parse import parse
from memory.images import Load, bzimage, elf

MIB = 1 << 20
SIZE = 32 * MIB
VMLINUX = parse(bytes(elf(32, 0x100_0000, [Load(0x100_0000, b"\x90" * 5000, 0x2000, 0xC100_0000)])))


def zero_page(**changed: bytes) -> bytes:
    """The page at 0, made from the offsets of boot.rst: *changed*, named by their offset, as x218."""
    page = bytearray(4096)
    fields = {
        0x1E8: b"\x01",
        0x206: b"\x07\x02",
        0x211: b"\x40",
        0x228: b"\x00\x10\x00\x00",
        0x230: b"\x00\x00\x00\x01",
        0x23C: b"\x01\x00\x00\x00",
        0x2D0: bytes(8) + b"\x00\x00\x00\x02\x00\x00\x00\x00" + b"\x01\x00\x00\x00",
    } | {int(name[1:], 16): value for name, value in changed.items()}
    for offset, value in fields.items():
        page[offset : offset + len(value)] = value
    return bytes(page)


@pytest.mark.parametrize("image", [VMLINUX, parse(bytes(bzimage(b"code" * 2000)))], ids=["vmlinux", "bzImage"])
def test_the_zero_page_and_the_command_line_are_the_c_launchers(image: Image) -> None:
    with GuestMemory.anonymous(SIZE) as memory:
        LguestBoot(image, SIZE, b"root=/dev/vda").place(memory)
        assert memory.read(GuestAddress(0), 4096) == zero_page()
        assert memory.read(GuestAddress(0x1000), 15) == b"root=/dev/vda\0\0"


def test_an_initrd_is_at_the_top_of_ram_and_its_length_told_in_whole_pages() -> None:
    initrd = bytes(range(256)) * 20
    with GuestMemory.anonymous(SIZE + MIB) as memory:
        LguestBoot(VMLINUX, SIZE, b"", initrd).place(memory)
        # 5120 bytes: two pages below 32 MiB.
        expected = zero_page(x210=b"\xff", x218=b"\x00\xe0\xff\x01", x21c=b"\x00\x20\x00\x00")
        assert memory.read(GuestAddress(0), 4096) == expected
        assert memory.read(GuestAddress(0x1FF_E000), 0x2000) == initrd.ljust(0x2000, b"\0")


def test_a_kernel_goes_where_its_image_says() -> None:
    with GuestMemory.anonymous(SIZE) as memory:
        code = b"protected mode" * 100
        image = parse(bytes(bzimage(code)))
        LguestBoot(image, SIZE).place(memory)
        image.place(memory)
        assert memory.read(GuestAddress(0x10_0000), len(code)) == code
        assert image.entry == 0x10_0000


def refused(image: Image, size: int, initrd: bytes | None = None, command_line: bytes = b"") -> str:
    """What is said of it; nothing has been written then."""
    # Behind RAM there are device pages, which are no place for a kernel.
    with GuestMemory.anonymous(size + 2 * MIB) as memory:
        with pytest.raises(ImageError) as failed:
            LguestBoot(image, size, command_line, initrd).place(memory)
        assert not any(memory.read(GuestAddress(0), 0x3000))
    return str(failed.value)


def test_a_kernel_that_memory_does_not_hold_says_how_much_it_needs() -> None:
    assert refused(VMLINUX, 16 * MIB) == (
        "ELF32: segment 0: 0x1000000 to 0x1002000 is not all in guest memory, which ends at 0x1000000:"
        " give the guest 17 MiB"
    )


def test_a_bzimage_needs_room_to_unpack_itself_at_the_alignment_it_is_told() -> None:
    image = parse(bytes(bzimage(b"code", init_size=3 * MIB, kernel_alignment=0x40_0000, pref_address=0x40_0000)))
    assert refused(image, 18 * MIB) == (
        "bzImage: the unpacked kernel: 0x1000000 to 0x1300000 is not all in guest memory, which ends at 0x1200000:"
        " give the guest 19 MiB"
    )
    with GuestMemory.anonymous(19 * MIB) as memory:
        LguestBoot(image, 19 * MIB).place(memory)


def test_a_64_bit_kernel_is_refused() -> None:
    told = "a 64-bit kernel: lguest runs 32-bit ones alone"
    assert refused(parse(bytes(elf(64, MIB, [Load(MIB, b"code", 4)]))), SIZE) == f"ELF64: {told}"
    image = bzimage(b"code")
    image[0x236] = 1
    assert refused(parse(bytes(image)), SIZE) == f"bzImage: {told}"


def test_an_initrd_needs_a_place_of_its_own() -> None:
    assert "initrd (0x10ff000 to 0x1100000) and " not in refused(VMLINUX, 17 * MIB, bytes(17 * MIB))
    assert "overlap" in refused(VMLINUX, 17 * MIB, bytes(MIB - 0x1000))
    assert refused(VMLINUX, 17 * MIB, bytes(18 * MIB)) == (
        "initrd: 0x1200000 bytes do not fit into 0x1100000 bytes of memory"
    )
    assert refused(VMLINUX, 17 * MIB, b"") == "initrd: empty"


def test_a_command_line_is_as_long_as_the_kernel_takes() -> None:
    assert "2048 bytes, this kernel takes 2047" in refused(VMLINUX, SIZE, command_line=b"x" * 2048)
    image = parse(bytes(bzimage(b"code", cmdline_size=100)))
    assert "101 bytes, this kernel takes 100" in refused(image, SIZE, command_line=b"x" * 101)
