"""How fast a Linux on the PC is, beside QEMU's microvm: `python3 tests/guests/speed_pc.py`, some minutes.

In the nested machine both boot the same kernel and initramfs in turns, with the same
devices, and let the guest ping the host through a TAP interface; on this machine the
launcher's processor time until the first guest instruction is taken.  `--help` tells more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS.parent / "src")]

import interpreters  # noqa: E402
from memory.images import real_kernel  # noqa: E402
from nested import GUEST_MODULES, NestedKvm  # noqa: E402

from lguestlib.runtime.initramfs.archive import make_initramfs  # noqa: E402
from lguestlib.runtime.initramfs.modules import resolve  # noqa: E402

QEMU = "/usr/bin/qemu-system-x86_64"
FIRMWARE = ("qemu/bios-microvm.bin", "seabios/bios-microvm.bin", "qemu/linuxboot_dma.bin", "qemu/pvh.bin")

GUEST = b"""
echo in user space
host=$(sed 's/.*ip=[^:]*::\\([^:]*\\):.*/\\1/' /proc/cmdline)
ping -c 3 $host >/dev/null
ping -q -A -c 300 $host
poweroff -f
"""

SETUP = """
import os, resource, sys
from lguestlib.cli import main
from lguestlib.runtime.vm import Vcpu

def run(vcpu):
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_utime + used.ru_stime, flush=True)
    os._exit(0)

Vcpu.run = run
main(sys.argv[1:])
"""
"""The launcher, up to its first KVM_RUN."""

RACE = """
import json, re, subprocess, sys, threading, time
from lguestlib.abi import tun
from lguestlib.abi.ioctl import ioctl
from lguestlib.runtime.backend.tap import Tap
from lguestlib.runtime.interface import InterfaceAddress, Interfaces

PATIENCE = 100
kernel, initrd, rounds = sys.argv[1:]
WORDS = "console=hvc0 quiet ip=192.168.{0}.2::192.168.{0}.1:255.255.255.0"
tap = Tap("qemu0")
ioctl(tap.fd, tun.TUNSETPERSIST, 1, "TUNSETPERSIST", tap.name)
with Interfaces() as interfaces:
    interfaces.set_address(tap.name, InterfaceAddress(bytes([192, 168, 20, 1]), 24))
    interfaces.set_up(tap.name)
tap.close()
ours = [
    sys.executable, "-m", "lguestlib", "run", "256", kernel, "--initrd", initrd, "--tunnet", "192.168.19.1",
    "--block", "/disk", "--rng", *WORDS.format(19).split(),
]
qemu = [
    "/usr/bin/qemu-system-x86_64", "-M", "microvm,acpi=on,accel=kvm", "-cpu", "host", "-m", "256", "-nodefaults",
    "-no-user-config", "-display", "none", "-no-reboot", "-kernel", kernel, "-initrd", initrd,
    "-netdev", "tap,id=n,ifname=qemu0,script=no,downscript=no", "-device", "virtio-net-device,netdev=n",
    "-drive", "file=/disk,format=raw,if=none,id=d", "-device", "virtio-blk-device,drive=d",
    "-device", "virtio-rng-device",
    "-chardev", "stdio,id=c,signal=off", "-device", "virtio-serial-device", "-device", "virtconsole,chardev=c",
    "-append", WORDS.format(20),
]

def boot(words):
    start = time.monotonic()
    shown = b""
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as vmm:
        patience = threading.Timer(PATIENCE, vmm.kill)
        patience.start()
        up = None
        while line := vmm.stdout.readline():
            shown += line
            if b"in user space" in line:
                up = time.monotonic() - start
        patience.cancel()
    found = re.search(rb"min/avg/max = [0-9.]+/([0-9.]+)/", shown)
    if not (up and found):
        sys.exit(f"{words[0]}: {shown.decode(errors='replace')}")
    return up, float(found[1])

open("/disk", "wb").truncate(1 << 20)
told = {"ours": [], "qemu": []}
for _ in range(int(rounds)):
    for name, words in (("ours", ours), ("qemu", qemu)):
        told[name].append(boot(words))
print(json.dumps(told))
"""


def setup_seconds(kernel: Path, rounds: int) -> float:
    """The median processor time of the launcher before the first guest instruction, on this machine."""
    words = [sys.executable, "-c", SETUP, "run", "--hypervisor", "kvm", "256", str(kernel)]
    # Compiled, as it is where it has been installed; the first start sees to that.
    environment = os.environ | {"PYTHONPATH": str(interpreters.SOURCE)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    told = [
        subprocess.run(words, env=environment, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
        for _ in range(rounds)
    ]
    return statistics.median(float(each.stdout.split()[-1]) for each in told)


def race(rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds to user space and milliseconds of a ping, of the launcher and of QEMU, in each of so many *rounds*."""
    kernel = real_kernel()
    [modules] = (kernel.parents[1] / "lib/modules").iterdir()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        initrd, program = folder / "initrd", folder / "race.py"
        initrd.write_bytes(make_initramfs(resolve(modules, GUEST_MODULES), GUEST).pack())
        program.write_text(RACE)
        firmware = [path for each in FIRMWARE if (path := Path("/usr/share") / each).exists()]
        with NestedKvm(folder, memory=2048, files=[initrd, program, *firmware], programs=[QEMU]) as machine:
            shown, status = machine.launch(f"/boot/{kernel.name} {initrd} {rounds}", str(program), 600.0 * rounds)
    if status:
        sys.exit(shown)
    told: dict[str, list[tuple[float, float]]] = json.loads(shown[shown.index('{"ours"') :])
    return told


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each, in turns (default 5)")
    rounds = parser.parse_args(arguments).rounds
    setup = setup_seconds(real_kernel(), max(rounds, 5))
    print(f"processor time before the first guest instruction: {setup * 1000:.0f} ms")
    told = race(rounds)
    for column, what, unit in ((0, "boot to user space", "s"), (1, "ping", "ms")):
        ours, qemu = (statistics.median(each[column] for each in told[name]) for name in ("ours", "qemu"))
        print(f"{what}: {ours:.2f} {unit}, QEMU's microvm {qemu:.2f} {unit}, ratio {ours / qemu:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
