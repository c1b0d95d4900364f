"""A PC's ACPI tables, made of its description and of nothing else (ACPI 6.5, 5.2).

The hardware is "reduced": neither timers nor interrupt controllers of old are needed,
and power goes off by one register (4.1).
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lguestlib.memory.acpi import aml
from lguestlib.memory.address import GuestAddress, GuestRange

OEM = b"LGUEST"
OEM_TABLE = b"LGUESTPC"
CREATOR = b"LGST"

LAPIC_AT = 0xFEE0_0000
IOAPIC_AT = 0xFEC0_0000

POWER_OFF_TYPE = 5
"""What goes into the sleep register's type field for off: ours to choose, and \\_S5 tells it."""

SLEEP_ENABLE = 1 << 5
SLEEP_TYPE_SHIFT = 2
"""Bits of the sleep control register (4.8.3.7)."""

_FADT_SIZE = 276
_HW_REDUCED = 1 << 20
_RESET_REGISTER = 1 << 10
_LEGACY_DEVICES, _NO_VGA = 1 << 0, 1 << 2
_SYSTEM_IO = 1


class MmioDevice(NamedTuple):
    """A virtio-mmio device: its registers, and its interrupt line."""

    registers: GuestRange
    line: int


@dataclass(frozen=True)
class Pci:
    """A PCI host bridge with bus 0 alone: its configuration *ecam*, *windows* of memory for BARs.

    *lines* are what pin INTA of each slot leads to, from slot 0 on.
    """

    ecam: GuestRange
    windows: Sequence[GuestRange]
    lines: Sequence[int]


@dataclass(frozen=True)
class Platform:
    """The machine to describe.  Ports are of one byte each, lines are inputs of the I/O APIC."""

    cpus: int
    sleep_port: int
    reset_port: int
    reset_value: int
    serial: Sequence[tuple[int, int]] = ()
    """Port and line of each 8250."""
    clock: tuple[int, int] | None = None
    """Port and line of a CMOS clock."""
    pci: Pci | None = None
    mmio: Sequence[MmioDevice] = ()


class AcpiTables(NamedTuple):
    """The tables, for guest memory from *at* on, where the RSDP is."""

    at: GuestAddress
    content: bytes


def acpi_tables(platform: Platform, at: GuestAddress) -> AcpiTables:
    """All tables of *platform*, to be placed at *at*.  Raises ValueError for more CPUs than have an 8-bit APIC ID."""
    if not 0 < platform.cpus <= 255:
        raise ValueError(f"ACPI: {platform.cpus} CPUs, not 1 to 255")
    content = bytearray(_aligned(_RSDP_SIZE))

    def add(table: bytes) -> int:
        where = at + len(content)
        content.extend(table.ljust(_aligned(len(table)), b"\0"))
        return where

    dsdt_at = add(dsdt(platform))
    pointed = [add(fadt(platform, dsdt_at)), add(madt(platform))]
    if platform.pci:
        pointed.append(add(mcfg(platform.pci)))
    xsdt_at = add(_table(b"XSDT", 1, b"".join(struct.pack("<Q", each) for each in pointed)))
    content[:_RSDP_SIZE] = rsdp(xsdt_at)
    return AcpiTables(at, bytes(content))


_RSDP_SIZE = 36


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _checksum(data: bytes) -> int:
    """What makes the bytes' sum 0."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its header (5.2.6)."""
    header = struct.pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM, OEM_TABLE, 1, CREATOR, 1
    )
    return header[:9] + bytes([_checksum(header + body)]) + header[10:] + body


def rsdp(xsdt_at: int) -> bytes:
    """The root pointer (5.2.5.3), with a checksum of its first 20 bytes and one of all."""
    first = struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM, 2, 0)
    first = first[:8] + bytes([_checksum(first)]) + first[9:]
    rest = struct.pack("<IQB3x", _RSDP_SIZE, xsdt_at, 0)
    return first + rest[:12] + bytes([_checksum(first + rest)]) + rest[13:]


def fadt(platform: Platform, dsdt_at: int) -> bytes:
    """The fixed description: how to sleep and how to reset (5.2.9)."""
    fields = bytearray(_FADT_SIZE)

    def put(offset: int, layout: str, *values: int) -> None:
        data = struct.pack("<" + layout, *values)
        fields[offset : offset + len(data)] = data

    def register(offset: int, port: int) -> None:
        put(offset, "BBBBQ", _SYSTEM_IO, 8, 0, 1, port)

    put(109, "H", _LEGACY_DEVICES | _NO_VGA)
    put(112, "I", _HW_REDUCED | _RESET_REGISTER)
    register(116, platform.reset_port)
    put(128, "B", platform.reset_value)
    put(131, "B", 5)  # minor version
    put(140, "Q", dsdt_at)
    register(244, platform.sleep_port)
    register(256, platform.sleep_port + 1)
    fields[268:276] = OEM_TABLE
    return _table(b"FACP", 6, bytes(fields[36:]))


def madt(platform: Platform) -> bytes:
    """The interrupt controllers: a local APIC for each CPU, whose ID is its number, and an I/O APIC (5.2.12)."""
    body = struct.pack("<II", LAPIC_AT, 0)
    for cpu in range(platform.cpus):
        body += struct.pack("<BBBBI", 0, 8, cpu, cpu, 1)
    body += struct.pack("<BBBBII", 1, 12, platform.cpus, 0, IOAPIC_AT, 0)
    return _table(b"APIC", 5, body)


def mcfg(pci: Pci) -> bytes:
    """Where PCI configuration space is in memory (PCI Firmware 3.3, 4.1.2)."""
    buses = pci.ecam.size >> 20
    return _table(b"MCFG", 1, struct.pack("<8xQHBB4x", pci.ecam.start, 0, 0, buses - 1))


def dsdt(platform: Platform) -> bytes:
    """The devices, in AML."""
    devices: list[bytes] = []
    if platform.pci:
        devices.append(_host_bridge(platform.pci))
    devices += [_mmio_device(number, device) for number, device in enumerate(platform.mmio)]
    for number, (port, line) in enumerate(platform.serial, 1):
        devices.append(_old_device(f"COM{number}", "PNP0501", number, port, line, 8))
    if platform.clock:
        devices.append(_old_device("RTC", "PNP0B00", 0, *platform.clock, 2))
    off = aml.name("_S5", aml.package(POWER_OFF_TYPE, 0, 0, 0))
    return _table(b"DSDT", 2, off + aml.scope("_SB", *devices))


def _host_bridge(pci: Pci) -> bytes:
    buses = pci.ecam.size >> 20
    routes = [aml.package(slot << 16 | 0xFFFF, 0, 0, line) for slot, line in enumerate(pci.lines)]
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_SEG", 0),
        aml.name("_BBN", 0),
        aml.name("_UID", 0),
        aml.name(
            "_CRS",
            aml.resources(
                aml.bus_numbers(0, buses - 1),
                aml.io(0xCF8, 8),
                *(aml.window(window.start, window.size) for window in pci.windows),
            ),
        ),
        aml.name("_PRT", aml.package(*routes)),
        # What is there besides: the kernel takes the configuration's memory only if it is claimed.
        aml.device(
            "MRES",
            aml.name("_HID", aml.eisa_id("PNP0C02")),
            aml.name("_CRS", aml.resources(aml.memory32(pci.ecam.start, pci.ecam.size))),
        ),
    )


def _mmio_device(number: int, device: MmioDevice) -> bytes:
    """As Linux's virtio_mmio driver knows it."""
    return aml.device(
        f"V{number:03X}",
        aml.name("_HID", "LNRO0005"),
        aml.name("_UID", number),
        # It is coherent with the CPUs' caches.
        aml.name("_CCA", 1),
        aml.name(
            "_CRS",
            aml.resources(
                aml.memory32(device.registers.start, device.registers.size), aml.interrupt(device.line)
            ),
        ),
    )


def _old_device(name: str, identity: str, number: int, port: int, line: int, ports: int) -> bytes:
    return aml.device(
        name,
        aml.name("_HID", aml.eisa_id(identity)),
        aml.name("_UID", number),
        aml.name("_CRS", aml.resources(aml.io(port, ports), aml.irq(line))),
    )
