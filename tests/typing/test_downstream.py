"""What mypy makes of the library from outside, with nothing but its own inline types."""

import os
import re
import subprocess
import sys
from pathlib import Path

import interpreters
import pytest

SAMPLE = Path(__file__).with_name("downstream.py")

_EXPECTATION = re.compile(r"^( *)(\w+)(?:: [^=]+)? = .*  # ([\w\[\], .|]+)$")


def mypy(file: Path) -> tuple[int, list[str]]:
    """The exit status of mypy --strict for *file*, and what it says, without a configuration of ours."""
    if subprocess.run([sys.executable, "-m", "mypy", "--version"], capture_output=True).returncode:
        pytest.skip("mypy does not run under this interpreter: pip install mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={file.parent / 'cache'}"]
    command += ["--no-error-summary", "--hide-error-context", "--no-color-output", "--no-pretty", str(file)]
    environment = os.environ | {"MYPYPATH": str(interpreters.SOURCE)}
    done = subprocess.run(command, env=environment, cwd=file.parent, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines() + done.stderr.splitlines()


def test_the_sample_does_what_it_says() -> None:
    shown = interpreters.run([sys.executable, "-X", "dev", "-W", "error"], str(SAMPLE))
    assert shown == "[b'desserts', b'evil'] PowerOff(verdict=0)\n"


def test_public_names_have_the_types_the_sample_says_and_no_any(tmp_path: Path) -> None:
    lines: list[str] = []
    expected: list[str] = []
    for line in SAMPLE.read_text().splitlines():
        lines.append(line)
        found = _EXPECTATION.match(line)
        if found:
            indentation, name, type = found.groups()
            lines.append(f"{indentation}reveal_type({name})")
            expected.append(type)
    assert len(expected) == SAMPLE.read_text().count("  # ") > 15
    file = tmp_path / "sample.py"
    file.write_text("\n".join(lines) + "\n")
    status, said = mypy(file)
    assert status == 0, said
    revealed = [re.sub(r"\b(?:\w+\.)+(?=\w)", "", line) for line in said]
    assert [line.partition('Revealed type is "')[2].rstrip('"') for line in revealed] == expected


MISUSES = [
    "memory.read(host, 1)",
    "memory.read(0x1000, 1)",
    "memory.host_address(host)",
    "GuestRange(host, 1)",
    "Buffer(host, 1)",
    "Buffer(0x1000, 1)",
    "QueueLayout.contiguous(0, 8, host)",
    "QueueLayout(0, 8, guest, head, guest)",
    "Chain(position)",
    "Chain(3)",
    "Chain(guest)",
    "SplitDeviceQueue(layout, memory, 0, head)",
    "SplitDeviceQueue(layout, memory, 0, 5)",
    "driver.add([], [buffer], 'token')",
    "driver.add([guest], [], 1)",
    "machine.add(queue)",
]
"""Each one takes one kind of number for another, or something else for what it is not."""

_PREPARED = """\
from lguestlib.memory.address import GuestAddress, GuestRange, HostAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.mmio_machine import MmioMachine
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Queue
from lguestlib.virtio.layout import DescriptorIndex, QueueLayout, RingIndex
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue
def misuse(
    guest: GuestAddress, host: HostAddress, head: DescriptorIndex, position: RingIndex, queue: Queue,
    memory: GuestMemory, layout: QueueLayout, buffer: Buffer, driver: SplitDriverQueue[int],
    machine: MmioMachine,
) -> None:
"""


def test_one_kind_of_number_is_not_taken_for_another(tmp_path: Path) -> None:
    file = tmp_path / "misuse.py"
    file.write_text(_PREPARED + "".join(f"    {misuse}\n" for misuse in MISUSES))
    status, said = mypy(file)
    first = _PREPARED.count("\n") + 1
    errors = {
        int(found[1]): found[2]
        for line in said
        if (found := re.match(r"misuse\.py:(\d+): error: .*\[([\w-]+)\]$", line))
    }
    assert status == 1
    told = {misuse: errors.get(first + number) for number, misuse in enumerate(MISUSES)}
    assert [misuse for misuse, code in told.items() if code not in ("arg-type", "list-item")] == [], said
    assert set(errors) <= set(range(first, first + len(MISUSES))), said
