"""The seed's own command line, on a host whose /dev/lguest is a double: what a user does and sees."""

import json
import os
import re
import signal
import sys
import termios
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import interpreters
import pytest
import sessions
from memory.images import Load, elf
from sessions import PYTHON, Namespace, Session, programs_or_skip

PROGRAM = str(Path(__file__).parents[1] / "lguest_launch.py")
COMMAND = (*PYTHON, PROGRAM)
GUEST = "192.168.19.2"
PINGS = 100
MARGIN = 10


@pytest.fixture
def network() -> Iterator[Namespace]:
    sessions.root_or_skip()
    programs_or_skip(ping="iputils-ping")
    with Namespace() as namespace:
        yield namespace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a kernel, a disk and an initrd."""
    (tmp_path / "vmlinux").write_bytes(elf(32, 0x10_0000, [Load(0x10_0000, b"\x90" * 64, 4096, 0xC010_0000)]))
    (tmp_path / "rootfile").write_bytes(b"the root file system".ljust(65536, b"\0"))
    return tmp_path


@pytest.fixture(params=["this interpreter", "an old kernel", "32 bits on an old kernel"])
def command(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The words that run the launcher here, and as it is run on the hosts that lguest is for."""
    if request.param == "this interpreter":
        return COMMAND
    python = (sys.executable,) if request.param == "an old kernel" else tuple(interpreters.i386_or_skip())
    return tuple(interpreters.on_old_kernel(*python, *PYTHON[1:], PROGRAM))


def test_the_seeds_own_line_boots_to_a_shell_with_its_disk_and_its_network(
    network: Namespace, folder: Path, command: tuple[str, ...]
) -> None:
    words = "run 64 vmlinux --tunnet=192.168.19.1 --block=rootfile root=/dev/vda".split()
    with Session(*words, prefix=network.prefix, command=command, directory=folder) as session:
        assert "Linux on lguest, 64 MiB: root=/dev/vda\n" in session.prompt()
        assert session.command("devices") == "net block console\n"
        assert session.command("line") == "root=/dev/vda\n"
        assert session.command("read 0") == "the root file system\n"
        assert session.command("write 5 kept") == "written\n"
        assert session.command("ping 20") == "20 replies\n"
        network.call("ping", "-q", "-c", "20", "-i", "0.01", GUEST)
        for kind in ("plain", "big", "new"):
            assert session.command(f"rebind {kind}") == "bound again\n"
            assert session.command("ping 3") == "3 replies\n"
            network.call("ping", "-q", "-c", "3", "-i", "0.01", "-s", "1400", GUEST)
        session.type("off\n")
        status, _, errors = session.end()
    assert status == 0
    assert "lguest, because /dev/lguest is usable and vmlinux is a 32-bit kernel" in errors
    assert (folder / "rootfile").read_bytes()[5 * 512 :].startswith(b"kept\0")
    assert network.interfaces() == []


def test_options_go_before_and_after_and_repeat(network: Namespace, folder: Path) -> None:
    (folder / "swap").write_bytes(b"swap space".ljust(4096, b"\0"))
    words = (
        "run --verbose --rng --block=swap 32 vmlinux --block=rootfile --tunnet=192.168.19.1:02:00:00:00:00:77"
        " --tunnet=192.168.20.1 root=/dev/vdb init=/bin/sh"
    )
    with Session(*words.split(), prefix=network.prefix, command=COMMAND, directory=folder) as session:
        assert "32 MiB: root=/dev/vdb init=/bin/sh\n" in session.prompt()
        assert session.command("devices") == "rng block block net net console\n"
        assert (session.command("read 0 0"), session.command("read 0 1")) == (
            "swap space\n", "the root file system\n",
        )  # fmt: skip
        assert (session.command("ping 2 0"), session.command("ping 2 1")) == ("2 replies\n", "2 replies\n")
        assert "lladdr 02:00:00:00:00:77 " in network.call("ip", "neighbour", "show", GUEST)
        assert len(session.command("rand")) == 129
        session.type("off\n")
        assert session.end().status == 0


def test_a_reboot_keeps_the_interface_and_the_disk(network: Namespace, folder: Path) -> None:
    words = "run 64 vmlinux --tunnet=192.168.19.1 --block=rootfile root=/dev/vda".split()
    with Session(*words, prefix=network.prefix, command=COMMAND, directory=folder) as session:
        session.prompt()
        before = network.call("ip", "-o", "link", "show", "tap0").partition(":")[0]
        for number in range(3):
            assert session.command(f"write {number + 1} boot{number}") == "written\n"
            session.type("reboot\n")
            assert "Linux on lguest" in session.prompt()
            assert session.command(f"read {number + 1}") == f"boot{number}\n"
            assert session.command("ping 2") == "2 replies\n"
            network.call("ping", "-q", "-c", "1", GUEST)
            assert network.call("ip", "-o", "link", "show", "tap0").partition(":")[0] == before
            held = len(os.listdir(f"/proc/{session.pid}/fd"))
            threads = len(os.listdir(f"/proc/{session.pid}/task"))
            if number == 0:
                first = held, threads
            assert (held, threads) == first
        session.type("off\n")
        assert session.end().status == 0


def test_in_a_bridge_the_guest_reaches_the_bridges_address(network: Namespace, folder: Path) -> None:
    network.call("ip", "link", "add", "br0", "type", "bridge")
    network.call("ip", "address", "add", "192.168.19.1/24", "dev", "br0")
    network.call("ip", "link", "set", "br0", "up")
    words = "run 64 vmlinux --tunnet=bridge:br0:02:00:00:00:00:05".split()
    with Session(*words, prefix=network.prefix, command=COMMAND, directory=folder) as session:
        session.prompt()
        assert session.command("ping 3") == "3 replies\n"
        network.call("ping", "-q", "-c", "3", "-i", "0.01", GUEST)
        assert "lladdr 02:00:00:00:00:05 " in network.call("ip", "neighbour", "show", GUEST)


def test_two_guests_at_once(network: Namespace, folder: Path) -> None:
    def start(address: str) -> Session:
        words = ["run", "64", "vmlinux", f"--tunnet={address}"]
        return Session(*words, prefix=network.prefix, command=COMMAND, directory=folder)

    with start("192.168.19.1") as one, start("192.168.20.1") as other:
        one.prompt()
        other.prompt()
        assert one.command("ping 3") == "3 replies\n"
        network.call("ping", "-q", "-c", "1", GUEST)
        for session in (one, other):
            session.type("off\n")
            assert session.end().status == 0


def test_a_panic_is_printed_and_the_exit_status_1(folder: Path) -> None:
    with Session("run", "64", "vmlinux", "--block=rootfile", command=COMMAND, directory=folder) as session:
        session.prompt()
        session.type("panic no init found\n")
        status, _, errors = session.end()
    assert status == 1
    assert "Kernel panic - not syncing: no init found" in errors


def test_commands_from_the_command_line_are_typed(folder: Path, command: tuple[str, ...]) -> None:
    words = ["run", "64", "vmlinux", "--block=rootfile", "--rng", "--exec"]
    commands = "write 1 typed; read 1; rand; off"
    status, output, errors = sessions.run(*words, commands, command=command, directory=folder)
    assert status == 0, errors
    assert "> read 1\ntyped\n" in output
    assert re.search(r"> rand\n[0-9a-f]{128}\n", output)


def test_three_interrupts_at_the_terminal_end_it_and_leave_the_terminal_as_it_was(folder: Path) -> None:
    words = ["run", "64", "vmlinux", "--rng"]
    with Session(*words, command=COMMAND, directory=folder, terminal=True) as session:
        before = termios.tcgetattr(session.terminal)
        session.prompt()
        assert termios.tcgetattr(session.terminal) != before
        for _ in range(3):
            session.type(b"\x03")
            time.sleep(0.1)
        assert session.end().status == 130
        assert termios.tcgetattr(session.terminal) == before


def test_a_signal_ends_it_and_its_interface_goes(network: Namespace, folder: Path) -> None:
    words = ["run", "64", "vmlinux", "--tunnet=192.168.19.1"]
    with Session(*words, prefix=network.prefix, command=COMMAND, directory=folder) as session:
        session.prompt()
        assert network.interfaces() == ["tap0"]
        session.signal(signal.SIGTERM)
        assert session.end().status == 128 + signal.SIGTERM
    assert network.interfaces() == []


def test_a_ping_is_the_seeds_five_calls(network: Namespace, folder: Path) -> None:
    words = ["run", "64", "vmlinux", "--tunnet=192.168.19.1", "--trace", "trace.json"]
    with Session(*words, prefix=network.prefix, command=COMMAND, directory=folder) as session:
        session.prompt()
        assert session.command(f"ping {PINGS}") == f"{PINGS} replies\n"
        session.type("off\n")
        assert session.end().status == 0
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    calls = Counter((names[event["tid"]], event["name"]) for event in events if event["ph"] == "X")
    network_calls = {call: count for call, count in calls.items() if call[0].startswith("net0 ")}
    # Once per ping, and a few for neighbours' questions; the guest wants no interrupt for what it has sent.
    once = [
        ("net0 transmit", "read(kick)"), ("net0 transmit", "writev(tap)"),
        ("net0 receive", "readv(tap)"), ("net0 receive", "write(interrupt)"),
    ]  # fmt: skip
    for call in once:
        assert PINGS <= network_calls.pop(call) < PINGS + MARGIN, call
    assert sum(network_calls.values()) < MARGIN, network_calls
