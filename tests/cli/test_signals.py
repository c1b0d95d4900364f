"""`run` and signals: every way out is prompt, quiet, and leaves nothing behind."""

import fcntl
import signal
import time
from pathlib import Path

import pytest
import sessions
from sessions import Namespace, Session, one_line, run

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_it_with_128_and_its_number(number: signal.Signals) -> None:
    with Session("run", "--hypervisor", "inprocess") as session:
        session.prompt()
        session.signal(number)
        status, output, errors = session.end()
        assert (status, output) == (128 + number, "")
        one_line(errors)


def test_a_guest_on_kvm_is_ended_too() -> None:
    sessions.kvm_or_skip()
    with Session("run", "--hypervisor", "kvm") as session:
        session.prompt()
        session.signal(signal.SIGTERM)
        assert session.end().status == 143


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_is_ignored_from_the_start_stays_ignored(number: signal.Signals) -> None:
    ignoring = ["sh", "-c", f'trap "" {number.name[3:]}; exec "$@"', "sh"]
    with Session("run", "--hypervisor", "inprocess", prefix=ignoring) as session:
        session.prompt()
        session.signal(number)
        assert "reply from" in session.command("ping")
        session.signal(signal.SIGTERM)
        assert session.end().status == 143


def test_other_signals_do_not_disturb_it() -> None:
    with Session("run", "--hypervisor", "inprocess") as session:
        session.prompt()
        for _ in range(20):
            for number in (signal.SIGWINCH, signal.SIGCONT):
                session.signal(number)
            assert "reply from" in session.command("ping")
        session.type("off\n")
        assert session.end().status == 0


def test_signals_while_it_starts_or_starts_over_end_it_without_a_word(hypervisor: str) -> None:
    with Session("run", "--hypervisor", hypervisor, "--exec", "reboot;" * 1000) as session:
        for _ in range(3):
            session.expect("the guest starts over", messages=True)
        session.signal(signal.SIGWINCH)
        session.signal(signal.SIGTERM)
        status, _, errors = session.end()
        assert status == 143
        assert set(errors.splitlines()) <= {"", "lguestlib: the guest starts over"}


@pytest.mark.parametrize("command", ["run", "ping"])
def test_an_interrupt_at_any_moment_of_the_start_ends_it_quietly(command: str) -> None:
    arguments = {"run": ("run",), "ping": ("ping", "--count", "20000")}[command]
    with Session(*arguments, "--hypervisor", "inprocess") as session:
        # Its first file of its own: from here on ^C is its affair.
        wait_until_mapped(session.pid, "_ctypes")
        session.signal(signal.SIGINT)
        assert session.end().status == 130


def wait_until_mapped(pid: int, name: str) -> None:
    deadline = time.monotonic() + sessions.PATIENCE
    while name not in Path(f"/proc/{pid}/maps").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def full_pipe_session(hypervisor: str) -> Session:
    """A session whose output pipe is full: the guest waits in the middle of a command."""
    session = Session("run", "--hypervisor", hypervisor)
    session.prompt()
    fcntl.fcntl(session.screen.fd, fcntl.F_SETPIPE_SZ, 4096)
    session.type("rand 1024\n" * 8)
    waiting = time.monotonic() + sessions.PATIENCE
    while not writes_to_console(session.pid):
        assert time.monotonic() < waiting
        time.sleep(0.01)
    return session


def writes_to_console(pid: int) -> bool:
    """Whether a thread of the process is in a write to the guest's console."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        call = (task / "syscall").read_text().split()
        # writev(2) on x86-64 and i386, and on the others.
        if call[0] in ("20", "146", "66") and call[1] == "0x1":
            return True
    return False


def test_a_guest_that_waits_for_a_slow_reader_can_be_ended(hypervisor: str) -> None:
    with full_pipe_session(hypervisor) as session:
        session.signal(signal.SIGTERM)
        # Nobody reads meanwhile.
        assert session.process.wait(sessions.PATIENCE) == 143


def test_a_slow_reader_gets_everything(hypervisor: str) -> None:
    with full_pipe_session(hypervisor) as session:
        time.sleep(0.1)
        for _ in range(8):
            shown = session.prompt()
            assert len(shown.splitlines()) == 33, shown
        session.type("off\n")
        assert session.end().status == 0


def test_power_off_waits_for_a_slow_reader_and_a_signal_for_nobody() -> None:
    with Session("run", "--hypervisor", "inprocess") as session:
        session.prompt()
        fcntl.fcntl(session.screen.fd, fcntl.F_SETPIPE_SZ, 4096)
        session.type("rand 1024\nrand 1024\nrand 1024\noff\n")
        time.sleep(0.3)
        assert session.process.poll() is None
        session.signal(signal.SIGTERM)
        assert session.process.wait(sessions.PATIENCE) == 143


def test_messages_that_nobody_reads_hold_nothing_up() -> None:
    # The errors go to a pipe that is full from the start.
    shell = 'import os, sys; r, w = os.pipe(); os.set_blocking(w, False)\n' \
        'try:\n while True: os.write(w, bytes(4096))\n' \
        'except BlockingIOError: os.set_blocking(w, True); os.dup2(w, 2); os.set_inheritable(r, True)\n' \
        'os.execvp(sys.argv[1], sys.argv[1:])'
    prefix = [*sessions.PYTHON, "-c", shell]
    with Session("run", "--hypervisor", "inprocess", prefix=prefix) as session:
        session.prompt()
        session.type("reboot\n")
        session.prompt()
        session.signal(signal.SIGTERM)
        assert session.end().status == 143


def test_kill_leaves_no_interface_and_no_process_behind() -> None:
    sessions.root_or_skip()
    with Namespace() as network:
        words = ("run", "--hypervisor", "inprocess", "--tunnet", "192.168.19.1")
        with Session(*words, prefix=network.prefix) as session:
            session.prompt()
            assert network.interfaces() == ["tap0"]
            session.signal(signal.SIGKILL)
            assert session.end().status == 137
        assert network.interfaces() == []


@pytest.mark.parametrize("number", [*ENDING, None])
def test_no_interface_is_left_behind(number: signal.Signals | None) -> None:
    sessions.root_or_skip()
    with Namespace() as network:
        words = ("run", "--hypervisor", "inprocess", "--tunnet", "192.168.19.1")
        with Session(*words, prefix=network.prefix) as session:
            session.prompt()
            if number is None:
                session.type("off\n")
            else:
                session.signal(number)
            assert session.end().status == (128 + number if number else 0)
        assert network.interfaces() == []
