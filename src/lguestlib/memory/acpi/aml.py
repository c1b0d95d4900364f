"""ACPI Machine Language, as much of it as names devices and their resources (ACPI 6.5, 20 and 6.4).

Each function returns the bytes of a term, to be put into another's.
"""

import struct

Value = int | str | bytes
"""An integer, a string, or a term's bytes."""


def name_string(path: str) -> bytes:
    """A name as ASL has it: up to four characters a segment, dots between, ``\\`` for the root (20.2.2)."""
    root = b"\\" if path.startswith("\\") else b""
    segments = [part.ljust(4, "_").encode() for part in path.removeprefix("\\").split(".") if part]
    prefix = {0: b"\0", 1: b"", 2: b"\x2e"}.get(len(segments), bytes([0x2F, len(segments)]))
    return root + prefix + b"".join(segments)


def _packaged(operator: bytes, body: bytes) -> bytes:
    """*body* behind its own length, which counts its own bytes too (20.2.4)."""
    if len(body) + 1 < 0x40:
        return operator + bytes([len(body) + 1]) + body
    for more in (1, 2, 3):
        length = len(body) + 1 + more
        if length < 1 << 4 + 8 * more:
            return operator + bytes([more << 6 | length & 0xF]) + (length >> 4).to_bytes(more, "little") + body
    raise ValueError(f"AML: {len(body)} bytes are too long for a package")


def value(data: Value) -> bytes:
    """The constant *data* (20.2.3)."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, str):
        return b"\x0d" + data.encode() + b"\0"
    if data in (0, 1):
        return bytes([data])
    for operator, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if data < 1 << 8 * size:
            return bytes([operator]) + data.to_bytes(size, "little")
    raise ValueError(f"AML: {data:#x} has more than 64 bits")


def scope(path: str, *terms: bytes) -> bytes:
    """``Scope (path) { terms }``."""
    return _packaged(b"\x10", name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """``Device (path) { terms }``."""
    return _packaged(b"\x5b\x82", name_string(path) + b"".join(terms))


def name(path: str, data: Value) -> bytes:
    """``Name (path, data)``."""
    return b"\x08" + name_string(path) + value(data)


def package(*elements: Value) -> bytes:
    """``Package () { elements }``; at most 255."""
    return _packaged(b"\x12", bytes([len(elements)]) + b"".join(map(value, elements)))


def buffer(content: bytes) -> bytes:
    """``Buffer () { content }``."""
    return _packaged(b"\x11", value(len(content)) + content)


def eisa_id(identity: str) -> int:
    """``EisaId (identity)``: three letters and four hexadecimal digits in 32 bits (19.3.4)."""
    letters = 0
    for letter in identity[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return int.from_bytes((letters << 16 | int(identity[3:], 16)).to_bytes(4, "big"), "little")


def resources(*descriptors: bytes) -> bytes:
    """``ResourceTemplate () { descriptors }``, with the end tag."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def memory32(base: int, size: int) -> bytes:
    """``Memory32Fixed (ReadWrite, base, size)``."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


def io(base: int, size: int) -> bytes:
    """``IO (Decode16, base, base, 1, size)``: *size* ports from *base*."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, size)


def irq(line: int) -> bytes:
    """``IRQNoFlags () {line}``: an edge-triggered line of the old interrupt controllers' 16."""
    return struct.pack("<BH", 0x22, 1 << line)


def interrupt(gsi: int) -> bytes:
    """``Interrupt (ResourceConsumer, Edge, ActiveHigh, Shared) {gsi}``."""
    return struct.pack("<BHBBI", 0x89, 6, 0b1011, 1, gsi)


def bus_numbers(first: int, last: int) -> bytes:
    """``WordBusNumber`` of the buses behind a bridge."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, 2, 0x0C, 0, 0, first, last, 0, last - first + 1)


def window(base: int, size: int) -> bytes:
    """``QWordMemory (ResourceProducer, ..., NonCacheable, ReadWrite)``, or ``DWordMemory`` below 4 GiB."""
    last = base + size - 1
    if last < 1 << 32:
        return struct.pack("<BHBBB5I", 0x87, 23, 0, 0x0C, 1, 0, base, last, 0, size)
    return struct.pack("<BHBBB5Q", 0x8A, 43, 0, 0x0C, 1, 0, base, last, 0, size)
