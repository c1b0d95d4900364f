"""Commands typed by a list: one at each prompt of the built-in guest."""

import os
import threading
from collections.abc import Iterator

import pytest
from runtime.rigs import nothing_left, write_all

from lguestlib.runtime.backend.script import Script, typed_ahead


class Guest:
    """Shows what a test says, and reads what is typed."""

    def __init__(self, *commands: bytes) -> None:
        self.screen, output = os.pipe()
        self.output = output
        self.script = Script(commands, output, lambda error: None)

    def show(self, *pieces: bytes) -> None:
        write_all(self.script.write, *pieces)

    def typed(self) -> bytes:
        """What has been typed by now, if anything: a line that ends with something of our own."""
        os.write(self.script._typing, b".")
        buffer = bytearray(1000)
        return bytes(buffer[: self.script.read([memoryview(buffer)])]).removesuffix(b".")

    def close(self) -> None:
        self.script.close()
        os.close(self.screen)
        os.close(self.output)


@pytest.fixture
def guest() -> Iterator[Guest]:
    with nothing_left():
        guest = Guest(b"one", b"two words")
        yield guest
        guest.close()


def test_each_prompt_gets_the_next_command_and_then_off(guest: Guest) -> None:
    guest.show(b"hello\n")
    assert guest.typed() == b""
    for line in (b"one\n", b"two words\n", b"off\n", b"off\n"):
        guest.show(b"answer\n> ")
        assert guest.typed() == line


def test_a_prompt_may_come_in_pieces(guest: Guest) -> None:
    for pieces in ([b"hello", b"\n", b">"], [b" "]):
        assert guest.typed() == b""
        guest.show(*pieces)
    assert guest.typed() == b"one\n"


def test_what_is_not_at_the_start_of_a_line_or_not_the_end_is_no_prompt(guest: Guest) -> None:
    guest.show(b"1 > ")
    guest.show(b"\n> more")
    assert guest.typed() == b""


def test_what_is_shown_is_shown(guest: Guest) -> None:
    guest.show(b"a", b"b\n> ")
    assert os.read(guest.screen, 100) == b"ab\n> "


def test_a_command_longer_than_a_pipe_is_typed_while_it_is_read() -> None:
    guest = Guest(b"x" * 200_000)
    showing = threading.Thread(target=guest.show, args=(b"\n> ",))
    showing.start()
    typed = b""
    while not typed.endswith(b"\n"):
        buffer = bytearray(4096)
        typed += buffer[: guest.script.read([memoryview(buffer)])]
    showing.join()
    guest.close()
    assert typed == b"x" * 200_000 + b"\n"


def test_commands_typed_ahead_are_lines_and_then_the_end() -> None:
    with nothing_left(), typed_ahead([b"one", b"two"]) as fd:
        assert os.read(fd, 100) == b"one\ntwo\n"
        assert os.read(fd, 100) == b""
