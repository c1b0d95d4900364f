"""An io_uring: reads, writes and flushes that the kernel does side by side, many asked for at once."""

import ctypes
import errno
import mmap
import os
from array import array
from collections.abc import Sequence
from struct import Struct
from types import TracebackType
from typing import Self

from lguestlib.abi import io_uring as abi
from lguestlib.abi.libc import failure
from lguestlib.abi.uio import UIO_MAXIOV, vector
from lguestlib.memory.fence import new_acquire
from lguestlib.runtime.trace import Tracer

_NEEDED = {
    "SINGLE_MMAP": abi.IORING_FEAT_SINGLE_MMAP,
    "NODROP": abi.IORING_FEAT_NODROP,
    "SUBMIT_STABLE": abi.IORING_FEAT_SUBMIT_STABLE,
    "EXT_ARG": abi.IORING_FEAT_EXT_ARG,
}
_NEEDED_SINCE = "5.11"

IO_URING_REMEDY = (
    f"Linux {_NEEDED_SINCE} and later have it, where sysctl kernel.io_uring_disabled is 0"
    " and no system call filter refuses it"
)
"""What to tell people where it cannot be had."""

_SETUPS = (
    # Completions are made when their thread asks for them: no interruption in between.
    abi.IORING_SETUP_SINGLE_ISSUER | abi.IORING_SETUP_DEFER_TASKRUN,
    abi.IORING_SETUP_COOP_TASKRUN,
    0,
)
"""The best that each kernel knows: from 6.1 on, from 5.19 on, and before."""

_ENTRY = Struct("=BBHiQQIIQ")
"""`io_uring_sqe` up to user_data; what comes behind stays zero."""
_ENTRY_SIZE = ctypes.sizeof(abi.io_uring_sqe)
_COMPLETION = Struct("=Qi4x")
"""user_data and res of `io_uring_cqe`."""

_address, _first = ctypes.addressof, ctypes.c_char.from_buffer

_SHORT = (errno.EAGAIN, errno.EBUSY)
_NOTHING_TAKEN = (errno.EINTR, errno.ETIME, *_SHORT)
_RETRY_SECONDS = 0.01

Completion = tuple[int, int]
"""The number a request was given, and what its system call would have returned, or a negative errno."""


class Uring:
    """A ring for *requests* in the kernel at a time, made, used and closed by one thread.

    Buffers must stay where they are until their request is complete.  A request
    is made known to the kernel by the next `enter`.

    Raises OSError: ENOSYS where the kernel has no io_uring, or one that is too
    old; EPERM where it is switched off; EINVAL for more requests than a ring has.
    """

    def __init__(self, requests: int, tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        self.fd, parameters = _new_ring(requests)
        try:
            lacking = [name for name, bit in _NEEDED.items() if not parameters.features & bit]
            if lacking:
                what = f"io_uring without {', '.join(lacking)} (Linux {_NEEDED_SINCE} has it)"
                raise OSError(errno.ENOSYS, what)
            sq, cq = parameters.sq_off, parameters.cq_off
            size, completions = parameters.sq_entries, parameters.cq_entries
            rings_size = max(sq.array + 4 * size, cq.cqes + _COMPLETION.size * completions)
            self._mappings = [mmap.mmap(self.fd, rings_size, offset=abi.IORING_OFF_SQ_RING)]
            self._mappings.append(mmap.mmap(self.fd, _ENTRY_SIZE * size, offset=abi.IORING_OFF_SQES))
        except BaseException:
            os.close(self.fd)
            raise
        rings = self._rings = memoryview(self._mappings[0])
        self._entries = memoryview(self._mappings[1])
        self._size, self._mask = size, size - 1
        self._tail_shared = rings[sq.tail : sq.tail + 4].cast("I")
        self._done_head_shared = rings[cq.head : cq.head + 4].cast("I")
        self._done_tail_shared = rings[cq.tail : cq.tail + 4].cast("I")
        self._done_mask = completions - 1
        self._done_entries = rings[cq.cqes : cq.cqes + _COMPLETION.size * completions]
        with rings[sq.array : sq.array + 4 * size].cast("I") as order:
            for index in range(size):
                order[index] = index
        # Counted on without end; the shared ones are cut to 32 bits.
        self._tail = self._submitted = self._done = 0
        # What entries that are not submitted yet point at.
        self._vectors: list[array[int]] = []
        self._acquire = new_acquire()
        self._wait = abi.io_uring_getevents_arg()
        self._timeout = abi.kernel_timespec()
        self._wait.ts = ctypes.addressof(self._timeout)

    @property
    def outstanding(self) -> int:
        """Requests that were added and whose completion has not been seen."""
        return self._tail - self._done

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int, number: int) -> None:
        """preadv(2); as all of these, under *number*, of 64 bits, which its completion has again."""
        self._move(abi.IORING_OP_READ, abi.IORING_OP_READV, fd, buffers, offset, number)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int, number: int) -> None:
        """pwritev(2)."""
        self._move(abi.IORING_OP_WRITE, abi.IORING_OP_WRITEV, fd, buffers, offset, number)

    def _move(
        self, plain: int, vectored: int, fd: int, buffers: Sequence[memoryview], offset: int, number: int
    ) -> None:
        if len(buffers) == 1:
            # `address_of`, by its parts.
            buffer = buffers[0]
            operation, address, length = plain, _address(_first(buffer)), len(buffer)
        else:
            words = vector(buffers[:UIO_MAXIOV])
            self._vectors.append(words)
            operation, (address, length) = vectored, words.buffer_info()
            length //= 2
        self._add(operation, fd, offset, address, length, 0, number)

    def flush(self, fd: int, number: int) -> None:
        """fdatasync(2): what is complete before it is submitted is then on stable storage."""
        self._add(abi.IORING_OP_FSYNC, fd, 0, 0, 0, abi.IORING_FSYNC_DATASYNC, number)

    def cancel(self, cancelled: int, number: int) -> None:
        """End the request whose number is *cancelled* early, with ECANCELED or EINTR, if that can be done.

        ENOENT says that there is none, EALREADY that it takes its course.
        """
        self._add(abi.IORING_OP_ASYNC_CANCEL, -1, 0, cancelled, 0, 0, number)

    def _add(
        self, operation: int, fd: int, offset: int, address: int, length: int, flags: int, number: int
    ) -> None:
        tail = self._tail
        if tail - self._submitted == self._size:
            raise OverflowError(f"io_uring: more than {self._size} requests at once")
        at = _ENTRY_SIZE * (tail & self._mask)
        _ENTRY.pack_into(self._entries, at, operation, 0, 0, fd, offset, address, length, flags, number)
        self._tail = tail + 1

    def enter(self, wait: bool, seconds: float = 0.0) -> list[Completion]:
        """Submit what was added and return what is complete, waiting for the first if *wait*.

        For *seconds* at most, unless that is 0.  Nothing may be complete even so,
        when a signal comes or memory is short.  Raises OSError.
        """
        # The kernel reads it in this thread, in the call.
        self._tail_shared[0] = self._tail & 0xFFFF_FFFF
        self._submitted += self._call(self._tail - self._submitted, int(wait), seconds)
        if self._vectors and self._submitted == self._tail:
            self._vectors.clear()
        return self._completions()

    def _call(self, submit: int, complete: int, seconds: float) -> int:
        """io_uring_enter(2), and how many it took; none is no error."""
        flags, argument, size = abi.IORING_ENTER_GETEVENTS, 0, 0
        if seconds:
            self._timeout.tv_sec, self._timeout.tv_nsec = divmod(int(seconds * 1e9), 1_000_000_000)
            flags |= abi.IORING_ENTER_EXT_ARG
            argument, size = ctypes.addressof(self._wait), ctypes.sizeof(self._wait)
        try:
            if self._tracer is None:
                return abi.io_uring_enter(self.fd, submit, complete, flags, argument, size)
            return self._tracer.traced(
                "io_uring_enter", "disk", abi.io_uring_enter, self.fd, submit, complete, flags, argument, size
            )
        except OSError as error:
            if error.errno not in _NOTHING_TAKEN:
                raise
            if submit and error.errno in _SHORT:
                # What is complete makes room for more.
                self._call(0, 1, _RETRY_SECONDS)
            return 0

    def _completions(self) -> list[Completion]:
        done, mask, entries = self._done, self._done_mask, self._done_entries
        count = self._done_tail_shared[0] - done & 0xFFFF_FFFF
        if not count:
            return []
        if self._acquire:
            self._acquire()
        start = done & mask
        end = start + count
        size = _COMPLETION.size
        completions = list(_COMPLETION.iter_unpack(entries[size * start : size * end]))
        if end > mask + 1:
            completions += _COMPLETION.iter_unpack(entries[: size * (end - mask - 1)])
        self._done = done = done + count
        if self._acquire:
            # Off x86 it is a full fence: the entries have been read before they are given back.
            self._acquire()
        self._done_head_shared[0] = done & 0xFFFF_FFFF
        return completions

    def close(self) -> None:
        """Give the ring back; nothing may be outstanding."""
        for view in (
            self._tail_shared, self._done_head_shared, self._done_tail_shared, self._done_entries,
            self._rings, self._entries,
        ):  # fmt: skip
            view.release()
        for mapping in self._mappings:
            mapping.close()
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _new_ring(requests: int) -> tuple[int, abi.io_uring_params]:
    """The descriptor of a ring set up as well as this kernel can, and what it is."""
    for flags in _SETUPS:
        parameters = abi.io_uring_params(flags=flags)
        try:
            return abi.io_uring_setup(requests, parameters), parameters
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    raise failure(errno.EINVAL, "io_uring_setup", requests)

