"""`lguestlib.abi` imports anywhere: what a platform lacks is found out by calling it."""

import sys

import interpreters

from abi import declarations

_ELSEWHERE = """
import ctypes, errno, os, platform, signal, sys

for name in ("eventfd", "EFD_CLOEXEC", "memfd_create", "MFD_CLOEXEC", "MFD_ALLOW_SEALING"):
    delattr(os, name)
del signal.SIGRTMIN, signal.SIGRTMAX
sys.modules["fcntl"] = None

def no_library(name, **options):
    raise TypeError("a library needs a name")

ctypes.CDLL = no_library
"""
"""A program's start that makes its platform look like one that is not Linux, nor even POSIX."""


def _imports() -> str:
    return "\n".join(f"import lguestlib.abi.{name}" for name in declarations.module_names())


def test_every_module_imports_where_linux_is_not() -> None:
    program = f"{_ELSEWHERE}{_imports()}\nprint('imported')"
    assert interpreters.run([sys.executable], "-c", program) == "imported\n"


def test_every_call_there_is_enosys_and_names_itself() -> None:
    program = f"""{_ELSEWHERE}{_imports()}
from lguestlib import abi
view = memoryview(bytearray(1))
calls = {{
    "eventfd": abi.eventfd.eventfd,
    "memfd_create": lambda: abi.memfd.memfd("", 1),
    "F_ADD_SEALS": lambda: abi.memfd.add_seals(0, 1),
    "F_GET_SEALS": lambda: abi.memfd.get_seals(0),
    "fallocate": lambda: abi.fallocate.fallocate(0, 0, 0, 1),
    "ioctl": lambda: abi.ioctl.ioctl(0, 0, 0, "NOTHING"),
    "syscall": lambda: abi.membarrier.membarrier(0),
    "mprotect": lambda: abi.mmap.mprotect(0, 4096, 0),
    "mmap": lambda: abi.mmap.replace_pages(0, 4096),
    "sigaction": lambda: abi.sigaction.get_action(7),
    "prctl": lambda: abi.prctl.name_thread("x"),
    "unshare": lambda: abi.sched.unshare(0),
    "signal": abi.signals.install_interrupt_handler,
    "readv": lambda: abi.uio.readv(0, [view]),
    "writev": lambda: abi.uio.writev(1, [view]),
    "preadv": lambda: abi.uio.preadv(0, [view], 0),
    "pwritev": lambda: abi.uio.pwritev(1, [view], 0),
}}
for name, call in calls.items():
    try:
        call()
    except OSError as error:
        assert error.errno == errno.ENOSYS, error
        assert str(error).startswith(f"[Errno {{errno.ENOSYS}}] {{name}}: "), error
    else:
        raise AssertionError(name)
print("all")
"""
    assert interpreters.run([sys.executable], "-c", program) == "all\n"


def test_importing_binds_no_function_of_the_c_library() -> None:
    program = f"""
import ctypes, sys
bound = []
sys.addaudithook(lambda event, about: bound.append(event) if event.startswith("ctypes.dl") else None)
ctypes.CDLL(None).getpid
assert bound, "binding is seen"
bound.clear()
{_imports()}
print(bound)
"""
    assert interpreters.run([sys.executable], "-c", program) == "[]\n"
