"""Small machine-code guests on the PC: its ports, its PCI bus, its processors, and how it ends."""

import os
from collections.abc import Iterator

import pytest
from runtime.rigs import nothing_left
from runtime.test_kvm import HALT, Nothing, al

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime import vm
from lguestlib.runtime.machine import Crash, Outcome, PowerOff, Reboot, Stopped
from lguestlib.runtime.options import TransportName
from lguestlib.runtime.pc.machine import ECAM, FIRMWARE, HIGH_MEMORY_AT, LOW_MEMORY_MAX, PcMachine, pc_memory
from lguestlib.runtime.vm import KvmUnusable, open_kvm

ENTRY = GuestAddress(0x10000)
RESULTS = GuestAddress(0x20000)
OUT_DX, OUTL_DX, INL_DX, IN_DX = "ee", "ef", "ed", "ec"
SPIN = "ebfe"


def dx(port: int) -> str:
    return f"ba{port.to_bytes(4, 'little').hex()}"  # mov $port, %edx


def eax(value: int) -> str:
    return f"b8{value.to_bytes(4, 'little').hex()}"  # mov $value, %eax


def load(address: int) -> str:
    return f"a1{address.to_bytes(4, 'little').hex()}"  # mov address, %eax


def store(address: int) -> str:
    return f"a3{address.to_bytes(4, 'little').hex()}"  # mov %eax, address


OFF = dx(0x600) + al(5 << 2 | 1 << 5) + OUT_DX + HALT


@pytest.fixture(autouse=True)
def usable() -> Iterator[None]:
    try:
        os.close(open_kvm())
    except KvmUnusable as error:
        pytest.skip(str(error))
    with nothing_left():
        yield


class Guest:
    """A machine with *devices* that do nothing, and what it has shown and reported."""

    def __init__(self, devices: int = 0, transport: TransportName = "pci", cpus: int = 1) -> None:
        self.shown = b""
        self.said: list[str] = []
        self.machine = PcMachine(
            pc_memory(2 << 20), self.said.append, cpus=cpus, transport=transport, console=self._show
        )
        for _ in range(devices):
            self.machine.add(Nothing("nothing"))
        self.rsdp = self.machine.place_firmware()

    def _show(self, text: bytes) -> None:
        self.shown += text

    def run(self, code: str) -> Outcome:
        self.machine.memory.write(ENTRY, bytes.fromhex(code))
        self.machine.boot_32(ENTRY)
        self.machine.start()
        return self.machine.wait()

    def word(self, index: int) -> int:
        return int.from_bytes(self.machine.memory.read(GuestAddress(RESULTS + 4 * index), 4), "little")

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *details: object) -> None:
        self.machine.close()


def test_the_sleep_register_powers_off() -> None:
    with Guest() as guest:
        assert guest.run(dx(0x600) + al(5 << 2) + OUT_DX + al(4 << 2 | 32) + OUT_DX + OFF) == PowerOff(0)


@pytest.mark.parametrize(
    "code", [dx(0xCF9) + al(2) + OUT_DX + al(6) + OUT_DX, dx(0x64) + al(0xFE) + OUT_DX]
)
def test_the_reset_register_and_the_keyboard_controller_start_over(code: str) -> None:
    with Guest() as guest:
        assert guest.run(code + HALT) == Reboot()


def test_the_reset_vector_starts_over_in_real_mode() -> None:
    with Guest() as guest:
        code = guest.machine.memory.read(GuestAddress(0xFFFF0), 9)
    # mov $0xcf9, %dx; mov $6, %al; out %al, %dx; hlt; jmp .-1
    assert code == bytes.fromhex("ba f9 0c b0 06 ee f4 eb fd")


def test_the_second_serial_port_takes_the_verdict_of_the_power_off() -> None:
    code = dx(0x2F8) + al(0x34) + OUT_DX + al(0x32) + OUT_DX + al(0x0A) + OUT_DX
    with Guest() as guest:
        assert guest.run(code + OFF) == PowerOff(42)


def test_the_first_serial_port_is_shown() -> None:
    code = "".join(dx(0x3F8) + al(byte) + OUT_DX for byte in b"early") + dx(0x3FD) + IN_DX + store(RESULTS)
    with Guest() as guest:
        assert guest.run(eax(0) + code + OFF) == PowerOff(0)
        assert guest.shown == b"early" and guest.word(0) == 0x60


def test_pci_is_reached_by_ports_and_by_memory() -> None:
    code = ""
    for index, slot in enumerate((0, 1, 2, 3)):
        code += dx(0xCF8) + eax(1 << 31 | slot << 11) + OUTL_DX + dx(0xCFC) + INL_DX + store(RESULTS + 8 * index)
        code += load(ECAM.start + (slot << 15)) + store(RESULTS + 8 * index + 4)
    code += load(0xC000_0000 + 0x10000 + 18 & ~3) + store(RESULTS + 32)
    with Guest(devices=2) as guest:
        assert guest.run(code + OFF) == PowerOff(0)
        words = [guest.word(index) for index in range(9)]
    nothing = 0x1040 + 63 << 16 | 0x1AF4
    assert words[:8] == [0x00081B36] * 2 + [nothing] * 4 + [0xFFFF_FFFF] * 2
    assert words[8] == 0, "a dword at 16 is wider than the register there"


def test_where_there_is_nothing_reads_as_ones() -> None:
    code = load(0xD800_0000) + store(RESULTS) + dx(0x1234) + INL_DX + store(RESULTS + 4)
    with Guest() as guest:
        guest.run(code + OFF)
        assert (guest.word(0), guest.word(1)) == (0xFFFF_FFFF, 0xFFFF_FFFF)


def test_virtio_mmio_devices_are_where_acpi_says() -> None:
    with Guest(devices=2, transport="mmio") as guest:
        code = load(0xD000_0000) + store(RESULTS) + load(0xD000_1008) + store(RESULTS + 4)
        assert guest.run(code + load(0xD000_2000) + store(RESULTS + 8) + OFF) == PowerOff(0)
        assert [guest.word(index) for index in range(3)] == [0x74726976, 63, 0xFFFF_FFFF]
        tables = guest.machine.memory.read(FIRMWARE.start, FIRMWARE.size)
    assert tables.count(b"LNRO0005") == 2 and b"MCFG" not in tables


def test_the_tables_are_where_an_old_kernel_looks() -> None:
    with Guest(cpus=3) as guest:
        assert guest.rsdp == 0xE0000
        tables = guest.machine.memory.read(FIRMWARE.start, FIRMWARE.size)
    assert tables.startswith(b"RSD PTR ")
    madt = tables.index(b"APIC", 0x40)
    assert tables[madt + 44 : madt + 68 : 8] == bytes([0, 0, 0]), "three local APICs"


def test_a_processor_that_is_not_started_waits_and_all_are_ended() -> None:
    with Guest(cpus=3) as guest:
        assert guest.run(OFF) == PowerOff(0)


def test_a_spinning_processor_is_stopped_from_outside() -> None:
    with Guest(cpus=2) as guest:
        guest.machine.memory.write(ENTRY, bytes.fromhex(SPIN))
        guest.machine.boot_32(ENTRY)
        guest.machine.start()
        guest.machine.request_stop()
        assert guest.machine.wait() == Stopped()


def test_a_triple_fault_is_a_crash_with_its_place() -> None:
    with Guest() as guest:
        outcome = guest.run("0f0b")  # ud2, and no interrupt table
        assert isinstance(outcome, Crash) and "triple fault" in outcome.reason and "\n" not in outcome.reason


def test_memory_past_3_gibibytes_is_above_4() -> None:
    with pc_memory(LOW_MEMORY_MAX + (1 << 20)) as memory:
        ranges = [(region.base, region.size) for region in memory.regions]
    assert ranges == [(0, LOW_MEMORY_MAX), (HIGH_MEMORY_AT, 1 << 20)]
    with pc_memory(1 << 20, shared=True) as memory:
        assert memory.regions[0].fd >= 0


def test_the_memory_map_has_the_firmware_and_the_configuration_reserved() -> None:
    with Guest() as guest:
        told = [(entry.where.start, entry.where.end, entry.type) for entry in guest.machine.memory_map()]
    assert told == [
        (0, 0xA0000, 1), (0xE0000, 0x100000, 2), (0x100000, 0x200000, 1), (0xE000_0000, 0xE010_0000, 2),
    ]  # fmt: skip


def test_a_bus_that_is_full_refuses_the_next_device() -> None:
    with Guest(devices=31) as guest:
        with pytest.raises(ValueError, match="nothing: the bus has no room for more than 31 devices"):
            guest.machine.add(Nothing("nothing"))


def test_a_capability_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "capability", lambda fd, number: number != 25)
    with GuestMemory.anonymous(1 << 20) as memory, pytest.raises(KvmUnusable, match="lacks KVM_CAP_IRQ_ROUTING"):
        PcMachine(memory, print)
