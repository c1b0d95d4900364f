"""Kernels that are compressed as a whole."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from random import Random

import pytest

from lguestlib.memory.image import compressed
from lguestlib.memory.image.image import ImageError
from lguestlib.memory.image.parse import parse
from memory.images import Load, elf

# More than the pieces that it is unpacked in, and of little entropy in places.
CONTENT = bytes(elf(64, 0x100000, [Load(0x100000, Random(1).randbytes(1 << 20) + bytes(3 << 20), 5 << 20)]))


def lzma_alone(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_ALONE)


PACKERS: list[Callable[[bytes], bytes]] = [gzip.compress, bz2.compress, lzma.compress, lzma_alone]


@pytest.mark.parametrize("pack", PACKERS)
def test_a_compressed_kernel_is_as_good_as_an_unpacked_one(pack: Callable[[bytes], bytes]) -> None:
    packed = pack(CONTENT)
    assert len(packed) < len(CONTENT) // 2
    image = parse(packed)
    assert (image.format, image.entry) == ("ELF64", 0x100000)
    assert image.data == CONTENT and image.data.readonly
    assert parse(packed + b"what follows").data == CONTENT


@pytest.mark.parametrize("pack", PACKERS)
def test_t23_one_that_is_cut_short_is_refused(pack: Callable[[bytes], bytes]) -> None:
    packed = pack(CONTENT)
    for length in (6, 20, len(packed) // 2, len(packed) - 9):
        with pytest.raises(ImageError, match="compressed with .*, and (cut short|damaged)"):
            parse(packed[:length])


@pytest.mark.parametrize("pack", PACKERS)
def test_t23_one_that_is_damaged_is_refused(pack: Callable[[bytes], bytes]) -> None:
    packed = bytearray(pack(CONTENT))
    for at in range(len(packed) // 2, len(packed) // 2 + 64):
        packed[at] ^= 0xFF
    with pytest.raises(ImageError, match="damaged|cut short|cut short or damaged"):
        parse(bytes(packed))


def test_t23_what_unpacks_to_more_than_any_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "UNPACKED_MAX", 2 << 20)
    with pytest.raises(ImageError, match="more than 2 MiB"):
        parse(gzip.compress(bytes(3 << 20)))
