"""What this host offers to a launcher, each with the reason and the remedy where it does not."""

import os
import platform
import shutil
import sys
import sysconfig
from typing import NamedTuple

from lguestlib.abi import kvm
from lguestlib.runtime.backend.tap import DEVICE as TUN_DEVICE
from lguestlib.runtime.backend.tap import Tap
from lguestlib.runtime.backend.uring import IO_URING_REMEDY, Uring
from lguestlib.runtime.gil import SWITCH_INTERVAL, gil_enabled
from lguestlib.runtime.lguest.file import DEVICE as LGUEST_DEVICE
from lguestlib.runtime.lguest.file import DevLguest, LguestUnusable
from lguestlib.runtime.namespace import enter_network_namespace
from lguestlib.runtime.vm import DEVICE as KVM_DEVICE
from lguestlib.runtime.vm import KvmUnusable, capability, open_kvm

_CAPABILITIES = (
    "KVM_CAP_IRQCHIP", "KVM_CAP_IOEVENTFD", "KVM_CAP_IRQFD", "KVM_CAP_IMMEDIATE_EXIT", "KVM_CAP_IRQ_ROUTING",
    "KVM_CAP_SIGNAL_MSI", "KVM_CAP_SPLIT_IRQCHIP", "KVM_CAP_DIRTY_LOG_RING", "KVM_CAP_NR_VCPUS",
    "KVM_CAP_MAX_VCPUS",
)  # fmt: skip


class Finding(NamedTuple):
    """One thing looked for; *usable* is None for plain facts."""

    name: str
    usable: bool | None
    detail: str
    remedy: str = ""


def probe() -> list[Finding]:
    """Look at everything; nothing on the host is changed.

    To be called while the process has one thread: it forks to try a namespace.
    """
    return [
        Finding("python", None, f"{sys.implementation.name} {platform.python_version()}, {_word_size()}"),
        _gil(),
        Finding("switch interval", None, _switch_interval()),
        Finding("host", None, f"{platform.machine()}, Linux {platform.release()}, {os.cpu_count()} CPUs"),
        _kvm(),
        _lguest(),
        _tun(),
        _private_network(),
        _io_uring(),
        _program("user-mode-linux", ("linux", "linux.uml"), "user-mode-linux"),
        _program("qemu", (f"qemu-system-{_qemu_machine()}",), f"qemu-system-{_qemu_package()}"),
        _program("qemu-storage-daemon", ("qemu-storage-daemon",), "qemu-system-common"),
    ]


def _word_size() -> str:
    return "64-bit" if sys.maxsize > 1 << 32 else "32-bit"


def _switch_interval() -> str:
    return f"{sys.getswitchinterval() * 1e6:g} us; a launcher sets {SWITCH_INTERVAL * 1e6:g} us while it runs"


def _gil() -> Finding:
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    if not gil_enabled():
        return Finding("GIL", None, "off: queue threads run side by side")
    if free_threaded:
        return Finding("GIL", None, "on, in a build that can do without", "start Python with -X gil=0")
    return Finding("GIL", None, "on: queue threads take turns, but for their system calls")


def _kvm() -> Finding:
    try:
        fd = open_kvm()
    except KvmUnusable as error:
        return Finding("kvm", False, str(error), "run --hypervisor inprocess works without")
    try:
        there = [f"{name[8:]} {capability(fd, getattr(kvm, name))}" for name in _CAPABILITIES]
    finally:
        os.close(fd)
    return Finding("kvm", True, f"{KVM_DEVICE}: {', '.join(there)}")


def _lguest() -> Finding:
    try:
        DevLguest(LGUEST_DEVICE).close()
    except LguestUnusable as error:
        return Finding("lguest", False, error.what, error.remedy)
    return Finding("lguest", True, f"{LGUEST_DEVICE}: run MEM KERNEL boots a 32-bit Linux")


def _tun() -> Finding:
    try:
        os.close(os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Finding("tun", False, f"{TUN_DEVICE}: no such file", "modprobe tun")
    except OSError as error:
        remedy = f"run as root, or: chmod 666 {TUN_DEVICE}"
        return Finding("tun", False, f"{TUN_DEVICE}: {error.strerror}", remedy)
    return Finding("tun", True, TUN_DEVICE)


def _private_network() -> Finding:
    """Try for a TAP device in a namespace, in a child, which takes both with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            in_user_namespace = enter_network_namespace()
            Tap().close()
            os.write(writer, b"in a user namespace" if in_user_namespace else b"in a network namespace")
            os._exit(0)
        except OSError as error:
            os.write(writer, f"{error.strerror}".encode())
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader) as told:
        detail = told.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        return Finding("private network", True, f"a TAP device {detail}")
    remedy = (
        f"chmod 666 {TUN_DEVICE}; sysctl user.max_net_namespaces, user.max_user_namespaces,"
        " kernel.unprivileged_userns_clone; without, a host inside the process answers the guest's pings"
    )
    return Finding("private network", False, detail, remedy)


def _io_uring() -> Finding:
    try:
        Uring(1).close()
    except OSError as error:
        return Finding("io_uring", False, str(error.strerror), IO_URING_REMEDY)
    return Finding("io_uring", True, "for serve blk --aio io_uring")


def _program(name: str, commands: tuple[str, ...], package: str) -> Finding:
    for command in commands:
        path = shutil.which(command)
        if path:
            return Finding(name, True, path)
    return Finding(name, False, f"{commands[0]}: not found", f"apt-get install {package}")


def _qemu_machine() -> str:
    return {"i386": "i386", "i686": "i386"}.get(platform.machine(), platform.machine())


def _qemu_package() -> str:
    return {"x86_64": "x86", "i386": "x86", "i686": "x86", "aarch64": "arm"}.get(platform.machine(), "misc")
