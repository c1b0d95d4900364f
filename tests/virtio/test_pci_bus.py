"""The PCI bus: the same functions by ports and by memory, and nothing where nothing is."""

from random import Random

import pytest
from virtio.toy import Toy

from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.pci.bus import ECAM_SIZE, PciBus
from lguestlib.virtio.pci.function import BAR_SIZE, PciFunction

TOY_ID = (0x1040 + 42 << 16 | 0x1AF4).to_bytes(4, "little")
HOST_ID = bytes.fromhex("361b 0800")
NOTHING = b"\xff" * 4


def bus(devices: int = 2) -> PciBus:
    made = PciBus()
    for _ in range(devices):
        made.add(PciFunction(Toy()))
    return made


def select(pci: PciBus, slot: int, register: int = 0, function: int = 0, number: int = 0) -> None:
    pci.write_port(0xCF8, (1 << 31 | number << 16 | slot << 11 | function << 8 | register).to_bytes(4, "little"))


def test_the_bridge_is_in_slot_0_and_the_devices_behind_it() -> None:
    pci = bus()
    found = []
    for slot in range(32):
        select(pci, slot)
        found.append(pci.read_port(0xCFC, 4))
        assert pci.read_ecam(slot << 15, 4) == found[-1]
    assert found == [HOST_ID, TOY_ID, TOY_ID] + [NOTHING] * 29


def test_the_bridge_says_that_it_is_one() -> None:
    assert bus().read_ecam(8, 4) == bytes.fromhex("00 00 00 06")
    pci = bus()
    pci.write_ecam(4, b"\xff\xff")
    assert pci.read_ecam(4, 2) == b"\x46\x05"


ABSENT = [(1, 1, 0), (0, 7, 0), (3, 0, 0), (31, 7, 0), (0, 0, 1), (1, 0, 255)]


@pytest.mark.parametrize(("slot", "function", "number"), ABSENT)
def test_absent_functions_read_as_ones_and_take_nothing(slot: int, function: int, number: int) -> None:
    pci = bus()
    at = number << 20 | slot << 15 | function << 12
    select(pci, slot, 0x10, function, number)
    for size in (1, 2, 4):
        assert pci.read_port(0xCFC, size) == pci.read_ecam(at, size) == b"\xff" * size
    pci.write_port(0xCFC, b"1234")
    pci.write_ecam(at, b"1234")
    assert all(pci.read_ecam(there << 15 | 0x10, 4) == b"\x04\0\0\0" for there in (1, 2))


def test_without_the_enable_bit_the_data_port_is_nothing() -> None:
    pci = bus()
    pci.write_port(0xCF8, (1 << 11).to_bytes(4, "little"))
    assert pci.read_port(0xCFC, 4) == NOTHING
    assert pci.read_port(0xCF8, 4) == (1 << 11).to_bytes(4, "little")


def test_the_data_port_has_four_lanes() -> None:
    pci = bus()
    select(pci, 1, 0x2C)
    whole = pci.read_port(0xCFC, 4)
    assert whole == TOY_ID
    for lane, size in ((0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2), (1, 2)):
        assert pci.read_port(0xCFC + lane, size) == whole[lane : lane + size]
    for lane, size in ((1, 4), (3, 2), (2, 4)):
        assert pci.read_port(0xCFC + lane, size) == b"\xff" * size
    pci.write_port(0xCFC + 2, b"\xff\xff")
    select(pci, 1, 0x3C)
    pci.write_port(0xCFC, b"\x0b")
    assert pci.read_port(0xCFC, 2) == b"\x0b\x01"


def test_the_address_port_takes_32_bits_at_once_and_keeps_what_is_defined() -> None:
    pci = bus()
    pci.write_port(0xCF8, NOTHING)
    assert pci.read_port(0xCF8, 4) == bytes.fromhex("fc ff ff 80")
    for port, data in ((0xCF8, b"\0"), (0xCF9, b"\x06"), (0xCFA, b"\0\0")):
        pci.write_port(port, data)
        assert pci.read_port(port, len(data)) == b"\xff" * len(data)
    assert pci.read_port(0xCF8, 4) == bytes.fromhex("fc ff ff 80")
    select(pci, 1, 0x3C)
    pci.write_port(0xCF8, b"\x0b")
    assert pci.read_port(0xCF8, 1) == b"\xff" and pci.read_ecam(1 << 15 | 0x38, 5) == bytes(5)


def test_t5_memory_and_ports_reach_the_same_bytes_at_any_width() -> None:
    random = Random(3)
    by_port, by_memory = bus(), bus()
    for _ in range(5000):
        slot, register, lane = random.randrange(4), random.randrange(0, 256, 4), random.randrange(4)
        size = random.choice([size for size in (1, 2, 4) if lane + size <= 4])
        data = random.randbytes(size)
        at = slot << 15 | register | lane
        select(by_port, slot, register)
        by_port.write_port(0xCFC + lane, data)
        by_memory.write_ecam(at, data)
        assert by_port.read_port(0xCFC + lane, size) == by_memory.read_ecam(at, size)
    state = [pci.read_ecam(offset, 256) for pci in (by_port, by_memory) for offset in (0, 1 << 15, 2 << 15)]
    assert state[:3] == state[3:] and state[1] != bus().read_ecam(1 << 15, 256)


def test_the_window_of_memory_is_one_bus_wide_and_an_access_stays_in_one_function() -> None:
    pci = bus()
    assert ECAM_SIZE == 1 << 20
    assert pci.read_ecam(4094, 4) == NOTHING
    assert pci.read_ecam((1 << 15) + 4092, 4) == bytes(4)


def test_a_function_is_found_by_the_address_of_its_registers() -> None:
    pci = bus(3)
    assert pci.at(0xC000_0000) is None
    pci.place(GuestAddress(0xC000_0000), range(16, 48))
    for slot, function in enumerate(pci.functions):
        assert pci.at(0xC000_0000 + slot * BAR_SIZE + 0x2004) == (function, 0x2004)
        assert function.read_config(0x3C, 1) == bytes([17 + slot])
    assert pci.at(0xC000_0000 + 3 * BAR_SIZE) is pci.at(0xBFFF_FFFF) is None
    pci.write_ecam(1 << 15 | 4, b"\0\0")
    assert pci.at(0xC000_0000) is None


def test_there_are_31_slots_for_devices() -> None:
    pci = bus(31)
    with pytest.raises(ValueError, match="the bus has no room for more than 31 devices"):
        pci.add(PciFunction(Toy()))
