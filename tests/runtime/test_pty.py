"""A console on a pseudo-terminal: who opens its other end, and when nobody does."""

import errno
import fcntl
import os
import select
import struct
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sessions
from runtime.rigs import PATIENCE, Rig, eventually, nothing_left, write_all

from lguestlib.abi.signals import install_interrupt_handler, interrupt_thread
from lguestlib.runtime.backend import pty
from lguestlib.runtime.backend.pty import Pty
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.devices.console import Console

TIOCVHANGUP = 0x5437
"""asm-generic/ioctls.h"""

STOP_SECONDS = 0.1
"""The longest that stopping a thread may take, from any state."""


@pytest.fixture
def line() -> Iterator[Pty]:
    with nothing_left():
        line = Pty(Tracer())
        yield line
        line.close()


@contextmanager
def somebody(line: Pty) -> Iterator[int]:
    """Somebody at the other end."""
    fd = os.open(line.name, os.O_RDWR | os.O_NOCTTY)
    yield fd
    os.close(fd)


def write(line: Pty, *pieces: bytes) -> None:
    write_all(line.write, *pieces)


def read(line: Pty, room: int = 100) -> bytes:
    buffer = bytearray(room)
    return bytes(buffer[: line.read([memoryview(buffer)])])


def shown(fd: int) -> bytes:
    """What can be read at once."""
    text = b""
    while select.select([fd], [], [], 0.05)[0]:
        text += os.read(fd, 65536)
    return text


def test_it_goes_both_ways_as_it_is(line: Pty) -> None:
    every = bytes(range(256))
    assert os.path.exists(line.name)
    with somebody(line) as fd:
        write(line, b"login: ", b"", every)
        assert shown(fd) == b"login: " + every
        os.write(fd, every)
        buffers = [bytearray(100), bytearray(1000)]
        assert line.read([memoryview(buffer) for buffer in buffers]) == 256
        assert buffers[0] + buffers[1][:156] == every
        assert shown(fd) == b"", "nothing is echoed"


def test_people_come_and_go(line: Pty) -> None:
    for number in range(5):
        with somebody(line) as fd:
            os.write(fd, b"%d" % number)
            assert read(line) == b"%d" % number
            write(line, b"hello %d" % number)
            assert shown(fd) == b"hello %d" % number
    with somebody(line) as one, somebody(line) as other:
        os.write(one, b"both")
        assert read(line) == b"both"
        write(line, b"again")
        assert shown(one) + shown(other) == b"again"


def test_what_was_written_before_somebody_comes_is_there(line: Pty) -> None:
    write(line, b"boot log\n")
    with somebody(line) as fd:
        assert shown(fd) == b"boot log\n"


def test_more_pieces_than_one_call_takes_are_written(line: Pty) -> None:
    with somebody(line) as fd:
        write(line, *[b"xy"] * 1500)
        assert shown(fd) == b"xy" * 1500


def test_what_nobody_reads_is_lost_oldest_first_and_hinders_for_a_while_only(
    line: Pty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pty, "PATIENCE", 20)
    lines = [b"line %06d\n" % number for number in range(20_000)]
    start = time.monotonic()
    for text in lines:
        write(line, text)
    assert time.monotonic() - start < PATIENCE
    with somebody(line) as fd:
        seen = shown(fd).splitlines(keepends=True)
        assert seen and lines[-len(seen) + 1 :] == seen[1:], "the end of it, without a gap"
        write(line, b"now")
        assert shown(fd) == b"now"


def test_a_reader_that_is_there_gets_everything_however_slow(line: Pty) -> None:
    data = os.urandom(200_000)
    seen = bytearray()

    def reading(fd: int) -> None:
        while len(seen) < len(data):
            seen.extend(os.read(fd, 4096))
            time.sleep(0.002)

    with somebody(line) as fd:
        thread = threading.Thread(target=reading, args=(fd,))
        thread.start()
        for start in range(0, len(data), 5000):
            write(line, data[start : start + 5000])
        thread.join()
    assert seen == data


def test_with_nobody_there_it_sleeps(line: Pty) -> None:
    install_interrupt_handler()
    outcome: list[str] = []

    def reading() -> None:
        try:
            read(line)
        except InterruptedError:
            outcome.append("interrupted")

    thread = threading.Thread(target=reading)
    thread.start()
    with somebody(line):
        pass
    time.sleep(0.1)
    assert line.tracer and line.tracer.calls == []
    assert calling(line, "poll", "input")
    while thread.is_alive():
        assert thread.native_id
        interrupt_thread(thread.native_id)
        thread.join(0.005)
    assert outcome == ["interrupted"]


def test_calls_are_traced_with_their_roles(line: Pty) -> None:
    with somebody(line) as fd:
        os.write(fd, b"abc")
        read(line)
        write(line, b"hello")
    assert line.tracer
    calls = [(call.call, call.role, call.result) for call in line.tracer.calls]
    assert calls == [("poll", "input", 1), ("readv", "input", 3), ("writev", "output", 5)]


def test_the_size_is_what_somebody_at_the_other_end_has_set(line: Pty) -> None:
    assert line.size() == (0, 0)
    with somebody(line) as fd:
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 132, 0, 0))
    assert line.size() == (132, 25)


def calling(line: Pty, call: str, role: str) -> bool:
    """Whether one thread is in a call on the line, and in this one."""
    assert line.tracer
    return [(each.call, each.role) for each in line.tracer.open_calls] == [(call, role)]


def test_a_hang_up_ends_nothing(line: Pty, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions.root_or_skip()
    monkeypatch.setattr(pty, "PATIENCE", 20)
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(read(line)))
    thread.start()
    for _ in range(3):
        with somebody(line) as fd:
            fcntl.ioctl(fd, TIOCVHANGUP)
        write(line, b"to nobody")
        time.sleep(0.02)
        assert calling(line, "poll", "input")
    with somebody(line) as fd:
        tty.setraw(fd)
        os.write(fd, b"back\n")
        thread.join(PATIENCE)
        for _ in range(20):
            write(line, bytes(4096))
        write(line, b"again\n")
        assert got == [b"back\n"] and shown(fd).endswith(b"again\n")


def test_what_cannot_be_made_raw_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> str:
        raise OSError(errno.ENODEV, "ttyname")

    monkeypatch.setattr(os, "ttyname", fail)
    with nothing_left(), pytest.raises(OSError, match="ttyname"):
        Pty()


def test_the_output_queues_thread_is_stopped_in_time_while_the_line_is_full(
    line: Pty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pty, "PATIENCE", 60_000)
    with Rig(Console(line).queues()[1]) as rig:
        rig.start()
        for token in range(60):
            rig.submit(token, readable=2048)
        eventually(lambda: calling(line, "poll", "output"), "the full line")
        start = time.monotonic()
        rig.thread.stop()
        assert time.monotonic() - start < STOP_SECONDS
        assert rig.failures == [] and 0 < rig.counters.chains < 60
        assert len(rig.driver.reap()) == rig.counters.chains == rig.ring.state.available


def test_a_guest_that_nobody_listens_to_goes_on(line: Pty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pty, "PATIENCE", 20)
    with Rig(Console(line).queues()[1]) as rig:
        rig.start()
        for token in range(60):
            rig.submit(token, readable=4096)
        assert len(rig.collect(60)) == 60
        assert rig.failures == []
    assert line.tracer
    waits = [call for call in line.tracer.calls if call.call == "poll" and call.result == 0]
    assert len(waits) < 40, "all that the kernel keeps is thrown away at once"
