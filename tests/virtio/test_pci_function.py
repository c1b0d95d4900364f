"""A virtio device as a PCI function, found and driven as a driver does that knows the specification alone."""

import struct
from random import Random
from typing import NamedTuple

import pytest
from virtio.toy import SIZES, Toy

from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.effects import Notify, Reset
from lguestlib.virtio.pci.effects import (
    CONFIG,
    BarMoved,
    MsixEnabled,
    PciEffect,
    PinLevel,
    VectorAssigned,
    VectorChanged,
)
from lguestlib.virtio.pci.function import BAR_SIZE, PciFunction

COMMON, NOTIFY, ISR, DEVICE, WINDOW = 1, 2, 3, 4, 5
MEMORY, MASTER, INTX_DISABLE = 2, 4, 0x400


class Place(NamedTuple):
    """Where a structure is: the capability's offset, the BAR, and the offset and bytes in it."""

    capability: int
    bar: int
    offset: int
    length: int


class Driver:
    """What a driver finds out about a function by its configuration space."""

    def __init__(self, device: Device | None = None) -> None:
        self.function = PciFunction(device or Toy())
        self.places: dict[int, Place] = {}
        self.msix = 0
        at = self.get(0x34, 1)
        while at:
            if self.get(at, 1) == 9:
                kind, bar, offset, length = struct.unpack("<3xBB3xII", self.function.read_config(at, 16))
                self.places[kind] = Place(at, bar, offset, length)
            elif self.get(at, 1) == 0x11:
                self.msix = at
            at = self.get(at + 1, 1)

    def get(self, offset: int, size: int) -> int:
        return int.from_bytes(self.function.read_config(offset, size), "little")

    def put(self, offset: int, size: int, value: int) -> list[PciEffect]:
        self.function.write_config(offset, value.to_bytes(size, "little"))
        return self.function.take_effects()

    def read(self, kind: int, offset: int, size: int) -> int:
        return int.from_bytes(self.function.read(self.places[kind].offset + offset, size), "little")

    def write(self, kind: int, offset: int, size: int, value: int) -> list[PciEffect]:
        self.function.write(self.places[kind].offset + offset, value.to_bytes(size, "little"))
        return self.function.take_effects()

    def enable_msix(self, flags: int = 0x8000) -> list[PciEffect]:
        return self.put(self.msix + 2, 2, flags)

    def unmask(self, vector: int, data: int) -> list[PciEffect]:
        at = self.get(self.msix + 4, 4) & ~7
        self.function.write(at + 16 * vector, struct.pack("<QII", 0xFEE0_0000, data, 0)[:8])
        self.function.write(at + 16 * vector + 8, struct.pack("<II", data, 0))
        return self.function.take_effects()


def test_the_function_is_a_modern_virtio_device() -> None:
    driver = Driver()
    assert driver.get(0, 4) == 0x1040 + 42 << 16 | 0x1AF4
    assert driver.get(8, 1) >= 1 and driver.get(0x2E, 2) >= 0x40
    assert driver.get(0x3D, 1) == 1


@pytest.mark.parametrize(("kind", "code"), [(1, 0x020000), (2, 0x018000), (3, 0x078000), (4, 0x00FF00)])
def test_class_codes_tell_what_it_is(kind: int, code: int) -> None:
    device = Toy()
    device.device_type = kind
    assert Driver(device).get(8, 4) >> 8 == code


def test_the_capabilities_name_every_structure_inside_the_bar_apart_from_each_other() -> None:
    driver = Driver()
    assert driver.places.keys() == {COMMON, NOTIFY, ISR, DEVICE, WINDOW}
    table, pending = driver.get(driver.msix + 4, 4), driver.get(driver.msix + 8, 4)
    assert (table & 7, pending & 7, driver.get(driver.msix + 2, 2)) == (0, 0, len(SIZES))
    taken = [(place.offset, place.length) for kind, place in driver.places.items() if kind != WINDOW]
    taken += [(table, 16 * (len(SIZES) + 1)), (pending, 8)]
    taken.sort()
    assert all(low + length <= high for (low, length), (high, _) in zip(taken, taken[1:]))
    assert taken[-1][0] + taken[-1][1] <= BAR_SIZE
    assert driver.places[COMMON].length >= 56 and driver.places[COMMON].offset % 4 == 0
    assert driver.places[NOTIFY].offset % 2 == 0
    multiplier = driver.get(driver.places[NOTIFY].capability + 16, 4)
    assert multiplier >= 2 and driver.places[NOTIFY].length >= multiplier * (len(SIZES) - 1) + 2


def test_each_structure_answers_where_its_capability_says() -> None:
    driver = Driver()
    assert driver.read(COMMON, 18, 2) == len(SIZES)
    assert driver.read(DEVICE, 0, 4) == 0x04030201
    assert driver.read(ISR, 0, 1) == 0
    for queue in range(len(SIZES)):
        assert driver.write(NOTIFY, 4 * queue, 2, queue) == [Notify(queue)]
    at = 0xC000_0000 + driver.places[NOTIFY].offset + 8
    assert driver.function.notify_address(GuestAddress(0xC000_0000), 2) == at


def test_the_bar_moves_when_it_is_written_while_memory_is_decoded() -> None:
    driver = Driver()
    assert driver.put(0x10, 4, 0xC000_0000) == []
    assert driver.put(4, 2, MEMORY) == [BarMoved(GuestAddress(0xC000_0000))]
    assert driver.put(4, 2, MEMORY | MASTER) == []
    assert driver.put(0x14, 4, 1) == [BarMoved(GuestAddress(0x1_C000_0000))]
    assert driver.function.bar == 0x1_C000_0000
    assert driver.put(4, 2, 0) == [BarMoved(None)]
    assert driver.put(0x10, 4, 0xFFFF_FFFF) == driver.put(0x14, 4, 0xFFFF_FFFF) == []
    assert driver.get(0x10, 8) == (1 << 64) - BAR_SIZE | 4


def test_vectors_are_told_of_when_the_table_or_the_control_changes() -> None:
    driver = Driver()
    assert driver.unmask(1, 0x41) == []
    changed = VectorChanged(1, driver.function.msix.message(1))
    effects = driver.enable_msix()
    assert effects[0] == MsixEnabled(True)
    [changed] = [effect for effect in effects[1:] if isinstance(effect, VectorChanged)]
    assert (changed.vector, changed.message) == (1, (0xFEE0_0000, 0x41))
    assert driver.enable_msix(0xC000) == [VectorChanged(1, None)]
    assert driver.enable_msix(0) == [MsixEnabled(False)]


def test_a_write_of_the_command_register_alone_changes_no_vector() -> None:
    driver = Driver()
    driver.unmask(0, 0x41)
    driver.enable_msix()
    assert driver.put(4, 2, MASTER) == []


def test_the_pin_is_asserted_until_the_isr_is_read() -> None:
    driver = Driver()
    function = driver.function
    function.transport.used_buffer()
    function.update_pin()
    assert function.take_effects() == [PinLevel(True)]
    assert driver.get(6, 2) & 8
    function.transport.used_buffer()
    function.update_pin()
    assert function.take_effects() == []
    assert driver.read(ISR, 0, 1) == 1
    assert function.take_effects() == [PinLevel(False)]
    assert not driver.get(6, 2) & 8
    assert (driver.read(ISR, 0, 1), function.take_effects()) == (0, [])


def test_the_pin_is_silent_while_it_is_disabled_or_interrupts_are_messages() -> None:
    driver = Driver()
    function = driver.function
    assert driver.put(4, 2, INTX_DISABLE) == []
    function.transport.config_changed()
    function.update_pin()
    assert function.take_effects() == [] and driver.get(6, 2) & 8, "the status tells all the same"
    assert driver.put(4, 2, 0) == [PinLevel(True)]
    assert driver.enable_msix() == [MsixEnabled(True), PinLevel(False)]
    assert not driver.get(6, 2) & 8
    assert driver.enable_msix(0) == [MsixEnabled(False), PinLevel(True)]
    assert driver.read(ISR, 0, 1) == 2


def test_a_reset_takes_the_vectors_from_their_sources() -> None:
    driver = Driver()
    assert driver.write(COMMON, 16, 2, 0) == [VectorAssigned(CONFIG, 0)]
    assert driver.write(COMMON, 20, 1, 0) == [Reset(), VectorAssigned(CONFIG, None)]


def window(driver: Driver, bar: int, offset: int, length: int) -> int:
    """Point the window of configuration space there; where its data is."""
    at = driver.places[WINDOW].capability
    driver.put(at + 4, 1, bar)
    driver.put(at + 8, 4, offset)
    driver.put(at + 12, 4, length)
    return at + 16


def test_registers_are_reached_through_configuration_space_without_a_bar() -> None:
    driver = Driver()
    data = window(driver, 0, driver.places[DEVICE].offset + 4, 4)
    assert driver.get(data, 4) == 0x08070605
    assert driver.get(data, 2) == 0x0605 and driver.get(data - 4, 8) >> 32 == 0x08070605
    data = window(driver, 0, driver.places[NOTIFY].offset + 4, 2)
    assert driver.put(data, 4, 1) == [Notify(1)]
    data = window(driver, 0, driver.places[COMMON].offset + 20, 1)
    driver.put(data, 1, 1)
    assert driver.get(data, 1) == 1


def test_of_a_write_through_the_window_as_much_is_taken_as_it_is_wide() -> None:
    driver = Driver()
    device = driver.function.device
    assert isinstance(device, Toy)
    data = window(driver, 0, driver.places[DEVICE].offset + 4, 2)
    assert driver.put(data, 4, 0x04030201) == [] and device.written == [(4, b"\1\2")]


def test_nothing_but_its_data_is_an_access_through_the_window() -> None:
    driver = Driver()
    function = driver.function
    device = function.device
    assert isinstance(device, Toy)
    plain = function.config.read(0, 256)
    function.transport.used_buffer()
    data = window(driver, 0, driver.places[ISR].offset, 1)
    for offset, size in ((0, 4), (data - 4, 4), (data + 1, 3), (data + 4, 4), (252, 4)):
        if offset != data - 4:
            assert function.read_config(offset, size) == plain[offset : offset + size]
        assert len(function.read_config(offset, size)) == size and function.transport.isr == 1
    window(driver, 0, driver.places[DEVICE].offset, 4)
    for offset in (4, 0x3C, data + 1, data - 1, 252):
        driver.put(offset, 1, 0)
    assert device.written == []


@pytest.mark.parametrize("offset", [0x1001, 0x1800, 0x1FFC, 0x3000, 0x3FFC, 0x400C, 0x4040, 0x7FF8])
def test_t5_between_the_structures_there_is_nothing(offset: int) -> None:
    driver = Driver()
    function = driver.function
    device, table = function.device, driver.get(driver.msix + 4, 4)
    assert isinstance(device, Toy)
    driver.unmask(0, 0x41)
    before = [function.read(table + at, 8) for at in range(0, 16 * (len(SIZES) + 1), 8)]
    assert function.transport.refused == 0 and function.read(offset, 4) == bytes(4)
    function.write(offset, b"\xff" * 4)
    assert function.transport.refused == 2 and function.msix.refused == 0
    assert function.take_effects() == [] and device.written == []
    assert [function.read(table + at, 8) for at in range(0, 16 * (len(SIZES) + 1), 8)] == before


def test_the_table_and_the_pending_bits_read_where_the_capability_says() -> None:
    driver = Driver()
    function = driver.function
    table, pending = driver.get(driver.msix + 4, 4), driver.get(driver.msix + 8, 4)
    driver.unmask(1, 0x41)
    assert function.read(table + 16, 8) + function.read(table + 24, 8) == struct.pack("<QII", 0xFEE0_0000, 0x41, 0)
    function.msix.pending = {2}.__contains__
    assert function.read(pending, 8) == b"\4" + bytes(7)
    function.write(pending, bytes(8))
    assert function.read(pending, 8) == b"\4" + bytes(7) and function.transport.refused == 1


def test_reading_the_isr_through_configuration_space_takes_it() -> None:
    driver = Driver()
    driver.function.transport.used_buffer()
    driver.function.update_pin()
    data = window(driver, 0, driver.places[ISR].offset, 1)
    driver.function.take_effects()
    assert (driver.get(data, 1), driver.get(data, 1)) == (1, 0)
    assert driver.function.take_effects() == [PinLevel(False)]


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [
        (1, 0x2000, 4), (0, 0x2002, 4), (0, 0x2000, 3), (0, 0x2000, 8), (0, 0x2000, 0), (0, BAR_SIZE, 4),
        (0, 0xFFFF_FFFC, 4),
    ],
)  # fmt: skip
def test_t5_a_window_that_cannot_be_reaches_nothing(bar: int, offset: int, length: int) -> None:
    driver = Driver()
    data = window(driver, bar, offset, length)
    assert driver.put(data, 4, 0xFFFF_FFFF) == []
    driver.get(data, 4)
    assert isinstance(driver.function.device, Toy) and driver.function.device.written == []
    assert driver.function.transport.refused == driver.function.msix.refused == 0


def test_more_queues_than_there_are_vectors_for_are_refused() -> None:
    class Wide(Device):
        device_type = 42

        def queues(self) -> list[Queue]:
            return [Queue(str(index), self.serve) for index in range(1024)]

        def serve(self, chain: Chain) -> int:
            return 0

    with pytest.raises(ValueError, match="wide: 1024 queues, a PCI function has room for 1023"):
        PciFunction(Wide("wide"))


@pytest.mark.parametrize("seed", range(4))
def test_t5_any_access_is_answered_and_what_is_told_is_how_it_is(seed: int) -> None:
    random = Random(seed)
    driver = Driver()
    function = driver.function
    bar: GuestAddress | None = None
    pin = enabled = False
    seen = set()
    pages = [0x0000, 0x1000, 0x2000, 0x3000, 0x4000, 0x8000, 0xC000, 0xF000]
    for _ in range(20_000):
        size = random.choice((1, 2, 4, 4, 8, 3))
        in_config = random.random() < 0.5
        offset = random.randrange(256) if in_config else random.choice(pages) + random.randrange(0x48)
        if in_config and random.random() < 0.5:
            offset, size = random.choice(((4, 2), (driver.msix + 2, 2), (0x10, 4), (0x14, 4)))
        kind = random.random()
        if kind < 0.4:
            data = function.read_config(offset, size) if in_config else function.read(offset, size)
            assert len(data) == size
        elif kind < 0.9:
            data = random.choice((random.randbytes(size), bytes(size), b"\xff" * size, (2).to_bytes(size, "little")))
            function.write_config(offset, data) if in_config else function.write(offset, data)
        else:
            function.transport.used_buffer()
            function.update_pin()
        for effect in function.take_effects():
            seen.add(type(effect))
            match effect:
                case BarMoved(address):
                    assert address != bar
                    bar = address
                case PinLevel(level):
                    assert level != pin
                    pin = level
                case MsixEnabled(now):
                    assert now != enabled
                    enabled = now
                case Reset():
                    function.transport.reset_done()
                    function.update_pin()
        for effect in function.take_effects():
            assert isinstance(effect, PinLevel)
            pin = effect.asserted
        assert (function.bar, function.msix.enabled) == (bar, enabled)
        assert pin == bool(function.transport.isr and not enabled and not function.config.command & INTX_DISABLE)
    assert seen >= {BarMoved, PinLevel, MsixEnabled, Notify}


def test_features_of_the_transports_own_are_offered() -> None:
    own = 1 << 38
    assert [PciFunction(Toy(), own=bits).transport.offered & own for bits in (0, own)] == [0, own]
