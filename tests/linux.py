"""A real Linux as the guest of a test: User-mode Linux, or Debian's cloud kernel in QEMU.

Its devices are vhost-user back-ends at work already, its console is one that the
kernel or QEMU brings along, and a shell reads the test's commands there.
"""

import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

import pytest
import sessions

from lguestlib.abi import virtio_ids
from lguestlib.memory.image.newc import NewcArchive
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.initramfs.archive import make_initramfs
from lguestlib.runtime.initramfs.modules import resolve
from lguestlib.runtime.uml.process import Guard
from memory.images import real_kernel

BOOT_PATIENCE = 90.0
"""Seconds until a kernel that has not come up is a failure."""

PATIENCE = 60.0

SHELL = rb"""
exec </proc/1/fd/1
stty -echo -onlcr
status=0
while printf '\036%d\n' $status; IFS= read -r line; do
    eval "$line" </dev/null
    status=$?
done
"""
"""Reads a line, runs it, and shows its exit status behind a character that nothing else shows."""

_STATUS = re.compile(rb"\036(\d+)\r?\n")

Kind = Literal["blk", "net", "console", "rng"]


class SocketDevice(NamedTuple):
    """A device of that *kind* whose back-end listens at *path*.

    *options* are words for QEMU's -device, *connection* for its -chardev.
    """

    kind: Kind
    path: Path
    options: str = ""
    connection: str = ""


class Answer(NamedTuple):
    """What a command has shown, errors included, and its exit status."""

    output: str
    status: int


class Linux:
    """A guest that *words* start, whose shell is at their standard input and output."""

    name: ClassVar[str]

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._start()

    def _start(self) -> None:
        keyboard, self._keyboard = os.pipe()
        self._screen, screen = os.pipe()
        self._guard = Guard()
        # Not the screen: it would come in the middle of what the guest shows.
        self._errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self._words, stdin=keyboard, stdout=screen, stderr=self._errors, start_new_session=True
        )
        self._guard.watch(self.process.pid)
        os.close(keyboard)
        os.close(screen)
        self._shown = b""
        self._ended = False
        try:
            self.boot_messages, _ = self._answer(BOOT_PATIENCE)
        except BaseException:
            self.close()
            raise

    def command(self, line: str, seconds: float = PATIENCE) -> Answer:
        """What the guest's shell answers to *line*, within so many *seconds*."""
        os.write(self._keyboard, line.encode() + b"\n")
        return self._answer(seconds)

    def call(self, line: str, seconds: float = PATIENCE) -> str:
        """What *line* shows; it has to succeed."""
        output, status = self.command(line, seconds)
        assert status == 0, f"{line}: exit status {status}: {output}"
        return output

    def begin(self, line: str) -> None:
        """Run *line*, and let it run; the next `answer` is its."""
        os.write(self._keyboard, line.encode() + b"\n")

    def answer(self, seconds: float = PATIENCE) -> Answer:
        """The answer to what `begin` has begun."""
        return self._answer(seconds)

    def reboot(self) -> None:
        """Let the guest start over, and wait until its shell is there again."""
        self.begin("reboot -f")
        self._answer(BOOT_PATIENCE)

    def end(self, status: int = 0) -> int:
        """Let the guest switch itself off; return the exit status of what it ran in.

        That is *status* in User-mode Linux.
        """
        self.begin(f"exit {status}")
        return self._wait()

    def _wait(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError("the guest does not end") from None

    def _answer(self, seconds: float) -> Answer:
        deadline = time.monotonic() + seconds
        while not (found := _STATUS.search(self._shown)):
            left = deadline - time.monotonic()
            if left <= 0 or self._ended:
                ended = f"the guest has ended ({self.process.wait(PATIENCE)})" if self._ended else "no answer"
                self._errors.seek(0)
                raise AssertionError(f"{ended}: {(self._shown + self._errors.read()).decode(errors='replace')}")
            if select.select([self._screen], [], [], left)[0]:
                piece = os.read(self._screen, 65536)
                self._ended = not piece
                self._shown += piece
        output, self._shown = self._shown[: found.start()], self._shown[found.end() :]
        return Answer(output.decode(errors="replace").replace("\r\n", "\n"), int(found[1]))

    def close(self) -> None:
        """Switch it off as one pulls a plug."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._guard.close()
        self._errors.close()
        os.close(self._keyboard)
        os.close(self._screen)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


class UserModeLinux(Linux):
    """User-mode Linux with *devices*, its files in *directory*.

    *memory* is in MiB.  *programs* of the host's, with their libraries, are in the
    guest's /sbin, where they have to be called by their path: by its name the
    shell finds a busybox applet first.  *arguments* are more words of the kernel's
    command line.
    """

    name = "uml"

    def __init__(
        self,
        devices: Sequence[SocketDevice],
        directory: Path,
        memory: int = 128,
        programs: Sequence[str] = (),
        arguments: Sequence[str] = (),
    ) -> None:
        sessions.programs_or_skip(**{"linux.uml": "user-mode-linux"})
        version = subprocess.run(["linux.uml", "--version"], capture_output=True, text=True, check=True)
        modules = Path("/usr/lib/uml/modules") / version.stdout.strip()
        initrd = _initramfs(directory, modules, ["virtio_blk", "virtio_net", "virtio_console"], programs)
        numbers = {kind: getattr(virtio_ids, f"VIRTIO_ID_{_IDS[kind]}") for kind in _IDS}
        super().__init__([
            "linux.uml", f"mem={memory}M", f"initrd={initrd}", f"uml_dir={directory}",
            "con=null", "con0=fd:0,fd:1", "console=tty0", "loglevel=4", "noreboot", *arguments,
            *(f"virtio_uml.device={device.path}:{numbers[device.kind]}" for device in devices),
        ])  # fmt: skip

    def reboot(self) -> None:
        # By itself it hangs at times: it runs the same program again, with signals blocked that it needs.
        self.begin("reboot -f")
        self._wait()
        self.close()
        self._start()


_IDS: dict[Kind, str] = {"blk": "BLOCK", "net": "NET", "console": "CONSOLE", "rng": "RNG"}


class Qemu(Linux):
    """Debian's cloud kernel in QEMU without KVM, otherwise as `UserModeLinux`.

    QEMU 7.2 has no vhost-user console.  *words* are more of its command line.
    """

    name = "qemu"

    def __init__(
        self,
        devices: Sequence[SocketDevice],
        directory: Path,
        memory: int = 256,
        programs: Sequence[str] = (),
        arguments: Sequence[str] = (),
        words: Sequence[str] = (),
    ) -> None:
        sessions.programs_or_skip(**{"qemu-system-x86_64": "qemu-system-x86"})
        kernel = real_kernel()
        [modules] = (kernel.parents[1] / "lib/modules").iterdir()
        names = ["virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng"]
        initrd = _initramfs(directory, modules, names, programs)
        super().__init__([
            "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", str(memory), "-nodefaults",
            "-display", "none",
            "-object", f"memory-backend-memfd,id=memory,size={memory}M,share=on",
            "-machine", "pc,memory-backend=memory",
            "-chardev", "stdio,id=screen,signal=off", "-serial", "chardev:screen",
            "-kernel", str(kernel), "-initrd", str(initrd),
            "-append", " ".join(["console=ttyS0", "loglevel=4", *arguments]),
            *(word for number, device in enumerate(devices) for word in _front_end(number, device)), *words,
        ])  # fmt: skip


def _front_end(number: int, device: SocketDevice) -> list[str]:
    """QEMU's words for *device*."""
    connection = f",{device.connection}" if device.connection else ""
    socket = ["-chardev", f"socket,id=c{number},path={device.path}{connection}"]
    options = f",{device.options}" if device.options else ""
    match device.kind:
        case "net":
            # With MSI-X, QEMU 7.2 without KVM dies of a segmentation fault when the driver starts the card.
            card = f"virtio-net-pci,netdev=n{number},romfile=,vectors=0{options}"
            return [*socket, "-netdev", f"vhost-user,id=n{number},chardev=c{number}", "-device", card]
        case "console":
            pytest.skip("QEMU has no vhost-user console")
        case kind:
            return [*socket, "-device", f"vhost-user-{kind}-pci,chardev=c{number}{options}"]


def _initramfs(directory: Path, modules: Path, names: Sequence[str], programs: Sequence[str]) -> Path:
    try:
        archive = make_initramfs(resolve(modules, names), SHELL)
    except LaunchError as error:
        pytest.skip(str(error))
    add_programs(archive, programs)
    place = directory / "initramfs"
    place.write_bytes(archive.pack())
    return place


def add_programs(archive: NewcArchive, programs: Sequence[str]) -> None:
    libraries: set[str] = set()
    for program in programs:
        found = shutil.which(program, path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
        if not found:
            pytest.skip(f"{program} is not installed: apt-get install {_PACKAGES.get(program, program)}")
        archive.file(f"sbin/{program}", Path(found).read_bytes(), 0o755)
        listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
        libraries |= set(re.findall(r"(/\S+) \(0x", listed))
    for library in sorted(libraries):
        archive.file(library.removeprefix("/"), Path(library).read_bytes(), 0o755)


_PACKAGES = {
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "nc.openbsd": "netcat-openbsd",
    "ping": "iputils-ping",
}
