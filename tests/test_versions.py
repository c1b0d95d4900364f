"""The other releases of CPython that this host has run the library, with every warning an error."""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import interpreters
import pytest

VERSIONS = ("3.11", "3.12", "3.13", "3.14", "3.13t", "3.14t")
STRICT = ("-X", "dev", "-W", "error")

IMPORT_ALL = """
import importlib, pkgutil, lguestlib
for module in pkgutil.walk_packages(lguestlib.__path__, "lguestlib."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@cache
def interpreter(version: str) -> str | None:
    """A CPython of that release, on the path or among pyenv's."""
    if sys.version_info[:2] == tuple(int(part) for part in version.rstrip("t").split(".")) and "t" not in version:
        return sys.executable
    beside = sorted(Path.home().glob(f".pyenv/versions/{version.rstrip('t')}.*/bin/python{version}"))
    for command in [shutil.which(f"python{version}"), *map(str, beside)]:
        if command and subprocess.run([command, "-c", ""], capture_output=True).returncode == 0:
            return command
    return None


@pytest.fixture(params=VERSIONS)
def python(request: pytest.FixtureRequest) -> str:
    version = str(request.param)
    return interpreter(version) or pytest.skip(f"no CPython {version} here (pyenv install {version} builds one)")


def test_every_module_imports(python: str) -> None:
    interpreters.run([python, *STRICT], "-c", IMPORT_ALL)


def test_a_session_in_this_process(python: str) -> None:
    commands = "ping; write 1 hello; read 1; flush; rand 16; reset 5; ping 192.168.19.1 20; stat"
    shown = interpreters.run(
        [python, *STRICT], "-m", "lguestlib", "run", "--hypervisor", "inprocess", "--exec", commands
    )
    assert "20 sent, 20 received" in shown and "|hello....." in shown


def test_a_session_on_whatever_hypervisor_there_is(python: str) -> None:
    shown = interpreters.run([python, *STRICT], "-m", "lguestlib", "ping", "--count", "3", "--json")
    assert '"received": 3' in shown
