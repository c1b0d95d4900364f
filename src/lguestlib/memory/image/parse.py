"""Which format an image has, by its first bytes."""

from lguestlib.abi.elf import ELFMAG
from lguestlib.memory.image.bzimage import has_boot_flag, is_bzimage, parse_bzimage
from lguestlib.memory.image.elf import parse_elf
from lguestlib.memory.image.image import Image, ImageError
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x5d\0\0")
"""How what the standard library can unpack begins: gzip, bzip2, xz, lzma."""

_COMPRESSED_OTHERWISE = {
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\x04\x22\x4d\x18": "unlz4",
    b"\x02\x21\x4c\x18": "unlz4",
}


def parse(data: bytes | memoryview) -> Image:
    """The ELF executable or the bzImage that *data*, a view of bytes, holds.

    The image refers to *data* and copies none of it but headers, unless it is compressed
    as a whole.  Raises ImageError, also for what is neither: where that is a flat
    image, `flat.flat_image` can be told where it goes.
    """
    view = memoryview(data) if isinstance(data, bytes) else data
    if view[:6].tobytes().startswith(_COMPRESSED):
        from lguestlib.memory.image.compressed import unpack

        view = unpack(view)
    magic = bytes(view[:6])
    if magic.startswith(ELFMAG):
        return parse_elf(view)
    if is_bzimage(view):
        return parse_bzimage(view)
    if not magic:
        raise ImageError("image: empty")
    for start, command in _COMPRESSED_OTHERWISE.items():
        if magic.startswith(start):
            raise ImageError(f"image: compressed: unpack it with {command} first")
    if has_boot_flag(view):
        raise ImageError(
            "image: a boot sector without Linux's header: a disk, or a kernel older than boot protocol 2.00"
        )
    raise ImageError(f"image: starts with {magic.hex(' ')}, which is neither an ELF file nor a bzImage")
