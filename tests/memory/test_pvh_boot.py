"""What a kernel finds at its PVH entry; offsets from Xen's start_info.h, written out."""

import struct

import pytest

from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.image import Image, ImageError
from lguestlib.memory.image.linux_boot import E820Entry, ram_map
from lguestlib.memory.image.parse import parse
from lguestlib.memory.image.pvh_boot import PvhBoot
from memory.images import Load, note_elf

SIZE = 4 << 20


def kernel() -> Image:
    return parse(note_elf(0x100000, [Load(0x100000, b"code" * 100, 0x1000)], 0x100010))


def test_the_note_names_the_entry() -> None:
    image = kernel()
    assert (image.pvh_entry, image.long_entry, image.entry) == (0x100010, 0x100000, 0x100000)


def test_the_start_information_says_where_everything_is() -> None:
    image = kernel()
    with GuestMemory.anonymous(SIZE) as memory:
        image.place(memory)
        reserved = E820Entry(GuestRange(GuestAddress(0xE000_0000), 0x10_0000), 2)
        e820 = [*ram_map(memory), reserved]
        told = PvhBoot(image, e820, b"console=ttyS0", b"initrd" * 1000, GuestAddress(0xE0000)).place(memory)
        info = struct.unpack("<IIIIQQQQII", memory.read(told.address, 56))
        magic, version, flags, modules, modules_at, words_at, rsdp, map_at, entries, _ = info
        assert (magic, version, flags, modules, rsdp, entries) == (0x336EC578, 1, 0, 1, 0xE0000, 3)
        assert memory.read(GuestAddress(words_at), 14) == b"console=ttyS0\0"
        at, size, words, _ = struct.unpack("<4Q", memory.read(GuestAddress(modules_at), 32))
        assert (size, words) == (6000, 0)
        assert memory.read(GuestAddress(at), size) == b"initrd" * 1000
        assert told.initrd == (at, size) and at + size <= SIZE and at % 4096 == 0
        table = list(struct.iter_unpack("<QQII", memory.read(GuestAddress(map_at), 24 * entries)))
        assert table == [
            (0, 0xA0000, 1, 0), (0x100000, SIZE - 0x100000, 1, 0), (0xE000_0000, 0x100000, 2, 0),
        ]  # fmt: skip


def test_without_an_initrd_there_is_no_module() -> None:
    image = kernel()
    with GuestMemory.anonymous(SIZE) as memory:
        told = PvhBoot(image, ram_map(memory)).place(memory)
        assert told.initrd is None
        assert struct.unpack_from("<I", memory.read(told.address, 56), 12) == (0,)


@pytest.mark.parametrize(
    ("at", "words", "reason"),
    [
        (0x100000, b"", "start information .* and the kernel .* overlap"),
        (0x6000, b"x" * 2048, "command line: 2048 bytes"),
        (SIZE - 16, b"", "start information: .* is not all in guest memory"),
    ],
)
def test_t23_what_does_not_fit_is_refused_and_nothing_written(at: int, words: bytes, reason: str) -> None:
    image = kernel()
    with GuestMemory.anonymous(SIZE) as memory:
        with pytest.raises(ImageError, match=reason):
            PvhBoot(image, ram_map(memory), words, start_info_at=GuestAddress(at)).place(memory)
        assert memory.read(GuestAddress(0), SIZE) == bytes(SIZE)
