"""Y1: what one process stores to a live field, another reads whole or not at all."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import interpreters
import pytest
from virtio import tearing

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.region import Region

SECONDS = 0.3
PATIENCE = 10.0
READS = 2000


@contextmanager
def hammered(field: str, how: str) -> Iterator[memoryview]:
    """*field* as this side's queue sees it, while another process stores to it."""
    with GuestMemory([Region.memfd(GuestAddress(0), tearing.SIZE)]) as memory:
        queue = tearing.queue_of(memory, field, other=True)
        fd = memory.regions[0].fd
        command = [sys.executable, tearing.__file__, str(fd), field, how]
        environment = os.environ | {"PYTHONPATH": str(interpreters.SOURCE)}
        writer = subprocess.Popen(command, env=environment, pass_fds=[fd])
        view = tearing.view_of(queue, field)
        try:
            deadline = time.monotonic() + 30
            while not view[0]:
                assert writer.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
            yield view
            assert writer.poll() is None
        finally:
            writer.kill()
            writer.wait()
            view.release()
            queue.release()


@contextmanager
def hammered_by_a_thread(field: str, how: str) -> Iterator[memoryview]:
    """As `hammered`, by another thread of this process."""
    with GuestMemory([Region.memfd(GuestAddress(0), tearing.SIZE)]) as memory:
        queue, other = tearing.queue_of(memory, field, other=True), tearing.queue_of(memory, field)
        view, target = tearing.view_of(queue, field), tearing.view_of(other, field)
        over = threading.Event()

        def store() -> None:
            for _ in tearing.stores(target, how):
                if over.is_set():
                    return

        writer = threading.Thread(target=store)
        writer.start()
        try:
            deadline = time.monotonic() + PATIENCE
            while not view[0]:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            yield view
            assert writer.is_alive()
        finally:
            over.set()
            writer.join()
            for each in (view, target):
                each.release()
            queue.release()
            other.release()


def has_gil() -> bool:
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def seen(view: memoryview, seconds: float) -> set[int]:
    """The values read there for so long, and then until there are two, or for `PATIENCE`."""
    values: set[int] = set()
    starts = time.monotonic()
    while time.monotonic() - starts < (seconds if len(values) > 1 else PATIENCE):
        values.update([view[0] for _ in range(READS)])
    return values


def written(view: memoryview) -> set[int]:
    return {value & (1 << 8 * view.itemsize) - 1 for value in tearing.VALUES}


@pytest.mark.parametrize("field", tearing.FIELDS + tearing.PACKED_FIELDS)
def test_y1_no_value_is_read_that_was_never_written(field: str) -> None:
    with hammered(field, "view") as view:
        found = seen(view, SECONDS)
        assert found <= written(view), sorted(map(hex, found - written(view)))
        assert len(found) > 1


@pytest.mark.parametrize("field", tearing.FIELDS + tearing.PACKED_FIELDS)
def test_y1_nor_is_one_that_another_thread_writes(field: str) -> None:
    """Without the GIL the two run at a time; with it they take turns, between two stores."""
    with hammered_by_a_thread(field, "view") as view:
        found = seen(view, SECONDS / 3)
        assert found <= written(view), sorted(map(hex, found - written(view)))
        assert len(found) > 1


def test_y1_without_the_gil_struct_pack_into_of_another_thread_would_be_caught() -> None:
    if has_gil():
        pytest.skip("threads of this interpreter take turns (python3.14t -m pytest tests/virtio/test_tearing.py has some that do not)")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor sees no store half done (taskset -c 0,1 gives two)")
    with hammered_by_a_thread("used_ring", "pack_into") as view:
        deadline = time.monotonic() + PATIENCE
        while seen(view, SECONDS) <= written(view):
            assert time.monotonic() < deadline, "nothing torn was seen"


@pytest.mark.parametrize("field", ["used_idx", "used_ring"])
def test_y1_struct_pack_into_would_be_caught(field: str) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor sees no store half done (taskset -c 0,1 gives two)")
    with hammered(field, "pack_into") as view:
        deadline = time.monotonic() + PATIENCE
        while seen(view, SECONDS) <= written(view):
            assert time.monotonic() < deadline, "nothing torn was seen"
