"""A machine with real KVM for tests: QEMU emulates a processor with SVM, and Debian's cloud kernel uses it.

In it are this interpreter, the library as it is here, and the kernel once more: the
host that a launcher finds there can boot its own Linux.
"""

import json
import os
import py_compile
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import interpreters
import pytest
import sessions
from linux import SHELL, Answer, Linux

from lguestlib.memory.image.newc import NewcArchive
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.initramfs.archive import make_initramfs
from lguestlib.runtime.initramfs.modules import resolve
from memory.images import real_kernel

OWN_MODULES = ("kvm_amd", "tun")
"""What the machine itself needs."""

GUEST_MODULES = ("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng")

_IMPORTS = """
import importlib, json, pkgutil, sys
import encodings.utf_8, encodings.latin_1, encodings.ascii, encodings.idna, zipimport, runpy, readline
import lguestlib
for module in pkgutil.walk_packages(lguestlib.__path__, "lguestlib."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import datetime, gzip, bz2, lzma, importlib.metadata, sysconfig
sysconfig.get_config_vars()
print(json.dumps(sorted({module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)})))
"""


_HOLD = b"""
import signal
from lguestlib.abi import kvm
from lguestlib.abi.ioctl import ioctl
from lguestlib.runtime.vm import open_kvm
machine = ioctl(open_kvm(), kvm.KVM_CREATE_VM, 0, "KVM_CREATE_VM")
print("held", flush=True)
signal.pause()
"""
"""Keeps a virtual machine.

With the first one and after the last one Linux rewrites an instruction of its scheduler, and at
times QEMU's processors then turn for ever around the breakpoint that is there meanwhile.
"""

LAUNCH_PATIENCE = 300.0
"""Seconds: two boots of a nested guest on a host that has much else to do."""


class NestedKvm(Linux):
    """That machine, with a shell; *files* of this one's are at the same paths in there.

    So are *programs*, with the libraries that they need.
    """

    name = "nested"

    def __init__(
        self,
        directory: Path,
        memory: int = 1024,
        cpus: int = 2,
        files: Iterable[Path] = (),
        programs: Iterable[str] = (),
    ) -> None:
        sessions.programs_or_skip(**{"qemu-system-x86_64": "qemu-system-x86"})
        kernel = real_kernel()
        [modules] = (kernel.parents[1] / "lib/modules").iterdir()
        try:
            archive = make_initramfs(resolve(modules, OWN_MODULES), SHELL)
            guest_modules = resolve(modules, GUEST_MODULES)
        except LaunchError as error:
            pytest.skip(str(error))
        archive.file(f"boot/{kernel.name}", kernel.read_bytes())
        for name in ("modules.dep", "modules.builtin"):
            archive.file(f"lib/modules/{modules.name}/{name}", (modules / name).read_bytes())
        for module in guest_modules:
            archive.file(f"lib/modules/{modules.name}/{module.relative_to(modules)}", module.read_bytes())
        _add_python(archive, directory, programs)
        archive.file("hold.py", _HOLD)
        for path in files:
            archive.file(str(path).lstrip("/"), path.read_bytes(), path.stat().st_mode & 0o777)
        initrd = directory / "nested.cpio"
        initrd.write_bytes(archive.pack())
        super().__init__([
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cpus), "-m", str(memory),
            "-nodefaults", "-display", "none", "-no-reboot",
            "-chardev", "stdio,id=screen,signal=off", "-serial", "chardev:screen",
            "-kernel", str(kernel), "-initrd", str(initrd),
            "-append", "console=ttyS0 loglevel=1 mitigations=off",
        ])  # fmt: skip
        try:
            self.call("mkdir -p /dev/pts && mount -t devpts devpts /dev/pts && mkfifo /tmp/held")
            self.call(f"PYTHONPATH=/lguestlib {_interpreter()} /hold.py >/tmp/held & read held </tmp/held")
        except BaseException:
            self.close()
            raise

    def launch(self, words: str, program: str = "-m lguestlib", seconds: float = LAUNCH_PATIENCE) -> Answer:
        """What `python -m lguestlib` with these *words* of a shell's shows in there, and its exit status."""
        return self.command(f"PYTHONPATH=/lguestlib {_interpreter()} {program} {words}", seconds)


def _interpreter() -> str:
    return os.path.realpath(sys.executable)


def _add_python(archive: NewcArchive, directory: Path, others: Iterable[str]) -> None:
    """The interpreter, the modules that the library imports, compiled, *others*, and the libraries of all."""
    programs = {_interpreter(), *others}
    source = str(interpreters.SOURCE)
    environment = os.environ | {"PYTHONPATH": source}
    told = subprocess.run(
        [_interpreter(), "-c", _IMPORTS], env=environment, capture_output=True, text=True, check=True
    )
    for file in json.loads(told.stdout):
        place = file.replace(source, "/lguestlib").lstrip("/")
        if file.endswith(".py"):
            compiled = directory / "compiled.pyc"
            py_compile.compile(file, cfile=str(compiled), dfile=file, doraise=True)
            archive.file(place + "c", compiled.read_bytes())
        elif file.endswith(".so"):
            programs.add(file)
    for name in ("runtime/guest/guest.elf", "runtime/initramfs/init.sh"):
        archive.file(f"lguestlib/lguestlib/{name}", (interpreters.SOURCE / "lguestlib" / name).read_bytes())
    main = interpreters.SOURCE / "lguestlib/__main__.py"
    py_compile.compile(str(main), cfile=str(directory / "compiled.pyc"), doraise=True)
    archive.file("lguestlib/lguestlib/__main__.pyc", (directory / "compiled.pyc").read_bytes())
    archive.symlink("usr/bin/python3", _interpreter())
    for path in sorted(programs | set(_libraries(programs))):
        archive.file(path.lstrip("/"), Path(path).read_bytes(), 0o755)


def _libraries(programs: Iterable[str]) -> Iterator[str]:
    for program in programs:
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        yield from re.findall(r"(/\S+) \(0x", listed)
