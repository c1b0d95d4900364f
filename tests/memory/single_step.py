"""The machine instructions of a call, one at a time, by ptrace(2) on x86-64.

    python single_step.py fence|none

is the process to look at: it stops itself just before and just after it calls a
fence, or nothing.  `full_fences` runs it and counts.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import interpreters

from lguestlib.abi.libc import check, function
from lguestlib.memory.fence import new_fence

PTRACE_TRACEME = 0
PTRACE_SINGLESTEP = 9
PTRACE_GETREGS = 12

_STEPS_MAX = 200_000
_RIP = 16
_PREFIXES = frozenset(b"\x66\x67\xf2\xf3\x2e\x36\x3e\x26\x64\x65")


def ptrace(request: int, pid: int, data: int = 0) -> int:
    """ptrace(2).  Raises OSError."""
    call = function(
        "ptrace", ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, result=ctypes.c_long
    )
    return check(call(request, pid, 0, data), "ptrace", request)


def is_full_fence(code: bytes) -> bool:
    """Whether the instruction that *code* starts with lets no load pass a store before it.

    AMD64 Architecture Programmer's Manual 2, 7.1 and 7.4; Intel SDM 3A, "Memory Ordering".
    """
    at = 0
    while code[at] in _PREFIXES:
        at += 1
    if code[at] == 0xF0:  # lock
        return True
    if code[at] & 0xF0 == 0x40:  # rex
        at += 1
    if code[at] in (0x86, 0x87):  # xchg is locked where one operand is memory
        return code[at + 1] >> 6 != 3
    return code[at : at + 2] == b"\x0f\xae" and code[at + 2] in range(0xF0, 0xF8)  # mfence


def full_fences(kind: str) -> int:
    """How many full fences there are between the two stops, of which some may be the stops' own.

    Raises PermissionError where processes may not be traced.
    """
    process = subprocess.Popen(
        [sys.executable, __file__, kind],
        env=os.environ | {"PYTHONPATH": f"{interpreters.SOURCE}:{Path(interpreters.__file__).parent}"},
    )
    try:
        _, status = os.waitpid(process.pid, 0)
        if not os.WIFSTOPPED(status):
            raise PermissionError(f"ptrace: not permitted, status {status:#x}")
        registers = (ctypes.c_uint64 * 27)()
        found = 0
        with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as memory:
            for _ in range(_STEPS_MAX):
                ptrace(PTRACE_GETREGS, process.pid, ctypes.addressof(registers))
                found += is_full_fence(os.pread(memory.fileno(), 15, registers[_RIP]))
                ptrace(PTRACE_SINGLESTEP, process.pid)
                _, status = os.waitpid(process.pid, 0)
                if os.WSTOPSIG(status) != signal.SIGTRAP:
                    return found
        raise AssertionError(f"no end after {_STEPS_MAX} instructions")
    finally:
        process.kill()
        process.wait()


def main(kind: str) -> None:
    """Be looked at."""

    def nothing() -> None:
        pass

    call = new_fence() if kind == "fence" else nothing
    for _ in range(100):
        call()
    ptrace(PTRACE_TRACEME, 0)
    pid, stop, kill = os.getpid(), signal.SIGSTOP, os.kill
    kill(pid, stop)
    call()
    kill(pid, stop)


if __name__ == "__main__":
    main(sys.argv[1])
