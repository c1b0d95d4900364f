"""Mark pages of a dirty log, again and again, from a process of its own.

    python dirty_pages.py FD SIZE FIRST STEP TURNS WAIT

FD is a file that holds a log of SIZE bytes, and after it, at the next page, a byte
for each page of guest memory: its content.  Of the pages from FIRST on, each
STEPth one, the content is set to the turn, from 1 on, and then the page is marked.
With WAIT, and not 0, the next turn begins when none of them is marked any more.
"""

import mmap
import os
import sys

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.dirty_log import PAGE, DirtyLog


def main(fd: int, size: int, first: int, step: int, turns: int, wait: int) -> None:
    log = DirtyLog(fd, size)
    bits = memoryview(mmap.mmap(fd, size))
    content = memoryview(mmap.mmap(fd, 8 * size, offset=mmap.PAGESIZE))
    pages = range(first, 8 * size, step)
    for turn in range(1, turns + 1):
        for page in pages:
            content[page] = turn
            log.mark(GuestAddress(page * PAGE), 1)
        while wait and any(bits[page >> 3] >> (page & 7) & 1 for page in pages):
            os.sched_yield()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
