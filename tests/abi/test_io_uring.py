"""io_uring_setup(2) and io_uring_enter(2): a ring is made, described and waited on."""

import ctypes
import errno
import mmap
import os
import resource
from collections.abc import Iterator

import pytest
from uring import uring_or_skip

from abi.interruption import interrupted
from lguestlib.abi import io_uring as abi


@pytest.fixture(autouse=True)
def needed() -> None:
    uring_or_skip()


@pytest.fixture
def parameters() -> abi.io_uring_params:
    return abi.io_uring_params()


@pytest.fixture
def ring(parameters: abi.io_uring_params) -> Iterator[int]:
    fd = abi.io_uring_setup(5, parameters)
    yield fd
    os.close(fd)


def waiting(seconds: float) -> tuple[abi.io_uring_getevents_arg, abi.kernel_timespec]:
    time = abi.kernel_timespec(tv_sec=int(seconds), tv_nsec=int(seconds % 1 * 1e9))
    return abi.io_uring_getevents_arg(ts=ctypes.addressof(time)), time


def wait(ring: int, seconds: float) -> int:
    argument, _time = waiting(seconds)
    flags = abi.IORING_ENTER_GETEVENTS | abi.IORING_ENTER_EXT_ARG
    return abi.io_uring_enter(ring, 0, 1, flags, ctypes.addressof(argument), ctypes.sizeof(argument))


def test_a_new_ring_is_described_and_not_inherited(ring: int, parameters: abi.io_uring_params) -> None:
    assert not os.get_inheritable(ring)
    assert (parameters.sq_entries, parameters.cq_entries) == (8, 16)
    wanted = abi.IORING_FEAT_SINGLE_MMAP | abi.IORING_FEAT_NODROP | abi.IORING_FEAT_SUBMIT_STABLE
    assert parameters.features & wanted == wanted
    places = {parameters.sq_off.head, parameters.sq_off.tail, parameters.sq_off.array, parameters.cq_off.cqes}
    assert len(places) == 4


def test_a_request_in_the_mappings_is_taken_and_completed(
    ring: int, parameters: abi.io_uring_params
) -> None:
    sq, cq = parameters.sq_off, parameters.cq_off
    size = max(sq.array + 4 * parameters.sq_entries, cq.cqes + 16 * parameters.cq_entries)
    with (
        mmap.mmap(ring, size, offset=abi.IORING_OFF_SQ_RING) as rings,
        mmap.mmap(ring, 64 * parameters.sq_entries, offset=abi.IORING_OFF_SQES) as entries,
    ):
        entry = abi.io_uring_sqe(opcode=abi.IORING_OP_NOP, user_data=(1 << 64) - 5)
        entries[:64] = bytes(entry)
        rings[sq.array : sq.array + 4] = bytes(4)
        rings[sq.tail : sq.tail + 4] = (1).to_bytes(4, "little")
        assert abi.io_uring_enter(ring, 1, 1, abi.IORING_ENTER_GETEVENTS) == 1
        assert rings[cq.tail : cq.tail + 4] == (1).to_bytes(4, "little")
        completion = abi.io_uring_cqe.from_buffer_copy(rings, cq.cqes)
        assert (completion.user_data, completion.res) == ((1 << 64) - 5, 0)


def test_a_wait_ends_after_its_time(ring: int) -> None:
    with pytest.raises(OSError, match="io_uring_enter") as caught:
        wait(ring, 0.01)
    assert (caught.value.errno, caught.value.filename) == (errno.ETIME, ring)


def test_a_signal_ends_a_wait(ring: int) -> None:
    error = interrupted(lambda: abi.io_uring_enter(ring, 0, 1, abi.IORING_ENTER_GETEVENTS))
    assert isinstance(error, InterruptedError)


def test_nothing_to_do_is_done_at_once(ring: int) -> None:
    assert abi.io_uring_enter(ring, 0, 0, 0) == 0


@pytest.mark.parametrize(("entries", "flags"), [(0, 0), (1 << 31, 0), (4, 1 << 31)])
def test_what_a_ring_cannot_be_is_einval(entries: int, flags: int) -> None:
    with pytest.raises(OSError, match="io_uring_setup") as caught:
        abi.io_uring_setup(entries, abi.io_uring_params(flags=flags))
    assert caught.value.errno == errno.EINVAL


def test_what_is_no_ring_is_refused(parameters: abi.io_uring_params) -> None:
    with pytest.raises(OSError) as caught:
        abi.io_uring_enter(-1, 0, 0, 0)
    assert caught.value.errno == errno.EBADF
    null = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(OSError) as caught:
        abi.io_uring_enter(null, 0, 0, 0)
    os.close(null)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_no_descriptor_left_is_emfile(parameters: abi.io_uring_params) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="io_uring_setup") as caught:
            abi.io_uring_setup(1, parameters)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
