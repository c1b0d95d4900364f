"""The fence: that it is one, and that this machine needs one."""

import os
import platform
import subprocess
import sys
import threading
import time

import interpreters
import pytest

from lguestlib.abi.membarrier import MEMBARRIER_CMD_GLOBAL_EXPEDITED, MEMBARRIER_CMD_QUERY
from lguestlib.abi.membarrier import membarrier as call_membarrier
from lguestlib.memory import fence as module
from lguestlib.memory.fence import new_acquire, new_fence
from memory import single_step, store_buffering

LOCATIONS = 200_000
BUDGET = 3.0
"""Seconds for all the rounds of one kind."""


def _both_old(kind: str, seconds: float) -> tuple[int, int]:
    """In how many rounds, and of how many, both sides loaded what was there before the stores."""
    fd = os.memfd_create("litmus")
    sides: list[subprocess.Popen[bytes]] = []
    try:
        os.ftruncate(fd, store_buffering.AREAS * LOCATIONS)
        for side in (0, 1):
            command = [sys.executable, store_buffering.__file__, str(fd), str(side), str(LOCATIONS), kind]
            environment = os.environ | {"PYTHONPATH": str(interpreters.SOURCE)}
            sides.append(subprocess.Popen(command, env=environment, pass_fds=[fd]))
        try:
            sides[0].wait(seconds)
        except subprocess.TimeoutExpired:
            os.pwrite(fd, b"\1", 2 * LOCATIONS)
        assert [side.wait(10) for side in sides] == [0, 0]
        results = [os.pread(fd, LOCATIONS, (4 + side) * LOCATIONS) for side in (0, 1)]
    finally:
        for process in sides:
            process.kill()
            process.wait()
        os.close(fd)
    rounds = min(len(result.rstrip(b"\0")) for result in results) - 1
    return sum(pair == (2, 2) for pair in zip(results[0][1 : rounds + 1], results[1][1 : rounds + 1])), rounds


def test_s21_s22_store_buffering_is_seen_without_the_fence_and_never_with_it() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor reorders nothing that it can see itself (taskset -c 0,1 gives two)")
    missed, rounds = _both_old("fence", BUDGET)
    assert missed == 0, f"{missed} of {rounds} rounds"
    ends, control = time.monotonic() + BUDGET, 0
    while (left := ends - time.monotonic()) > 0:
        missed, more = _both_old("none", left)
        control += more
        if missed and rounds >= more // 100:
            return
    pytest.skip(
        f"none missed in {rounds} rounds with the fence, but it says nothing: nor in {control} without,"
        " because this interpreter stores too much between two statements, or the machine is busy"
        " (run it with CPython 3.11 or 3.12 on an idle x86-64 machine)"
    )


def test_s21_the_fence_is_a_locked_instruction() -> None:
    """What the litmus test cannot see: even a call of nothing takes longer than a store is held up."""
    if platform.machine() != "x86_64" or sys.maxsize < 1 << 32:
        pytest.skip(f"instructions of x86-64 are read, this is {platform.machine()}: run this on x86-64")
    try:
        without, with_fence = single_step.full_fences("none"), single_step.full_fences("fence")
    except PermissionError as error:
        pytest.skip(f"{error} (sysctl kernel.yama.ptrace_scope=0, or a container with CAP_SYS_PTRACE)")
    assert with_fence > without


@pytest.mark.parametrize(
    ("code", "full"),
    [
        ("f0 0f b1 17", True),  # lock cmpxchg %edx,(%rdi)
        ("66 f0 48 83 0c 24 00", True),  # lock orq $0,(%rsp)
        ("0f ae f0", True),  # mfence
        ("87 07", True),  # xchg %eax,(%rdi)
        ("48 87 07", True),
        ("87 c1", False),  # xchg %eax,%ecx
        ("0f ae f8", False),  # sfence
        ("0f ae e8", False),  # lfence
        ("0f b1 17", False),
        ("48 89 07", False),
    ],
)
def test_a_full_fence_is_told_by_its_code(code: str, full: bool) -> None:
    assert single_step.is_full_fence(bytes.fromhex(code).ljust(15, b"\x90")) is full


def test_a_fence_is_its_threads_own_and_never_waits() -> None:
    fences = [new_fence() for _ in range(2)]
    assert fences[0] is not fences[1]
    running = threading.Event()

    def spin() -> None:
        while not running.is_set():
            fences[0]()

    thread = threading.Thread(target=spin)
    thread.start()
    for _ in range(10_000):
        fences[1]()
    running.set()
    thread.join(10)
    assert not thread.is_alive()


def test_s23_an_acquire_is_needed_where_loads_are_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRONGLY_ORDERED", True)
    assert new_acquire() is None
    monkeypatch.setattr(module, "STRONGLY_ORDERED", False)
    assert new_acquire() is not None


def test_elsewhere_the_kernel_is_asked_for_a_barrier_that_other_processes_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def membarrier(command: int) -> int:
        asked.append(command)
        return call_membarrier(command)

    try:
        supported = call_membarrier(MEMBARRIER_CMD_QUERY)
    except OSError as error:
        pytest.skip(f"{error} (a kernel with CONFIG_MEMBARRIER has it)")
    if not supported & MEMBARRIER_CMD_GLOBAL_EXPEDITED:
        pytest.skip("no global expedited membarrier (Linux 4.16 and later have it)")
    monkeypatch.setattr(module, "membarrier", membarrier)
    monkeypatch.setattr(module, "STRONGLY_ORDERED", False)
    fence = new_fence()
    for _ in range(3):
        fence()
    assert asked == [MEMBARRIER_CMD_GLOBAL_EXPEDITED] * 3
    monkeypatch.setattr(sys, "platform", "darwin")
    new_fence()()
    assert len(asked) == 3
