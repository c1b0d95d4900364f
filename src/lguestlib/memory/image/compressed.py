"""A file that is compressed as a whole, as distributions ship a vmlinux: unpacked, or named.

To be imported where there is one: each format brings a library along.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Protocol

from lguestlib.memory.image.image import ImageError

UNPACKED_MAX = 1 << 30
"""Bytes that an image may have when it is unpacked: more is no kernel."""

_PIECE = 1 << 20


class _Decompressor(Protocol):
    """What the standard library's have in common; *max_length* bounds the bytes returned."""

    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gunzip:
    """zlib's decompressor, which wants what it has left over again, as one that keeps it."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(zlib.MAX_WBITS | 16)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


_UNPACKERS: dict[bytes, tuple[str, Callable[[], _Decompressor]]] = {
    b"\x1f\x8b": ("gzip", _Gunzip),
    b"BZh": ("bzip2", bz2.BZ2Decompressor),
    b"\xfd7zXZ\0": ("xz", lzma.LZMADecompressor),
    b"\x5d\0\0": ("lzma", lzma.LZMADecompressor),
}


def unpack(data: memoryview) -> memoryview:
    """The contents of *data*, which begins as a file of gzip, bzip2, xz or lzma does.

    Raises ImageError for what is damaged, and for more than `UNPACKED_MAX` bytes.
    """
    magic = bytes(data[:6])
    name, make = next(unpacker for start, unpacker in _UNPACKERS.items() if magic.startswith(start))
    decompressor, content, at = make(), bytearray(), 0
    try:
        while not decompressor.eof:
            piece = bytes(data[at : at + _PIECE])
            at += len(piece)
            got = decompressor.decompress(piece, _PIECE)
            content += got
            if not got and not piece:
                raise ImageError(f"image: compressed with {name}, and cut short")
            if len(content) > UNPACKED_MAX:
                raise ImageError(f"image: compressed with {name}, and more than {UNPACKED_MAX >> 20} MiB of it")
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise ImageError(f"image: compressed with {name}, and damaged: {error}") from None
    return memoryview(content).toreadonly()
