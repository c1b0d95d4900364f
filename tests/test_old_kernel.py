"""The launcher on a kernel that has none of the calls of the last ten years."""

import errno
import os
import subprocess
import sys

import interpreters
import pytest

YOUNG_CALLS = """
import errno, os
from lguestlib.abi import membarrier, memfd, io_uring
def refused(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        print(call.__name__, errno.errorcode[error.errno])
    else:
        print(call.__name__, "worked")
refused(os.getrandom, 1)
refused(os.memfd_create, "x")
refused(os.pidfd_open, os.getpid())
refused(os.preadv, 0, [bytearray(8)], -1, os.RWF_NOWAIT)
refused(membarrier.membarrier, 0)
refused(memfd.memfd, "x", 1)
refused(io_uring.io_uring_setup, 1, io_uring.io_uring_params())
"""

SESSION = "write 0 seven; read 0; flush; rand 16; ping; ping 192.168.19.1 3"


@pytest.fixture(params=["this interpreter", "32 bits"])
def interpreter(request: pytest.FixtureRequest) -> list[str]:
    """This Python and a 32-bit one."""
    return [sys.executable] if request.param == "this interpreter" else interpreters.i386_or_skip()


def run(interpreter: list[str], *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(interpreters.SOURCE), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        interpreters.on_old_kernel(*interpreter, *arguments), env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def test_what_is_to_be_absent_is_absent(interpreter: list[str]) -> None:
    done = run(interpreter, "-c", YOUNG_CALLS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "getrandom", "ENOSYS", "memfd_create", "ENOSYS", "pidfd_open", "ENOSYS",
        "preadv", errno.errorcode[errno.EOPNOTSUPP], "membarrier", "ENOSYS", "memfd", "ENOSYS",
        "io_uring_setup", "ENOSYS",
    ]  # fmt: skip


def test_a_session_has_its_disk_its_network_and_its_randomness(interpreter: list[str]) -> None:
    done = run(interpreter, "-m", "lguestlib", "run", "--hypervisor", "inprocess", "--exec", SESSION)
    assert done.returncode == 0, done.stderr
    assert "seven" in done.stdout
    assert "3 sent, 3 received" in done.stdout


@pytest.mark.parametrize(
    "command", [["probe"], ["ping", "--hypervisor", "inprocess", "--count", "3"], ["--help"]], ids=" ".join
)
def test_other_commands_do_not_need_young_calls_either(interpreter: list[str], command: list[str]) -> None:
    done = run(interpreter, "-m", "lguestlib", *command)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
