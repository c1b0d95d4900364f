"""lguest's bus: the page as its C launcher filled it in, and what notifications of it mean."""

from collections.abc import Iterator, Sequence
from random import Random

import pytest
from virtio.toy import Toy

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.effects import DriverFailed, DriverNear, DriverReady, Effect, Notify, Reset
from lguestlib.virtio.features import Feature
from lguestlib.virtio.lguest import DEVICE_PAGES, EARLY_TEXT_MAX, PAGE, BusFull, EarlyText, LguestBus, Stray, Told

RAM = 0x10_0000
ALL = 0x3100_0000
"""NOTIFY_ON_EMPTY, INDIRECT_DESC and EVENT_IDX."""
A, D, OK, FAILED = 1, 2, 4, 0x80


class Like(Device):
    """A device of any type, with so many queues, these features of the C launcher's and no more."""

    def __init__(self, kind: int, queues: Sequence[int], features: int = 0, config: bytes = b"") -> None:
        super().__init__(f"like {kind}")
        self.device_type = kind
        self._queues = queues
        self._features = features
        self._config = config
        self.withheld = ALL & ~features

    @property
    def features(self) -> int:
        return self._features

    def config(self) -> bytes:
        return self._config

    def queues(self) -> Sequence[Queue]:
        return [Queue(f"queue {index}", self.serve, size) for index, size in enumerate(self._queues)]

    def serve(self, chain: Chain) -> int:
        return 0


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.anonymous(RAM + DEVICE_PAGES * PAGE) as made:
        yield made


@pytest.fixture
def bus(memory: GuestMemory) -> LguestBus:
    return LguestBus(memory, RAM)


def page(memory: GuestMemory) -> bytes:
    return memory.read(GuestAddress(RAM), PAGE)


def test_the_page_is_the_c_launchers_of_linux_3_11(memory: GuestMemory, bus: LguestBus) -> None:
    mac = bytes.fromhex("0200c0a81302")
    bus.add(Like(1, [256, 256], 0x1000_3BA3, mac + bytes(4)))
    bus.add(Like(2, [256], 0x204, bytes([0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 254, 0, 0, 0])))
    bus.add(Like(4, [256]))
    bus.add(Like(3, [256, 256]))
    net = (
        "01 02 04 0a 00"  # type, queues, bytes of features and of configuration, status
        "0001 0100 01010000"  # 256 entries, irq 1, the page behind the descriptors'
        "0001 0200 04010000"  # irq 2, three pages further
        "a33b0010 00000000"  # offered, accepted
        "0200c0a81302 0000 0000"
    )
    block = "02 01 02 10 00" "0001 0300 07010000" "0402 0000" "0008000000000000 00000000 fe000000"
    rng = "04 01 00 00 00" "0001 0400 0a010000"
    console = "03 02 00 00 00" "0001 0500 0d010000" "0001 0600 10010000"
    expected = bytes.fromhex(net + block + rng + console)
    assert len(expected) == 39 + 33 + 13 + 21
    assert page(memory) == expected.ljust(PAGE, b"\0")
    assert bus.end == 0x11_3000


def test_rings_are_legacy_ones_of_4096_byte_alignment(bus: LguestBus) -> None:
    first, second = bus.add(Like(1, [256, 1024])).layouts
    assert (first.descriptors, first.available, first.used) == (0x10_1000, 0x10_2000, 0x10_3000)
    # 1024 entries: 4 pages of descriptors, 2054 bytes available, 8198 used.
    assert (second.descriptors, second.available, second.used) == (0x10_4000, 0x10_8000, 0x10_9000)
    assert bus.end == 0x10_C000


def test_only_legacy_features_are_offered_in_as_few_bytes_as_hold_them(memory: GuestMemory, bus: LguestBus) -> None:
    toy = Toy()
    assert bus.add(toy).offered == 1 | 1 << 5 | ALL
    toy = Toy()
    toy.withheld = ALL
    assert bus.add(toy).offered == 1 | 1 << 5
    first = 5 + 3 * 8 + 2 * 4 + 10
    assert page(memory)[first + 2] == 1


def test_t21_what_a_u8_cannot_count_is_cut(memory: GuestMemory, bus: LguestBus) -> None:
    long = bytes(range(1, 256)) + b"beyond"
    bus.add(Like(9, [256], 0, long))
    bus.add(Like(4, [256]))
    found = page(memory)
    assert found[3] == 255
    assert found[13 : 13 + 255] == long[:255]
    assert found[13 + 255] == 4


def started(bus: LguestBus, slot: int = 0) -> bool:
    return bus.transports[slot].started


class Driver:
    """Writes the memory of one device as a driver does, and notifies."""

    def __init__(self, memory: GuestMemory, bus: LguestBus, slot: int = 0) -> None:
        self.bus = bus
        self.memory = memory
        self.slot = slot
        self.transport = bus.transports[slot]

    def status(self, value: int, tell: bool = True) -> Effect | None:
        self.memory.write(GuestAddress(self.transport.address + 4), bytes([value]))
        return self._effect(self.transport.address) if tell else None

    def kick(self, index: int = 0) -> Effect | None:
        return self._effect(self.transport.layouts[index].descriptors)

    def accept(self, features: int) -> None:
        queues = len(self.transport.layouts)
        self.memory.write(GuestAddress(self.transport.address + 5 + 8 * queues + 4), features.to_bytes(4, "little"))

    def _effect(self, address: int) -> Effect | None:
        told = self.bus.notify(address)
        assert told is None or isinstance(told, Told) and told.slot == self.slot
        return told.effect if told else None


@pytest.fixture
def driver(memory: GuestMemory, bus: LguestBus) -> Driver:
    bus.add(Like(4, [256]))
    bus.add(Toy())
    return Driver(memory, bus, 1)


def test_t21_a_later_kernel_starts_the_device_with_its_one_notification_of_the_status(driver: Driver) -> None:
    assert driver.status(0) == Reset()
    driver.transport.reset_done()
    driver.status(A, tell=False)
    driver.accept(0x2000_0020)
    assert driver.status(A | D) == DriverReady(0x2000_0020)
    assert driver.transport.features == 0x2000_0020
    driver.status(A | D | OK, tell=False)
    assert driver.kick() == Notify(0)


def test_t21_an_older_kernel_tells_of_every_status_and_accepts_features_in_between(driver: Driver) -> None:
    assert driver.status(0) == Reset()
    driver.transport.reset_done()
    assert driver.status(A) is None
    assert driver.status(A | D) == DriverNear()
    driver.accept(0x1000_0001)
    assert driver.status(A | D | OK) == DriverReady(0x1000_0001)
    assert driver.status(A | D | OK) is None


def test_t21_an_older_kernels_first_kick_before_driver_ok_starts_the_device(driver: Driver) -> None:
    driver.status(A)
    driver.status(A | D)
    driver.accept(1)
    assert driver.kick(2) == DriverReady(1)
    assert driver.kick(2) == Notify(2)
    assert driver.status(A | D | OK) is None


@pytest.mark.parametrize("status", [0, A, OK, FAILED | A | D])
def test_a_kick_starts_no_device_that_has_no_driver(driver: Driver, status: int) -> None:
    driver.status(status, tell=False)
    assert driver.kick() is None
    assert not started(driver.bus, 1)


def test_features_that_were_not_offered_are_not_negotiated(driver: Driver) -> None:
    driver.accept(0xFFFF_FFFF)
    assert driver.status(A | D) == DriverReady(1 | 1 << 5 | ALL)
    assert not driver.transport.features & Feature.VERSION_1


def test_accepted_features_are_those_of_the_start(driver: Driver) -> None:
    driver.accept(1)
    driver.status(A | D)
    driver.accept(0)
    assert driver.transport.features == 1


def test_a_reset_zeroes_the_rings_and_the_accepted_features(driver: Driver, memory: GuestMemory) -> None:
    before = page(memory)
    driver.accept(0xFFFF_FFFF)
    driver.status(A | D)
    for layout in driver.transport.layouts:
        for address in (layout.descriptors, layout.end - 1):
            memory.write(GuestAddress(address), b"x")
    assert driver.status(0) == Reset()
    assert driver.transport.features, "until it is done"
    driver.transport.reset_done()
    assert page(memory) == before
    assert not any(memory.read(GuestAddress(RAM + PAGE), driver.bus.end - RAM - PAGE))
    assert (driver.transport.started, driver.transport.features) == (False, 0)
    driver.accept(1)
    assert driver.status(A | D) == DriverReady(1)


def test_a_driver_that_has_failed_says_so(driver: Driver) -> None:
    driver.status(A | D)
    assert driver.status(A | D | FAILED) == DriverFailed()


def test_a_changed_configuration_is_put_in_its_place(driver: Driver, memory: GuestMemory) -> None:
    toy = driver.transport.device
    assert isinstance(toy, Toy)
    end = driver.transport.address + driver.transport.size
    for space in (b"\xff" * 10, b"\xee" * 11, b"\xdd" * 3):
        toy.space = space
        driver.transport.config_changed()
        assert memory.read(GuestAddress(end - 10), 11) == space[:10].ljust(10, b"\0") + b"\0"


def test_below_the_end_of_ram_a_notification_is_early_text(bus: LguestBus, memory: GuestMemory) -> None:
    memory.write(GuestAddress(0x5000), b"Linux version 3.\0not this")
    assert bus.notify(0x5000) == EarlyText(b"Linux version 3.")
    assert bus.notify(0) == EarlyText(b"")


def test_early_text_without_an_end_ends_with_ram_or_at_a_limit(bus: LguestBus, memory: GuestMemory) -> None:
    memory.write(GuestAddress(RAM - 3), b"end")
    bus.add(Toy())
    assert bus.notify(RAM - 3) == EarlyText(b"end")
    memory.write(GuestAddress(0x1000), b"x" * (EARLY_TEXT_MAX + 100))
    assert bus.notify(0x1000) == EarlyText(b"x" * EARLY_TEXT_MAX)


@pytest.mark.parametrize("address", [RAM + 1, RAM + 4, RAM + PAGE + 4, RAM + 256 * PAGE, 0xFFFF_FFFF])
def test_a_notification_of_nothing_is_told_as_such(driver: Driver, address: int) -> None:
    assert driver.bus.notify(address) == Stray(address)


def test_where_ram_ends_there_is_no_text_even_without_a_device(bus: LguestBus) -> None:
    assert bus.notify(RAM) == Stray(RAM)


def test_the_bus_has_31_interrupts(bus: LguestBus, memory: GuestMemory) -> None:
    for _ in range(15):
        bus.add(Like(1, [16, 16]))
    before = page(memory), bus.end
    with pytest.raises(BusFull, match="^like 1: 2 interrupts, of 31 on the bus 1 are left$"):
        bus.add(Like(1, [16, 16]))
    assert (page(memory), bus.end) == before
    assert bus.add(Like(4, [16])).irqs == (31,)


def test_the_bus_has_256_device_pages(bus: LguestBus) -> None:
    # 3 for 256 entries; 8 + 2 + 5 for 2048.
    bus.add(Like(1, [2048] * 16 + [256] * 4))
    assert (bus.end - RAM) // PAGE == 1 + 16 * 15 + 4 * 3
    with pytest.raises(BusFull, match="^like 1: 6 pages of rings, of 256 device pages 3 are left$"):
        bus.add(Like(1, [256, 256]))
    bus.add(Like(4, [256]))
    assert bus.end == RAM + DEVICE_PAGES * PAGE


def test_the_page_has_4096_bytes(bus: LguestBus) -> None:
    for _ in range(15):
        bus.add(Like(9, [16], 0, bytes(255)))
    assert 15 * (5 + 8 + 255) == 4020
    with pytest.raises(BusFull, match="^like 9: a descriptor of 76 bytes, of the page 75 are left$"):
        bus.add(Like(9, [16], 0, bytes(63)))
    bus.add(Like(9, [16], 0, bytes(62)))


def test_whatever_is_notified_with_whatever_in_memory_is_an_effect_or_nothing(memory: GuestMemory) -> None:
    random = Random(1)
    bus = LguestBus(memory, RAM)
    for device in (Toy(), Like(1, [256, 256], 0x3BA3), Toy()):
        bus.add(device)
    good = [transport.address for transport in bus.transports]
    good += [layout.descriptors for transport in bus.transports for layout in transport.layouts]
    for _ in range(3000):
        memory.write(GuestAddress(RAM), random.randbytes(150))
        address = random.choice([*good, random.randrange(1 << 32), random.randrange(RAM - 20, RAM + 200)])
        told = bus.notify(address)
        assert told is None or isinstance(told, (EarlyText, Told, Stray))
        if isinstance(told, Told):
            transport = bus.transports[told.slot]
            if told.effect in (Reset(), DriverFailed()):
                transport.reset_done()
            assert transport.features & ~transport.offered == 0
            assert isinstance(told.effect, (Reset, DriverFailed, DriverNear, DriverReady, Notify))
