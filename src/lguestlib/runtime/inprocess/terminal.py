"""The guest's side of the console: output, and lines edited as they are typed."""

from collections.abc import Callable

from lguestlib.runtime.inprocess.driver import PAGE, GuestDevice, Pages
from lguestlib.virtio.split_driver import Buffer

INPUT, OUTPUT = 0, 1
INPUT_BUFFERS = 16
INPUT_SIZE = 256
OUTPUT_BUFFERS = 8

LINE_MAX = 1024
_ENDS, _ERASES, _DROPS = b"\r\n", b"\b\x7f", b"\x03\x15"


class GuestTerminal:
    """Reads lines from, and writes text to, the console behind *device*.

    *sleep* waits for an interrupt and lets every device's be handled.
    """

    def __init__(self, device: GuestDevice, pages: Pages, sleep: Callable[[], object]) -> None:
        self.device = device
        self._sleep = sleep
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
        """The next line, echoed and edited; sleeps until there is one."""
        line = bytearray()
        while True:
            echo: list[str] = []
            for position, byte in enumerate(self._typed):
                if byte in _ENDS:
                    del self._typed[: position + 1]
                    self.write("".join(echo) + "\n")
                    return line.decode("latin-1")
                echo.append(_edit(line, byte))
            self._typed.clear()
            self.write("".join(echo))
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


def _edit(line: bytearray, byte: int) -> str:
    """Apply one key to *line* and return what to echo."""
    if byte in _DROPS:
        erased = len(line)
        line.clear()
        return "\b \b" * erased
    if byte in _ERASES:
        if not line:
            return ""
        line.pop()
        return "\b \b"
    if byte < 0x20 or len(line) >= LINE_MAX:
        return ""
    line.append(byte)
    return chr(byte)
