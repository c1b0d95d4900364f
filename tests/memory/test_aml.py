"""AML by hand: the bytes of terms as ACPI 6.5, chapter 20, and 6.4 give them."""

import pytest

from lguestlib.memory.acpi import aml


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("_HID", b"_HID"), ("RTC", b"RTC_"), ("\\_SB", b"\\_SB_"), ("\\", b"\\\0"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"), ("A.B.C", b"\x2f\x03A___B___C___"),
    ],
)  # fmt: skip
def test_names_have_segments_of_four(path: str, expected: bytes) -> None:
    assert aml.name_string(path) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "00"), (1, "01"), (2, "0a 02"), (255, "0a ff"), (256, "0b 00 01"), (0x12345, "0c 45 23 01 00"),
        (1 << 32, "0e 00 00 00 00 01 00 00 00"),
    ],
)  # fmt: skip
def test_integers_are_as_short_as_they_can_be(number: int, expected: str) -> None:
    assert aml.value(number) == bytes.fromhex(expected)


def test_what_has_more_than_64_bits_is_no_integer() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        aml.value(1 << 64)


def test_strings_end_with_a_zero() -> None:
    assert aml.value("LNRO0005") == b"\x0dLNRO0005\0"


@pytest.mark.parametrize(
    ("content", "prefix"),
    [
        (58, "11 3d 0a 3a"),  # the size takes two bytes, the length one: 61 in all
        (60, "11 3f 0a 3c"),
        (61, "11 41 04 0a 3d"),
        (4089, "11 4e ff 0b f9 0f"),
        (4090, "11 4f ff 0b fa 0f"),
        (4091, "11 81 00 01 0b fb 0f"),
    ],
)
def test_a_package_length_counts_itself(content: int, prefix: str) -> None:
    made = aml.buffer(bytes(content))
    head = bytes.fromhex(prefix)
    assert made == head + bytes(content)


def test_what_does_not_fit_into_28_bits_of_length_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        aml.buffer(bytes(1 << 28))


def test_a_name_a_device_and_a_scope() -> None:
    assert aml.name("_UID", 3) == b"\x08_UID\x0a\x03"
    assert aml.device("RTC", aml.name("_UID", 0)) == b"\x5b\x82\x0bRTC_\x08_UID\0"
    assert aml.scope("\\_SB") == b"\x10\x06\\_SB_"
    assert aml.package(5, 0, "x") == b"\x12\x08\x03\x0a\x05\0\x0dx\0"


def test_eisa_ids_are_packed_letters() -> None:
    # PNP is 10000 01110 10000 in five bits each, 41d0; the bytes of the number are turned round.
    assert aml.eisa_id("PNP0A03").to_bytes(4, "little") == bytes.fromhex("41 d0 0a 03")


def test_resource_descriptors() -> None:
    assert aml.resources() == bytes.fromhex("11 05 0a 02 79 00")
    assert aml.memory32(0xD000_0000, 0x1000) == bytes.fromhex("86 09 00 01 000000d0 00100000")
    assert aml.io(0x3F8, 8) == bytes.fromhex("47 01 f803 f803 01 08")
    assert aml.irq(4) == bytes.fromhex("22 10 00")
    assert aml.interrupt(17) == bytes.fromhex("89 06 00 0b 01 11 00 00 00")
    assert aml.bus_numbers(0, 255) == bytes.fromhex("88 0d 00 02 0c 00 0000 0000 ff00 0000 0001")
    assert aml.window(0xC000_0000, 0x1000_0000) == bytes.fromhex(
        "87 17 00 00 0c 01 00000000 000000c0 ffffffcf 00000000 00000010"
    )
    assert aml.window(1 << 32, 1 << 32) == bytes.fromhex(
        "8a 2b 00 00 0c 01 0000000000000000 0000000001000000 ffffffff01000000 0000000000000000 0000000001000000"
    )
