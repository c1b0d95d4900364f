"""A 8250 serial port as a register model: for what a kernel has to say before it has a console (16550A data sheet).

What is sent is gone at once, so the transmitter is always empty; nothing is received
but what the port sends itself in loopback.
"""

from collections.abc import Callable

PORTS = 8
"""Ports that one takes."""
CONSOLE_AT, CONSOLE_LINE = 0x3F8, 4
"""COM1, what Linux calls ttyS0: its first port, and its interrupt line."""
VERDICT_AT, VERDICT_LINE = 0x2F8, 3
"""COM2, ttyS1."""

_INTERRUPT_ENABLE, _LINE_CONTROL, _MODEM_CONTROL = 1, 3, 4

_ENABLE_RECEIVED, _ENABLE_EMPTY = 0x1, 0x2
_ID_NONE, _ID_EMPTY, _ID_RECEIVED, _ID_FIFO = 0x1, 0x2, 0x4, 0xC0
_FIFO_ENABLE = 0x1
_DIVISOR_ACCESS = 0x80
_LOOPBACK = 0x10
_RECEIVED = 0x1
_TRANSMITTER_EMPTY = 0x60
_CONNECTED = 0xB0
"""Clear to send, data set ready, carrier."""

_LINE_MAX = 20


class Serial8250:
    """*send* takes the bytes that are sent, one by one; *interrupt* is called for each edge of the interrupt."""

    def __init__(self, send: Callable[[bytes], None], interrupt: Callable[[], None]) -> None:
        self._send = send
        self._interrupt = interrupt
        self._registers = bytearray(PORTS)
        self._divisor = bytearray([1, 0])
        self._fifo = self._empty_pending = False
        self._received: int | None = None

    def read(self, register: int) -> int:
        """The byte the processor reads from *register*."""
        match register:
            case 0 | 1 if self._registers[_LINE_CONTROL] & _DIVISOR_ACCESS:
                return self._divisor[register]
            case 0:
                received, self._received = self._received, None
                return received or 0
            case 2:
                return self._identify()
            case 5:
                return _TRANSMITTER_EMPTY | _RECEIVED * (self._received is not None)
            case 6:
                return self._modem_status()
        return self._registers[register]

    def write(self, register: int, value: int) -> None:
        """The processor writes the byte *value* to *register*."""
        match register:
            case 0 | 1 if self._registers[_LINE_CONTROL] & _DIVISOR_ACCESS:
                self._divisor[register] = value
            case 0:
                self._transmit(value)
            case 1:
                newly = value & ~self._registers[_INTERRUPT_ENABLE] & _ENABLE_EMPTY
                self._registers[_INTERRUPT_ENABLE] = value & 0xF
                if newly:
                    self._emptied()
            case 2:
                self._fifo = bool(value & _FIFO_ENABLE)
            case 3 | 7:
                self._registers[register] = value
            case 4:
                self._registers[_MODEM_CONTROL] = value & 0x1F

    def _transmit(self, value: int) -> None:
        if self._registers[_MODEM_CONTROL] & _LOOPBACK:
            self._received = value
            if self._registers[_INTERRUPT_ENABLE] & _ENABLE_RECEIVED:
                self._interrupt()
        else:
            self._send(bytes([value]))
        self._emptied()

    def _emptied(self) -> None:
        if self._registers[_INTERRUPT_ENABLE] & _ENABLE_EMPTY:
            self._empty_pending = True
            self._interrupt()

    def _identify(self) -> int:
        """The reason of the interrupt, the most urgent first; reading it takes the transmitter's back."""
        fifo = _ID_FIFO if self._fifo else 0
        if self._received is not None and self._registers[_INTERRUPT_ENABLE] & _ENABLE_RECEIVED:
            return fifo | _ID_RECEIVED
        if self._empty_pending:
            self._empty_pending = False
            return fifo | _ID_EMPTY
        return fifo | _ID_NONE

    def _modem_status(self) -> int:
        control = self._registers[_MODEM_CONTROL]
        if not control & _LOOPBACK:
            return _CONNECTED
        # Each output is led back to an input: DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
        pairs = ((0x1, 0x20), (0x2, 0x10), (0x4, 0x40), (0x8, 0x80))
        return sum(to for bit, to in pairs if control & bit)


class Verdict:
    """What is on the other end of the second port: a guest writes a number there, to be the verdict of its power-off."""

    def __init__(self) -> None:
        self.value = 0
        """The number of the last line that was one, modulo 256."""
        self._line = b""

    def take(self, data: bytes) -> None:
        """The guest sends *data*."""
        if data == b"\n":
            number = self._line.strip()
            self.value = int(number) % 256 if number.isdigit() else self.value
            self._line = b""
        else:
            self._line = (self._line + data)[:_LINE_MAX]
