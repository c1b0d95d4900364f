"""Sessions with `python -m lguestlib` as a user has them: in a process, at a terminal or on pipes."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import interpreters
import pytest

from lguestlib.runtime.vm import KvmUnusable, open_kvm

PYTHON = (sys.executable, "-X", "dev", "-W", "error")
COMMAND = (*PYTHON, "-m", "lguestlib")
PATIENCE = 20.0
"""Seconds until what does not come is a failure."""

PROMPT = "\n> "


class Result(NamedTuple):
    """An exit status, as a shell shows it, and all that was written since the last `expect`."""

    status: int
    output: str
    errors: str


class Stream:
    """What comes out of *fd*."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.shown = bytearray()
        self.ended = False

    def take(self) -> None:
        """Read what there is, or sleep until there is something."""
        try:
            piece = os.read(self.fd, 65536)
        except OSError:
            # How a terminal says that nobody has its other end open.
            piece = b""
        self.shown += piece
        self.ended = not piece

    @property
    def text(self) -> str:
        return self.shown.decode(errors="backslashreplace").replace("\r\n", "\n")


class Session:
    """`python -m lguestlib` with *arguments*, behind the words *prefix*.

    At a *terminal* of its own it leads a session there, and input, output and
    errors are that terminal; else they are three pipes.
    """

    def __init__(
        self,
        *arguments: str | bytes,
        prefix: Sequence[str] = (),
        terminal: bool = False,
        command: Sequence[str] = COMMAND,
        directory: Path | None = None,
    ) -> None:
        environment = os.environ | {"PYTHONPATH": str(interpreters.SOURCE), "PYTHONDONTWRITEBYTECODE": "1"}
        words = [*prefix, *command, *arguments]
        if terminal:
            outside, self.terminal = pty.openpty()
            self.process = subprocess.Popen(
                ["setsid", "--ctty", *words], env=environment, cwd=directory,
                stdin=self.terminal, stdout=self.terminal, stderr=self.terminal,
            )  # fmt: skip
            self._keyboard = outside
            self.screen = self.messages = Stream(outside)
        else:
            keyboard, self._keyboard = os.pipe()
            screen, output = os.pipe()
            messages, errors = os.pipe()
            self.process = subprocess.Popen(
                words, env=environment, cwd=directory, start_new_session=True,
                stdin=keyboard, stdout=output, stderr=errors,
            )  # fmt: skip
            for fd in (keyboard, output, errors):
                os.close(fd)
            self.terminal = -1
            self.screen, self.messages = Stream(screen), Stream(messages)

    @property
    def pid(self) -> int:
        """The launcher's process: what stands before it becomes it."""
        return self.process.pid

    def type(self, text: str | bytes) -> None:
        """Type *text*, all at once."""
        os.write(self._keyboard, text.encode() if isinstance(text, str) else text)

    def end_input(self) -> None:
        """Close the input, a pipe."""
        os.close(self._keyboard)
        self._keyboard = -1

    def end_output(self) -> None:
        """Close the output, a pipe, at the reader's end."""
        os.close(self.screen.fd)
        self.screen.ended = True
        self.screen.fd = -1

    def expect(self, text: str, messages: bool = False) -> str:
        """Wait for *text* on the screen, or among the *messages*; return all up to it, which is then gone."""
        stream = self.messages if messages else self.screen
        wanted = text.encode()
        deadline = time.monotonic() + PATIENCE
        while wanted not in stream.shown:
            assert self._take(deadline - time.monotonic()), f"no {text!r} but {self.shown!r}"
        end = stream.shown.index(wanted) + len(wanted)
        found = stream.shown[:end].decode().replace("\r\n", "\n")
        del stream.shown[:end]
        return found

    def prompt(self) -> str:
        """Wait for the guest's next prompt; return what was shown before it."""
        end = PROMPT if self.terminal < 0 else PROMPT.replace("\n", "\r\n")
        return self.expect(end).removesuffix(PROMPT) + "\n"

    def command(self, line: str) -> str:
        """What the guest answers to *line*."""
        self.type(line + "\n")
        shown = self.prompt()
        assert shown.startswith(line + "\n"), shown
        return shown.removeprefix(line + "\n")

    @property
    def shown(self) -> tuple[str, str]:
        """Screen and messages, without what was expected."""
        return self.screen.text, self.messages.text

    def _take(self, seconds: float) -> bool:
        """Read what comes within so many *seconds*; False if that is nothing, or all has come."""
        streams = {stream.fd: stream for stream in (self.screen, self.messages) if not stream.ended}
        ready = select.select(list(streams), [], [], max(0, seconds))[0] if streams else []
        for fd in ready:
            streams[fd].take()
        return bool(ready)

    def signal(self, number: int) -> None:
        """Send the launcher a signal."""
        self.process.send_signal(number)

    def end(self) -> Result:
        """Wait until it ends, reading on."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end: {self.shown!r}"
            if not self._take(0.01):
                time.sleep(0.005)
        while self._take(0):
            continue
        status = self.process.returncode
        result = Result(status if status >= 0 else 128 - status, *self.shown)
        check_clean(result.errors)
        return result

    def close(self) -> None:
        """End it if nothing else has."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for fd in {self._keyboard, self.terminal, self.screen.fd, self.messages.fd} - {-1}:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def check_clean(errors: str) -> None:
    """No traceback, no warning of the interpreter's, was written to *errors*."""
    for word in ("Traceback", "Warning", "Exception ignored", "Fatal Python error"):
        assert word not in errors, errors


def run(
    *arguments: str | bytes,
    prefix: Sequence[str] = (),
    typed: str | bytes = b"",
    command: Sequence[str] = COMMAND,
    directory: Path | None = None,
) -> Result:
    """The whole session whose input is *typed*."""
    with Session(*arguments, prefix=prefix, command=command, directory=directory) as session:
        try:
            session.type(typed)
            session.end_input()
        except BrokenPipeError:
            pass
        return session.end()


def one_line(errors: str) -> str:
    """The one line that *errors* has to be, without its head."""
    lines = errors.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lguestlib: "), errors
    return lines[0].removeprefix("lguestlib: ")


def kvm_or_skip() -> None:
    """Skip the running test where KVM cannot be used."""
    try:
        os.close(open_kvm())
    except KvmUnusable as error:
        pytest.skip(f"kvm: {error}")


def programs_or_skip(**packages: str) -> None:
    """Skip the running test unless these programs are there; each with its Debian package."""
    for program, package in packages.items():
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed: apt-get install {package}")


def root_or_skip() -> None:
    """Skip the running test for anyone but root with all capabilities that namespaces take."""
    programs_or_skip(unshare="util-linux", nsenter="util-linux", setpriv="util-linux", ip="iproute2")
    if subprocess.run(["unshare", "-n", "-m", "true"], capture_output=True).returncode:
        pytest.skip("namespaces cannot be made: run as root (sudo sh tests/run)")


def user_namespaces_or_skip() -> None:
    """Skip the running test where user namespaces are refused to everyone, as in a chroot or some containers."""
    root_or_skip()
    if subprocess.run(["unshare", "-U", "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are refused (sysctl user.max_user_namespaces; not in a chroot)")


class Namespace:
    """A network namespace, which lasts as long as a process that sleeps in it."""

    def __init__(self) -> None:
        words = ["unshare", "-n", "sh", "-c", "ip link set lo up && echo ready && exec sleep 1000"]
        self._holder = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert self._holder.stdout and self._holder.stdout.readline() == b"ready\n"

    @property
    def prefix(self) -> list[str]:
        """The words that run a command in here."""
        return ["nsenter", "-n", "-t", str(self._holder.pid)]

    def call(self, *command: str) -> str:
        """What *command* prints, run in here; it has to succeed."""
        done = subprocess.run([*self.prefix, *command], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def interfaces(self) -> list[str]:
        """The names of its network interfaces; those the kernel gives every namespace are left out."""
        text = self.call("cat", "/proc/net/dev")
        names = [line.partition(":")[0].strip() for line in text.splitlines()[2:]]
        return sorted(name for name in names if name.startswith(("tap", "br")))

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout
        self._holder.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def ordinary_user(
    directory: Path, devices: Mapping[str, str] = {"kvm": "666", "net/tun": "666"}, setup: str = "true"
) -> tuple[list[str], list[str]]:
    """The words before a command that run it as nobody in *directory*, and lguestlib's command there.

    In a mount namespace of its own, where nobody reaches this interpreter and
    these sources, and the *devices* below /dev have these modes, whatever the
    host's have.  *setup* is a command that root runs there before.
    """
    root_or_skip()
    base, executable = Path(sys.base_prefix), Path(os.path.realpath(sys.executable))
    if not executable.is_relative_to(base):
        pytest.skip(f"{executable} is not below {base} (PYTHON=/usr/bin/python3 sh tests/run)")
    lines = [
        "mount -t tmpfs -o mode=755 lguestlib /mnt",
        "mkdir /mnt/python /mnt/source /mnt/folder",
        'mount --bind "$1" /mnt/python',
        'mount --bind "$2" /mnt/source',
        'mount --bind "$3" /mnt/folder',
        "chmod 777 /mnt/folder",
    ]
    for number, (device, mode) in enumerate(devices.items()):
        if not os.path.exists(f"/dev/{device}"):
            pytest.skip(f"/dev/{device} is not there (python -m lguestlib probe tells the remedy)")
        kind = os.stat(f"/dev/{device}").st_rdev
        lines += [
            f"mknod -m {mode} /mnt/{number} c {os.major(kind)} {os.minor(kind)}",
            f"mount --bind /mnt/{number} /dev/{device}",
        ]
    lines += [
        setup,
        "cd /mnt/folder",
        "shift 3",
        "export PYTHONHOME=/mnt/python PYTHONPATH=/mnt/source LD_LIBRARY_PATH=/mnt/python/lib",
        'exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"',
    ]
    folders = [str(folder) for folder in (base, interpreters.SOURCE, directory)]
    prefix = ["unshare", "-m", "sh", "-ec", "\n".join(lines), "sh", *folders]
    python = Path("/mnt/python") / executable.relative_to(base)
    return prefix, [str(python), "-X", "dev", "-W", "error", "-m", "lguestlib"]


def tick_seconds(pid: int) -> float:
    """Seconds of processor time that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

