"""The console's far end: reads, writes, the way out, and the terminal's modes."""

import errno
import fcntl
import os
import pty
import struct
import termios
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from runtime.rigs import nothing_left, write_all

from lguestlib.abi import uio
from lguestlib.abi.signals import install_interrupt_handler, interrupt_thread
from lguestlib.runtime.backend import terminal as module
from lguestlib.runtime.backend.terminal import ESCAPE_COUNT, ESCAPE_SECONDS, Terminal
from lguestlib.runtime.trace import Tracer

RAW = termios.ICANON | termios.ECHO | termios.ISIG


class Desk:
    """A terminal object on two pipes, with somebody at their other ends."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.input, self.keyboard = os.pipe()
        self.screen, self.output = os.pipe()
        self.escapes = 0
        self.hangups: list[int | None] = []
        self.terminal = Terminal(self.input, self.output, self._escape, self._hang_up, tracer)

    def _escape(self) -> None:
        self.escapes += 1

    def _hang_up(self, error: OSError) -> None:
        self.hangups.append(error.errno)

    def type(self, data: bytes) -> bytes:
        """Type *data* and let it be read at once."""
        os.write(self.keyboard, data)
        return self.read()

    def read(self, room: int = 256) -> bytes:
        buffer = bytearray(room)
        return bytes(buffer[: self.terminal.read([memoryview(buffer)])])

    def write(self, *pieces: bytes) -> None:
        write_all(self.terminal.write, *pieces)

    def close(self) -> None:
        for fd in {self.input, self.keyboard, self.screen, self.output} - {-1}:
            os.close(fd)


@pytest.fixture
def desk() -> Iterator[Desk]:
    with nothing_left():
        desk = Desk()
        yield desk
        desk.close()


def test_input_goes_into_the_buffers_in_order(desk: Desk) -> None:
    os.write(desk.keyboard, b"abcdef")
    buffers = [bytearray(2), bytearray(3)]
    assert desk.terminal.read([memoryview(buffer) for buffer in buffers]) == 5
    assert buffers == [b"ab", b"cde"]


def test_the_end_of_input_is_0(desk: Desk) -> None:
    os.close(desk.keyboard)
    desk.keyboard = -1
    assert desk.read() == b""


def test_a_descriptor_that_cannot_be_read_has_ended(desk: Desk) -> None:
    assert on(desk.output).read([memoryview(bytearray(1))]) == 0


def test_a_descriptor_made_non_blocking_by_another_process_is_waited_for(desk: Desk) -> None:
    os.set_blocking(desk.input, False)
    typing = threading.Timer(0.05, os.write, (desk.keyboard, b"late"))
    typing.start()
    assert desk.read() == b"late"
    typing.join()


def test_a_read_is_interrupted_by_a_directed_signal(desk: Desk) -> None:
    install_interrupt_handler()
    outcome: list[str] = []

    def reading() -> None:
        try:
            desk.read()
        except InterruptedError:
            outcome.append("interrupted")

    thread = threading.Thread(target=reading)
    thread.start()
    while not outcome and thread.is_alive():
        if thread.native_id:
            interrupt_thread(thread.native_id)
        thread.join(0.005)
    assert outcome == ["interrupted"]


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("pauses", "escapes"),
    [
        ([0.0, 0.0], 1),
        ([ESCAPE_SECONDS / 2, ESCAPE_SECONDS / 2], 1),
        ([ESCAPE_SECONDS / 2, ESCAPE_SECONDS / 2 + 0.01], 0),
        # The last three count, not the first that came.
        ([ESCAPE_SECONDS - 0.1, 0.2, 0.2], 1),
        ([ESCAPE_SECONDS] * 5, 0),
    ],
)
def test_three_interrupts_within_a_second_are_the_way_out(
    desk: Desk, clock: Clock, pauses: list[float], escapes: int
) -> None:
    assert desk.type(b"\x03") == b"\x03"
    for pause in pauses:
        assert desk.escapes == 0
        clock.now += pause
        # The guest gets them all the same.
        assert desk.type(b"\x03") == b"\x03"
    assert desk.escapes == escapes


def test_an_interrupt_that_is_not_alone_in_its_read_does_not_count(desk: Desk, clock: Clock) -> None:
    desk.type(b"\x03" * ESCAPE_COUNT)
    for _ in range(ESCAPE_COUNT):
        desk.type(b"\x03\n")
    desk.type(b"\x03")
    desk.type(b"\x03")
    desk.type(b"x")
    desk.type(b"\x03")
    desk.type(b"\x03")
    assert desk.escapes == 0
    desk.type(b"\x03")
    assert desk.escapes == 1


def test_output_is_written_whole_however_slow_the_reader(desk: Desk) -> None:
    fcntl.fcntl(desk.output, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(desk.output, False)
    data = os.urandom(100_000)
    shown = bytearray()

    def reading() -> None:
        while len(shown) < len(data):
            shown.extend(os.read(desk.screen, 1000))

    thread = threading.Thread(target=reading)
    thread.start()
    desk.write(data[:5], b"", data[5:70_000], data[70_000:])
    thread.join()
    assert shown == data


def test_more_pieces_than_one_call_takes_are_written(desk: Desk) -> None:
    desk.write(*[b"x"] * 1500)
    assert os.read(desk.screen, 2000) == b"x" * 1500


def test_a_reader_that_has_gone_is_told_of_once_and_output_dropped(desk: Desk) -> None:
    os.close(desk.screen)
    desk.screen = -1
    desk.write(b"one")
    desk.write(b"two")
    assert desk.hangups == [errno.EPIPE]


def test_t13_memory_that_is_not_there_any_more_is_neither_an_end_nor_a_hang_up(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(fd: int, buffers: Sequence[memoryview]) -> int:
        raise OSError(errno.EFAULT, "Bad address")

    monkeypatch.setattr(uio, "readv", gone)
    monkeypatch.setattr(uio, "writev", gone)
    with pytest.raises(OSError, match="Bad address"):
        desk.read()
    with pytest.raises(OSError, match="Bad address"):
        desk.write(b"words")
    assert desk.hangups == []


def test_calls_are_traced_with_their_roles() -> None:
    tracer = Tracer()
    desk = Desk(tracer)
    desk.type(b"abc")
    desk.write(b"hello")
    desk.close()
    assert [(call.call, call.role, call.result) for call in tracer.calls] == [
        ("readv", "input", 3), ("writev", "output", 5),
    ]  # fmt: skip


@pytest.fixture
def tty() -> Iterator[tuple[int, int]]:
    """A terminal's two ends: the user's and the program's."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def on(fd: int) -> Terminal:
    return Terminal(fd, fd, lambda: None, lambda error: None)


def modes(fd: int) -> bytes:
    return fcntl.ioctl(fd, termios.TCGETS, bytes(64))


def test_the_size_is_the_terminals_and_zeros_elsewhere(desk: Desk, tty: tuple[int, int]) -> None:
    fcntl.ioctl(tty[1], termios.TIOCSWINSZ, struct.pack("HHHH", 25, 132, 0, 0))
    assert on(tty[1]).size() == (132, 25)
    assert desk.terminal.size() == (0, 0)


def test_raw_is_undone_on_every_way_out(tty: tuple[int, int]) -> None:
    before = modes(tty[1])
    terminal = on(tty[1])
    with pytest.raises(ZeroDivisionError), terminal.raw():
        assert not termios.tcgetattr(tty[1])[3] & RAW
        raise ZeroDivisionError
    assert modes(tty[1]) == before
    with terminal.raw():
        assert modes(tty[1]) != before
    assert modes(tty[1]) == before


def test_a_key_is_read_at_once_and_output_is_still_processed(tty: tuple[int, int]) -> None:
    terminal = on(tty[1])
    with terminal.raw():
        os.write(tty[0], b"k")
        buffer = bytearray(10)
        assert terminal.read([memoryview(buffer)]) == 1 and buffer[:1] == b"k"
        terminal.write([memoryview(bytearray(b"a\nb"))])
        assert os.read(tty[0], 100) == b"a\r\nb"


def test_a_terminal_that_goes_meanwhile_ends_the_input_and_is_no_error(tty: tuple[int, int]) -> None:
    terminal = on(tty[1])
    with terminal.raw():
        os.close(tty[0])
        assert terminal.read([memoryview(bytearray(10))]) == 0
        terminal.resume()


def test_resuming_is_for_inside_raw_alone(tty: tuple[int, int]) -> None:
    before = modes(tty[1])
    terminal = on(tty[1])
    terminal.resume()
    assert modes(tty[1]) == before
    with terminal.raw():
        cooked = termios.tcgetattr(tty[1])
        cooked[3] |= RAW
        termios.tcsetattr(tty[1], termios.TCSANOW, cooked)
        terminal.resume()
        assert not termios.tcgetattr(tty[1])[3] & RAW
    assert modes(tty[1]) == before


def test_while_another_job_has_the_terminal_reads_look_now_and_then(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreground = os.getpgrp() + 1
    monkeypatch.setattr(os, "tcgetpgrp", lambda fd: foreground)

    def refuse(fd: int, buffers: object) -> int:
        raise OSError(errno.EIO, "in the background")

    with monkeypatch.context() as away:
        away.setattr(uio, "readv", refuse)
        before = time.monotonic()
        with pytest.raises(InterruptedError):
            desk.read()
        assert time.monotonic() - before >= module.AWAY_SECONDS
    foreground = os.getpgrp()
    assert desk.type(b"back") == b"back"

