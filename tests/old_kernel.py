"""Run a command as on Linux 3.11: calls the kernel has learned since give ENOSYS.

    python tests/old_kernel.py COMMAND [ARGUMENTS...]

By a seccomp filter, which its children inherit, 32-bit ones too: all numbers from
sched_setattr on, the first call of Linux 3.14, are unknown.
"""

import ctypes
import errno
import os
import struct
import sys

from lguestlib.abi.libc import check, function

FIRST_UNKNOWN = {0xC000_003E: 314, 0x4000_0003: 351}
"""By AUDIT_ARCH: of x86-64, and of i386."""

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_OR_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _ARCH_AT = 0, 4
_ALLOW, _ERRNO = 0x7FFF_0000, 0x0005_0000


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _filter() -> bytes:
    """For each architecture: is it that one?  Then, is the number one of those?"""
    program: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, _ARCH_AT)]
    for arch, first in FIRST_UNKNOWN.items():
        program += [
            (_JUMP_EQUAL, 0, 4, arch),
            (_LOAD, 0, 0, _NUMBER_AT),
            (_JUMP_GREATER_OR_EQUAL, 0, 1, first),
            (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
            (_RETURN, 0, 0, _ALLOW),
        ]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def become_old() -> None:
    """Put the filter on this process, for good.  Raises OSError."""
    words = (ctypes.c_ulong,) * 4
    prctl = function("prctl", ctypes.c_int, *words)
    check(prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    instructions = _filter()
    program = _Program(len(instructions) // 8, instructions)
    check(prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0), "PR_SET_SECCOMP")


if __name__ == "__main__":
    become_old()
    os.execvp(sys.argv[1], sys.argv[1:])
