"""The driver of a virtio-mmio device: against this library's registers, and against registers that lie."""

from collections.abc import Callable

import pytest
from virtio.rings import Descriptor, Ring, memory_of
from virtio.toy import SIZES, Toy

from lguestlib.abi import virtio_mmio as abi
from lguestlib.memory.address import GuestAddress
from lguestlib.virtio import mmio_driver
from lguestlib.virtio.device import RING_FEATURES
from lguestlib.virtio.effects import DriverReady, Effect, Notify, QueueReady, QueueStop, Reset
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.mmio import MmioTransport
from lguestlib.virtio.mmio_driver import DeviceRefused, MmioDriver
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue
from lguestlib.virtio.status import Status


class Bus:
    """A toy on a bus: what the transport asks for is done at once, unless a test has its way."""

    def __init__(self) -> None:
        self.device = Toy()
        self.transport = MmioTransport(self.device)
        self.effects: list[Effect] = []
        self.overrides: dict[int, Callable[[int], int]] = {}
        """Registers whose value is made into another."""
        self.written: dict[int, int] = {}
        """What each register was written last."""

    def read(self, offset: int, size: int) -> bytes:
        data = self.transport.read(offset, size)
        if offset in self.overrides:
            return self.overrides[offset](int.from_bytes(data, "little")).to_bytes(size, "little")
        return data

    def write(self, offset: int, data: bytes) -> None:
        self.written[offset] = int.from_bytes(data, "little")
        effect = self.transport.write(offset, data)
        if effect is None:
            return
        self.effects.append(effect)
        if effect == Reset():
            self.transport.reset_done()
        elif isinstance(effect, QueueStop):
            self.transport.queue_stopped(effect.index)

    def changed(self, register: int, change: Callable[[int], int]) -> None:
        self.overrides[register] = change


def layout(index: int, size: int = 1) -> QueueLayout:
    return QueueLayout.contiguous(index, size, GuestAddress(0x1_0000_0000 + 0x4000 * index))


@pytest.fixture
def bus() -> Bus:
    return Bus()


def test_a_device_is_brought_up_in_the_order_of_the_specification(bus: Bus) -> None:
    driver = MmioDriver(bus)
    assert driver.device_type == 42
    assert [driver.queue_size_max(index) for index in range(5)] == [*SIZES, 0, 0]
    wanted = int(Feature.VERSION_1 | Feature.RING_EVENT_IDX) | 1 << 5 | 1 << 7
    assert driver.negotiate(wanted) == wanted & ~(1 << 7)
    layouts = [layout(0, 8), layout(1, 64), layout(2)]
    for each in layouts:
        driver.enable_queue(each)
    driver.ready()
    driver.notify(1)
    features = wanted & ~(1 << 7)
    assert bus.effects == [Reset(), *map(QueueReady, layouts), DriverReady(features), Notify(1)]
    assert driver.status == 0x0F and bus.transport.layouts == layouts
    assert bus.transport.refused == 0
    driver.reset()
    assert driver.status == 0 and bus.effects[-1] == Reset()


def test_a_notification_says_where_the_driver_goes_on_where_that_was_agreed_on(bus: Bus) -> None:
    bus.transport.offered |= int(Feature.NOTIFICATION_DATA)
    driver = MmioDriver(bus)
    for features, expected in ((0, 1), (Feature.NOTIFICATION_DATA, 0x8005_0001)):
        driver.negotiate(int(Feature.VERSION_1 | features))
        driver.notify(1, 0x8005)
        assert bus.written[abi.VIRTIO_MMIO_QUEUE_NOTIFY] == expected and bus.effects[-1] == Notify(1)


def test_what_is_offered_is_all_64_bits(bus: Bus) -> None:
    assert MmioDriver(bus).offered() == bus.transport.offered == int(RING_FEATURES | Feature.RING_RESET) | 1 << 5 | 1


@pytest.mark.parametrize(
    ("register", "value"),
    [(abi.VIRTIO_MMIO_MAGIC_VALUE, 0), (abi.VIRTIO_MMIO_VERSION, 1), (abi.VIRTIO_MMIO_VERSION, 3)],
)
def test_what_is_no_device_of_version_2_is_refused(bus: Bus, register: int, value: int) -> None:
    bus.changed(register, lambda found: value)
    with pytest.raises(DeviceRefused, match="not a device of version 2"):
        MmioDriver(bus)


def test_t1_features_ok_that_does_not_stay_is_a_refusal(bus: Bus) -> None:
    driver = MmioDriver(bus)
    with pytest.raises(DeviceRefused, match="does not accept"):
        driver.negotiate(1 << 5)
    assert driver.status == Status.ACKNOWLEDGE | Status.DRIVER | Status.FAILED
    assert driver.negotiate(int(Feature.VERSION_1)) == Feature.VERSION_1


def test_a_queue_larger_than_the_device_has_or_none_at_all_is_refused(bus: Bus) -> None:
    driver = MmioDriver(bus)
    driver.negotiate(int(Feature.VERSION_1))
    for bad in (layout(0, 16), layout(2, 2), layout(3), layout(0xFFFF_FFFF)):
        with pytest.raises(DeviceRefused, match=f"queue {bad.index} has"):
            driver.enable_queue(bad)
    driver.enable_queue(layout(0, 8))
    assert bus.transport.layouts == [layout(0, 8)]


def test_a_queue_that_does_not_become_ready_is_refused(bus: Bus) -> None:
    driver = MmioDriver(bus)
    driver.negotiate(int(Feature.VERSION_1))
    bus.changed(abi.VIRTIO_MMIO_QUEUE_READY, lambda found: 0)
    with pytest.raises(DeviceRefused, match="does not enable queue 1"):
        driver.enable_queue(layout(1))


def test_t3_a_reset_is_waited_for_but_not_for_ever(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmio_driver, "READS_MAX", 50)
    driver = MmioDriver(bus)
    left = 20

    def busy(found: int) -> int:
        nonlocal left
        left -= 1
        return 0x0F if left > 0 else found

    bus.changed(abi.VIRTIO_MMIO_STATUS, busy)
    driver.reset()
    assert left == 0
    bus.changed(abi.VIRTIO_MMIO_STATUS, lambda found: 0x4F)
    with pytest.raises(DeviceRefused, match="does not finish its reset"):
        driver.reset()


def test_t5_the_config_space_is_read_again_until_it_is_of_one_state(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmio_driver, "READS_MAX", 50)
    driver = MmioDriver(bus)
    assert driver.config(0, 10) == bus.device.space
    assert driver.config(3, 4) == bus.device.space[3:7]
    changes = [bytes([number] * 10) for number in range(5)]

    def changing(generation: int) -> int:
        if changes:
            bus.device.space = changes.pop()
        return generation

    bus.changed(abi.VIRTIO_MMIO_CONFIG_GENERATION, changing)
    assert driver.config(2, 8) == bytes(8)
    generations = iter(range(1000))
    bus.changed(abi.VIRTIO_MMIO_CONFIG_GENERATION, lambda found: next(generations))
    with pytest.raises(DeviceRefused, match="never the same"):
        driver.config(0, 4)


def test_t5_an_interrupt_is_taken_once_with_its_reasons(bus: Bus) -> None:
    driver = MmioDriver(bus)
    assert driver.take_interrupt() == 0
    bus.transport.used_buffer()
    bus.transport.config_changed()
    assert driver.take_interrupt() == abi.VIRTIO_MMIO_INT_VRING | abi.VIRTIO_MMIO_INT_CONFIG
    assert driver.take_interrupt() == 0


def test_a_request_goes_all_the_way_through_the_registers_and_the_rings(bus: Bus) -> None:
    with memory_of((0x1_0000_0000, 0x10000)) as memory:
        driver = MmioDriver(bus)
        features = driver.negotiate(int(RING_FEATURES))
        rings: SplitDriverQueue[str] = SplitDriverQueue(layout(1, 64), memory, features)
        driver.enable_queue(rings.layout)
        driver.ready()
        where = GuestAddress(0x1_0000_8000)
        memory.write(where, b"question")
        rings.add([Buffer(where, 8)], [Buffer(GuestAddress(where + 8), 16)], "token")
        assert rings.kick_needed()
        driver.notify(1)
        assert bus.effects[-1] == Notify(1)
        [started] = bus.transport.layouts
        device = SplitDeviceQueue(started, memory, bus.transport.features)
        [chain] = device.pop_many()
        device.push(chain, chain.write(chain.read()[::-1]))
        assert device.should_interrupt()
        bus.transport.used_buffer()
        assert driver.take_interrupt() == abi.VIRTIO_MMIO_INT_VRING
        assert rings.reap() == [("token", 8)]
        assert memory.read(GuestAddress(where + 8), 8) == b"noitseuq"
        rings.release()
        device.release()


def test_t8_what_was_available_before_the_queue_was_started_is_found_at_its_start(bus: Bus) -> None:
    with memory_of((0x1_0000_0000, 0x10000)) as memory:
        driver = MmioDriver(bus)
        driver.negotiate(int(Feature.VERSION_1))
        ring = Ring(memory, layout(0, 8))
        ring.offer(ring.chain(Descriptor(0x1_0000_8000, 16)))
        driver.notify(0)
        driver.enable_queue(ring.layout)
        driver.ready()
        device = SplitDeviceQueue(bus.transport.layouts[0], memory, bus.transport.features)
        assert device.enable_notifications()
        [chain] = device.pop_many()
        device.push(chain, 0)
        assert device.should_interrupt()
        ring.release()
        device.release()
