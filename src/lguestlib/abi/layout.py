"""Structures declared once: annotated fields give mypy the types and ctypes the layout.

A field is annotated with one of the aliases below, with another structure, or
with ``Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * n]`` for an
array.  A type checker reads an integer field as ``int``; ctypes gets
``_fields_`` in the order of the declaration.

>>> class vring_used_elem(Structure):
...     id: u32
...     len: u32
>>> vring_used_elem(id=1, len=2).len, ctypes.sizeof(vring_used_elem)
(2, 8)

Structures are named as the kernel's headers name them.  An integer assigned to a
field is cut to its width, as in C: what came from outside is checked first (S16).

A module that declares structures cannot use ``from __future__ import
annotations``, which would leave only the names of the types.
"""

import ctypes
from typing import TYPE_CHECKING, Annotated, get_args

if TYPE_CHECKING:
    from _ctypes import _PyCStructType as _LittleEndianType, _PyCStructType as _NativeType, _UnionType
else:  # they differ on a big-endian machine
    _LittleEndianType, _NativeType = type(ctypes.LittleEndianStructure), type(ctypes.Structure)
    _UnionType = type(ctypes.Union)

u8 = Annotated[int, ctypes.c_uint8]
u16 = Annotated[int, ctypes.c_uint16]
u32 = Annotated[int, ctypes.c_uint32]
u64 = Annotated[int, ctypes.c_uint64]
i8 = Annotated[int, ctypes.c_int8]
i16 = Annotated[int, ctypes.c_int16]
i32 = Annotated[int, ctypes.c_int32]
i64 = Annotated[int, ctypes.c_int64]
ulong = Annotated[int, ctypes.c_ulong]
"""The kernel's ``unsigned long``: four bytes on i386, eight on x86-64 and aarch64."""
size_t = Annotated[int, ctypes.c_size_t]
pointer = Annotated[int, ctypes.c_size_t]
"""A user-space address, zero for NULL."""


def _declare(cls: type) -> None:
    """Turn the annotations of *cls* itself, not of its bases, into ctypes fields."""
    fields = []
    for name, annotation in cls.__annotations__.items():
        arguments = get_args(annotation)
        fields.append((name, arguments[1] if arguments else annotation))
    if fields:
        setattr(cls, "_fields_", fields)


class _DeclaredLittleEndian(_LittleEndianType):
    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, object]) -> None:
        super().__init__(name, bases, namespace)
        _declare(cls)


class _DeclaredNative(_NativeType):
    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, object]) -> None:
        super().__init__(name, bases, namespace)
        _declare(cls)


class _DeclaredUnion(_UnionType):
    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, object]) -> None:
        super().__init__(name, bases, namespace)
        _declare(cls)


class Structure(ctypes.LittleEndianStructure, metaclass=_DeclaredLittleEndian):
    """A C ``struct`` of the wire or of a file: the ABI's natural alignment, little-endian."""


class PackedStructure(ctypes.LittleEndianStructure, metaclass=_DeclaredLittleEndian):
    """A C ``struct`` with ``__attribute__((packed))``, little-endian."""

    _pack_ = 1
    _layout_ = "ms"


class NativeStructure(ctypes.Structure, metaclass=_DeclaredNative):
    """A C ``struct`` between this process and its kernel: natural alignment, the machine's byte order."""


class Union(ctypes.Union, metaclass=_DeclaredUnion):
    """A C ``union`` between this process and its kernel, in the machine's byte order."""


def offset_of(structure: type[ctypes.Structure] | type[ctypes.Union], field: str) -> int:
    """Bytes from the start of *structure* to *field*, as C's ``offsetof``.

    Raises AttributeError for a field the structure does not have.
    """
    offset: int = getattr(structure, field).offset
    return offset


def size_of(structure: type[ctypes.Structure] | type[ctypes.Union]) -> int:
    """The bytes of *structure*, as C's ``sizeof``."""
    return ctypes.sizeof(structure)
