"""Flat images: bytes that go to one address as they are."""

from typing import Literal

from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.image.image import Image, ImageError, Segment


def flat_image(
    data: bytes | memoryview,
    base: GuestAddress,
    entry: GuestAddress | None = None,
    bits: Literal[32, 64] = 32,
) -> Image:
    """All of *data* at guest-physical *base*, entered there or at *entry*, in a mode of *bits*.

    Raises ImageError for no bytes, addresses past 64 bits, or an entry elsewhere.
    """
    view = memoryview(data) if isinstance(data, bytes) else data
    where = GuestRange(base, len(view))
    entry = base if entry is None else entry
    if not where.size:
        raise ImageError("flat image: empty")
    if base < 0 or where.end > 1 << 64:
        raise ImageError(f"flat image: {where.size:#x} bytes at {base:#x} are not in 64 bits of address")
    if not where.start <= entry < where.end:
        raise ImageError(f"flat image: entry {entry:#x} is outside it, {where}")
    return Image("flat image", view, (Segment(where, 0, where.size),), entry, bits)
