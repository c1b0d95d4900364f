"""The serial port, as Linux's 8250 driver probes and uses it."""

import pytest

from lguestlib.runtime.pc.serial import Serial8250, Verdict

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(8)


class Port:
    """A port, what it has sent, and how often it has interrupted."""

    def __init__(self) -> None:
        self.sent = b""
        self.interrupts = 0
        self.serial = Serial8250(self._take, self._count)
        self.read, self.write = self.serial.read, self.serial.write

    def _take(self, data: bytes) -> None:
        self.sent += data

    def _count(self) -> None:
        self.interrupts += 1


def test_what_is_written_is_sent_and_the_transmitter_is_empty_again() -> None:
    port = Port()
    for byte in b"Linux version 6.1\n":
        assert port.read(LSR) == 0x60
        port.write(DATA, byte)
    assert (port.sent, port.interrupts, port.read(DATA)) == (b"Linux version 6.1\n", 0, 0)


def test_linux_takes_it_for_a_16550a() -> None:
    port = Port()
    port.write(IER, 0)
    assert port.read(IER) == 0
    port.write(IER, 0x0F)
    assert port.read(IER) == 0x0F
    port.write(IER, 0)
    port.write(MCR, 0x10 | 0x0A)  # loopback
    assert port.read(MSR) & 0xF0 == 0x90
    port.write(MCR, 0)
    port.write(LCR, 0)
    port.write(IIR, 1)  # FIFO control
    assert port.read(IIR) >> 6 == 3
    port.write(IIR, 0)
    assert port.read(IIR) >> 6 == 0
    for value in (0x55, 0xAA):
        port.write(SCRATCH, value)
        assert port.read(SCRATCH) == value


def test_the_divisor_is_behind_its_access_bit_and_sends_nothing() -> None:
    port = Port()
    port.write(LCR, 0x83)
    port.write(DATA, 0x0C)
    port.write(IER, 0x01)
    assert (port.read(DATA), port.read(IER)) == (0x0C, 0x01)
    port.write(LCR, 0x03)
    assert (port.read(IER), port.read(LCR), port.sent) == (0, 3, b"")


def test_an_empty_transmitter_interrupts_who_wants_to_know() -> None:
    port = Port()
    assert port.read(IIR) & 0x0F == 1
    port.write(IER, 2)
    assert port.interrupts == 1
    assert port.read(IIR) & 0x0F == 2
    assert port.read(IIR) & 0x0F == 1, "told once"
    port.write(IER, 2)
    assert port.interrupts == 1
    port.write(DATA, 0x41)
    assert (port.interrupts, port.read(IIR) & 0x0F) == (2, 2)
    port.write(IER, 0)
    port.write(DATA, 0x42)
    assert (port.interrupts, port.sent) == (2, b"AB")


def test_in_loopback_it_receives_what_it_sends_and_the_outside_nothing() -> None:
    port = Port()
    port.write(MCR, 0x10)
    port.write(IER, 1)
    port.write(DATA, 0x5A)
    assert (port.interrupts, port.read(IIR) & 0x0F, port.read(LSR)) == (1, 4, 0x61)
    assert port.read(DATA) == 0x5A
    assert (port.read(LSR), port.read(IIR) & 0x0F, port.sent) == (0x60, 1, b"")
    for control, status in ((0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80), (0x1F, 0xF0)):
        port.write(MCR, control)
        assert port.read(MSR) == status
    port.write(MCR, 0x0B)
    assert port.read(MSR) == 0xB0


def test_t5_every_register_takes_any_byte() -> None:
    port = Port()
    for register in range(8):
        for value in range(256):
            port.write(register, value)
            assert 0 <= port.read(register) <= 0xFF


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"", 0), (b"3", 0), (b"3\r\n", 3), (b"3\r\n200\n", 200), (b"7\nnonsense\n", 7), (b"256\n", 0), (b"\n", 0),
        (b"9" * 100 + b"\n", 255),
    ],
)  # fmt: skip
def test_the_verdict_is_the_last_line_that_is_a_number(text: bytes, value: int) -> None:
    verdict = Verdict()
    for byte in text:
        verdict.take(bytes([byte]))
    assert verdict.value == value
