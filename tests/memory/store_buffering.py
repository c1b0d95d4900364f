"""One side of the store buffering litmus test: store here, fence, load there.

    python store_buffering.py FD SIDE LOCATIONS FENCE

FD is a file of six areas of LOCATIONS bytes, zero at first, shared by the two
sides 0 and 1: what each stores, how far each is, results of each.  A location is
stored to once, at the same time as the other side stores to its own, and right
after it the other side's is loaded.  Finding zero on both sides means that both
loads passed the stores before them.  FENCE is `fence` or `none`.

The order of the statements is the test: on processors of today the store stays
in the store buffer for some fifty other stores only, and the interpreter makes
many of those.  So the load is done by the ``for`` statement itself, which stores
less on its way than a subscription, and without a fence nothing is called.
"""

import mmap
import os
import sys
from itertools import cycle

from lguestlib.memory.fence import Fence, new_fence

AREAS = 6
_COLD = 1 << 20
_COLD_STORES = 16
_COLD_STRIDE = 17 * 64


def _cold_lines() -> list[memoryview]:
    """Some bytes each, on lines that were not used lately: stores to them hold up the next one."""
    area = memoryview(mmap.mmap(-1, _COLD))
    span = _COLD_STORES * _COLD_STRIDE
    return [area[start : start + span : _COLD_STRIDE] for start in range(0, _COLD - span, span)]


def run(
    store: memoryview,
    load: memoryview,
    here: memoryview,
    there: memoryview,
    stop: memoryview,
    fence: Fence | None,
) -> list[int]:
    """What was loaded, by location; location 0 is loaded before anything is stored."""
    seen: list[int] = []
    lines, filler = cycle(_cold_lines()), bytes(_COLD_STORES)
    location, last = 0, len(store) - 1
    for value in load:
        seen.append(value)
        if location == last:
            break
        location += 1
        cold = next(lines)
        here[location] = 1
        while not there[location]:
            if stop[0]:
                return seen
        cold[:] = filler
        store[location] = 1
        if fence is not None:
            fence()
    return seen


def main(fd: int, side: int, locations: int, kind: str) -> None:
    """Run one side on a processor of its own."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[side]})
    shared = memoryview(mmap.mmap(fd, AREAS * locations))
    area = [shared[index * locations : (index + 1) * locations] for index in range(AREAS)]
    fence = new_fence() if kind == "fence" else None
    # Location 0 of how far side 0 is, which no round uses, says that time is over.
    seen = run(area[side], area[1 - side], area[2 + side], area[3 - side], area[2], fence)
    area[4 + side][: len(seen)] = bytes(value | 2 for value in seen)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
