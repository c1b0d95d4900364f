"""A console with nobody at it: commands from a list."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from lguestlib.abi import uio
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.backend.unnamed import unnamed_file
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.chain import part

PROMPT = b"\n> "
"""The end of the built-in guest's output when it waits for a command."""

SWITCH_OFF = b"off\n"


class Script(Terminal):
    """Types *commands* to the built-in guest, one at each prompt, and when there are none left, "off".

    A guest that starts over goes on with the commands that are left.
    """

    def __init__(
        self,
        commands: Sequence[bytes],
        output_fd: int,
        on_hangup: Callable[[OSError], None],
        tracer: Tracer | None = None,
    ) -> None:
        self._typed, self._typing = os.pipe()
        super().__init__(self._typed, output_fd, lambda: None, on_hangup, tracer)
        self._left = iter(commands)
        self._shown = b""

    def write(self, buffers: Sequence[memoryview]) -> int:
        """As `Terminal.write`, and type the next command if the guest has asked for one."""
        done = super().write(buffers)
        self._shown = b"".join([self._shown, *part(tuple(buffers), 0, done)])[-len(PROMPT) :]
        if self._shown == PROMPT:
            command = next(self._left, None)
            line = SWITCH_OFF if command is None else command + b"\n"
            uio.writev(self._typing, [memoryview(bytearray(line))])
        return done

    def close(self) -> None:
        """Close the pipe that is the keyboard."""
        os.close(self._typing)
        os.close(self._typed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


@contextmanager
def typed_ahead(commands: Sequence[bytes]) -> Iterator[int]:
    """A descriptor, open inside the ``with`` block, from which *commands* can be read, a line each."""
    text = b"".join(command + b"\n" for command in commands)
    fd = unnamed_file("commands", 0)
    try:
        os.pwrite(fd, text, 0)
        yield fd
    finally:
        os.close(fd)
