"""A file that becomes shorter after it was mapped: whoever touches what has gone goes on, and is told (T13)."""

import mmap
import os
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import interpreters
import pytest
from test_versions import VERSIONS, interpreter

from lguestlib.abi.memfd import F_SEAL_SHRINK, get_seals, memfd
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.dirty_log import DirtyLog
from lguestlib.memory.mapping import MappingLost, map_shared
from lguestlib.memory.region import Region

PAGE = mmap.PAGESIZE
PAGES = 8


@pytest.fixture
def fd() -> Iterator[int]:
    """A file in memory, of ones, that cannot be sealed."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(b"\1" * (PAGES * PAGE))
        file.flush()
        yield file.fileno()


ACCESSES: dict[str, Callable[[memoryview], object]] = {
    "an item": lambda view: view[0],
    "a word": lambda view: view[:PAGE].cast("H")[1],
    "a structure": lambda view: struct.unpack_from("<QIHH", view, 16),
    "a copy": lambda view: bytes(view),
    "a list": lambda view: view[:64].tolist(),
    "a comparison": lambda view: view == bytes(len(view)),
    "a store": lambda view: view.__setitem__(5, 7),
    "a copy to it": lambda view: view.__setitem__(slice(0, len(view)), b"x" * len(view)),
    "across two pages": lambda view: struct.unpack_from("<Q", view, PAGE - 4),
}


@pytest.mark.parametrize("name", ACCESSES)
def test_t13_touching_what_has_gone_goes_on_and_is_told_once(fd: int, name: str) -> None:
    lost: list[MappingLost] = []
    mapping, skip = map_shared(fd, PAGES * PAGE, 0, "memory: ", lost.append)
    with closing(mapping), memoryview(mapping) as view:
        os.ftruncate(fd, 0)
        assert lost == []
        ACCESSES[name](view)
        ACCESSES["a copy"](view)
        (error,) = lost
        assert str(error) == "memory: its file has become shorter than what is used of it"


def test_t13_zeros_are_there_then_and_what_is_written_stays_and_the_rest_is_shared_still(fd: int) -> None:
    mapping, skip = map_shared(fd, 3 * PAGE, 100)
    with closing(mapping), memoryview(mapping) as view:
        os.ftruncate(fd, PAGE)
        assert view[PAGE : 2 * PAGE] == bytes(PAGE)
        view[PAGE + 1] = 9
        assert bytes(view[PAGE : PAGE + 3]) == b"\0\t\0"
        view[7] = 8
        assert os.pread(fd, 2, 7) == b"\x08\1"


def test_t13_a_system_call_says_efault(fd: int) -> None:
    mapping, _ = map_shared(fd, PAGE, 0)
    with closing(mapping), memoryview(mapping) as view, open("/dev/zero", "rb", buffering=0) as zero:
        os.ftruncate(fd, 0)
        with pytest.raises(OSError, match="Bad address"):
            os.readv(zero.fileno(), [view])


def test_t13_a_file_that_can_be_sealed_is_and_stays_as_long_as_it_is() -> None:
    fd = memfd("sealed", PAGES * PAGE)
    mapping, _ = map_shared(fd, PAGE, 0)
    with closing(mapping):
        assert get_seals(fd) == F_SEAL_SHRINK
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    os.close(fd)


def test_t13_a_region_and_a_log_tell_of_their_loss(fd: int) -> None:
    lost: list[str] = []
    region = Region.from_fd(GuestAddress(0), PAGE, fd, 0, lambda error: lost.append(str(error)))
    log = DirtyLog(fd, PAGE, PAGE, lambda error: lost.append(str(error)))
    with closing(region), closing(log):
        os.ftruncate(fd, 0)
        with region.view() as view:
            assert view[0] == 0
        log.mark_all([(GuestAddress(0), 32 * 4096)])
    assert [line.split(":")[0] for line in lost] == ["memory region", "dirty log"]


def test_t13_many_threads_touch_what_goes_at_the_same_time() -> None:
    wrong: list[object] = []
    turns = 15

    def work() -> None:
        for _ in range(turns):
            lost: list[MappingLost] = []
            fd = os.memfd_create("unsealable", os.MFD_CLOEXEC)
            os.ftruncate(fd, 64 * PAGE)
            mapping, _ = map_shared(fd, 64 * PAGE, 0, "", lost.append)
            with closing(mapping), memoryview(mapping) as view:
                view[:] = b"\1" * len(view)
                os.ftruncate(fd, 0)
                for at in range(0, 64 * PAGE, PAGE):
                    if view[at] or any(struct.unpack_from("<QQ", view, at)):
                        wrong.append(at)
            os.close(fd)
            if len(lost) != 1:
                wrong.append(lost)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


PROGRAM = """
import faulthandler, mmap, os, signal, sys
from lguestlib.memory.mapping import map_shared

def unsealable():
    fd = os.memfd_create("file", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    return fd

def crash():
    fd = unsealable()
    other = mmap.mmap(fd, 4096)
    os.ftruncate(fd, 0)
    other[0]

def ours():
    lost, fd = [], unsealable()
    mapping, _ = map_shared(fd, 4096, 0, "", lost.append)
    os.ftruncate(fd, 0)
    assert mapping[0] == 0 and len(lost) == 1
    return mapping

{before}
kept = ours()
{after}
print("alive", flush=True)
{end}
"""
ENDS = {"a fault elsewhere": "crash()", "a signal": "os.kill(os.getpid(), signal.SIGBUS)"}


def _ended(before: str, after: str, end: str) -> "subprocess.CompletedProcess[str]":
    program = PROGRAM.format(before=before, after=after, end=end)
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"PYTHONPATH": str(interpreters.SOURCE)},
    )  # fmt: skip
    assert ended.stdout == "alive\n", ended.stderr
    return ended


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("trace", ["none", "before", "after", "after, and one more mapping"])
def test_another_bus_error_still_ends_the_process_and_faulthandler_tells_of_it(name: str, trace: str) -> None:
    enable = "faulthandler.enable()"
    before = enable if trace == "before" else ""
    after = f"{enable}\n" if trace.startswith("after") else ""
    ended = _ended(before, after + ("kept2 = ours()" if "more" in trace else ""), ENDS[name])
    assert ended.returncode == -7
    assert ("Fatal Python error: Bus error" in ended.stderr) == (trace != "none")


def test_a_handler_of_the_programs_own_gets_what_is_not_of_these_mappings() -> None:
    handler = "signal.signal(signal.SIGBUS, lambda *about: print('handled', file=sys.stderr))"
    assert _ended(handler, "", ENDS["a signal"]).stderr == "handled\n"


def test_a_mapping_that_nobody_has_closed_is_forgotten() -> None:
    assert _ended("", "kept = None", ENDS["a fault elsewhere"]).returncode == -7


def test_it_is_so_under_every_release_there_is_here() -> None:
    for python in filter(None, map(interpreter, VERSIONS)):
        _works_under([python])


def test_it_is_so_under_a_32_bit_interpreter() -> None:
    _works_under(interpreters.i386_or_skip())


def _works_under(command: list[str]) -> None:
    program = PROGRAM.format(before="", after="", end="kept.close()")
    assert interpreters.run(command, "-c", program) == "alive\n"
