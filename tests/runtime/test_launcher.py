"""Machines made, booted, booted again, and ended."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from runtime.rigs import nothing_left, open_descriptors

from lguestlib.runtime.backend.script import Script
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.boot import Boot
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.gil import SWITCH_INTERVAL
from lguestlib.runtime.launch import choice
from lguestlib.runtime.launch.choice import choose_hypervisor
from lguestlib.runtime.launcher import Launcher
from lguestlib.runtime.machine import PowerOff, Stopped
from lguestlib.runtime.options import MEBIBYTE, DiskImage, MachineOptions, Randomness, ScratchDisk
from lguestlib.runtime.vm import KvmUnusable

OPTIONS = MachineOptions("inprocess", memory=16 * MEBIBYTE, devices=(ScratchDisk(), Randomness()))
"""No network: a private one would take this process into a namespace."""


@contextmanager
def script(*commands: str) -> Iterator[tuple[Script, Path]]:
    """A console where *commands* are typed, and what it shows: a file, all of it there in the end."""
    fd = os.memfd_create("screen")
    with Script([command.encode() for command in commands], fd, lambda error: None) as typist:
        yield typist, Path(f"/proc/self/fd/{fd}")
    os.close(fd)


def nothing_said(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture(autouse=True)
def everything_is_given_back() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.mark.parametrize(("commands", "verdict"), [(["rand 5"], 0), (["nonsense"], 1)])
def test_a_machine_runs_until_its_guest_switches_off(commands: list[str], verdict: int) -> None:
    with script(*commands) as (typist, screen), Launcher(OPTIONS, typist, nothing_said) as launcher:
        assert launcher.hypervisor == "inprocess"
        assert launcher.run() == PowerOff(verdict)
        assert screen.read_text().endswith("> off\n")


def test_a_reboot_is_a_new_machine_on_the_same_disks() -> None:
    said: list[str] = []
    machines: list[Boot] = []
    with script("write 7 kept", "reboot", "read 7", "reboot") as (typist, screen):
        with Launcher(OPTIONS, typist, said.append) as launcher:
            assert launcher.run(machines.append) == PowerOff(0)
            assert "|kept............|" in screen.read_text()
    assert len(set(machines)) == 3 and said == ["the guest starts over"] * 2


def test_the_switch_interval_is_set_while_it_runs_and_put_back() -> None:
    before = sys.getswitchinterval()
    seen: list[float] = []
    with script() as (typist, _), Launcher(OPTIONS, typist, nothing_said) as launcher:
        launcher.run(lambda machine: seen.append(sys.getswitchinterval()))
    assert seen == [pytest.approx(SWITCH_INTERVAL)]
    assert sys.getswitchinterval() == before


@contextmanager
def silent_launcher() -> Iterator[Launcher]:
    """A launcher whose guest waits for input that does not come."""
    reader, writer = os.pipe()
    screen = os.memfd_create("screen")
    terminal = Terminal(reader, screen, lambda: None, lambda error: None)
    with Launcher(OPTIONS, terminal, nothing_said) as launcher:
        yield launcher
    for fd in (reader, writer, screen):
        os.close(fd)


def test_a_stop_asked_for_before_it_runs_keeps_the_guest_from_starting() -> None:
    with silent_launcher() as launcher:
        launcher.request_stop()
        machines: list[Boot] = []
        assert launcher.run(machines.append) == Stopped()
        assert len(machines) == 1


def test_any_thread_may_stop_it_at_any_time() -> None:
    for delay in (0.0, 0.001, 0.01, 0.05):
        with silent_launcher() as launcher:
            timer = threading.Timer(delay, launcher.request_stop)
            timer.start()
            assert launcher.run() == Stopped()
            timer.join()
            # Too late is no error.
            launcher.request_stop()
            launcher.resized()


def test_sizes_that_change_all_the_time_do_no_harm() -> None:
    done = threading.Event()
    with script(*["rand 3", "reboot"] * 5) as (typist, _):
        with Launcher(OPTIONS, typist, lambda line: None) as launcher:

            def resize() -> None:
                while not done.wait(0.0005):
                    launcher.resized()

            thread = threading.Thread(target=resize)
            thread.start()
            assert launcher.run() == PowerOff(0)
            done.set()
            thread.join()


def test_an_error_while_it_boots_leaves_nothing() -> None:
    def fail(machine: Boot) -> None:
        raise ZeroDivisionError

    with script() as (typist, _), Launcher(OPTIONS, typist, nothing_said) as launcher:
        with pytest.raises(ZeroDivisionError):
            launcher.run(fail)
        launcher.request_stop()


def test_what_was_opened_before_a_device_that_fails_is_closed(tmp_path: Path) -> None:
    devices = (ScratchDisk(), ScratchDisk(), DiskImage(str(tmp_path / "missing")))
    with script() as (typist, _):
        before = open_descriptors()
        with pytest.raises(LaunchError, match="missing: No such file"):
            Launcher(replace(OPTIONS, devices=devices), typist, nothing_said)
        assert open_descriptors() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (replace(OPTIONS, memory=3 * MEBIBYTE), "--memory 3: at least 4 MiB"),
        (replace(OPTIONS, memory=4000 * MEBIBYTE), "--memory 4000: at most 3328 MiB"),
        (replace(OPTIONS, devices=(Randomness(),) * 64), "65 devices: the bus has room for 64, the cons"),
        (replace(OPTIONS, kernel="vmlinux"), "--hypervisor inprocess: it cannot run vmlinux "),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(options: MachineOptions, words: str) -> None:
    with script() as (typist, _), pytest.raises(LaunchError, match=f"^{words}"):
        Launcher(options, typist, nothing_said)


def without_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise KvmUnusable("/dev/kvm: lacks everything (a newer kernel has it)")

    monkeypatch.setattr(choice, "open_kvm", refuse)


def test_without_kvm_auto_is_the_guest_in_this_process_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kvm(monkeypatch)
    said: list[str] = []
    assert choose_hypervisor(MachineOptions("auto"), said.append) == "inprocess"
    assert said == [
        "hypervisor: inprocess, because kvm is not usable: /dev/kvm: lacks everything (a newer kernel has it)"
    ]


@pytest.mark.parametrize("options", [MachineOptions("kvm"), MachineOptions("auto", kernel="vmlinux")])
def test_without_kvm_nothing_takes_its_place_when_it_is_needed(
    options: MachineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kvm(monkeypatch)
    with pytest.raises(LaunchError, match="^kvm: /dev/kvm: lacks everything "):
        choose_hypervisor(options, nothing_said)


def test_with_kvm_auto_takes_it_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "open_kvm", lambda: os.open(os.devnull, os.O_RDWR))
    said: list[str] = []
    assert choose_hypervisor(MachineOptions("auto"), said.append) == "kvm"
    assert said == ["hypervisor: kvm, because /dev/kvm is usable"]
    assert choose_hypervisor(MachineOptions("kvm"), nothing_said) == "kvm"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (replace(OPTIONS, linux=True), "--hypervisor inprocess: it cannot run --linux"),
        (replace(OPTIONS, cpus=2), "--cpus 2: for a Linux on kvm"),
        (replace(OPTIONS, transport="pci"), "--transport pci: on kvm alone"),
    ],
)
def test_what_a_pc_alone_has_is_refused_elsewhere(options: MachineOptions, words: str) -> None:
    with script() as (typist, _), pytest.raises(LaunchError, match=f"^{words}"):
        Launcher(options, typist, nothing_said)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (MachineOptions("kvm", cpus=2), "--cpus 2: for a Linux on kvm"),
        (MachineOptions("kvm", transport="pci", devices=(Randomness(),) * 31), "32 devices: the bus has room for 31"),
    ],
)
def test_what_a_pc_has_no_room_for_is_refused(
    options: MachineOptions, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "open_kvm", lambda: os.open(os.devnull, os.O_RDWR))
    with script() as (typist, _), pytest.raises(LaunchError, match=f"^{words}"):
        Launcher(options, typist, nothing_said)
