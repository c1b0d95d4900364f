"""User-mode Linux's process and its kernel, without a guest; guests are in tests/cli/test_uml.py."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import sessions
from runtime.rigs import eventually, nothing_left
from sessions import Session

from lguestlib.abi.virtio_ids import VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_RNG
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.uml import kernel as uml_kernel
from lguestlib.runtime.uml import machine as uml_machine
from lguestlib.runtime.uml import terminal as uml_terminal
from lguestlib.runtime.uml.kernel import UmlKernel
from lguestlib.runtime.uml.machine import UmlMachine
from lguestlib.runtime.uml.process import TAIL, GuestProcess
from lguestlib.runtime.uml.terminal import PatientTerminal
from lguestlib.virtio.device import Device, Queue


class Some(Device):
    """A device of any type, whose queues nobody looks at."""

    def __init__(self, device_type: int, name: str) -> None:
        super().__init__(name)
        self.device_type = device_type

    def queues(self) -> tuple[Queue, ...]:
        return ()


def shell(script: str) -> GuestProcess:
    return GuestProcess(["/bin/sh", "-c", script], os.environ)


def is_alive(pid: int) -> bool:
    """Whether the process has not ended; one that waits to be asked how has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_its_exit_status_and_the_last_of_what_it_says_are_known() -> None:
    with nothing_left():
        process = shell("echo one; echo; echo two >&2; exit 7")
        assert process.wait() == 7
        assert process.last_lines == ["one", "two"]
        process.kill()


def test_a_signal_that_killed_it_is_known_and_so_is_an_endless_talk_bounded() -> None:
    with nothing_left():
        process = shell("yes $(seq 100) | head -c 3000000; kill -SEGV $$")
        assert process.wait() == -signal.SIGSEGV
        assert 0 < sum(map(len, process.last_lines)) <= TAIL


def test_it_has_no_input_and_a_session_of_its_own() -> None:
    process = shell("cat; ps -o sid= -p $$; echo $$")
    assert process.wait() == 0
    session, pid = process.last_lines
    assert int(session) == int(pid)


def test_a_kill_takes_all_it_has_started() -> None:
    with nothing_left():
        process = shell("sleep 1000 & echo $!; sleep 1000")
        ended: list[int] = []
        thread = threading.Thread(target=lambda: ended.append(process.wait()))
        thread.start()
        eventually(lambda: bool(process.last_lines), "the child's number")
        process.kill()
        thread.join()
        assert ended == [-signal.SIGKILL]
        eventually(lambda: not is_alive(int(process.last_lines[0])), "the child's end")


def test_what_it_leaves_behind_is_killed_when_it_ends() -> None:
    with nothing_left():
        # That has its output open: the end of the output is not waited for.
        process = shell("sleep 1000 & echo $!")
        assert process.wait() == 0
        eventually(lambda: not is_alive(int(process.last_lines[0])), "the child's end")


PROGRAM = """
import os, signal, sys
from lguestlib.runtime.uml.process import GuestProcess
process = GuestProcess(["/bin/sh", "-c", "sleep 1000 & echo $$ $!; sleep 1000"], os.environ)
print(os.read(process._output, 100).decode(), flush=True)
sys.stdin.read()
"""


def test_all_of_it_ends_with_the_process_that_started_it() -> None:
    with Session("-c", PROGRAM, command=sessions.PYTHON) as program:
        leader, child = map(int, program.expect("\n").split())
        assert is_alive(leader) and is_alive(child)
        program.signal(signal.SIGKILL)
        for pid in (leader, child):
            eventually(lambda: not is_alive(pid), "its end")


def test_it_has_no_signal_blocked_that_this_process_has() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        with nothing_left():
            assert shell("kill $$; exit 3").wait() == -signal.SIGTERM
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_program_that_is_not_there_leaves_nothing() -> None:
    with nothing_left(), pytest.raises(FileNotFoundError):
        GuestProcess(["/missing"], os.environ)


def test_memory_goes_where_there_is_room_and_code_may_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # /proc and /sys have no room.
    monkeypatch.setattr(uml_machine, "MEMORY_PLACES", ("/missing", "/proc", str(tmp_path), "/tmp"))
    assert uml_machine._memory_place(1 << 20) == str(tmp_path)
    assert uml_machine._memory_place(1 << 60) == "/tmp"


@pytest.mark.parametrize(
    ("lines", "status", "reason"),
    [
        ([], -6, "signal 6"),
        (["a", "no room"], 1, "exit status 1: no room"),
        (["Kernel panic - not syncing: Oh", "CPU: 0", "trace"], -6, "panic: Oh"),
    ],
)
def test_a_crash_has_the_reason_a_panic_gives_or_the_last_line(
    lines: list[str], status: int, reason: str
) -> None:
    assert uml_machine._last_words(lines, status) == reason


def test_drivers_come_from_the_folder_of_the_kernels_release(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "6.1"
    folder.mkdir()
    (folder / "modules.dep").write_text("kernel/virtio_console.ko:\n")
    (folder / "modules.builtin").write_text("kernel/virtio_net.ko\n")
    monkeypatch.setattr(uml_kernel, "MODULES", ("/missing", str(tmp_path)))
    said: list[str] = []
    devices = [Some(VIRTIO_ID_NET, "net0"), Some(VIRTIO_ID_RNG, "rng0"), Some(VIRTIO_ID_CONSOLE, "console0")]
    assert UmlKernel("/linux", "6.1").drivers(devices, said.append) == [folder / "kernel/virtio_console.ko"]
    [line] = said
    assert line.startswith("rng0 is there, but out of the guest's reach:") and "virtio_rng" in line
    assert UmlKernel("/linux", "6.2").drivers(devices, said.append) == []
    (folder / "modules.dep").write_text("")
    with pytest.raises(LaunchError, match="no module virtio_console"):
        UmlKernel("/linux", "6.1").drivers(devices, said.append)


def test_a_folder_whose_name_cannot_be_told_the_kernel_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "a b"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    with nothing_left(), UmlMachine(UmlKernel("/linux", "6.1"), 1 << 28, print) as machine:
        with pytest.raises(LaunchError, match=r"a space or a colon \(TMPDIR=/tmp makes another\)"):
            machine.add(Some(VIRTIO_ID_NET, "net0"))
    assert list(place.iterdir()) == []


def test_a_folder_whose_name_is_too_long_for_a_socket_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / ("n" * 120)
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    with nothing_left(), UmlMachine(UmlKernel("/linux", "6.1"), 1 << 28, print) as machine:
        with pytest.raises(LaunchError, match=r"too long \(TMPDIR=/tmp makes another\)"):
            machine.add(Some(VIRTIO_ID_NET, "net0"))
    assert list(place.iterdir()) == []


@contextmanager
def patient() -> Iterator[tuple[PatientTerminal, int]]:
    """A terminal whose input is what is written to the descriptor."""
    reader, keyboard = os.pipe()
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        yield PatientTerminal(reader, null, lambda: None, lambda error: None), keyboard
    finally:
        for fd in (reader, keyboard, null):
            os.close(fd)


def test_input_waits_until_the_guest_has_shown_something() -> None:
    room = memoryview(bytearray(16))
    with patient() as (terminal, keyboard):
        os.write(keyboard, b"early")
        for _ in range(3):
            with pytest.raises(InterruptedError):
                terminal.read([room])
        assert terminal.write([memoryview(bytearray(b"> "))]) == 2
        assert terminal.read([room]) == 5 and bytes(room[:5]) == b"early"


def test_input_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uml_terminal, "SILENCE_SECONDS", 0.05)
    room = memoryview(bytearray(16))
    with patient() as (terminal, keyboard):
        os.write(keyboard, b"early")
        begun, length = time.monotonic(), 0
        while not length:
            with suppress(InterruptedError):
                length = terminal.read([room])
        assert length == 5 and time.monotonic() - begun >= 0.05
