"""io_uring_setup(2) and io_uring_enter(2), linux/io_uring.h: requests to the kernel through shared rings.

The rings and the entries lie in mappings of the descriptor that
`io_uring_setup` returns, at IORING_OFF_SQ_RING and IORING_OFF_SQES, with their
parts where `io_uring_params` says.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Annotated

from lguestlib.abi.layout import NativeStructure, i32, i64, u8, u16, u32, u64
from lguestlib.abi.libc import check, system_call

SYS_io_uring_setup = (425, 425, 425)
SYS_io_uring_enter = (426, 426, 426)

IORING_OFF_SQ_RING = 0
IORING_OFF_SQES = 0x1000_0000

IORING_SETUP_CQSIZE = 1 << 3
IORING_SETUP_COOP_TASKRUN = 1 << 8
IORING_SETUP_SINGLE_ISSUER = 1 << 12
IORING_SETUP_DEFER_TASKRUN = 1 << 13

IORING_FEAT_SINGLE_MMAP = 1 << 0
IORING_FEAT_NODROP = 1 << 1
IORING_FEAT_SUBMIT_STABLE = 1 << 2
IORING_FEAT_EXT_ARG = 1 << 8

IORING_ENTER_GETEVENTS = 1 << 0
IORING_ENTER_EXT_ARG = 1 << 3

IORING_OP_NOP = 0
IORING_OP_READV = 1
IORING_OP_WRITEV = 2
IORING_OP_FSYNC = 3
IORING_OP_ASYNC_CANCEL = 14
IORING_OP_READ = 22
IORING_OP_WRITE = 23

IORING_FSYNC_DATASYNC = 1 << 0


class io_sqring_offsets(NativeStructure):
    """linux/io_uring.h: where the parts of the submission ring are, in bytes."""

    head: u32
    tail: u32
    ring_mask: u32
    ring_entries: u32
    flags: u32
    dropped: u32
    array: u32
    resv1: u32
    user_addr: u64


class io_cqring_offsets(NativeStructure):
    """linux/io_uring.h: where the parts of the completion ring are, in bytes."""

    head: u32
    tail: u32
    ring_mask: u32
    ring_entries: u32
    overflow: u32
    cqes: u32
    flags: u32
    resv1: u32
    user_addr: u64


class io_uring_params(NativeStructure):
    """linux/io_uring.h: what a ring is to be, and what it has become."""

    sq_entries: u32
    cq_entries: u32
    flags: u32
    sq_thread_cpu: u32
    sq_thread_idle: u32
    features: u32
    wq_fd: u32
    resv: Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 3]
    sq_off: io_sqring_offsets
    cq_off: io_cqring_offsets


class io_uring_sqe(NativeStructure):
    """linux/io_uring.h: a request; *rw_flags* is an fsync's fsync_flags too, *off* an offset in bytes."""

    opcode: u8
    flags: u8
    ioprio: u16
    fd: i32
    off: u64
    addr: u64
    len: u32
    rw_flags: u32
    user_data: u64
    buf_index: u16
    personality: u16
    splice_fd_in: i32
    addr3: u64
    pad2: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 1]


class io_uring_cqe(NativeStructure):
    """linux/io_uring.h: a request's end; *res* as of the system call, or a negative errno."""

    user_data: u64
    res: i32
    flags: u32


class kernel_timespec(NativeStructure):
    """linux/time_types.h, `__kernel_timespec`: 64 bits everywhere."""

    tv_sec: i64
    tv_nsec: i64


class io_uring_getevents_arg(NativeStructure):
    """linux/io_uring.h: the argument with IORING_ENTER_EXT_ARG; *ts*: the address of a `kernel_timespec`."""

    sigmask: u64
    sigmask_sz: u32
    min_wait_usec: u32
    ts: u64


def io_uring_setup(entries: int, params: io_uring_params) -> int:
    """A new close-on-exec ring for *entries* requests at a time, which *params* then describes.

    Raises OSError: ENOSYS where the kernel has none, EPERM where it or a filter
    refuses, EINVAL for a flag it does not know, ENOMEM, EMFILE.
    """
    call = system_call(SYS_io_uring_setup, 2)
    return check(call(entries, ctypes.addressof(params)), "io_uring_setup")


@cache
def _enter() -> Callable[..., int]:
    return system_call(SYS_io_uring_enter, 6)


def io_uring_enter(
    fd: int, to_submit: int, min_complete: int, flags: int, argument: int = 0, size: int = 0
) -> int:
    """Submit, and with IORING_ENTER_GETEVENTS wait for *min_complete* completions; return how many were taken.

    With IORING_ENTER_EXT_ARG *argument* is the address of an
    `io_uring_getevents_arg`, of *size* bytes.  Raises OSError where nothing was
    taken: InterruptedError, ETIME after the time in the argument, EAGAIN or EBUSY
    for want of memory or of room for completions.
    """
    return check(_enter()(fd, to_submit, min_complete, flags, argument, size), "io_uring_enter", fd)
