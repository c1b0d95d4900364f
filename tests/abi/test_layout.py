"""Structures declared once: what ctypes and the type checker make of annotated fields."""

import ctypes
from typing import Annotated, assert_type

import pytest

from lguestlib.abi.layout import (
    NativeStructure,
    PackedStructure,
    Structure,
    Union,
    i16,
    offset_of,
    u8,
    u32,
    u64,
)


class Plain(Structure):
    small: u8
    large: u32


class Packed(PackedStructure):
    small: u8
    large: u32
    inner: Plain
    bytes_: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 3]


class Longer(Plain):
    more: u64


class Renamed(Plain):
    """Adds nothing."""


class Either(Union):
    number: u32
    halves: Annotated[ctypes.Array[ctypes.c_uint16], ctypes.c_uint16 * 2]


class Native(NativeStructure):
    signed: i16
    either: Either


def test_fields_lie_in_the_order_of_the_declaration_with_natural_alignment() -> None:
    assert [name for name, *_ in Plain._fields_] == ["small", "large"]
    assert (offset_of(Plain, "small"), offset_of(Plain, "large"), ctypes.sizeof(Plain)) == (0, 4, 8)


def test_a_packed_structure_has_no_padding_of_its_own() -> None:
    places = [offset_of(Packed, name) for name in ("small", "large", "inner", "bytes_")]
    assert (places, ctypes.sizeof(Packed)) == ([0, 1, 5, 13], 16)


def test_a_type_checker_reads_integer_fields_as_int() -> None:
    assert_type(Plain().large, int)
    assert_type(Packed().inner, Plain)
    assert type(Plain(large=7).large) is int


def test_structures_of_the_wire_are_little_endian() -> None:
    assert bytes(Packed(small=1, large=0x0A0B0C0D))[:5] == bytes([1, 0x0D, 0x0C, 0x0B, 0x0A])


def test_native_structures_and_unions_have_the_machines_byte_order() -> None:
    native = Native(signed=-2, either=Either(number=1))
    assert native.signed == -2
    assert bytes(native)[4:] == bytes(ctypes.c_uint32(1))


def test_members_of_a_union_share_their_bytes() -> None:
    either = Either(halves=(ctypes.c_uint16 * 2)(0xFFFF, 0xFFFF))
    assert (either.number, ctypes.sizeof(Either)) == (0xFFFF_FFFF, 4)


def test_a_derived_structure_adds_its_fields_to_its_bases() -> None:
    assert (offset_of(Longer, "large"), offset_of(Longer, "more")) == (4, 8)
    assert ctypes.sizeof(Renamed) == ctypes.sizeof(Plain)
    assert Longer(small=1, more=2).small == 1


def test_a_structure_may_be_laid_over_a_buffer() -> None:
    memory = bytearray(8)
    Plain.from_buffer(memory).large = 0x01020304
    assert memory == bytes([0, 0, 0, 0, 4, 3, 2, 1])


def test_the_offset_of_an_unknown_field_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="absent"):
        offset_of(Plain, "absent")


def test_a_field_whose_type_is_not_cs_is_refused_at_the_declaration() -> None:
    with pytest.raises(TypeError):

        class Wrong(Structure):
            field: str
