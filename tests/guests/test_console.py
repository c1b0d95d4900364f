"""Consoles served to a real kernel, User-mode Linux (QEMU has no front-end for one).

A pseudo-terminal, pipes and a terminal are the host's ends of three, and each has a
shell of the guest's at the other, with a megabyte typed into it and one shown by it.
"""

import base64
import fcntl
import os
import re
import select
import signal
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from guests.serving import MIB, listening, serving
from linux import SocketDevice, UserModeLinux
from runtime.rigs import eventually
from sessions import PATIENCE, Session

PROMPT = b"ready> "
END_OF_FILE = b"\4"
INTERRUPT = b"\3"
NAMES = ("pty", "pipes", "terminal")
AT_BOOT = (100, 40)


class Console:
    """One end of a console: what *type* types the guest's shell reads, *screen* is what it shows.

    *terminal*, if there is one, has the size.
    """

    def __init__(
        self,
        type: Callable[[bytes], object],
        screen: int,
        guest: UserModeLinux,
        device: str,
        terminal: int = -1,
    ) -> None:
        self.type = type
        self.screen = screen
        self.guest = guest
        self.device = device
        self.terminal = terminal

    def shown(self) -> bytes:
        """All up to the next prompt, without that."""
        shown = bytearray()
        deadline = time.monotonic() + PATIENCE
        while not shown.endswith(PROMPT):
            ready = select.select([self.screen], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, f"no prompt but {len(shown)} bytes: {shown[-200:]!r}"
            shown += os.read(self.screen, 65536)
        return bytes(shown.removesuffix(PROMPT).replace(b"\r\n", b"\n"))

    def command(self, line: str) -> bytes:
        """What the shell answers."""
        self.type(line.encode() + b"\n")
        return self.shown()

    def start_shell(self) -> None:
        """A shell of people's, with job control; it does not show again what it reads."""
        there = f"exec <{self.device} >{self.device} 2>&1; stty -echo -onlcr"
        shell = f'{there}; PS1="{PROMPT.decode()}" exec setsid -c sh -i'
        # What a script's shell runs in the background is deaf to ^C.
        self.guest.call(f"start-stop-daemon -S -b -p /tmp/none -a /bin/sh -- -c '{shell}'")
        self.shown()

    def size(self) -> tuple[int, int] | None:
        """Columns and rows, where the guest knows them; its shell keeps the device open."""
        known = re.fullmatch(r"(\d+) (\d+)\n", self.guest.command(f"stty size <{self.device}").output)
        return (int(known[2]), int(known[1])) if known else None


def resize(terminal: int, columns: int, rows: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))


@pytest.fixture(scope="module")
def back_ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Session, Session, Path]]:
    """Two: one with a pseudo-terminal and pipes, one at a terminal."""
    folder = tmp_path_factory.mktemp("consoles")
    words = ["console", "--pty", f"--socket-path={folder}/pty", "console", f"--socket-path={folder}/pipes"]
    with serving(*words, sockets=0) as first:
        with serving("console", "--socket-path", f"{folder}/terminal", terminal=True) as second:
            resize(second.terminal, *AT_BOOT)
            yield first, second, folder


@pytest.fixture(scope="module")
def consoles(back_ends: tuple[Session, Session, Path]) -> Iterator[dict[str, Console]]:
    """One guest with all of them."""
    first, second, folder = back_ends
    first.expect("console: ", messages=True)
    pty = os.open(first.expect("\n", messages=True).strip(), os.O_RDWR | os.O_NOCTTY)
    listening(first, 2)
    devices = [SocketDevice("console", folder / name) for name in NAMES]
    with UserModeLinux(devices, folder) as guest:
        found = {
            "pty": Console(lambda data: os.write(pty, data), pty, guest, "/dev/hvc0", pty),
            "pipes": Console(first.type, first.screen.fd, guest, "/dev/hvc1"),
            "terminal": Console(second.type, second.screen.fd, guest, "/dev/hvc2", second.terminal),
        }
        for console in found.values():
            console.start_shell()
        yield found
        assert guest.end() == 0
    os.close(pty)


@pytest.fixture(params=NAMES)
def console(request: pytest.FixtureRequest, consoles: dict[str, Console]) -> Console:
    return consoles[str(request.param)]


def test_a_megabyte_goes_each_way(console: Console) -> None:
    """As people paste it into a shell, and as a program shows it."""
    # In lines that a terminal can edit.
    text = base64.encodebytes(os.urandom(MIB * 3 // 4))
    assert len(text) >= MIB
    console.type(b"cat >/tmp/pasted\n")
    typing = threading.Thread(target=console.type, args=[text + END_OF_FILE], daemon=True)
    typing.start()
    assert not console.shown()
    typing.join()
    checksum = sha256(text).hexdigest()
    assert console.command("sha256sum </tmp/pasted").split()[0].decode() == checksum
    assert sha256(console.command("cat /tmp/pasted")).hexdigest() == checksum


def test_control_c_reaches_the_program(console: Console) -> None:
    console.type(b"sleep 1000\n")
    eventually(lambda: console.guest.command("pidof sleep").status == 0, "the program's start")
    console.type(INTERRUPT)
    assert console.shown().strip() in (b"", b"^C")
    assert console.command("echo $?") == b"130\n"


def test_a_terminals_size_is_the_guests(consoles: dict[str, Console]) -> None:
    """From the first on, and as it changes."""
    console = consoles["terminal"]
    assert console.size() == AT_BOOT
    for size in ((132, 43), (80, 25)):
        # The kernel tells who is in the foreground there.
        resize(console.terminal, *size)
        eventually(lambda: console.size() == size, f"a size of {size}")


def test_a_pseudo_terminals_size_is_the_guests_when_the_back_end_is_told(
    consoles: dict[str, Console], back_ends: tuple[Session, Session, Path]
) -> None:
    console = consoles["pty"]
    assert console.size() is None
    resize(console.terminal, 132, 43)
    back_ends[0].signal(signal.SIGWINCH)
    eventually(lambda: console.size() == (132, 43), "the size that somebody at the pseudo-terminal has set")
    assert consoles["pipes"].size() is None
