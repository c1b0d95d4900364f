"""Other Python interpreters that tests run code under: another word size, another release or platform."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
SOURCE = _TESTS.parent / "src"
"""The folder to put on another interpreter's PYTHONPATH."""

_OLD_KERNEL = (sys.executable, str(_TESTS / "old_kernel.py"))

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lguestlib"


@cache
def i386() -> list[str] | None:
    """The command of a 32-bit x86 CPython, which takes arguments as any does; None where there is none."""
    command = [str(_CACHE / "i386/usr/bin/python3")]
    try:
        done = subprocess.run([*command, "-c", "import ctypes"], capture_output=True)
    except OSError:
        return None
    return command if done.returncode == 0 else None


def i386_or_skip() -> list[str]:
    """`i386`, or the running test is skipped with the command that fetches one."""
    return i386() or pytest.skip("no 32-bit x86 Python (tests/i386/fetch unpacks one)")


def on_old_kernel(*command: str) -> list[str]:
    """The words that run *command* as on Linux 3.11 (`old_kernel`), or the running test is skipped."""
    machine = os.uname().machine
    if machine not in ("x86_64", "i386", "i586", "i686"):
        pytest.skip(f"system call numbers of {machine} are not known here: run this on x86")
    refusal = _old_kernel_refusal()
    if refusal:
        pytest.skip(f"no seccomp filters here, {refusal} (a kernel with CONFIG_SECCOMP_FILTER has them)")
    return [*_OLD_KERNEL, *command]


@cache
def _old_kernel_refusal() -> str:
    """Why a process cannot be run so here; empty where it can."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([*_OLD_KERNEL, "true"], env=environment, capture_output=True, text=True)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def run(command: list[str], *arguments: str, timeout: float = 60) -> str:
    """What the interpreter *command* prints for *arguments*, with the project's sources on its path.

    Raises AssertionError with its error output where it fails.
    """
    return _run([*command, *arguments], SOURCE, timeout)


def run_tests(command: list[str], *arguments: str, timeout: float = 300) -> str:
    """What this pytest prints for *arguments* under the interpreter *command*, in the project's folder.

    Raises AssertionError with that output where a test fails.
    """
    installed = Path(pytest.__file__).parent.parent
    return _run([*command, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], installed, timeout)


def _run(command: list[str], path: Path, timeout: float) -> str:
    environment = os.environ | {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, env=environment, cwd=_TESTS.parent, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout
