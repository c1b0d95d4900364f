"""A PCI function's configuration space, byte by byte as PCI Local Bus 3.0, 6.1 and 6.2 have it."""

from random import Random

import pytest

from lguestlib.virtio.pci.config import ConfigSpace, Identity

IDENTITY = Identity(0x1AF4, 0x1042, 0x018000, 1, 0x1AF4, 0x1100, 2)


def space() -> ConfigSpace:
    config = ConfigSpace(IDENTITY)
    config.add_bar(0, 0x10000)
    return config


def get(config: ConfigSpace, offset: int, size: int) -> int:
    return int.from_bytes(config.read(offset, size), "little")


def test_the_header_is_that_of_a_type_0_function() -> None:
    expected = bytearray(64)
    expected[0x00:0x04] = bytes.fromhex("f41a 4210")
    expected[0x08:0x0C] = bytes.fromhex("01 00 80 01")
    expected[0x10] = 0x04  # memory, 64 bits, not prefetchable
    expected[0x2C:0x30] = bytes.fromhex("f41a 0011")
    expected[0x3D] = 2
    assert space().read(0, 64) == expected


def test_capabilities_are_a_list_on_dwords_that_the_status_announces() -> None:
    config = space()
    assert get(config, 0x06, 2) == 0
    first = config.add_capability(0x11, b"abcde")
    second = config.add_capability(0x09, b"\x10" + bytes(13), b"\0\xff")
    assert (first, second) == (0x40, 0x48)
    assert get(config, 0x06, 2) == 0x10
    assert get(config, 0x34, 1) == 0x40
    assert config.read(0x40, 8) == b"\x11\x48abcde\0"
    assert config.read(0x48, 4) == b"\x09\0\x10\0"
    config.write(0x48, b"\xff" * 16)
    assert config.read(0x48, 4) == b"\x09\0\x10\xff", "only what is writable has changed"


def test_a_capability_past_the_256_bytes_is_refused() -> None:
    config = space()
    config.add_capability(9, bytes(256 - 64 - 2))
    with pytest.raises(ValueError, match="no room"):
        config.add_capability(9, b"")


@pytest.mark.parametrize("size", [16, 0x1000, 0x10000, 1 << 40])
def test_writing_ones_to_a_bar_tells_its_size(size: int) -> None:
    config = ConfigSpace(IDENTITY)
    config.add_bar(2, size)
    config.write(0x18, b"\xff" * 4)
    config.write(0x1C, b"\xff" * 4)
    read_back = get(config, 0x18, 8)
    assert read_back & 0xF == 4
    assert -(read_back & ~0xF) & (1 << 64) - 1 == size


@pytest.mark.parametrize(("index", "size"), [(0, 8), (0, 24), (0, 0), (5, 16), (-1, 16)])
def test_a_bar_that_cannot_be_is_refused(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="no BAR"):
        ConfigSpace(IDENTITY).add_bar(index, size)


def test_a_bar_is_where_it_was_put_while_memory_is_decoded() -> None:
    config = space()
    config.write(0x10, (0x12_3456_0000).to_bytes(8, "little"))
    assert config.bar(0) is None
    config.write(4, b"\2\0")
    assert config.bar(0) == 0x12_3456_0000
    config.write(0x10, (0x9000_1234).to_bytes(4, "little"))
    assert config.bar(0) == 0x12_9000_0000, "aligned to its size"
    config.write(0x10, bytes(8))
    assert config.bar(0) is None
    config.write(0x10, b"\xff" * 8)
    assert config.bar(0) is None, "while its size is asked for it is nowhere"


def test_of_the_command_register_what_means_something_here_can_be_set() -> None:
    config = space()
    config.write(4, b"\xff\xff\xff\xff")
    assert get(config, 4, 2) == config.command == 0x546
    assert get(config, 6, 2) == 0, "the status is not to be written"


def test_the_interrupt_line_is_kept_and_the_pin_stays() -> None:
    config = space()
    config.write(0x3C, b"\x0b\x04")
    assert config.read(0x3C, 2) == b"\x0b\x02"


@pytest.mark.parametrize(("offset", "size", "bit"), [(6, 2, 0x08), (6, 1, 0x08), (4, 4, 0x08 << 16), (7, 1, 0)])
def test_an_asserted_pin_shows_in_the_status(offset: int, size: int, bit: int) -> None:
    config = space()
    config.pin_asserted = True
    assert get(config, offset, size) == bit


def test_there_is_no_extended_capability_and_nothing_past_4096_bytes() -> None:
    config = space()
    assert config.read(0x100, 4) == config.read(0xFFC, 4) == b"\0" * 4
    assert config.read(0x1000, 4) == b"\xff" * 4
    config.write(0x100, b"\xff" * 4)
    assert config.read(0x100, 4) == b"\0" * 4


def test_t5_any_width_and_alignment_is_an_access_to_each_of_the_bytes() -> None:
    random = Random(5)
    one, many = space(), space()
    for config in (one, many):
        config.add_capability(0x11, bytes(10), b"\x00\xc0")
    for _ in range(5000):
        offset, data = random.randrange(300), random.randbytes(random.choice((1, 2, 3, 4, 8)))
        many.write(offset, data)
        for at, byte in enumerate(data, offset):
            one.write(at, bytes([byte]))
        offset, size = random.randrange(256), random.choice((1, 2, 3, 4, 8))
        assert many.read(offset, size) == b"".join(one.read(at, 1) for at in range(offset, offset + size))
