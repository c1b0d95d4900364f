"""Debian's own Linux on the PC, on KVM as real as it can be had: nested in a machine that QEMU emulates.

With LGUESTLIB_LONG=1 there are more ways to boot it, to end it and to get in its way.
"""

import json
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from guests.serving import LONG
from linux import Answer
from nested import GUEST_MODULES, NestedKvm

from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.initramfs.archive import make_initramfs
from lguestlib.runtime.initramfs.modules import resolve
from memory.images import real_kernel

QUEUES = {
    "virtio0": ("config", "input.0", "output.0"),
    "virtio1": ("config", "req.0"),
    "virtio2": ("config", "input"),
    "virtio3": ("config", "input", "output"),
}
"""The vectors of network, disk, rng and console, by Linux's names."""

INTERRUPT = re.compile(r"^ *\d+: +((?:\d+ +)+)(\S+) +\S+ +(virtio\S+)", re.MULTILINE)

WORKLOAD = (
    "head -c 65536 /dev/zero | tr '\\0' x >/tmp/x; dd if=/tmp/x of=/dev/vda bs=4096 conv=fsync; "
    "echo 3 >/proc/sys/vm/drop_caches; head -c 65536 /dev/vda | cmp - /tmp/x && echo disk works; "
    "ping -c 2 192.168.19.1 >/dev/null && echo network works; "
    "[ $(head -c 64 /dev/hwrng | wc -c) = 64 ] && echo rng works; "
)


def only_long() -> None:
    if not LONG:
        pytest.skip("takes its time (LGUESTLIB_LONG=1 in the environment)")


class Host(NamedTuple):
    """The machine, and what is in it of the test's: an initrd of somebody else's, one that is garbage, a vmlinux."""

    machine: NestedKvm
    initrd: Path
    garbage: Path
    counting: Path
    terminal: Path
    vmlinux: Path | None

    def launch(self, words: str, program: str = "-m lguestlib") -> Answer:
        """What the launcher, or another *program* of Python's, shows there, and its exit status."""
        return self.machine.launch(words, program)


COUNTING = """
import sys
from lguestlib.runtime.backend.script import typed_ahead
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.launcher import Launcher
from lguestlib.runtime.options import LINUX_MEMORY, MachineOptions

def say(line):
    pass

def hung_up(error):
    pass

machines = []
memory = int(sys.argv[2]) << 20 if sys.argv[2:] else LINUX_MEMORY
options = MachineOptions("kvm", memory, script=sys.argv[1].encode(), linux=True)
with typed_ahead([]) as fd, Launcher(options, Terminal(fd, 1, lambda: None, hung_up), say) as launcher:
    def booted(machine):
        machines.append((machine, machine.runners[0].counters))
    launcher.run(booted)
[(machine, counters)] = machines
print(
    machine.exits, sum(each.chains for each in counters), sum(each.interrupts for each in counters),
    next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")),
)
"""
"""Runs a script in a Linux of that many MiB, and tells of its network's queues, its processor and our memory."""

TERMINAL = """
import os, select, sys, termios, time

PROMPT = b":/root # "

def session(*talk):
    here, there = os.openpty()
    before = termios.tcgetattr(there)
    pid = os.fork()
    if not pid:
        os.close(here)
        os.login_tty(os.dup(there))
        os.execv(sys.executable, [sys.executable, "-m", "lguestlib", "run", "--linux"])
    shown = b""
    talk = list(talk)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if select.select([here], [], [], 0.1)[0]:
            shown += os.read(here, 65536)
        if talk and talk[0][0] in shown:
            shown = shown[shown.index(talk[0][0]) + len(talk[0][0]) :]
            for key in talk.pop(0)[1]:
                os.write(here, bytes([key]))
                time.sleep(0.1)
    print(len(talk), os.waitstatus_to_exitcode(ended[1]), termios.tcgetattr(there) == before, flush=True)

session(
    (PROMPT, b"echo $((6 * 7)) works; /bin/cat\\n"), (b"42 works", b"\\3"), (PROMPT, b"echo $((6 * 8)) too\\n"),
    (b"48 too", b""), (PROMPT, b"poweroff\\n"),
)
session((PROMPT, b"cat\\n"), (b"\\n", b"\\3\\3\\3"))
"""
"""At terminals, two launchers: what is left of the talk, the exit status, whether the terminal is as it was."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("nested")
    kernel = real_kernel()
    [modules] = (kernel.parents[1] / "lib/modules").iterdir()
    try:
        archive = make_initramfs(resolve(modules, GUEST_MODULES), b"echo here is $(hostname); poweroff -f")
    except LaunchError as error:
        pytest.skip(str(error))
    initrd, garbage, vmlinux = folder / "initrd", folder / "garbage", folder / "vmlinux"
    initrd.write_bytes(archive.pack())
    garbage.write_bytes(b"070701" + b"garbage" * 1000)
    has_vmlinux = LONG and shutil.which("unlz4") is not None
    if has_vmlinux:
        vmlinux.write_bytes(_vmlinux(kernel))
    counting, terminal = folder / "counting.py", folder / "terminal.py"
    counting.write_text(COUNTING)
    terminal.write_text(TERMINAL)
    files = [initrd, garbage, counting, terminal, *([vmlinux] if has_vmlinux else [])]
    with NestedKvm(folder, files=files) as machine:
        yield Host(machine, initrd, garbage, counting, terminal, vmlinux if has_vmlinux else None)


def _vmlinux(kernel: Path) -> bytes:
    """What is in a bzImage that is compressed with lz4 (boot protocol 2.08; its last 4 bytes are the size)."""
    image = kernel.read_bytes()
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (image[0x1F1] + 1) * 512 + offset
    packed = image[start : start + length - 4]
    if not packed.startswith(b"\x02\x21\x4c\x18"):
        pytest.skip("the kernel is not compressed with lz4")
    return subprocess.run(["unlz4", "-c"], input=packed, capture_output=True, check=True).stdout


class Line(NamedTuple):
    """Of /proc/interrupts: the controller, and how often on each processor."""

    controller: str
    counts: list[int]


def interrupts(shown: str) -> dict[str, Line]:
    """The lines of /proc/interrupts that are virtio's."""
    return {
        name: Line(controller, list(map(int, counts.split())))
        for counts, controller, name in INTERRUPT.findall(shown)
    }


def everything_works(shown: str) -> None:
    for part in ("disk", "network", "rng"):
        assert f"{part} works" in shown, shown


def quoted(script: str) -> str:
    """The script as one word of a shell's."""
    return "'" + script.replace("'", "'\\''") + "'"


def test_each_queue_of_a_linux_has_a_vector_of_its_own_and_is_served(host: Host) -> None:
    script = quoted(f"{WORKLOAD} cat /proc/interrupts; grep -h PCI_ID /sys/bus/pci/devices/*/uevent; exit 3")
    shown, status = host.launch(f"run --linux --exec {script}")
    assert status == 3, shown
    everything_works(shown)
    found = interrupts(shown)
    assert found.keys() == {f"{device}-{queue}" for device, queues in QUEUES.items() for queue in queues}
    assert {controller for controller, _ in found.values()} == {"PCI-MSI"}
    for queue in ("virtio0-input.0", "virtio1-req.0", "virtio2-input"):
        assert sum(found[queue].counts) > 0, queue
    assert sorted(re.findall(r"1AF4:10\w\w", shown)) == ["1AF4:1041", "1AF4:1042", "1AF4:1043", "1AF4:1044"]


def test_two_processors_have_a_queue_of_the_disk_and_a_pair_of_the_network_each(host: Host) -> None:
    only_long()
    script = (
        "nproc; for cpu in 0 1; do taskset -c $cpu ping -q -A -c 50 192.168.19.1 | grep received; "
        "taskset -c $cpu dd if=/dev/vda of=/dev/null bs=4096 count=20 iflag=direct 2>/dev/null; done; "
        f"{WORKLOAD} cat /proc/interrupts; exit 0"
    )
    shown, status = host.launch(f"run --linux --cpus 2 --exec {quoted(script)}")
    assert status == 0 and "\n2\n" in shown, shown
    assert shown.count("50 packets received") == 2, shown
    everything_works(shown)
    found = interrupts(shown)
    several = {"virtio0-output.1", "virtio0-input.1", "virtio1-req.1"}
    assert found.keys() == {f"{device}-{queue}" for device, queues in QUEUES.items() for queue in queues} | several
    for queue in ("virtio0-input.0", "virtio0-input.1"):
        assert sum(found[queue].counts) >= 30, (queue, shown)
    for queue in ("virtio1-req.0", "virtio1-req.1"):
        assert sum(found[queue].counts) > 0, (queue, shown)


def test_vectors_move_between_processors_under_load(host: Host) -> None:
    """Linux masks a vector, writes its message and unmasks it; a disk's it lets nobody move."""
    only_long()
    script = (
        "irqs=$(sed -n 's/^ *\\([0-9]*\\):.*virtio[023]-\\(in\\|out\\).*/\\1/p' /proc/interrupts); "
        "for cpu in 0 1; do taskset -c $cpu ping -q -A -c 600 192.168.19.1 >/tmp/ping$cpu & done; pings=$!; "
        "(while :; do cat /dev/vda; head -c 64 /dev/hwrng; done >/dev/null) & load=$!; moved=0; "
        "while [ -d /proc/$pings ]; do for turn in 1 2; do for irq in $irqs; do "
        "echo $turn >/proc/irq/$irq/smp_affinity && moved=$((moved + 1)); done; done; done; "
        "kill $load; sleep 2; grep -h received /tmp/ping0 /tmp/ping1; echo moved $moved; "
        f"{WORKLOAD} cat /proc/interrupts; exit 0"
    )
    shown, status = host.launch(f"run --linux --cpus 2 --exec {quoted(script)}")
    assert status == 0, shown
    assert shown.count("600 packets received") == 2, shown
    moved = re.search(r"moved (\d+)", shown)
    assert moved and int(moved[1]) >= 50, shown
    everything_works(shown)
    found = interrupts(shown)
    for queue in ("virtio0-input.0", "virtio0-input.1", "virtio2-input"):
        assert all(found[queue].counts), (queue, shown)


def test_devices_are_found_by_acpi_behind_virtio_mmio(host: Host) -> None:
    only_long()
    script = quoted(f"{WORKLOAD} cat /proc/interrupts; exit 0")
    shown, status = host.launch(f"run --linux --transport mmio --exec {script}")
    assert status == 0, shown
    everything_works(shown)
    found = interrupts(shown)
    assert found.keys() == set(QUEUES) and {controller for controller, _ in found.values()} == {"IO-APIC"}


def test_without_messages_linux_falls_back_to_the_pins(host: Host) -> None:
    only_long()
    script = quoted(f"{WORKLOAD} cat /proc/interrupts; exit 0")
    shown, status = host.launch(f"run --linux --append pci=nomsi --exec {script}")
    assert status == 0, shown
    everything_works(shown)
    assert "nobody cared" not in shown
    found = interrupts(shown)
    assert found.keys() == set(QUEUES) and {controller for controller, _ in found.values()} == {"IO-APIC"}


def test_drivers_are_unbound_and_bound_again_under_load(host: Host) -> None:
    only_long()
    script = (
        "cd /sys/bus/virtio/drivers; for turn in 1 2 3; do "
        "(while head -c 65536 /dev/vda >/dev/null; do :; done) 2>/dev/null & "
        "ping -q -A 192.168.19.1 >/dev/null & head -c 1000000 /dev/hwrng >/dev/null 2>&1 & sleep 0.2; "
        "echo virtio1 >virtio_blk/unbind; echo virtio0 >virtio_net/unbind; echo virtio2 >virtio_rng/unbind; "
        "kill $(pidof ping); wait; "
        "echo virtio1 >virtio_blk/bind; echo virtio0 >virtio_net/bind; echo virtio2 >virtio_rng/bind; "
        "ip address add 192.168.19.2/24 dev eth0; ip link set eth0 up; done; "
        "cd /sys/bus/pci/drivers/virtio-pci; "
        "for slot in 2 3; do echo 0000:00:0$slot.0 >unbind; echo 0000:00:0$slot.0 >bind; done; cd /; sleep 1; "
        f"{WORKLOAD} cat /proc/interrupts; exit 0"
    )
    shown, status = host.launch(f"run --linux --exec {quoted(script)}")
    assert status == 0, shown
    everything_works(shown)
    assert len(interrupts(shown)) == 10


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("reboot -f", ""), ("reboot -f", "--cpus 2"), ("reboot -f", "--append reboot=k"),
        ("echo c >/proc/sysrq-trigger", "--append panic=-1"),
    ],
)  # fmt: skip
def test_a_guest_starts_over_with_its_disk_as_it_was(host: Host, ending: str, words: str) -> None:
    only_long()
    script = f'[ "$(head -c 5 /dev/vda)" = again ] && exit 7; printf again >/dev/vda; sync; {ending}'
    shown, status = host.launch(f"run --linux {words} --exec {quoted(script)}")
    assert status == 7 and shown.count("the guest starts over") == 1, shown
    assert ("Kernel panic" in shown) == ("sysrq" in ending)


def test_a_kernel_and_an_initrd_of_the_users_own(host: Host) -> None:
    only_long()
    shown, status = host.launch(f"run 256 /boot/{real_kernel().name} --initrd {host.initrd} hostname=mine quiet")
    assert status == 0, shown
    assert "Linux version" in shown and "here is mine" in shown


def test_a_kernel_by_pvh(host: Host) -> None:
    only_long()
    if host.vmlinux is None:
        pytest.skip("no unlz4 (apt-get install lz4)")
    shown, status = host.launch(f"run 256 {host.vmlinux} --initrd {host.initrd} hostname=pvh quiet")
    assert status == 0 and "here is pvh" in shown, shown


def test_pings_from_a_real_linux_are_the_seeds_calls(host: Host) -> None:
    only_long()
    shown, status = host.launch("ping --hypervisor kvm --linux --count 5 --json")
    assert status == 0, shown
    told = json.loads(shown[shown.index("{") :])
    assert told["received"] == 5
    calls = [sorted((call["call"], call["role"]) for call in ping["calls"]) for ping in told["pings"]]
    seed = sorted([
        ("read", "kick"), ("writev", "tap"), ("readv", "tap"), ("write", "interrupt"), ("write", "interrupt"),
    ])  # fmt: skip
    assert seed in calls, calls


def test_on_the_data_path_no_processor_leaves_the_guest(host: Host) -> None:
    only_long()
    runs = []
    for count in (10, 310):
        script = f"ping -q -A -c {count} 192.168.19.1 >/dev/null"
        shown, status = host.launch(quoted(script), program=str(host.counting))
        assert status == 0, shown
        exits, chains, interrupts, _ = map(int, shown.split()[-4:])
        runs.append((exits, chains, interrupts))
    (few_exits, few_chains, few_interrupts), (exits, chains, interrupts) = runs
    assert chains - few_chains >= 600 and interrupts - few_interrupts >= 250, runs
    assert abs(exits - few_exits) < 100, runs


def test_memory_that_the_guest_does_not_touch_is_not_there(host: Host) -> None:
    only_long()
    script = "free -m | sed -n 's/^Mem: *\\([0-9]*\\).*/\\1 MiB/p'"
    shown, status = host.launch(f"{quoted(script)} 768", program=str(host.counting))
    assert status == 0, shown
    guest = re.search(r"(\d+) MiB", shown)
    assert guest and int(guest[1]) > 650, shown
    assert int(shown.split()[-1]) < 300 << 10, "the most that the launcher has had, in KiB"


def test_a_terminal_has_a_shell_that_ctrl_c_goes_to_and_is_restored(host: Host) -> None:
    only_long()
    shown, status = host.launch("", program=str(host.terminal))
    assert status == 0, shown
    assert shown.split("\n")[:2] == ["0 0 True", "0 130 True"], shown


def test_what_cannot_be_is_one_line(host: Host) -> None:
    only_long()
    shown, status = host.launch(f"run 16 /boot/{real_kernel().name}")
    assert status == 1 and re.search(r"kernel /boot/\S+: bzImage: .* give the guest \d+ MiB", shown), shown
    words = f"run 256 /boot/{real_kernel().name} --initrd {host.garbage} quiet panic=-1"
    shown, _ = host.launch(f"{words} 2>&1 | head -n 40")
    assert "Kernel panic" in shown and "Unable to mount root fs" in shown, shown
