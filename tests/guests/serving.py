"""`serve` as the back-end of real guests."""

import os
import signal
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import linux
import pytest
import sessions
from sessions import Session

LONG = bool(os.environ.get("LGUESTLIB_LONG"))
"""Whether what takes its time is done as often as it is meant to be (LGUESTLIB_LONG=1 in the environment)."""

GUESTS: dict[str, type[linux.UserModeLinux] | type[linux.Qemu]] = {
    guest.name: guest for guest in (linux.UserModeLinux, linux.Qemu)
}

MIB = 1 << 20


@contextmanager
def serving(
    *words: str, sockets: int = 1, prefix: Sequence[str] = (), terminal: bool = False
) -> Iterator[Session]:
    """`serve` with *words*, listening on so many sockets; ended by SIGTERM, with nothing to complain of."""
    with Session("serve", *words, prefix=prefix, terminal=terminal) as session:
        listening(session, sockets)
        yield session
        session.signal(signal.SIGTERM)
        assert session.end().status == 0


def listening(session: Session, sockets: int = 1) -> None:
    """Wait until *session* listens on so many sockets."""
    for _ in range(sockets):
        session.expect("listening on", messages=True)
        session.expect("\n", messages=True)


class Held(NamedTuple):
    """What a process has in its hands."""

    descriptors: int
    threads: int
    memory_files: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        """*memory_files* are shared mappings: a guest's memory, an io_uring."""
        process = Path(f"/proc/{pid}")
        shared = [line for line in (process / "maps").read_text().splitlines() if line.split()[1][3] == "s"]
        return cls(len(os.listdir(process / "fd")), len(os.listdir(process / "task")), len(shared))


def holds_again(pid: int, before: Held) -> None:
    """Wait until the process *pid* holds what it did *before*."""
    deadline = time.monotonic() + sessions.PATIENCE
    while (now := Held.by(pid)) != before:
        assert time.monotonic() < deadline, f"{now}, and {before} before"
        time.sleep(0.01)


def sparse(path: Path, size: int) -> Path:
    """An image of *size* bytes at *path* that takes no room yet."""
    with path.open("xb") as file:
        file.truncate(size)
    return path


def occupied(path: Path) -> int:
    """The bytes that the file at *path* takes on its disk."""
    return path.stat().st_blocks * 512


def compressible(data: bytes) -> bool:
    """Whether *data* can be told in fewer bytes, as chance never can."""
    return len(zlib.compress(data, 9)) < len(data)


class Load:
    """What *guest* does over and over in the background: *command*, which has to succeed each time."""

    def __init__(self, guest: linux.Linux, name: str, command: str) -> None:
        self._guest = guest
        self._name = f"/tmp/load-{name}"
        guest.call(f"mkdir {self._name} && echo 0 >{self._name}/rounds")
        round = f"({command}) >said 2>&1 || {{ echo $? >failed; break; }}"
        count = "rounds=$((rounds + 1)); echo $rounds >next; mv next rounds"
        loop = f"rounds=0; while [ ! -e stop ]; do {round}; {count}; done"
        guest.call(f"(cd {self._name}; {loop}; touch stopped) & true")

    @property
    def rounds(self) -> int:
        """How often it has been done."""
        return int(self._guest.call(f"cat {self._name}/rounds"))

    def goes_on(self, rounds: int = 1) -> None:
        """Wait until it has been done so many times more."""
        wanted = self.rounds + rounds
        deadline = time.monotonic() + linux.PATIENCE
        while self.rounds < wanted:
            self.check()
            assert time.monotonic() < deadline, f"{self._name}: no further than {self.rounds} of {wanted}"
            time.sleep(0.05)

    def check(self) -> None:
        """It has not failed so far."""
        self._guest.call(f"[ ! -e {self._name}/failed ] || {{ cat {self._name}/said; false; }}")

    def stop(self) -> int:
        """Let it come to its end; how often it was done."""
        self._guest.call(f"touch {self._name}/stop; until [ -e {self._name}/stopped ]; do sleep 0.05; done")
        self.check()
        return self.rounds


def bind_anew(driver: str, times: int) -> str:
    """The guest's command that takes *driver* off its only device and puts it back, so many *times*."""
    rounds = f'for round in $(seq {times}); do echo "$1" >unbind && echo "$1" >bind || exit 1; done'
    return f"(cd /sys/bus/virtio/drivers/{driver} && set -- virtio[0-9]* && {rounds})"
