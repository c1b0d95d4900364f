"""The registers of virtio over PCI, each by itself and in any order whatever (virtio 1.3, 4.1.4)."""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import pytest
from virtio.owner import Owner
from virtio.statuses import STATES
from virtio.toy import SIZES, Toy

from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.device import RING_FEATURES
from lguestlib.virtio.effects import DriverReady, Notify, QueueReady, QueueStop, Reset
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.pci.effects import CONFIG, PciEffect, VectorAssigned
from lguestlib.virtio.pci.transport import PciTransport
from lguestlib.virtio.status import Status

A, D, F, OK = Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK
NEGOTIATED = A | D | F
ALIVE = NEGOTIATED | OK
NO_VECTOR = 0xFFFF
VECTORS = 3


class Register(NamedTuple):
    """Offset and bytes, and whether the driver may read or write it (virtio 1.3, 4.1.4.3)."""

    offset: int
    size: int
    write: bool
    at_first: int = 0


DEVICE_FEATURE_SELECT, DRIVER_FEATURE_SELECT, DRIVER_FEATURE, MSIX_CONFIG = 0, 8, 12, 16
STATUS, GENERATION, SELECT, SIZE, VECTOR, ENABLE, NOTIFY_OFF, DESC, QUEUE_RESET = 20, 21, 22, 24, 26, 28, 30, 32, 58
RESETTABLE = int(RING_FEATURES | Feature.RING_RESET)
FEATURES = 1 << 0 | 1 << 5 | RESETTABLE
TABLE = [
    Register(0, 4, True),
    Register(4, 4, False, FEATURES & 0xFFFF_FFFF),
    Register(8, 4, True),
    Register(12, 4, True),
    Register(16, 2, True, NO_VECTOR),
    Register(18, 2, False, len(SIZES)),
    Register(20, 1, True),
    Register(21, 1, False),
    Register(22, 2, True),
    Register(24, 2, True, SIZES[0]),
    Register(26, 2, True, NO_VECTOR),
    Register(28, 2, True),
    Register(30, 2, False),
    *(Register(at, 4, True) for at in (32, 36, 40, 44, 48, 52)),
    Register(58, 2, True),
]
BY_OFFSET = {register.offset: register for register in TABLE}


class Driver:
    """Accesses to the registers of a toy, each as wide as it is."""

    def __init__(self, device: Toy | None = None) -> None:
        self.device = device or Toy()
        self.transport = PciTransport(self.device, VECTORS)

    def get(self, offset: int) -> int:
        return int.from_bytes(self.transport.read_common(offset, BY_OFFSET[offset].size), "little")

    def put(self, offset: int, value: int) -> Sequence[PciEffect]:
        size = BY_OFFSET[offset].size
        return list(self.transport.write_common(offset, value.to_bytes(size, "little")))

    def accept(self, features: int) -> None:
        for page in (0, 1):
            self.put(DRIVER_FEATURE_SELECT, page)
            self.put(DRIVER_FEATURE, features >> 32 * page & 0xFFFF_FFFF)

    def negotiate(self, features: int = int(RING_FEATURES)) -> int:
        """Go as far as FEATURES_OK; the status that reads back."""
        self.put(STATUS, A | D)
        self.accept(features)
        self.put(STATUS, NEGOTIATED)
        return self.get(STATUS)

    def set_up(self, queue: int, size: int, addresses: tuple[int, int, int] = (0x1000, 0x2000, 0x3000)) -> None:
        self.put(SELECT, queue)
        self.put(SIZE, size)
        for offset, address in zip((32, 40, 48), addresses):
            self.put(offset, address & 0xFFFF_FFFF)
            self.put(offset + 4, address >> 32)


def test_t5_the_registers_are_those_of_the_table_each_as_wide_as_it_is() -> None:
    for size in (1, 2, 3, 4, 8):
        for offset in range(0, 64):
            transport = Driver().transport
            register = BY_OFFSET.get(offset)
            known = register is not None and register.size == size
            value = int.from_bytes(transport.read_common(offset, size), "little")
            assert value == (register.at_first if register and known else 0), (offset, size)
            assert transport.refused == (not known), (offset, size)


def test_t5_only_the_writable_registers_take_a_write() -> None:
    for size in (1, 2, 3, 4, 8):
        for offset in range(0, 64):
            driver = Driver()
            driver.negotiate(int(RING_FEATURES))
            if offset in (DRIVER_FEATURE, QUEUE_RESET):
                continue  # frozen here; and for a queue that is enabled
            register = BY_OFFSET.get(offset)
            known = register is not None and register.size == size and register.write
            driver.transport.write_common(offset, (1).to_bytes(size, "little"))
            assert driver.transport.refused == (not known), (offset, size)


def test_what_a_driver_has_written_reads_back() -> None:
    driver = Driver()
    driver.put(STATUS, A | D)
    driver.accept(FEATURES)
    driver.put(DRIVER_FEATURE_SELECT, 0)
    assert driver.get(DRIVER_FEATURE) == FEATURES & 0xFFFF_FFFF
    driver.put(DRIVER_FEATURE_SELECT, 1)
    assert driver.get(DRIVER_FEATURE) == FEATURES >> 32
    driver.put(DRIVER_FEATURE_SELECT, 2)
    assert driver.get(DRIVER_FEATURE) == 0
    driver.put(STATUS, NEGOTIATED)
    driver.set_up(1, 64, (0x1_2345_6000, 0x1FFF_F000_0002, 0x8_0000_0004))
    assert (driver.get(SELECT), driver.get(SIZE), driver.get(NOTIFY_OFF)) == (1, 64, 1)
    assert (driver.get(32), driver.get(36)) == (0x2345_6000, 1)
    [effect] = driver.put(ENABLE, 1)
    assert isinstance(effect, QueueReady)
    layout = effect.layout
    assert (layout.index, layout.size) == (1, 64)
    assert (layout.descriptors, layout.available, layout.used) == (0x1_2345_6000, 0x1FFF_F000_0002, 0x8_0000_0004)
    assert driver.get(ENABLE) == 1


@pytest.mark.parametrize("bit", range(64))
def test_t1_features_ok_stays_clear_on_what_was_not_offered(bit: int) -> None:
    driver = Driver()
    got = driver.negotiate(int(Feature.VERSION_1) | 1 << bit)
    assert got == (NEGOTIATED if FEATURES & 1 << bit else A | D)


def test_driver_ok_is_told_once_with_the_features() -> None:
    driver = Driver()
    driver.negotiate()
    assert driver.put(STATUS, ALIVE) == [DriverReady(int(RING_FEATURES))]
    assert driver.put(STATUS, ALIVE) == []


def test_a_queue_is_disabled_by_a_reset_alone() -> None:
    driver = Driver()
    driver.negotiate()
    driver.set_up(0, 8)
    assert driver.put(ENABLE, 2) == driver.put(ENABLE, 0) == [] and driver.get(ENABLE) == 0
    driver.put(ENABLE, 1)
    refused = driver.transport.refused
    assert driver.put(ENABLE, 0) == driver.put(ENABLE, 2) == driver.put(ENABLE, 1) == []
    assert (driver.get(ENABLE), driver.transport.refused) == (1, refused + 3)
    driver.set_up(0, 4, (0, 0, 0))
    assert driver.transport.layouts[0].size == 8, "a queue that is enabled stays as it was set up"


@pytest.mark.parametrize("queue", [3, 4, 0xFFFF])
def test_t6_cve_2011_2512_a_queue_that_does_not_exist(queue: int) -> None:
    driver = Driver()
    driver.negotiate()
    driver.set_up(queue, 1)
    assert [driver.get(offset) for offset in (SIZE, ENABLE, NOTIFY_OFF, 32, 36)] == [0] * 5
    assert driver.get(VECTOR) == NO_VECTOR
    assert driver.put(ENABLE, 1) == driver.put(VECTOR, 0) == []
    assert driver.transport.layouts == [] and not driver.transport.assigned
    assert driver.transport.notify(4 * queue) == ()


def test_each_queue_is_notified_at_an_address_of_its_own() -> None:
    transport = Driver().transport
    for queue in range(len(SIZES)):
        assert list(transport.notify(4 * queue)) == [Notify(queue)]
    assert transport.refused == 0
    for offset in (1, 2, 3, 5, 12, 16):
        assert list(transport.notify(offset)) == []
    assert transport.refused == 6


def test_t8_cve_2024_4693_a_kick_before_anything_is_set_up_is_a_kick() -> None:
    driver = Driver()
    assert list(driver.transport.notify(4)) == [Notify(1)]
    assert (driver.get(STATUS), driver.get(MSIX_CONFIG)) == (0, NO_VECTOR)


def test_vectors_are_assigned_to_the_config_space_and_to_queues() -> None:
    driver = Driver()
    assert driver.put(MSIX_CONFIG, 0) == [VectorAssigned(CONFIG, 0)]
    driver.put(SELECT, 2)
    assert driver.put(VECTOR, 1) == [VectorAssigned(2, 1)]
    assert driver.put(VECTOR, 1) == []
    assert (driver.get(MSIX_CONFIG), driver.get(VECTOR)) == (0, 1)
    assert driver.put(VECTOR, 0) == [VectorAssigned(2, 0)], "shared with the config space's"
    assert driver.put(VECTOR, NO_VECTOR) == [VectorAssigned(2, None)]
    assert driver.get(VECTOR) == NO_VECTOR and driver.transport.refused == 0


@pytest.mark.parametrize("vector", [VECTORS, VECTORS + 1, 0x7FF, 0xFFFE])
def test_a_vector_that_does_not_exist_reads_back_as_none(vector: int) -> None:
    driver = Driver()
    driver.put(MSIX_CONFIG, 1)
    assert driver.put(MSIX_CONFIG, vector) == [VectorAssigned(CONFIG, None)]
    assert (driver.get(MSIX_CONFIG), driver.transport.refused) == (NO_VECTOR, 1)


def test_reading_the_isr_takes_what_it_says() -> None:
    transport = Driver().transport
    assert (transport.isr, transport.take_isr()) == (0, 0)
    transport.used_buffer()
    transport.config_changed()
    assert (transport.isr, transport.take_isr(), transport.isr) == (3, 3, 0)
    transport.used_buffer()
    assert transport.take_isr() == 1


def test_the_generation_changes_with_the_config_space_and_has_8_bits() -> None:
    driver = Driver()
    generations = []
    for value in range(300):
        driver.device.space = value.to_bytes(10, "little")
        generations.append(driver.get(GENERATION))
        assert driver.get(GENERATION) == generations[-1]
    assert all(before != after for before, after in zip(generations, generations[1:]))
    assert max(generations) == 255


def test_the_config_space_is_read_and_written_at_any_width() -> None:
    driver = Driver()
    assert driver.transport.read_config(0, 8) == bytes(range(1, 9))
    assert driver.transport.read_config(8, 4) == b"\x09\x0a\0\0"
    driver.transport.write_config(3, b"ab")
    assert driver.device.written == [(3, b"ab")]


def test_t3_cve_2026_45782_a_reset_is_over_only_when_its_owner_says_so_and_leaves_nothing() -> None:
    driver = Driver()
    driver.negotiate()
    driver.put(MSIX_CONFIG, 0)
    driver.set_up(1, 16)
    driver.put(VECTOR, 2)
    driver.put(ENABLE, 1)
    driver.put(STATUS, ALIVE)
    driver.transport.used_buffer()
    assert driver.put(STATUS, 0) == [Reset(), VectorAssigned(CONFIG, None), VectorAssigned(1, None)]
    assert driver.get(STATUS) == ALIVE
    assert driver.put(STATUS, 0) == [Reset(), VectorAssigned(CONFIG, None), VectorAssigned(1, None)]
    for offset, value in ((STATUS, ALIVE), (MSIX_CONFIG, 1), (ENABLE, 1), (DRIVER_FEATURE, 1)):
        assert driver.put(offset, value) == []
    driver.transport.write_config(0, b"x")
    assert list(driver.transport.notify(0)) == [] and driver.device.written == []
    driver.transport.reset_done()
    assert [driver.get(register.offset) for register in TABLE] == [register.at_first for register in TABLE]
    assert driver.transport.isr == 0


def test_t4_a_queue_is_reset_by_itself_and_reads_so_until_it_has_stopped() -> None:
    driver = Driver()
    driver.negotiate(RESETTABLE)
    for queue in (0, 1):
        driver.set_up(queue, 16 >> queue)
        driver.put(VECTOR, 1)
        driver.put(ENABLE, 1)
    driver.put(STATUS, ALIVE)
    other = driver.transport.layouts[0]
    assert driver.put(QUEUE_RESET, 0) == []
    assert driver.put(QUEUE_RESET, 1) == [QueueStop(1), VectorAssigned(1, None)]
    assert (driver.get(QUEUE_RESET), driver.get(ENABLE)) == (1, 1)
    driver.put(SIZE, 4)
    assert (driver.put(ENABLE, 1), driver.get(SIZE)) == ([], 8), "it is in use until it has stopped"
    driver.transport.queue_stopped(1)
    assert (driver.get(QUEUE_RESET), driver.get(ENABLE), driver.get(SIZE), driver.get(32)) == (0, 0, SIZES[1], 0)
    assert driver.get(VECTOR) == NO_VECTOR
    assert driver.put(QUEUE_RESET, 1) == [], "what is not enabled cannot be reset"
    assert driver.transport.layouts == [other] and driver.transport.assigned == {0: 1}
    driver.set_up(1, 4, (0x4000, 0x5000, 0x6000))
    assert driver.put(VECTOR, 2) == [VectorAssigned(1, 2)]
    assert driver.put(ENABLE, 1) == [QueueReady(QueueLayout(1, 4, *map(GuestAddress, (0x4000, 0x5000, 0x6000))))]
    assert driver.put(QUEUE_RESET, 1) == [QueueStop(1), VectorAssigned(1, None)], "and again"


def test_t4_a_queue_is_not_reset_where_that_was_not_offered_or_not_accepted() -> None:
    withheld = Toy()
    withheld.withheld |= int(Feature.RING_RESET)
    for device, refused in ((withheld, 2), (Toy(), 1)):
        driver = Driver(device)
        driver.negotiate()
        driver.set_up(0, 8)
        driver.put(ENABLE, 1)
        assert driver.put(QUEUE_RESET, 1) == []
        assert (driver.get(QUEUE_RESET), driver.transport.refused) == (0, refused)


@pytest.mark.parametrize("seed", range(6))
def test_t1_t5_t6_any_sequence_of_accesses_leaves_a_state_the_specification_knows(seed: int) -> None:
    random = Random(seed)
    driver = Driver()
    transport = driver.transport
    owner = Owner(random, transport)
    everything = RESETTABLE
    values = [0, 1, 1, 2, 3, 8, 11, 15, 15, 0x80, 255, 256, NO_VECTOR]
    offsets = [*(register.offset for register in TABLE if register.write), SELECT, *[ENABLE, QUEUE_RESET] * 3]
    assigned: dict[int, int] = {}

    def take(effects: Sequence[PciEffect]) -> None:
        for effect in effects:
            if isinstance(effect, VectorAssigned):
                assigned.pop(effect.source, None)
                if effect.vector is not None:
                    assigned[effect.source] = effect.vector
            else:
                owner.take(effect)

    states = set()
    for step in range(20_000):
        kind = random.random()
        if kind < 0.1:
            # As a driver would go on, or it seldom gets anywhere.
            driver.accept(everything)
            take(driver.put(STATUS, transport.status << 1 & ALIVE | transport.status | A))
        elif kind < 0.7:
            offset = random.choice(offsets)
            value = random.choice(values)
            take(driver.put(offset, value & 0xFF if offset == STATUS else value))
        elif kind < 0.8:
            size = random.choice((1, 2, 3, 4, 8))
            take(transport.write_common(random.randrange(0x60), random.randbytes(size)))
        elif kind < 0.9:
            size = random.choice((1, 2, 3, 4, 8))
            assert len(transport.read_common(random.randrange(0x60), size)) == size
        elif kind < 0.95:
            random.choice((transport.used_buffer, transport.config_changed, owner.act, owner.act))()
        elif kind < 0.955:
            transport.fail()
        else:
            owner.act()
        states.add(transport.status)
        assert transport.status in STATES, (seed, step)
        assert {layout.index for layout in transport.layouts} == owner.ready, (seed, step)
        assert bool(transport.status & OK) is owner.alive, (seed, step)
        if not transport._resetting:
            assert transport.assigned == assigned, (seed, step)
    assert {Status(0), A, A | D, NEGOTIATED, ALIVE} <= states
    assert owner.seen >= {DriverReady, QueueReady, QueueStop, Reset}
