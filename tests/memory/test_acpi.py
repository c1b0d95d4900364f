"""The ACPI tables: their places, sums and fields, and what iasl, ACPI's own compiler, says of them."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from lguestlib.memory.acpi.tables import AcpiTables, MmioDevice, Pci, Platform, acpi_tables
from lguestlib.memory.address import GuestAddress, GuestRange

AT = GuestAddress(0xE0000)
ECAM = GuestRange(GuestAddress(0xE000_0000), 1 << 20)
WINDOWS = (GuestRange(GuestAddress(0xC000_0000), 0x2000_0000), GuestRange(GuestAddress(1 << 38), 1 << 36))
PLATFORM = Platform(
    cpus=2,
    sleep_port=0x600,
    reset_port=0xCF9,
    reset_value=6,
    serial=[(0x3F8, 4), (0x2F8, 3)],
    clock=(0x70, 8),
    pci=Pci(ECAM, WINDOWS, [16 + slot % 8 for slot in range(32)]),
    mmio=[MmioDevice(GuestRange(GuestAddress(0xD000_0000 + 0x1000 * n), 0x1000), 5 + n) for n in range(3)],
)


def table(tables: AcpiTables, address: int) -> bytes:
    start = address - tables.at
    length = struct.unpack_from("<I", tables.content, start + 4)[0]
    return tables.content[start : start + length]


def by_signature(platform: Platform) -> dict[str, bytes]:
    """Found as a kernel does: from the root pointer on."""
    tables = acpi_tables(platform, AT)
    xsdt = table(tables, struct.unpack_from("<Q", tables.content, 24)[0])
    found = [xsdt] + [table(tables, address) for (address,) in struct.iter_unpack("<Q", xsdt[36:])]
    [fadt] = [each for each in found if each.startswith(b"FACP")]
    found.append(table(tables, struct.unpack_from("<Q", fadt, 140)[0]))
    return {each[:4].decode(): each for each in found}


def test_the_root_pointer_is_first_and_sums_to_zero() -> None:
    rsdp = acpi_tables(PLATFORM, AT).content[:36]
    assert rsdp[:8] == b"RSD PTR " and rsdp[15] == 2
    assert sum(rsdp[:20]) % 256 == sum(rsdp) % 256 == 0
    assert struct.unpack_from("<II", rsdp, 16) == (0, 36)


def test_every_table_is_found_and_sums_to_zero() -> None:
    found = by_signature(PLATFORM)
    assert found.keys() == {"XSDT", "FACP", "APIC", "MCFG", "DSDT"}
    for name, content in found.items():
        assert sum(content) % 256 == 0, name
    assert acpi_tables(PLATFORM, AT) == acpi_tables(PLATFORM, AT), "of the same machine always the same"


def test_without_pci_there_is_no_mcfg() -> None:
    assert by_signature(Platform(1, 0x600, 0xCF9, 6)).keys() == {"XSDT", "FACP", "APIC", "DSDT"}


def test_the_fixed_description_says_how_to_sleep_and_how_to_reset() -> None:
    fadt = by_signature(PLATFORM)["FACP"]
    assert (len(fadt), fadt[8]) == (276, 6)
    flags, = struct.unpack_from("<I", fadt, 112)
    assert flags == 1 << 20 | 1 << 10
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 6)
    assert struct.unpack_from("<BBBBQ", fadt, 244) == (1, 8, 0, 1, 0x600)
    assert struct.unpack_from("<BBBBQ", fadt, 256) == (1, 8, 0, 1, 0x601)
    boot_flags, = struct.unpack_from("<H", fadt, 109)
    assert boot_flags == 0b101, "old devices, no 8042, no VGA, MSI as it likes, a CMOS clock"


def test_the_interrupt_controllers_are_those_of_kvm() -> None:
    madt = by_signature(PLATFORM)["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 0)
    assert madt[44:60] == bytes.fromhex("00 08 00 00 01000000 00 08 01 01 01000000")
    assert madt[60:] == bytes.fromhex("01 0c 02 00 0000c0fe 00000000")


def test_the_configuration_window_is_that_of_bus_0() -> None:
    assert by_signature(PLATFORM)["MCFG"][36:] == bytes(8) + struct.pack("<QHBBI", 0xE000_0000, 0, 0, 0, 0)


@pytest.mark.parametrize("cpus", [0, 256])
def test_there_are_1_to_255_cpus(cpus: int) -> None:
    with pytest.raises(ValueError, match="CPUs"):
        acpi_tables(Platform(cpus, 0x600, 0xCF9, 6), AT)
    assert len(by_signature(Platform(255, 0x600, 0xCF9, 6))["APIC"]) == 44 + 255 * 8 + 12


def iasl(*words: str, folder: Path) -> str:
    if shutil.which("iasl") is None:
        pytest.skip("no iasl (apt-get install acpica-tools)")
    done = subprocess.run(["iasl", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", ["FACP", "APIC", "MCFG"])
def test_iasl_understands_the_tables_of_data(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.dat").write_bytes(by_signature(PLATFORM)[name])
    said = iasl("-d", f"{name}.dat", folder=tmp_path)
    assert not re.search(r"warning|error|invalid|incorrect", said, re.IGNORECASE), said
    assert "Compilation" in iasl(f"{name}.dsl", folder=tmp_path)
    again = (tmp_path / f"{name}.aml").read_bytes()
    fields = slice(36, None)
    assert again[fields] == by_signature(PLATFORM)[name][fields], "what iasl has read is what was written"


@pytest.mark.parametrize("platform", [PLATFORM, Platform(1, 0x600, 0xCF9, 6)])
def test_iasl_compiles_the_devices_without_a_complaint_to_the_same_code(platform: Platform, tmp_path: Path) -> None:
    dsdt = by_signature(platform)["DSDT"]
    (tmp_path / "dsdt.dat").write_bytes(dsdt)
    iasl("-d", "dsdt.dat", folder=tmp_path)
    said = iasl("-we", "dsdt.dsl", folder=tmp_path)
    assert "0 Errors, 0 Warnings" in said, said
    assert (tmp_path / "dsdt.aml").read_bytes()[36:] == dsdt[36:]


def test_the_devices_are_those_asked_for(tmp_path: Path) -> None:
    (tmp_path / "dsdt.dat").write_bytes(by_signature(PLATFORM)["DSDT"])
    iasl("-d", "dsdt.dat", folder=tmp_path)
    source = re.sub(r"/\*.*?\*/|//[^\n]*|\s+", " ", (tmp_path / "dsdt.dsl").read_text(), flags=re.DOTALL)
    assert source.count('Name (_HID, "LNRO0005")') == source.count('"LNRO0005"') == 3
    devices = ("COM1", "COM2", "PNP0A08", "PNP0501", "PNP0B00")
    for expected in (*devices, "0x000FFFFF", "WordBusNumber", "QWordMemory", "DWordMemory"):
        assert expected in source, expected
    assert source.count("FFFF, ") >= 32
