"""`run` at a terminal: raw while it runs, and afterwards as it was found, byte for byte."""

import fcntl
import os
import shlex
import signal
import struct
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sessions
from sessions import PATIENCE, Session



def modes(session: Session) -> bytes:
    """The terminal's struct termios, as the kernel has it."""
    return fcntl.ioctl(session.terminal, termios.TCGETS, bytes(64))


def local_modes(session: Session) -> int:
    flags = termios.tcgetattr(session.terminal)[3]
    assert isinstance(flags, int)
    return flags


RAW = termios.ICANON | termios.ECHO | termios.ISIG


def at_prompt(*arguments: str, command: tuple[str, ...] = sessions.COMMAND) -> tuple[Session, bytes]:
    """A session at its first prompt, its terminal raw, and the modes from before."""
    session = Session("run", *arguments, terminal=True, command=command)
    # Before the interpreter has come to the point where it could change them.
    before = modes(session)
    session.prompt()
    assert local_modes(session) & RAW == 0
    return session, before


def test_keys_go_to_the_guest_as_they_are_typed_and_power_off_restores_the_terminal(hypervisor: str) -> None:
    session, before = at_prompt("--hypervisor", hypervisor)
    with session:
        for key in "ping\b":
            session.type(key)
        session.expect("ping\b \b")
        session.type("g\r")
        assert "reply from" in session.prompt()
        session.type("off\r")
        assert session.end().status == 0
        assert modes(session) == before


def test_three_interrupts_within_a_second_end_it(hypervisor: str) -> None:
    session, before = at_prompt("--hypervisor", hypervisor)
    with session:
        interrupt(session, 0.05)
        assert session.end().status == 130
        assert modes(session) == before


def interrupt(session: Session, pause: float, times: int = 3) -> None:
    for _ in range(times):
        session.type(b"\x03")
        time.sleep(pause)


def test_interrupts_further_apart_or_in_one_read_are_the_guests() -> None:
    session, before = at_prompt("--hypervisor", "inprocess")
    with session:
        interrupt(session, 0.55)
        session.type(b"\x03\x03\x03")
        interrupt(session, 0.05, times=2)
        session.type(b"x\x15")
        interrupt(session, 0.05, times=2)
        session.type("ping\r")
        session.expect("reply from")
        session.prompt()
        session.type("off\r")
        assert session.end().status == 0
        assert modes(session) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_restores_the_terminal(number: signal.Signals) -> None:
    session, before = at_prompt("--hypervisor", "inprocess")
    with session:
        session.signal(number)
        assert session.end().status == 128 + number
        assert modes(session) == before


def test_odd_modes_come_back_as_odd_as_they_were() -> None:
    with Session("run", "--hypervisor", "inprocess", terminal=True) as session:
        odd = termios.tcgetattr(session.terminal)
        odd[0] |= termios.IXANY | termios.INLCR
        odd[3] &= ~termios.ECHOE
        odd[3] |= termios.NOFLSH
        odd[6][termios.VINTR], odd[6][termios.VMIN], odd[6][termios.VTIME] = b"\x07", b"\0", b"\x05"
        termios.tcsetattr(session.terminal, termios.TCSANOW, odd)
        before = modes(session)
        session.prompt()
        # A read that may return nothing would be the end of input.
        characters = termios.tcgetattr(session.terminal)[6]
        assert (characters[termios.VMIN], characters[termios.VTIME]) == (1, 0)
        assert local_modes(session) & RAW == 0
        session.signal(signal.SIGTERM)
        assert session.end().status == 143
        assert modes(session) == before


def test_an_exception_in_the_launcher_restores_the_terminal() -> None:
    program = (
        "import sys; from lguestlib import cli; from lguestlib.runtime.machine import Machine\n"
        "def fail(machine): input_is_raw(); raise RuntimeError('a fault of the launcher')\n"
        "def input_is_raw(): import termios; assert not termios.tcgetattr(0)[3] & termios.ICANON\n"
        "Machine.finish = fail; sys.exit(cli.main())"
    )
    session, before = at_prompt("--hypervisor", "inprocess", command=(*sessions.PYTHON, "-c", program))
    with session:
        session.type("off\r")
        session.process.wait(PATIENCE)
        session.expect("a fault of the launcher")
        assert modes(session) == before


def test_a_crash_of_the_guest_is_told_and_restores_the_terminal() -> None:
    program = (
        "import sys; from lguestlib import cli; from lguestlib.runtime.inprocess.shell import Shell\n"
        "def fail(shell, arguments): raise ZeroDivisionError('in the guest')\n"
        "Shell._stat = fail; sys.exit(cli.main())"
    )
    session, before = at_prompt("--hypervisor", "inprocess", command=(*sessions.PYTHON, "-c", program))
    with session:
        session.type("stat\r")
        status, shown, _ = session.end()
        assert status == 1
        assert shown.endswith("lguestlib: the guest crashed: ZeroDivisionError: in the guest\n")
        assert modes(session) == before


def test_the_terminals_end_ends_it() -> None:
    session, _ = at_prompt("--hypervisor", "inprocess")
    os.close(session.terminal)
    os.close(session.screen.fd)
    # SIGHUP, or an error of the output, whichever is first.
    assert session.process.wait(PATIENCE) in (129, 1)


def test_the_guest_is_told_of_the_terminals_size(hypervisor: str) -> None:
    session, _ = at_prompt("--hypervisor", hypervisor)
    with session:
        for columns in (80, 100, 120):
            fcntl.ioctl(session.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            assert "reply from" in terminal_command(session, "ping")
        session.type("off\r")
        assert session.end().status == 0


def terminal_command(session: Session, line: str) -> str:
    session.type(line + "\r")
    return session.prompt()


def test_a_stop_and_a_continuation_make_the_terminal_raw_again() -> None:
    session, before = at_prompt("--hypervisor", "inprocess")
    with session:
        session.signal(signal.SIGSTOP)
        # What a shell does meanwhile.
        shells = termios.tcgetattr(session.terminal)
        shells[3] |= RAW
        termios.tcsetattr(session.terminal, termios.TCSANOW, shells)
        session.signal(signal.SIGCONT)
        eventually(lambda: local_modes(session) & RAW == 0)
        assert "reply from" in terminal_command(session, "ping")
        session.signal(signal.SIGTERM)
        assert session.end().status == 143
        assert modes(session) == before


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Shell:
    """An interactive shell at a terminal, with job control."""

    def __init__(self) -> None:
        self.session = Session(terminal=True, command=("sh", "-i"))
        # Quoted so that its echo is not the prompt.
        self.session.type("PS1='rea''dy: '\n")
        self.session.expect("ready: ")

    def run(self, line: str) -> str:
        """What is shown from *line* to the next prompt."""
        self.session.type(line + "\n")
        return self.session.expect("ready: ")


def in_shell(*arguments: str) -> str:
    return shlex.join([*sessions.COMMAND, "run", "--hypervisor", "inprocess", *arguments])


def test_in_the_background_it_runs_without_the_terminal_and_has_it_in_the_foreground() -> None:
    shell = Shell()
    with shell.session as session:
        before = modes(session)
        session.type(f"{in_shell()} &\n")
        session.prompt()
        assert modes(session) == before
        # The shell's own, still.
        shell.run("")
        session.type("fg\n")
        eventually(lambda: local_modes(session) & RAW == 0)
        assert "reply from" in terminal_command(session, "ping")
        session.type("off\r")
        session.expect("ready: ")
        assert modes(session) == before


def test_in_the_background_it_ends_as_anywhere() -> None:
    shell = Shell()
    with shell.session as session:
        before = modes(session)
        session.type(f"{in_shell('--exec', 'ping')} & wait $!; echo status $?\n")
        session.expect("reply from")
        session.expect("status 0")
        session.type(f"{in_shell()} &\n")
        session.prompt()
        assert "143" in shell.run("kill $!; wait $!; echo $?")
        assert modes(session) == before


def test_one_stopped_and_killed_leaves_the_terminal_to_who_has_it() -> None:
    shell = Shell()
    with shell.session as session:
        session.type(in_shell() + "\n")
        session.prompt()
        child = int(Path(f"/proc/{session.pid}/task/{session.pid}/children").read_text())
        os.kill(child, signal.SIGTSTP)
        session.expect("ready: ")
        mine = modes(session)
        shell.run("kill -TERM %1; kill -CONT %1")
        eventually(lambda: not has_memory(child))
        assert modes(session) == mine


def has_memory(pid: int) -> bool:
    """Whether the process is one still, and not what is left until its parent looks."""
    try:
        return bool(Path(f"/proc/{pid}/maps").read_bytes())
    except OSError:
        return False


def test_progress_of_ping_is_shown_on_a_terminal_and_gone_at_the_end() -> None:
    with Session("ping", "--hypervisor", "inprocess", "--count", "3", terminal=True) as session:
        session.expect("3 of 3 pings")
        session.expect("\r\033[K")
        status, shown, _ = session.end()
        assert status == 0 and "3 sent, 3 received" in shown
