"""The guest's side of the console: output, and lines edited as they are typed."""

from collections.abc import Callable

from lguestlib.runtime.inprocess.driver import PAGE, GuestDevice, Pages
from lguestlib.virtio.split_driver import Buffer

INPUT, OUTPUT = 0, 1
INPUT_BUFFERS = 16
INPUT_SIZE = 256
OUTPUT_BUFFERS = 8

LINE_MAX = 639
"""Room for a sector's worth of text behind a command."""


class LineTooLong(Exception):
    """A line that was too long to be kept has ended."""


class LineEditor:
    """Makes lines of keys; what it returns is to be echoed.

    As on any terminal: backspace, ^U for the whole line, ^C for a new one; what
    cursor keys send is left out.
    """

    def __init__(self) -> None:
        self._line = bytearray()
        self._too_long = False
        self._last = 0
        self._escape = ""
        self.ended: bytes | None = None
        """The line that the last key has ended, if it has; empty after ^C."""

    def key(self, byte: int) -> str:
        """Take one key.  Raises LineTooLong with the end of a line that does not fit."""
        before, self._last, self.ended = self._last, byte, None
        if self._escape:
            self._skip(byte)
        elif byte == 0x1B:
            self._escape = "\x1b"
        elif byte == 0x0D or (byte == 0x0A and before != 0x0D):
            return self._end("\n")
        elif byte == 0x03:
            self._line.clear()
            self._too_long = False
            return self._end("^C\n")
        elif byte == 0x15:
            erased = len(self._line)
            self._line.clear()
            self._too_long = False
            return "\b \b" * erased
        elif byte in (0x08, 0x7F):
            return self._erase()
        elif byte >= 0x20 or byte == 0x09:
            return self._add(byte if byte >= 0x20 else 0x20)
        return ""

    def _add(self, byte: int) -> str:
        if len(self._line) == LINE_MAX:
            self._too_long = True
            return ""
        self._line.append(byte)
        return chr(byte)

    def _erase(self) -> str:
        """A character of several bytes goes as one (UTF-8)."""
        if not self._line:
            return ""
        while self._line.pop() & 0xC0 == 0x80 and self._line:
            continue
        return "\b \b"

    def _skip(self, byte: int) -> None:
        """What a cursor or function key sends behind ESC: the last character of "[1;5C" is a letter."""
        first = len(self._escape) == 1
        self._escape += chr(byte)
        if byte not in b"[O" if first else 0x40 <= byte or byte < 0x20:
            self._escape = ""

    def _end(self, echo: str) -> str:
        self.ended = bytes(self._line)
        self._line.clear()
        if self._too_long:
            self._too_long = False
            raise LineTooLong
        return echo


class GuestTerminal:
    """Reads lines from, and writes text to, the console behind *device*.

    *sleep* waits for an interrupt and lets every device's be handled.
    """

    def __init__(self, device: GuestDevice, pages: Pages, sleep: Callable[[], object]) -> None:
        self.device = device
        self._sleep = sleep
        self._editor = LineEditor()
        self._typed = bytearray()
        self._input_buffers = [Buffer(pages.take(INPUT_SIZE), INPUT_SIZE) for _ in range(INPUT_BUFFERS)]
        self._output_buffers = [pages.take(PAGE) for _ in range(OUTPUT_BUFFERS)]
        self._free = list(self._output_buffers)

    def start(self) -> None:
        """The device has just been brought up: give it all input buffers."""
        self._free = list(self._output_buffers)
        self.device.queues[OUTPUT].ring.disable_interrupts()
        for buffer in self._input_buffers:
            self.device.queues[INPUT].submit((), (buffer,), buffer)

    def read_line(self) -> str:
        """The next line, echoed and edited; sleeps until there is one.  Raises LineTooLong."""
        while True:
            echo, taken = "", 0
            try:
                for byte in self._typed:
                    taken += 1
                    echo += self._editor.key(byte)
                    if self._editor.ended is not None:
                        return self._editor.ended.decode("latin-1")
            except LineTooLong:
                echo += "\n"
                raise
            finally:
                del self._typed[:taken]
                self.write(echo)
            self._collect()
            if not self._typed:
                self._sleep()

    def _collect(self) -> None:
        """Take what has been typed, if anything; else ask for an interrupt at the next key."""
        queue = self.device.queues[INPUT]
        while not self._typed:
            for buffer, written in queue.reap():
                self._typed += self.device.memory.read(buffer.address, written)
                queue.submit((), (buffer,), buffer)
            if not queue.ring.enable_interrupts():
                return

    def write(self, text: str) -> None:
        """Write *text*; sleeps while all output buffers are with the device."""
        data = text.encode("latin-1", "replace")
        queue = self.device.queues[OUTPUT]
        for start in range(0, len(data), PAGE):
            while True:
                self._free += [done.buffer.address for done in queue.reap()]
                if self._free:
                    break
                if not queue.ring.enable_interrupts():
                    self._sleep()
            queue.ring.disable_interrupts()
            piece = data[start : start + PAGE]
            buffer = Buffer(self._free.pop(), len(piece))
            self.device.memory.write(buffer.address, piece)
            queue.submit((buffer,), (), buffer)
