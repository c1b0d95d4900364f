"""`run` where the kernel has no descriptor or no memory left: one line, and the status of a failure."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable

import interpreters
import pytest

WORDS = ("run", "--hypervisor", "inprocess", "--memory", "64", "--exec", "rand 4")


def run(limit: int, number: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The command with so low a *limit*."""
    lower: Callable[[], None] = lambda: resource.setrlimit(limit, (number, number))
    command = [sys.executable, "-m", "lguestlib", *words]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(interpreters.SOURCE)}, preexec_fn=lower, capture_output=True, text=True, timeout=60
    )  # fmt: skip


@pytest.mark.parametrize("number", range(8, 18, 2))
def test_without_a_descriptor_for_its_eventfds_a_session_does_not_begin(number: int) -> None:
    ended = run(resource.RLIMIT_NOFILE, number, *WORDS)
    assert ended.returncode == 1 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.endswith("Too many open files (ulimit -n raises the limit)")


def test_without_memory_for_its_guest_a_session_does_not_begin() -> None:
    ended = run(resource.RLIMIT_AS, 2 << 30, *WORDS[:4], "3000", *WORDS[5:])
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "lguestlib: --memory 3000: Cannot allocate memory\n"
