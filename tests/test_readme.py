"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import interpreters

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def example() -> str:
    found = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def test_the_device_of_ones_own_works_and_takes_under_60_lines() -> None:
    assert len(example().splitlines()) < 60
    assert interpreters.run([sys.executable, "-W", "error", "-X", "dev"], "-c", example()) == "HELLO\n"


def test_the_device_of_ones_own_type_checks(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(example())
    command = [sys.executable, "-m", "mypy", "--strict", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_commands_it_names_exist() -> None:
    for command in set(re.findall(r"-m lguestlib (\w+)", TEXT)):
        shown = interpreters.run([sys.executable], "-m", "lguestlib", command, "--help")
        assert "examples:" in shown
    assert (ROOT / "tests/run").is_file()
