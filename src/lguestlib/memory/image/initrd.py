"""Where an initial ramdisk goes: at the top of what the kernel can reach, beside what is there."""

from collections.abc import Iterable

from lguestlib.memory.address import GuestAddress, GuestRange
from lguestlib.memory.image.image import ImageError

PAGE = 4096


def initrd_range(size: int, ram: Iterable[GuestRange], last: int, taken: Iterable[GuestRange]) -> GuestRange:
    """The highest page-aligned *size* bytes of *ram* that are up to address *last* and not *taken*.

    *last* is the kernel's initrd_addr_max.  The last page is kept whole, because
    the kernel frees the initrd by pages.  Raises ImageError for no bytes, more
    than there are, and where every place is taken.
    """
    if size <= 0:
        raise ImageError("initrd: empty")
    room = -(-size // PAGE) * PAGE
    runs = sorted(ram, reverse=True)
    taken = tuple(taken)
    for run in runs:
        top = min(run.end, last + 1)
        while True:
            place = GuestRange(GuestAddress(top // PAGE * PAGE - room), room)
            if place.start < run.start:
                break
            in_the_way = [other.start for other in taken if other.overlaps(place)]
            if not in_the_way:
                return GuestRange(place.start, size)
            top = min(in_the_way)
    reach = max((min(run.end, last + 1) - run.start for run in runs), default=0)
    beside = f" beside what is at {', '.join(map(str, taken))}" if size <= reach else ""
    raise ImageError(
        f"initrd: {size:#x} bytes do not fit into {max(reach, 0):#x} bytes of memory up to {last:#x}{beside}:"
        " give the guest more memory or a smaller initrd"
    )
