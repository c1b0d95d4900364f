"""The wheel: what is in it, and that it works where nothing else is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import interpreters
import pytest

ROOT = Path(__file__).parent.parent


def call(*command: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    """Run *command* as somebody does who does not have this repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by pip from a copy of what the repository holds."""
    place = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, place / "tree", ignore=unwanted)
    if call(sys.executable, "-m", "pip", "--version", directory=place).returncode:
        pytest.skip("pip is not installed: python3 -m ensurepip")
    words = ("wheel", "--quiet", "--no-deps", "--wheel-dir", ".", "./tree")
    built = call(sys.executable, "-m", "pip", *words, directory=place)
    if built.returncode and "satisfies the requirement setuptools" in built.stderr:
        pytest.skip("setuptools, to build with, cannot be had: set PIP_INDEX_URL to a package index")
    assert built.returncode == 0, built.stderr
    [found] = place.glob("*.whl")
    return found


def test_it_holds_the_library_with_its_types_and_its_guest_and_no_tests(wheel: Path) -> None:
    assert wheel.name.startswith("lguestlib-") and wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        shipped = {name: archive.read(name) for name in names}
    source = interpreters.SOURCE
    wanted = {str(path.relative_to(source)) for path in source.rglob("*.py")} | {"lguestlib/py.typed"}
    guest = [path for path in (source / "lguestlib/runtime/guest").iterdir() if path.is_file()]
    wanted |= {str(path.relative_to(source)) for path in guest} | {"lguestlib/runtime/initramfs/init.sh"}
    assert "lguestlib/runtime/guest/guest.elf" in wanted
    assert set(names) == wanted
    assert all(data == (source / name).read_bytes() for name, data in shipped.items())


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The programs of an environment with the wheel and nothing else."""
    place = wheel.parent / "environment"
    made = call(sys.executable, "-m", "venv", "--without-pip", str(place), directory=wheel.parent)
    if made.returncode:
        pytest.skip(f"no environment can be made: apt-get install python3-venv: {made.stdout}{made.stderr}")
    python = str(place / "bin/python")
    words = ("install", "--quiet", "--no-index", "--no-deps", str(wheel))
    done = call(sys.executable, "-m", "pip", "--python", python, *words, directory=wheel.parent)
    assert done.returncode == 0, done.stderr
    return place / "bin"


def test_a_guest_runs_from_an_environment_with_nothing_else(installed: Path, tmp_path: Path) -> None:
    program = ("-X", "dev", "-W", "error", "-m", "lguestlib", "run", "--exec", "ping; off")
    done = call(str(installed / "python"), *program, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reply from 192.168.19.1" in done.stdout


def test_the_command_is_there_and_knows_its_version(installed: Path, wheel: Path, tmp_path: Path) -> None:
    command = str(installed / "lguestlib")
    done = call(command, "probe", directory=tmp_path)
    assert done.returncode == 0 and "switch interval" in done.stdout, done.stderr
    version = wheel.name.split("-")[1]
    assert call(command, "--version", directory=tmp_path).stdout == f"lguestlib {version}\n"
    assert call(command, "run", "--memory", "0", directory=tmp_path).returncode == 2
