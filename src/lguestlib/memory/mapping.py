"""A part of a file that another process has handed over, mapped shared.

Whoever has the file open may make it shorter at any time, and touching a page that
is not there any more is a SIGBUS (T13).  Where the file lets itself be sealed, that
is forbidden for good.  Elsewhere a handler puts a private page of zeros in the
place of the one that is gone, so that whoever has touched it goes on, and the
mapping is lost.  A system call that is given such a page says EFAULT.
"""

import mmap
import os
import signal
import weakref
from collections.abc import Callable
from contextlib import suppress

from lguestlib.abi.memfd import F_SEAL_SHRINK, add_seals
from lguestlib.abi.mmap import address_of, replace_pages
from lguestlib.abi.sigaction import (
    fault_action,
    get_action,
    set_action,
    sigaction,
    siginfo_fault,
)


class MappingLost(Exception):
    """Memory that another process has shared is not there any more: it has made its file shorter."""


OnLost = Callable[[MappingLost], None]
"""Told that a mapping is lost, in the middle of whatever the thread that has found out does.

It may not wait for anything, nor touch the mapping.
"""


class SharedMapping(mmap.mmap):
    """A mapping of another process's file.  Made by `map_shared`."""

    _start = _length = 0
    _to_tell: list[OnLost]
    _about = ""
    _reference: "weakref.ref[SharedMapping]"

    def watch(self, about: str, on_lost: OnLost) -> None:
        """Have *on_lost* told, once, of the loss of what is *about*."""
        with memoryview(self) as view:
            self._start = address_of(view)
        self._length = -(-len(self) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._about, self._to_tell = about, [on_lost]
        self._reference = weakref.ref(self, _watched.discard)
        _watched.add(self._reference)

    def replace(self, address: int) -> bool:
        """Put a page where one is gone, at *address*; False where that is none of this mapping."""
        # Where one is closed another may be by now, before this one has left the list.
        if self.closed or not 0 <= address - self._start < self._length:
            return False
        try:
            replace_pages(address & -mmap.PAGESIZE, mmap.PAGESIZE)
        except OSError:
            # Huge pages are not replaced in parts.
            replace_pages(self._start, self._length)
        with suppress(IndexError):
            # Of several threads that find out at once one has it.
            self._to_tell.pop()(MappingLost(f"{self._about}its file has become shorter than what is used of it"))
        return True

    def close(self) -> None:
        """Unmap; closing again is no error.  Raises BufferError while a view lives (Y4)."""
        super().close()
        _watched.discard(self._reference)


_watched: "set[weakref.ref[SharedMapping]]" = set()
_before: list[sigaction] = []
"""What SIGBUS did, each time the handler was installed."""


def check_held(fd: int, size: int, offset: int, about: str = "") -> None:
    """Raise ValueError, with *about* before its text, unless the file *fd* holds *size* bytes at byte *offset*.

    Raises OSError (EBADF).
    """
    held = os.fstat(fd).st_size
    if offset < 0 or offset > held or size > held - offset:
        raise ValueError(f"{about}{size:#x} bytes at offset {offset:#x} of a file of {held:#x}")


def nobody(error: MappingLost) -> None:
    """Nobody wants to know: zeros are read, and what is written is gone."""


def map_shared(
    fd: int, size: int, offset: int, about: str = "", on_lost: OnLost = nobody
) -> tuple[SharedMapping, int]:
    """*size* bytes at byte *offset* of the file *fd*, page-aligned or not: the mapping, and where in it they begin.

    *on_lost* is told, once, when they are found to have gone.  Raises as
    `check_held`; OSError where it cannot be mapped for reading and writing (EACCES).
    """
    with suppress(OSError):
        # Not every file has seals; and what is checked next stays so.
        add_seals(fd, F_SEAL_SHRINK)
    check_held(fd, size, offset, about)
    skip = offset % mmap.ALLOCATIONGRANULARITY
    mapping = SharedMapping(fd, skip + size, offset=offset - skip)
    mapping.watch(about, on_lost)
    with suppress(OSError):
        # On a system whose signals are not known here such a fault ends the process, as it would have.
        _install_handler()
    return mapping, skip


def _install_handler() -> None:
    """See to it that a SIGBUS comes here first, whoever has installed what since the last time."""
    ours, now = fault_action(_bus_error), get_action(signal.SIGBUS)
    if now.sa_handler != ours.sa_handler:
        _before.append(now)
        set_action(signal.SIGBUS, ours)


def _bus_error(number: int, info: int, context: int) -> None:
    """On the thread that has touched the page; when this returns it touches it again."""
    fault = siginfo_fault.from_address(info)
    by_kernel = fault.si_code > 0
    with suppress(Exception):
        if by_kernel and any(
            mapping is not None and mapping.replace(fault.si_addr)
            # Copied whole: other threads come and go, and one that iterates would be told off for it.
            for mapping in [reference() for reference in _watched.copy()]
        ):
            return
    # None of ours: it gets what it would have got, from the same fault again or the same signal.
    set_action(number, _before.pop() if _before else sigaction())
    if not by_kernel:
        signal.raise_signal(number)
