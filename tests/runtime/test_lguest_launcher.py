"""The launcher on lguest, with the test double of /dev/lguest: the choice of it, its errors, its reboots."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from lguest_double import GuestProgram, LguestDouble
from lguest_guest import BLOCK, CONSOLE, RNG, BlockDriver, ConsoleDriver, Linux, RngDriver, session
from runtime.rigs import nothing_left

from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.vm import KvmUnusable
from lguestlib.runtime.launch import choice, lguest
from lguestlib.runtime.launch.choice import choose_hypervisor
from lguestlib.runtime.launcher import Launcher
from lguestlib.runtime.lguest.file import LguestUnusable
from lguestlib.runtime.machine import Crash, PowerOff
from lguestlib.runtime.options import (
    MEBIBYTE,
    DeviceOption,
    HypervisorName,
    MachineOptions,
    Randomness,
    ScratchDisk,
    VhostUserDisk,
)
from memory.images import Load, elf


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def vmlinux(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux"
    path.write_bytes(elf(32, MEBIBYTE, [Load(MEBIBYTE, b"\x90" * 64, 4096)]))
    return path


@pytest.fixture
def vmlinux64(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux64"
    path.write_bytes(elf(64, MEBIBYTE, [Load(MEBIBYTE, b"\x90" * 64, 4096)]))
    return path


class Host:
    """A host with lguest, whose guests are *programs*, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.programs: list[GuestProgram] = []
        self.doubles: list[LguestDouble] = []
        monkeypatch.setattr(lguest, "DevLguest", self.open)

    def open(self) -> LguestDouble:
        # The first is opened to see whether it can be.
        program = self.programs[len(self.doubles) - 1] if self.doubles else (lambda cpu: None)
        self.doubles.append(LguestDouble(program))
        return self.doubles[-1]

    def all_went_well(self) -> bool:
        return [double.failure for double in self.doubles if double.failure] == []


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


@contextmanager
def terminal(typed: bytes = b"") -> Iterator[tuple[Terminal, Callable[[], bytes]]]:
    """A console where *typed* has been, and what it has shown."""
    reader, writer = os.pipe()
    os.write(writer, typed)
    screen = os.memfd_create("screen")
    yield Terminal(reader, screen, lambda: None, lambda error: None), lambda: os.pread(screen, 1 << 20, 0)
    for fd in (reader, writer, screen):
        os.close(fd)


def options(kernel: Path, *devices: DeviceOption, hypervisor: HypervisorName = "lguest") -> MachineOptions:
    return MachineOptions(hypervisor, 8 * MEBIBYTE, devices, str(kernel), arguments=("root=/dev/vda",))


def test_the_devices_are_in_the_order_given_the_console_last(host: Host, vmlinux: Path) -> None:
    types: list[int] = []
    host.programs = [session(lambda linux: types.extend(device.type for device in linux.devices))]
    with terminal() as (console, shown):
        with Launcher(options(vmlinux, Randomness(), ScratchDisk(), Randomness()), console, print) as launcher:
            assert launcher.run() == PowerOff(0)
        assert shown() == b"Linux on lguest, 8 MiB: root=/dev/vda\n"
    assert types == [RNG, BLOCK, RNG, CONSOLE]
    assert host.all_went_well()


def test_a_reboot_is_a_new_guest_on_the_same_disk_in_fresh_memory(host: Host, vmlinux: Path) -> None:
    def write(linux: Linux) -> None:
        linux.cpu.write(0x10_0000, b"changed")
        BlockDriver(linux.of_type(BLOCK)).write(7, b"kept" * 128)
        console = ConsoleDriver(linux.of_type(CONSOLE))
        console.write(b"once\n")
        assert console.read_line() == b"typed"
        linux.reboot()

    def read(linux: Linux) -> None:
        assert linux.cpu.read(0x10_0000, 8) == b"\x90" * 8
        assert BlockDriver(linux.of_type(BLOCK)).read(7, 512) == b"kept" * 128
        ConsoleDriver(linux.of_type(CONSOLE)).write(b"again\n")

    host.programs = [session(write), session(read)]
    said: list[str] = []
    with terminal(b"typed\n") as (console, shown):
        with Launcher(options(vmlinux, ScratchDisk()), console, said.append) as launcher:
            assert launcher.run() == PowerOff(0)
        assert shown().count(b"once") == shown().count(b"again") == 1 and shown().count(b"Linux on lguest") == 2
    assert said == ["the guest starts over"]
    assert host.all_went_well() and len(host.doubles) == 3


def test_a_panic_is_the_outcome(host: Host, vmlinux: Path) -> None:
    host.programs = [session(lambda linux: linux.panic("VFS: Unable to mount root fs"))]
    with terminal() as (console, _), Launcher(options(vmlinux), console, print) as launcher:
        assert launcher.run() == Crash("CRASH: VFS: Unable to mount root fs")


def test_verbose_tells_of_each_device(host: Host, vmlinux: Path) -> None:
    host.programs = [session(lambda linux: None)]
    said: list[str] = []
    with terminal() as (console, _):
        with Launcher(replace(options(vmlinux, Randomness()), verbose=True), console, said.append) as launcher:
            launcher.run()
    assert said == [
        "rng0: requests, interrupts 1, rings at 0x801000, described at 0x800000",
        "console0: receive and transmit, interrupts 2 and 3, rings at 0x804000 and 0x807000, described at 0x800015",
    ]


def test_auto_takes_lguest_for_a_32_bit_kernel_where_it_is_usable(
    host: Host, vmlinux: Path, vmlinux64: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "open_kvm", lambda: os.open("/dev/null", os.O_RDONLY))
    said: list[str] = []
    assert choose_hypervisor(options(vmlinux, hypervisor="auto"), said.append) == "lguest"
    assert said == [f"hypervisor: lguest, because /dev/lguest is usable and {vmlinux} is a 32-bit kernel"]
    for kernel in (vmlinux64, vmlinux.parent / "absent"):
        assert choose_hypervisor(options(kernel, hypervisor="auto"), said.append) == "kvm"
    assert choose_hypervisor(MachineOptions("auto"), said.append) == "kvm"

    def absent() -> LguestDouble:
        raise LguestUnusable("/dev/lguest: gone", "modprobe lg")

    monkeypatch.setattr(lguest, "DevLguest", absent)
    assert choose_hypervisor(options(vmlinux, hypervisor="auto"), said.append) == "kvm"

    def refuse() -> int:
        raise KvmUnusable("/dev/kvm: gone too")

    monkeypatch.setattr(choice, "open_kvm", refuse)
    with pytest.raises(LaunchError) as failed:
        choose_hypervisor(options(vmlinux, hypervisor="auto"), said.append)
    assert str(failed.value) == "lguest: /dev/lguest: gone (modprobe lg); kvm: /dev/kvm: gone too"
    with pytest.raises(LaunchError, match=r"^lguest: /dev/lguest: gone \(modprobe lg\)$"):
        choose_hypervisor(options(vmlinux), said.append)


def test_what_lguest_cannot_do_is_told_in_one_line(host: Host, vmlinux: Path) -> None:
    with pytest.raises(LaunchError, match="^--hypervisor lguest: it has no built-in guest "):
        choose_hypervisor(MachineOptions("lguest"), print)
    with pytest.raises(LaunchError, match="^--block vhost-user:disk.sock: lguest's memory is not to be shared"):
        choose_hypervisor(options(vmlinux, VhostUserDisk("disk.sock")), print)


def refused(asked: MachineOptions) -> str:
    """What is said where a machine is not made."""
    with terminal() as (console, _), pytest.raises(LaunchError) as failed:
        with Launcher(asked, console, print) as launcher:
            launcher.run()
    return str(failed.value)


def test_a_kernel_that_lguest_cannot_run_is_named(host: Host, vmlinux64: Path, tmp_path: Path) -> None:
    host.programs = [lambda cpu: None] * 9
    assert refused(options(vmlinux64)) == (
        f"kernel {vmlinux64}: ELF64: a 64-bit kernel: lguest runs 32-bit ones alone"
    )
    assert refused(options(tmp_path / "absent")) == f"kernel {tmp_path}/absent: No such file or directory"
    large = tmp_path / "large"
    large.write_bytes(elf(32, MEBIBYTE, [Load(MEBIBYTE, b"\x90" * 64, 16 * MEBIBYTE)]))
    assert refused(options(large)) == (
        f"kernel {large}: ELF32: segment 0: 0x100000 to 0x1100000 is not all in guest memory,"
        " which ends at 0x800000: give the guest 17 MiB"
    )
    assert host.all_went_well()


def test_too_many_devices_and_too_much_memory_are_told(host: Host, vmlinux: Path) -> None:
    host.programs = [lambda cpu: None] * 9
    assert refused(options(vmlinux, *[Randomness()] * 30)) == (
        "console0: 2 interrupts, of 31 on the bus 1 are left (name fewer --block, --tunnet and --rng)"
    )
    most = 4094 if sys.maxsize > 1 << 32 else 2045
    assert f"at most {most} MiB" in refused(replace(options(vmlinux), memory=4096 * MEBIBYTE))
