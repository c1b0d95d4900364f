"""Accesses to a PCI bus that no driver should make: each means something or nothing, and a reset helps."""

from random import Random

from virtio.arena import Enclosure
from virtio.toy import Toy

from fuzz.owner import DEVICES, Owner, add_request, came_back, offer, scribble
from lguestlib.abi import pci
from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.device import Device
from lguestlib.virtio.driver_queue import DriverQueue, new_driver_queue
from lguestlib.virtio.effects import DriverFailed, DriverReady, Notify, QueueReady, QueueStop, Reset
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.pci.bus import CONFIG_ADDRESS, ECAM_SIZE, ENABLE, PORTS, PciBus
from lguestlib.virtio.pci.effects import CONFIG, BarMoved, MsixEnabled, PciEffect, PinLevel, VectorAssigned, VectorChanged
from lguestlib.virtio.pci.function import (
    BAR_SIZE,
    COMMON_AT,
    CONFIG_AT,
    ISR_AT,
    MSIX_PENDING_AT,
    MSIX_TABLE_AT,
    NOTIFY_AT,
    PciFunction,
)

ACCESSES = 1000
"""What one seed makes."""

RAM, RAM_SIZE = 0x10000, 0x8000
FAR, FAR_SIZE = 0x1_0000_0000, 0x1000
WINDOW = 0xD000_0000
MSIX_AT = 0x40
RING_RESET = 1 << 40

STATUS, SELECT, SIZE, VECTOR, ENABLED, QUEUE_RESET = 20, 22, 24, 26, 28, 58
_COMMON = {
    0: 4, 4: 4, 8: 4, 12: 4, 16: 2, 18: 2, STATUS: 1, 21: 1, SELECT: 2, SIZE: 2, VECTOR: 2, ENABLED: 2, 30: 2,
    32: 4, 36: 4, 40: 4, 44: 4, 48: 4, 52: 4, 56: 2, QUEUE_RESET: 2, 60: 4,
}  # fmt: skip
"""Offsets, and how wide each register is."""
_OFTEN = (STATUS, STATUS, SELECT, SIZE, ENABLED, ENABLED, 8, 12, 16, VECTOR, QUEUE_RESET)
_VALUES = {
    STATUS: (0, 1, 3, 3, 11, 11, 15, 15, 0x80, 0x8F, 0xFF), SELECT: (0, 1, 2, 3, 0xFFFF), 8: (0, 1, 2), ENABLED: (0, 1),
    SIZE: (1, 2, 4, 8, 3, 0, 256, 0xFFFF), QUEUE_RESET: (0, 1),
}  # fmt: skip
_ANY = (0, 1, 2, 4, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
_WIDTHS = (1, 2, 4, 8, 4, 2, 1, 3)


class ResettableToy(Toy):
    """A toy whose queues can be reset one by one, and which has packed rings."""

    def __init__(self) -> None:
        super().__init__()
        self.withheld = 0

    @property
    def offered(self) -> int:
        return super().offered | RING_RESET


class Slot:
    """A function on the bus, and who sees to what it asks."""

    def __init__(self, random: Random, device: Device, ground: Enclosure) -> None:
        self._random = random
        self._ground = ground
        self.function = function = PciFunction(device)
        function.msix.pending = lambda vector: bool(vector % 2)
        self.owner = Owner(function.transport, ground.memory, lambda: function.transport.layouts)
        self._identity = function.read_config(0, 4), function.read_config(8, 4), function.read_config(0x2C, 4)
        self._late: list[Reset | QueueStop] = []
        self._pin = False

    def see_to_effects(self, at_once: bool = False) -> None:
        """Do what has been asked for, a stop sooner or later."""
        self._take_all()
        if self._late and (at_once or self._random.random() < 0.5):
            transport = self.function.transport
            for late in self._late:
                self.owner.take(late)
                ready = {layout.index for layout in transport.layouts}
                assert late.index not in ready if isinstance(late, QueueStop) else transport.status == 0 and not ready
            self._late.clear()
            self._take_all()

    def _take_all(self) -> None:
        """Do what has been asked for, and what comes of that: the pin then is as it has to be."""
        function = self.function
        function.update_pin()
        while effects := function.take_effects():
            for effect in effects:
                self._take(effect)
            function.update_pin()
        disabled = function.config.command & pci.PCI_COMMAND_INTX_DISABLE
        assert self._pin is bool(function.transport.isr and not function.msix.enabled and not disabled)

    def _take(self, effect: PciEffect) -> None:
        function = self.function
        match effect:
            case Reset() | QueueStop():
                self._late.append(effect)
            case VectorAssigned(source, vector):
                assert source == CONFIG or 0 <= source < len(function.device.queues())
                assert vector is None or 0 <= vector < function.msix.count
            case VectorChanged(vector, message):
                assert 0 <= vector < function.msix.count
                assert message is None or 0 <= message.address < 1 << 64 and 0 <= message.data < 1 << 32
            case BarMoved(address):
                assert address is None or address % BAR_SIZE == 0 and 0 < address < 1 << 64
            case PinLevel(asserted):
                assert asserted is not self._pin
                self._pin = asserted
            case MsixEnabled():
                pass
            case DriverReady() | QueueReady() | Notify() | DriverFailed():
                if self.owner.take(effect):
                    function.transport.used_buffer()
            case _:
                raise AssertionError(effect)

    def holds(self) -> None:
        """What no access can change is as it was, and what says the same thing twice says the same."""
        function = self.function
        assert self._identity == (
            function.read_config(0, 4), function.read_config(8, 4), function.read_config(0x2C, 4)
        )  # fmt: skip
        low = int.from_bytes(function.read_config(pci.PCI_BASE_ADDRESS_0, 4), "little")
        assert low % BAR_SIZE == pci.PCI_BASE_ADDRESS_MEM_TYPE_64
        seen, at = set[int](), function.read_config(pci.PCI_CAPABILITY_LIST, 1)[0]
        while at:
            assert at not in seen and at >= pci.PCI_STD_HEADER_SIZEOF
            seen.add(at)
            at = function.read_config(at + 1, 1)[0]
        assert len(seen) == 6

    def poke(self, offset: int, size: int, value: int) -> None:
        """Write a register, as a driver does who has found it."""
        self.function.write(offset, value.to_bytes(size, "little"))
        self.see_to_effects(at_once=True)

    def works(self) -> None:
        """After a reset a driver finds a device that serves it."""
        function, ground = self.function, self._ground
        self.poke(COMMON_AT + STATUS, 1, 0)
        assert function.read(COMMON_AT + STATUS, 1) == b"\0" and not self.owner.alive
        self.poke(COMMON_AT + STATUS, 1, 3)
        wanted = int(Feature.VERSION_1) | function.transport.offered & int(Feature.RING_EVENT_IDX)
        for page in (0, 1):
            self.poke(COMMON_AT + 8, 4, page)
            self.poke(COMMON_AT + 12, 4, wanted >> 32 * page & 0xFFFF_FFFF)
        self.poke(COMMON_AT + STATUS, 1, 11)
        assert function.read(COMMON_AT + STATUS, 1) == b"\x0b"
        ground.memory.write(GuestAddress(RAM), bytes(0x2000))
        queue = len(function.device.queues()) - 1 if not isinstance(function.device, Toy) else 0
        layout = QueueLayout.contiguous(queue, 4, GuestAddress(RAM))
        driver: DriverQueue[str] = new_driver_queue(layout, ground.memory, wanted)
        self.poke(COMMON_AT + SELECT, 2, queue)
        self.poke(COMMON_AT + SIZE, 2, 4)
        for at, address in zip((32, 40, 48), (layout.descriptors, layout.available, layout.used)):
            self.poke(COMMON_AT + at, 4, address & 0xFFFF_FFFF)
            self.poke(COMMON_AT + at + 4, 4, address >> 32)
        self.poke(COMMON_AT + ENABLED, 2, 1)
        self.poke(COMMON_AT + STATUS, 1, 15)
        assert self.owner.alive and function.read(COMMON_AT + STATUS, 1) == b"\x0f"
        for _ in range(3):
            add_request(driver, RAM + 0x1000)
            self.poke(NOTIFY_AT + 4 * queue, 2, queue)
            assert came_back(driver)
            ground.memory.write(GuestAddress(RAM + 0x1000), bytes(0x1000))
        driver.release()


class Guest:
    """What makes the accesses."""

    def __init__(self, random: Random, bus: PciBus, slots: list[Slot], ground: Enclosure) -> None:
        self._random = random
        self._bus = bus
        self._slots = slots
        self._ground = ground

    def access(self) -> None:
        """One, to any part of the bus."""
        random = self._random
        draw = random.random()
        slot = random.choice(self._slots)
        if draw < 0.03:
            self._begin(slot)
        elif draw < 0.15:
            self._ask(slot)
        elif draw < 0.55:
            self._register(slot)
        elif draw < 0.7:
            offset = random.randrange(0x100) if random.random() < 0.95 else random.randrange(0x2000)
            if random.random() < 0.4:
                offset = random.choice((4, 6, 0x10, 0x14, 0x3C, MSIX_AT + 2, *range(0x90, 0xC0, 4)))
            self._config(slot, offset)
        elif draw < 0.8:
            self._window(slot)
        elif draw < 0.9:
            self._ports(slot)
        else:
            self._memory()

    def _begin(self, slot: Slot) -> None:
        """Start the device as a driver does, but for a step now and then."""
        random = self._random
        wanted = slot.function.transport.offered & (random.getrandbits(64) | 1 << 32)
        index = random.randrange(3)
        layout = QueueLayout.contiguous(index, random.choice((1, 4, 8)), GuestAddress(RAM + 0x400 * random.randrange(8)))
        steps = [(STATUS, 0), (STATUS, 3), (8, 0), (12, wanted & 0xFFFF_FFFF), (8, 1), (12, wanted >> 32), (STATUS, 11)]
        steps += [(SELECT, index), (SIZE, layout.size)]
        for at, address in zip((32, 40, 48), (layout.descriptors, layout.available, layout.used)):
            steps += [(at, address), (at + 4, 0)]
        for at, value in (*steps, (ENABLED, 1), (STATUS, 15)):
            if random.random() < 0.995:
                slot.poke(COMMON_AT + at, _COMMON[at], value)

    def _ask(self, slot: Slot) -> None:
        """Put requests into a ring, and notify."""
        for layout in slot.function.transport.layouts:
            if all(RAM <= at <= RAM + 0x4000 for at in (layout.descriptors, layout.available, layout.used)):
                offer(self._random, self._ground.memory, layout, RAM + 0x5000)
            slot.poke(NOTIFY_AT + 4 * layout.index, 2, layout.index)

    def _bytes(self, size: int, offset: int = -1) -> bytes:
        random = self._random
        if random.random() < 0.2:
            return random.randbytes(size)
        return (random.choice(_VALUES.get(offset, _ANY)) & (1 << 8 * size) - 1).to_bytes(size, "little")

    def _place(self) -> tuple[int, int, int]:
        """A register's offset in its structure and in the BAR, and how wide it may be."""
        random = self._random
        draw = random.random()
        if draw < 0.55:
            offset = random.choice(_OFTEN)
            return offset, COMMON_AT + offset, _COMMON[offset]
        if draw < 0.75:
            offset, size = random.choice(list(_COMMON.items()))
            return offset, COMMON_AT + offset, size
        if draw < 0.85:
            return -1, NOTIFY_AT + random.choice((0, 4, 8, 2, 12, 16)), 2
        if draw < 0.92:
            return -1, MSIX_TABLE_AT + 4 * random.randrange(20), random.choice((4, 4, 8))
        start = random.choice((COMMON_AT, ISR_AT, CONFIG_AT, NOTIFY_AT, MSIX_TABLE_AT, MSIX_PENDING_AT, BAR_SIZE - 8))
        return -1, min(start + random.randrange(0x80), BAR_SIZE - 1), random.choice(_WIDTHS)

    def _register(self, slot: Slot) -> None:
        random = self._random
        offset, at, size = self._place()
        if random.random() < 0.05:
            size = random.choice(_WIDTHS)
        if random.random() < 0.2:
            assert len(slot.function.read(at, size)) == size
        elif 32 <= offset < 56:
            high = offset % 8 != 0
            base = random.choice((RAM, RAM, FAR, 0, (1 << 64) - 16)) + 16 * random.randrange(0x400)
            slot.function.write(at, (base >> 32 * high & 0xFFFF_FFFF).to_bytes(4, "little"))
        elif offset == 12 and random.random() < 0.8:
            page = slot.function.read(COMMON_AT + 8, 4)[0]
            wanted = slot.function.transport.offered & (random.getrandbits(64) | 1 << 32)
            slot.function.write(at, (wanted >> 32 * min(page, 1) & 0xFFFF_FFFF).to_bytes(4, "little"))
        else:
            slot.function.write(at, self._bytes(size, offset))

    def _config(self, slot: Slot, offset: int) -> None:
        random = self._random
        size = random.choice(_WIDTHS)
        if random.random() < 0.5:
            assert len(slot.function.read_config(offset, size)) == size
        else:
            slot.function.write_config(offset, self._bytes(size))

    def _window(self, slot: Slot) -> None:
        """By the capability for access through configuration space: its BAR, offset and length, then the data."""
        random, function = self._random, slot.function
        at = function._window_at
        offset, place, size = self._place()
        if random.random() < 0.1:
            place, size = random.choice(((BAR_SIZE, 4), (0xFFFF_FFFC, 4), (BAR_SIZE - 1, 2), (3, 4), (0, 0), (0, 8)))
        function.write_config(at + 4, bytes([0 if random.random() < 0.95 else random.randrange(256)]))
        function.write_config(at + 8, place.to_bytes(4, "little"))
        function.write_config(at + 12, size.to_bytes(4, "little"))
        width = size if size and random.random() < 0.8 else random.choice(_WIDTHS)
        if random.random() < 0.5:
            assert len(function.read_config(at + 16, width)) == width
        else:
            function.write_config(at + 16, self._bytes(width, offset))

    def _ports(self, slot: Slot) -> None:
        random, bus = self._random, self._bus
        number = (1 + self._slots.index(slot)) << 11 if random.random() < 0.8 else random.getrandbits(24)
        address = (ENABLE if random.random() < 0.9 else 0) | number | random.getrandbits(8)
        bus.write_port(CONFIG_ADDRESS, address.to_bytes(4, "little"))
        port, size = random.choice(PORTS), random.choice((1, 2, 4))
        if random.random() < 0.5:
            assert len(bus.read_port(port, size)) == size
        else:
            bus.write_port(port, self._bytes(size))
        at = random.randrange(ECAM_SIZE) if random.random() < 0.2 else random.randrange(0x8000 * (len(self._slots) + 1))
        if random.random() < 0.5:
            assert len(bus.read_ecam(at, size)) == size
        else:
            bus.write_ecam(at, self._bytes(size))

    def _memory(self) -> None:
        """By address, wherever the BARs are by now."""
        random, bus = self._random, self._bus
        bars = [slot.function.bar for slot in self._slots]
        address = random.choice([bar or 0 for bar in bars]) + random.choice((-1, 0, BAR_SIZE, random.randrange(BAR_SIZE)))
        found = bus.at(address)
        inside = any(bar is not None and bar <= address < bar + BAR_SIZE for bar in bars)
        assert (found is not None) is inside
        if found:
            function, offset = found
            assert 0 <= offset < BAR_SIZE
            size = random.choice(_WIDTHS)
            assert len(function.read(offset, size)) == size
            function.write(offset, self._bytes(size))


def one(seed: int) -> int:
    """The accesses of *seed*; how many."""
    random = Random(seed)
    with Enclosure((RAM, RAM_SIZE), (FAR, FAR_SIZE)) as ground:
        bus = PciBus()
        kinds = (ResettableToy, *DEVICES)
        slots = [Slot(random, random.choice(kinds)(), ground) for _ in range(2)]
        for slot in slots:
            bus.add(slot.function)
        bus.place(GuestAddress(WINDOW), [0, 10, 11])
        guest = Guest(random, bus, slots, ground)
        for number in range(ACCESSES):
            guest.access()
            if random.random() < 0.3:
                scribble(random, ground, RAM, RAM + RAM_SIZE)
            for slot in slots:
                slot.see_to_effects()
                if number % 100 == 99:
                    slot.holds()
        for slot in slots:
            slot.see_to_effects(at_once=True)
            slot.works()
            slot.owner.close()
    return ACCESSES
