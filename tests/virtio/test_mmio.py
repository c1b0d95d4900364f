"""The virtio-mmio registers, each by itself and in any order whatever."""

from random import Random
from typing import NamedTuple

import pytest
from virtio.owner import Owner
from virtio.statuses import STATES
from virtio.toy import SIZES, Toy

from lguestlib.abi import virtio_mmio as abi
from lguestlib.virtio.device import RING_FEATURES
from lguestlib.virtio.effects import DriverReady, Effect, Notify, QueueReady, QueueStop, Reset
from lguestlib.virtio.features import Feature
from lguestlib.virtio.mmio import REGION_SIZE, MmioTransport
from lguestlib.virtio.status import Status

A, D, F, OK = Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK
NEGOTIATED = A | D | F
ALIVE = NEGOTIATED | OK


class Register(NamedTuple):
    """Its offset, and whether the driver may read or write it (virtio 1.3, 4.2.2)."""

    offset: int
    read: bool
    write: bool
    at_first: int = 0


TABLE = [
    Register(0x000, True, False, 0x74726976),
    Register(0x004, True, False, 2),
    Register(0x008, True, False, 42),
    Register(0x00C, True, False, int.from_bytes(b"lgst", "little")),
    Register(0x010, True, False, (1 << 0 | 1 << 5 | int(RING_FEATURES)) & 0xFFFF_FFFF),
    Register(0x014, False, True),
    Register(0x020, False, True),
    Register(0x024, False, True),
    Register(0x030, False, True),
    Register(0x034, True, False, SIZES[0]),
    Register(0x038, False, True),
    Register(0x044, True, True),
    Register(0x050, False, True),
    Register(0x060, True, False),
    Register(0x064, False, True),
    Register(0x070, True, True),
    *(Register(at, False, True) for at in (0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4)),
    Register(0x0AC, False, True),
    *(Register(at, True, False, 0xFFFF_FFFF) for at in (0xB0, 0xB4, 0xB8, 0xBC)),
    Register(0x0FC, True, False),
]
READABLE = {register.offset: register for register in TABLE if register.read}
WRITABLE = {register.offset: register for register in TABLE if register.write}


class Driver:
    """Accesses to the registers of a toy, four bytes at a time."""

    def __init__(self, note: bool = True) -> None:
        self.device = Toy()
        self.transport = MmioTransport(self.device, note)

    def get(self, register: int) -> int:
        return int.from_bytes(self.transport.read(register, 4), "little")

    def put(self, register: int, value: int) -> Effect | None:
        return self.transport.write(register, value.to_bytes(4, "little"))

    def accept(self, features: int) -> None:
        for page in (0, 1):
            self.put(abi.VIRTIO_MMIO_DRIVER_FEATURES_SEL, page)
            self.put(abi.VIRTIO_MMIO_DRIVER_FEATURES, features >> 32 * page & 0xFFFF_FFFF)

    def negotiate(self, features: int = int(RING_FEATURES)) -> int:
        """Go as far as FEATURES_OK; the status that reads back."""
        self.put(abi.VIRTIO_MMIO_STATUS, A | D)
        self.accept(features)
        self.put(abi.VIRTIO_MMIO_STATUS, NEGOTIATED)
        return self.get(abi.VIRTIO_MMIO_STATUS)

    def set_up(
        self, queue: int, size: int = 1, addresses: tuple[int, int, int] = (0x1000, 0x2000, 0x3000)
    ) -> None:
        self.put(abi.VIRTIO_MMIO_QUEUE_SEL, queue)
        self.put(abi.VIRTIO_MMIO_QUEUE_NUM, size)
        for register, address in zip((0x80, 0x90, 0xA0), addresses):
            self.put(register, address & 0xFFFF_FFFF)
            self.put(register + 4, address >> 32)


def test_t5_the_registers_are_those_of_the_table_and_no_others() -> None:
    driver = Driver()
    for offset in range(0, abi.VIRTIO_MMIO_CONFIG):
        refused = driver.transport.refused
        value = driver.get(offset)
        if offset in READABLE:
            assert (value, driver.transport.refused) == (READABLE[offset].at_first, refused), hex(offset)
        else:
            assert (value, driver.transport.refused) == (0, refused + 1), hex(offset)
    for offset in range(0, abi.VIRTIO_MMIO_CONFIG):
        driver = Driver()
        driver.negotiate(0 if offset == abi.VIRTIO_MMIO_DRIVER_FEATURES else int(RING_FEATURES))
        effect = driver.put(offset, 1)
        assert driver.transport.refused == (offset not in WRITABLE), hex(offset)
        expected: dict[int, Effect] = {0x050: Notify(1), 0x044: QueueReady(driver.transport._layout(0))}
        assert effect == expected.get(offset)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
def test_t5_an_access_of_another_width_than_four_bytes_does_nothing(size: int) -> None:
    driver = Driver()
    driver.negotiate()
    state = vars(driver.transport).copy()
    for offset in range(0, abi.VIRTIO_MMIO_CONFIG):
        assert driver.transport.read(offset, size) == bytes(size)
        assert driver.transport.write(offset, b"\0" * size) is None
        assert driver.transport.write(offset, b"\xff" * size) is None
    assert driver.transport.refused == 3 * abi.VIRTIO_MMIO_CONFIG
    assert vars(driver.transport) | {"refused": 0} == state


def test_t5_the_config_space_takes_any_width_and_reads_zero_past_its_end() -> None:
    driver = Driver()
    padded = driver.device.space + bytes(REGION_SIZE)
    for size in (1, 2, 3, 4, 8):
        for offset in (*range(24), REGION_SIZE - abi.VIRTIO_MMIO_CONFIG - size):
            assert (
                driver.transport.read(abi.VIRTIO_MMIO_CONFIG + offset, size) == padded[offset : offset + size]
            )
            driver.transport.write(abi.VIRTIO_MMIO_CONFIG + offset, bytes(size))
            assert driver.device.written.pop() == (offset, bytes(size))
    assert driver.transport.refused == 0


def test_t5_the_generation_changes_whenever_two_reads_would_not_go_together() -> None:
    """Even before the device has said anything of the change."""
    driver = Driver()
    generation = driver.get(abi.VIRTIO_MMIO_CONFIG_GENERATION)
    driver.transport.read(abi.VIRTIO_MMIO_CONFIG, 4)
    assert driver.get(abi.VIRTIO_MMIO_CONFIG_GENERATION) == generation
    driver.device.space = bytes(range(10, 20))
    assert driver.transport.read(abi.VIRTIO_MMIO_CONFIG + 4, 4) == bytes(range(14, 18))
    changed = driver.get(abi.VIRTIO_MMIO_CONFIG_GENERATION)
    assert changed != generation
    assert driver.get(abi.VIRTIO_MMIO_CONFIG_GENERATION) == changed
    driver.device.space = b""
    assert driver.get(abi.VIRTIO_MMIO_CONFIG_GENERATION) != changed


def test_t5_a_reported_change_is_a_new_generation_and_an_interrupt() -> None:
    driver = Driver()
    generations = {driver.get(abi.VIRTIO_MMIO_CONFIG_GENERATION)}
    for _ in range(3):
        driver.transport.config_changed()
        assert driver.get(abi.VIRTIO_MMIO_INTERRUPT_STATUS) == abi.VIRTIO_MMIO_INT_CONFIG
        generations.add(driver.get(abi.VIRTIO_MMIO_CONFIG_GENERATION))
    assert len(generations) == 4
    driver.transport._generation = 0xFFFF_FFFF
    driver.transport.config_changed()
    assert driver.get(abi.VIRTIO_MMIO_CONFIG_GENERATION) == 0


def test_t5_an_acknowledgement_clears_what_was_written_and_nothing_else() -> None:
    for pending in range(4):
        for written in (*range(8), 0xFFFF_FFFC, 0xFFFF_FFFF):
            driver = Driver()
            if pending & abi.VIRTIO_MMIO_INT_VRING:
                driver.transport.used_buffer()
            if pending & abi.VIRTIO_MMIO_INT_CONFIG:
                driver.transport.config_changed()
            assert driver.get(abi.VIRTIO_MMIO_INTERRUPT_STATUS) == pending
            driver.put(abi.VIRTIO_MMIO_INTERRUPT_ACK, written)
            assert driver.get(abi.VIRTIO_MMIO_INTERRUPT_STATUS) == pending & ~written


def test_t1_features_not_offered_are_not_negotiated() -> None:
    offered = int(RING_FEATURES | Feature.RING_RESET) | 1 << 0 | 1 << 5
    for bit in range(64):
        driver = Driver()
        got = driver.negotiate(int(Feature.VERSION_1) | 1 << bit)
        assert got == (NEGOTIATED if offered & 1 << bit else A | D), bit
        if got == NEGOTIATED:
            assert driver.transport.features == int(Feature.VERSION_1) | 1 << bit
        driver.put(abi.VIRTIO_MMIO_STATUS, ALIVE)
        assert bool(driver.get(abi.VIRTIO_MMIO_STATUS) & OK) is (got == NEGOTIATED)


def test_t1_what_was_not_offered_is_never_among_the_features() -> None:
    driver = Driver()
    driver.put(abi.VIRTIO_MMIO_STATUS, A | D)
    driver.accept(0xFFFF_FFFF_FFFF_FFFF)
    assert driver.transport.features == driver.transport.offered


def test_t1_without_version_1_there_is_no_agreement() -> None:
    driver = Driver()
    assert driver.negotiate(int(RING_FEATURES & ~Feature.VERSION_1)) == A | D
    driver.accept(int(RING_FEATURES))
    driver.put(abi.VIRTIO_MMIO_STATUS, NEGOTIATED)
    assert driver.get(abi.VIRTIO_MMIO_STATUS) == NEGOTIATED, "a second try with what is acceptable"


def test_t1_features_are_frozen_by_features_ok_and_not_taken_before_driver() -> None:
    driver = Driver()
    driver.put(abi.VIRTIO_MMIO_STATUS, A)
    driver.accept(int(RING_FEATURES))
    assert (driver.transport.accepted, driver.transport.refused) == (0, 2)
    driver.negotiate()
    accepted = driver.transport.features
    driver.accept(0)
    driver.accept(0xFFFF_FFFF_FFFF_FFFF)
    assert (driver.transport.features, driver.transport.accepted) == (accepted, accepted)
    assert driver.transport.refused == 6


@pytest.mark.parametrize("page", [2, 3, 31, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_t6_pages_of_features_that_do_not_exist(page: int) -> None:
    driver = Driver()
    driver.put(abi.VIRTIO_MMIO_STATUS, A | D)
    driver.put(abi.VIRTIO_MMIO_DEVICE_FEATURES_SEL, page)
    driver.put(abi.VIRTIO_MMIO_DRIVER_FEATURES_SEL, page)
    assert driver.get(abi.VIRTIO_MMIO_DEVICE_FEATURES) == 0
    driver.put(abi.VIRTIO_MMIO_DRIVER_FEATURES, 0)
    assert driver.transport.refused == 0
    driver.put(abi.VIRTIO_MMIO_DRIVER_FEATURES, 0xFFFF_FFFF)
    assert (driver.transport.accepted, driver.transport.refused) == (0, 1)


@pytest.mark.parametrize("queue", [3, 4, 0xFFFF, 0xFFFF_FFFF])
def test_t6_cve_2011_2512_a_queue_that_does_not_exist(queue: int) -> None:
    driver = Driver()
    driver.negotiate()
    driver.set_up(queue)
    assert driver.get(abi.VIRTIO_MMIO_QUEUE_NUM_MAX) == 0
    assert driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 1) is None
    assert driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 0) is None
    assert driver.get(abi.VIRTIO_MMIO_QUEUE_READY) == 0
    assert driver.put(abi.VIRTIO_MMIO_QUEUE_NOTIFY, queue) is None
    assert driver.transport.refused == 9
    assert driver.transport.layouts == []


def test_t6_cve_2017_17381_a_size_that_cannot_be_leaves_the_old_one() -> None:
    driver = Driver()
    driver.negotiate()
    for index, largest in enumerate(SIZES):
        driver.put(abi.VIRTIO_MMIO_QUEUE_SEL, index)
        assert driver.get(abi.VIRTIO_MMIO_QUEUE_NUM_MAX) == largest
        sizes = set()
        for size in (
            0,
            3,
            largest + 1,
            2 * largest,
            0x8000_0000,
            0x1_0000 + largest & 0xFFFF_FFFF,
            0xFFFF_FFFF,
        ):
            refused = driver.transport.refused
            driver.put(abi.VIRTIO_MMIO_QUEUE_NUM, size)
            assert driver.transport.refused == refused + 1
            sizes.add(driver.transport._layout(index).size)
        assert sizes == {largest}
        driver.put(abi.VIRTIO_MMIO_QUEUE_NUM, 1)
        assert driver.transport._layout(index).size == 1


def test_t6_queues_are_set_up_only_when_features_are_agreed() -> None:
    driver = Driver()
    driver.put(abi.VIRTIO_MMIO_STATUS, A | D)
    driver.set_up(0)
    assert driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 1) is None
    assert (driver.get(abi.VIRTIO_MMIO_QUEUE_READY), driver.transport.refused) == (0, 8)


def test_s32_t6_cve_2026_86565_a_ready_queue_stays_as_it_was_set_up() -> None:
    driver = Driver()
    driver.negotiate()
    driver.set_up(1, 64, (0x1_2345_6000, 0xFFFF_FFFF_FFFF_FFFE, 0x8_0000_0004))
    effect = driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 1)
    assert isinstance(effect, QueueReady)
    layout = effect.layout
    assert (layout.index, layout.size) == (1, 64)
    assert (layout.descriptors, layout.available, layout.used) == (
        0x1_2345_6000,
        0xFFFF_FFFF_FFFF_FFFE,
        0x8_0000_0004,
    )
    driver.set_up(1, 8, (0, 0, 0))
    assert driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 1) is None
    assert driver.transport.refused == 8
    assert driver.transport.layouts == [layout]
    assert driver.get(abi.VIRTIO_MMIO_QUEUE_READY) == 1


def test_a_queue_whose_addresses_were_never_written_is_at_0() -> None:
    driver = Driver()
    driver.negotiate()
    driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 1)
    [layout] = driver.transport.layouts
    assert (layout.size, layout.descriptors, layout.available, layout.used) == (SIZES[0], 0, 0, 0)


@pytest.mark.parametrize("value", [2, 3, 0x100, 0x8000_0001, 0xFFFF_FFFF])
def test_t6_ready_is_0_or_1(value: int) -> None:
    driver = Driver()
    driver.negotiate()
    assert driver.put(abi.VIRTIO_MMIO_QUEUE_READY, value) is None
    assert (driver.get(abi.VIRTIO_MMIO_QUEUE_READY), driver.transport.refused) == (0, 1)
    assert isinstance(driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 1), QueueReady)
    assert driver.put(abi.VIRTIO_MMIO_QUEUE_READY, value) is None
    assert (driver.get(abi.VIRTIO_MMIO_QUEUE_READY), driver.transport.refused) == (1, 2)


def test_t7_a_queue_reads_not_ready_only_when_it_has_stopped() -> None:
    driver = Driver()
    driver.negotiate()
    driver.set_up(0)
    driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 1)
    driver.put(abi.VIRTIO_MMIO_STATUS, ALIVE)
    for _ in range(2):
        assert driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 0) == QueueStop(0)
        assert driver.get(abi.VIRTIO_MMIO_QUEUE_READY) == 1
    driver.set_up(0, 8, (0, 0, 0))
    assert driver.transport.refused == 7, "not while it may still be at work"
    driver.transport.queue_stopped(0)
    assert driver.get(abi.VIRTIO_MMIO_QUEUE_READY) == 0
    assert driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 0) is None
    driver.set_up(0, 8, (0x100, 0x200, 0x300))
    effect = driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 1)
    assert isinstance(effect, QueueReady) and (effect.layout.size, effect.layout.used) == (8, 0x300)


def test_t8_cve_2024_4693_a_kick_before_anything_is_set_up_is_a_kick() -> None:
    driver = Driver()
    for index in range(len(SIZES)):
        assert driver.put(abi.VIRTIO_MMIO_QUEUE_NOTIFY, index) == Notify(index)
    assert driver.get(abi.VIRTIO_MMIO_STATUS) == 0


def test_driver_ok_is_told_once_with_the_features_and_the_queues() -> None:
    driver = Driver()
    driver.negotiate()
    for index in (2, 0):
        driver.set_up(index)
        driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 1)
    assert driver.put(abi.VIRTIO_MMIO_STATUS, ALIVE) == DriverReady(int(RING_FEATURES))
    assert [layout.index for layout in driver.transport.layouts] == [0, 2]
    assert driver.put(abi.VIRTIO_MMIO_STATUS, ALIVE) is None


def test_used_buffers_that_nobody_notes_are_told_of_while_the_driver_is_live() -> None:
    driver = Driver(note=False)
    driver.negotiate()
    assert driver.get(abi.VIRTIO_MMIO_INTERRUPT_STATUS) == 0
    driver.put(abi.VIRTIO_MMIO_STATUS, ALIVE)
    for _ in range(2):
        assert driver.get(abi.VIRTIO_MMIO_INTERRUPT_STATUS) == abi.VIRTIO_MMIO_INT_VRING
        driver.put(abi.VIRTIO_MMIO_INTERRUPT_ACK, 3)
    driver.transport.config_changed()
    assert driver.get(abi.VIRTIO_MMIO_INTERRUPT_STATUS) == 3
    driver.put(abi.VIRTIO_MMIO_INTERRUPT_ACK, abi.VIRTIO_MMIO_INT_CONFIG)
    assert driver.get(abi.VIRTIO_MMIO_INTERRUPT_STATUS) == abi.VIRTIO_MMIO_INT_VRING
    driver.put(abi.VIRTIO_MMIO_STATUS, 0)
    driver.transport.reset_done()
    assert driver.get(abi.VIRTIO_MMIO_INTERRUPT_STATUS) == 0


def test_t3_cve_2026_45782_a_reset_is_over_only_when_its_owner_says_so_and_leaves_nothing() -> None:
    driver = Driver()
    fresh = Driver()
    driver.negotiate()
    driver.set_up(2)
    driver.put(abi.VIRTIO_MMIO_QUEUE_READY, 1)
    driver.put(abi.VIRTIO_MMIO_STATUS, ALIVE)
    driver.put(abi.VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1)
    driver.transport.used_buffer()
    driver.transport.config_changed()
    driver.transport.fail()
    assert driver.put(abi.VIRTIO_MMIO_STATUS, 0) == Reset()
    alive = driver.get(abi.VIRTIO_MMIO_STATUS)
    assert alive == ALIVE | Status.NEEDS_RESET
    refused = driver.transport.refused
    for register, value in ((0x070, ALIVE), (0x050, 2), (0x044, 0), (0x020, 1), (0x064, 3), (0x100, 0)):
        assert driver.put(register, value) is None
    assert driver.transport.refused == refused + 6 and driver.device.written == []
    assert driver.get(abi.VIRTIO_MMIO_STATUS) == alive
    assert driver.put(abi.VIRTIO_MMIO_STATUS, 0) == Reset(), "asked for again, it is begun again"
    driver.transport.used_buffer()
    driver.transport.reset_done()
    for register in READABLE:
        if register != abi.VIRTIO_MMIO_CONFIG_GENERATION:
            assert driver.get(register) == fresh.get(register), hex(register)
    assert driver.transport.layouts == [] and driver.transport.features == 0
    assert driver.negotiate() == NEGOTIATED
    assert driver.transport._layout(2) == fresh.transport._layout(2)


def test_a_failed_device_asks_for_a_reset_and_interrupts_only_a_driver_that_is_ready() -> None:
    for alive in (False, True):
        driver = Driver()
        driver.negotiate()
        if alive:
            driver.put(abi.VIRTIO_MMIO_STATUS, ALIVE)
        before = driver.get(abi.VIRTIO_MMIO_STATUS)
        driver.transport.fail()
        assert driver.get(abi.VIRTIO_MMIO_STATUS) == before | Status.NEEDS_RESET
        assert driver.get(abi.VIRTIO_MMIO_INTERRUPT_STATUS) == (abi.VIRTIO_MMIO_INT_CONFIG if alive else 0)
        assert driver.put(abi.VIRTIO_MMIO_STATUS, ALIVE) is None
        assert driver.get(abi.VIRTIO_MMIO_STATUS) == before | Status.NEEDS_RESET


def test_t3_a_failure_while_the_driver_writes_the_status_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue's thread may fail between the driver's reading and writing of it."""
    driver = Driver()
    driver.put(abi.VIRTIO_MMIO_STATUS, A | D)
    driver.accept(int(RING_FEATURES))

    def acceptable() -> bool:
        driver.transport.fail()
        return True

    monkeypatch.setattr(driver.transport, "_acceptable", acceptable)
    driver.put(abi.VIRTIO_MMIO_STATUS, NEGOTIATED)
    assert driver.get(abi.VIRTIO_MMIO_STATUS) == NEGOTIATED | Status.NEEDS_RESET


@pytest.mark.parametrize("seed", range(8))
def test_t1_t5_t6_any_sequence_of_accesses_leaves_a_state_the_specification_knows(seed: int) -> None:
    random = Random(seed)
    driver = Driver()
    transport = driver.transport
    owner = Owner(random, transport)
    states = set()
    interesting = [*WRITABLE, 0x030, 0x044, 0x044, 0x044, 0x020, 0x024]
    values = [0, 1, 2, 3, 8, 11, 15, 15, 0x80, 255, 256, int(RING_FEATURES) & 0xFFFF_FFFF, 0xFFFF_FFFF]
    frozen = None
    for step in range(20_000):
        kind = random.random()
        if kind < 0.1:
            # As a driver would go on, or it seldom gets anywhere.
            driver.accept(int(RING_FEATURES))
            owner.take(
                driver.put(abi.VIRTIO_MMIO_STATUS, transport.status << 1 & ALIVE | transport.status | A)
            )
        elif kind < 0.65:
            owner.take(driver.put(random.choice(interesting), random.choice(values)))
        elif kind < 0.75:
            offset, size = (
                random.randrange(REGION_SIZE if kind < 0.7 else 0x110),
                random.choice((1, 2, 3, 4, 8)),
            )
            owner.take(transport.write(offset, random.randbytes(size)))
        elif kind < 0.9:
            offset, size = (
                random.randrange(REGION_SIZE if kind < 0.8 else 0x110),
                random.choice((1, 2, 3, 4, 8)),
            )
            assert len(transport.read(offset, size)) == size
        elif kind < 0.95:
            random.choice((transport.used_buffer, transport.config_changed, owner.act, owner.act))()
        elif kind < 0.955:
            transport.fail()
        else:
            owner.act()
        status = transport.status
        states.add(status)
        assert status in STATES, (seed, step, status)
        assert driver.get(abi.VIRTIO_MMIO_STATUS) == status
        if status & F:
            assert not transport.accepted & ~transport.offered and transport.accepted & Feature.VERSION_1
            assert frozen in (None, transport.accepted)
            frozen = transport.accepted
        else:
            frozen = None
        assert {layout.index for layout in transport.layouts} == owner.ready, (seed, step)
        assert bool(status & OK) is owner.alive, (seed, step)
    assert {Status(0), A, A | D, NEGOTIATED, ALIVE} <= states
    assert owner.seen == {DriverReady, QueueReady, QueueStop, Reset, Notify}


RESET = 0x0C0


def test_t4_a_queue_is_reset_by_itself_where_that_was_agreed_on() -> None:
    driver = Driver()
    assert driver.negotiate(int(RING_FEATURES | Feature.RING_RESET)) == NEGOTIATED
    driver.set_up(0)
    driver.put(0x044, 1)
    driver.set_up(1)
    assert driver.put(RESET, 1) is None and driver.transport.refused == 1
    driver.put(0x030, 0)
    assert driver.put(RESET, 0) is None and driver.transport.refused == 2
    assert driver.put(RESET, 1) == QueueStop(0)
    driver.transport.queue_stopped(0)
    assert driver.get(RESET) == driver.get(0x044) == 0 and driver.transport.refused == 2
    # It is set up anew, and of another size perhaps.
    driver.set_up(0, 2)
    assert driver.put(0x044, 1) == QueueReady(driver.transport.layouts[0])
    assert driver.transport.layouts[0].size == 2


def test_t4_no_queue_is_reset_where_it_was_not_agreed_on() -> None:
    driver = Driver()
    driver.negotiate()
    driver.set_up(0)
    driver.put(0x044, 1)
    assert driver.put(RESET, 1) is None and driver.get(RESET) == 0
    assert driver.transport.refused == 2 and driver.get(0x044) == 1


def test_features_of_the_transports_own_are_offered_unless_withheld_and_count_where_agreed_on() -> None:
    toy, data = Toy(), int(Feature.NOTIFICATION_DATA)
    assert MmioTransport(toy, own=data).offered == MmioTransport(toy).offered | data
    toy.withheld |= data
    assert MmioTransport(toy, own=data).offered == MmioTransport(toy).offered
    for agreed, notified in ((0, None), (data, Notify(1))):
        driver = Driver()
        driver.transport.offered |= data
        driver.negotiate(int(RING_FEATURES) | agreed)
        assert driver.put(0x050, 0x8007_0001) == notified and driver.put(0x050, 2) == Notify(2)
        assert driver.put(0x050, 3) is None and driver.put(0x050, 0x8007_0003) is None
        assert driver.transport.refused == 3 - bool(agreed)


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_p2_a_packed_queue_may_have_any_size_up_to_its_most(size: int) -> None:
    for features in (0, Feature.RING_PACKED):
        driver = Driver()
        driver.transport.offered |= Feature.RING_PACKED
        driver.negotiate(int(RING_FEATURES | features))
        most = driver.get(0x034)
        driver.set_up(0, size)
        driver.put(0x044, 1)
        possible = size <= most and (bool(features) or not size & size - 1)
        assert driver.transport.layouts[0].size == (size if possible else most)
