"""lguest's device page, written over and notified of as no driver should: an effect or nothing, and a reset helps."""

from random import Random

from virtio.arena import Enclosure
from virtio.toy import Toy

from fuzz.owner import DEVICES, Owner, add_request, came_back, offer, scribble
from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.driver_queue import DriverQueue, new_driver_queue
from lguestlib.virtio.effects import DriverFailed, DriverReady, Notify, Reset
from lguestlib.virtio.lguest import DEVICE_PAGES, PAGE, EarlyText, LguestBus, LguestTransport, Stray, Told

NOTIFICATIONS = 300
"""What one seed makes."""

RAM = 0x8000
SIZE = RAM + DEVICE_PAGES * PAGE
_STATUS_AT = 4
_STATUSES = (0, 1, 2, 3, 3, 3, 7, 7, 0x80, 0x83, 0x87, 0xFF)


def one(seed: int) -> int:
    """The notifications of *seed*; how many."""
    random = Random(seed)
    with Enclosure((0, SIZE)) as ground:
        memory = ground.memory
        bus = LguestBus(memory, RAM)
        for kind in random.sample(DEVICES, 3):
            bus.add(kind())
        owners = [_owner(transport, ground) for transport in bus.transports]
        rings = [layout.descriptors for transport in bus.transports for layout in transport.layouts]
        for _ in range(NOTIFICATIONS):
            transport = random.choice(bus.transports)
            draw = random.random()
            if draw < 0.7:
                status = random.choice(_STATUSES)
                memory.write(GuestAddress(transport.address + _STATUS_AT), bytes([status]))
            if draw < 0.3:
                at = transport.address + random.randrange(transport.size)
                memory.write(GuestAddress(at), random.randbytes(random.choice((1, 4))))
            if draw < 0.5:
                scribble(random, ground, 0, RAM)
                start = random.choice(rings)
                # Somewhere in the rings, where what it names is.
                scribble(random, ground, start, min(start + random.choice((64, 4096, 0x3000)), SIZE))
            elif draw < 0.8:
                offer(random, memory, random.choice(transport.layouts), 0x4000)
            address = _address(random, bus, transport, rings)
            page = memory.read(GuestAddress(RAM), PAGE)
            told = bus.notify(address)
            # Telling is not doing: nothing is written for it.
            assert memory.read(GuestAddress(RAM), PAGE) == page
            match told:
                case Told(slot, effect):
                    owner = owners[slot]
                    owner.take(effect)
                    assert not owner.transport.features & ~bus.transports[slot].offered
                    if isinstance(effect, (Reset, DriverFailed)):
                        assert not bus.transports[slot].started and not owner.alive
                    elif isinstance(effect, (DriverReady, Notify)):
                        assert bus.transports[slot].started
                case EarlyText(text):
                    assert 0 <= address < RAM and len(text) <= RAM - address and b"\0" not in text
                case Stray(where):
                    assert where == address and not 0 <= address < RAM
                case None:
                    assert address >= RAM
        for owner, transport in zip(owners, bus.transports):
            _works(owner, transport, bus, ground)
    return NOTIFICATIONS


def _owner(transport: LguestTransport, ground: Enclosure) -> Owner:
    return Owner(transport, ground.memory, lambda: list(transport.layouts))


def _address(random: Random, bus: LguestBus, transport: LguestTransport, rings: list[GuestAddress]) -> int:
    draw = random.random()
    if draw < 0.4:
        return transport.address
    if draw < 0.75:
        return random.choice(rings)
    return random.choice((
        0, RAM - 1, RAM, RAM + 1, bus.end, SIZE - 1, SIZE, -1, (1 << 32) - 1, (1 << 64) - 1, random.randrange(RAM),
        random.randrange(SIZE), random.choice(rings) + 1, random.getrandbits(32),
    ))  # fmt: skip


def _works(owner: Owner, transport: LguestTransport, bus: LguestBus, ground: Enclosure) -> None:
    """After a reset a driver finds a device that serves it."""
    memory = ground.memory

    def told(address: int) -> None:
        found = bus.notify(address)
        assert isinstance(found, Told), found
        owner.take(found.effect)

    def status(value: int) -> None:
        memory.write(GuestAddress(transport.address + _STATUS_AT), bytes([value]))
        told(transport.address)

    status(0)
    assert not owner.alive and not transport.features
    assert not any(any(memory.read(one.descriptors, one.end - one.descriptors)) for one in transport.layouts)
    memory.write(GuestAddress(0x1000), bytes(0x1000))
    queue = 0 if isinstance(transport.device, Toy) else len(transport.layouts) - 1
    layout = transport.layouts[queue]
    driver: DriverQueue[str] = new_driver_queue(layout, memory, 0)
    status(3)
    assert owner.alive
    for _ in range(3):
        add_request(driver, 0x1000)
        told(layout.descriptors)
        assert came_back(driver)
        memory.write(GuestAddress(0x1000), bytes(0x1000))
    driver.release()
    owner.close()
