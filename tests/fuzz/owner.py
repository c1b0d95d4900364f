"""A device's owner: does what a transport asks of him, on rings that may be anything, in guest memory that ends."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from virtio.arena import Enclosure
from virtio.devices.test_block import Disk
from virtio.devices.test_console import Line
from virtio.devices.test_entropy import Source
from virtio.devices.test_net import MAC, Network
from virtio.rings import without_frames
from virtio.toy import Toy

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.virtio.chain import DESCRIPTOR
from lguestlib.virtio.device import Device, SourceEnded
from lguestlib.virtio.device_queue import DeviceQueue, new_device_queue
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.net import Net
from lguestlib.virtio.driver_queue import DriverQueue
from lguestlib.virtio.effects import DriverFailed, DriverNear, DriverReady, Effect, Notify, QueueReady, QueueStop, Reset
from lguestlib.virtio.errors import QueueError
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.split_driver import Buffer


class Wire(Network):
    """Keeps nothing of what is sent."""

    def send(self, buffers: Sequence[memoryview]) -> int:
        return sum(map(len, buffers))


class Screen(Line):
    """Keeps nothing of what is shown."""

    def write(self, buffers: Sequence[memoryview]) -> int:
        return sum(map(len, buffers))


DEVICES: tuple[Callable[[], Device], ...] = (
    Toy, lambda: Block(Disk(), num_queues=2), lambda: Net(Wire(), MAC, mtu=1500), lambda: Console(Screen(b"typed")),
    lambda: Entropy(Source()),
)  # fmt: skip

_POPS_MAX = 64
_REQUEST, _ROOM = 16, 513
"""Bytes: a block device's header of zeros, and room for a sector and a status; any other kind takes them as well."""


class Transport(Protocol):
    """What the owner has to do with."""

    device: Device
    offered: int

    @property
    def features(self) -> int:
        """The features negotiated."""

    def reset_done(self) -> None:
        """Every queue has stopped."""

    def queue_stopped(self, index: int) -> None:
        """Queue *index* has."""

    def fail(self) -> None:
        """The device has failed."""


class Owner:
    """Of the device behind *transport*, of which *layouts* tells the queues that are ready."""

    def __init__(
        self, transport: Transport, memory: GuestMemory, layouts: Callable[[], list[QueueLayout]]
    ) -> None:
        self.transport = transport
        self.alive = False
        self.served = 0
        self._memory = memory
        self._layouts = layouts
        self._services = [queue.service for queue in transport.device.queues()]
        self._queues: dict[int, DeviceQueue] = {}

    def take(self, effect: Effect) -> bool:
        """Do it; whether the driver is to be interrupted."""
        match effect:
            case DriverReady(features):
                assert features == self.transport.features and not features & ~self.transport.offered
                self.alive = True
                self.transport.device.activate(features)
                for layout in self._layouts():
                    self._start(layout)
            case QueueReady(layout):
                if self.alive:
                    self._start(layout)
            case QueueStop(index):
                self._stop(index)
                self.transport.queue_stopped(index)
            case Reset() | DriverFailed():
                self.close()
                self.transport.device.deactivate()
                self.transport.reset_done()
            case Notify(index):
                return self._serve(index)
            case DriverNear():
                pass
        return False

    def _start(self, layout: QueueLayout) -> None:
        self._stop(layout.index)
        try:
            self._queues[layout.index] = new_device_queue(layout, self._memory, self.transport.features)
        except QueueError as error:
            without_frames(error)
            self.transport.fail()

    def _serve(self, index: int) -> bool:
        """As a queue's thread does, until it has no more, or the ring is broken."""
        queue = self._queues.get(index)
        if queue is None:
            return False
        try:
            for _ in range(_POPS_MAX):
                chain = queue.pop()
                if chain is None:
                    break
                written = 0
                try:
                    written = self._services[index](chain)
                except SourceEnded:
                    pass
                queue.push(chain, written)
                self.served += 1
            queue.enable_notifications()
            return queue.should_interrupt()
        except QueueError as error:
            without_frames(error)
            self._stop(index)
            self.transport.fail()
            return True

    def _stop(self, index: int) -> None:
        queue = self._queues.pop(index, None)
        if queue is not None:
            queue.release()

    def close(self) -> None:
        """Stop every queue."""
        self.alive = False
        for index in list(self._queues):
            self._stop(index)


def scribble(random: Random, ground: Enclosure, start: int, end: int) -> None:
    """Descriptors, or what comes, from *start* to *end*: most of it inside, and some of it on the edge."""
    at = random.randrange(start, end - 16)
    if random.random() < 0.5:
        address = random.choice((start, end - 8, end, 0, (1 << 64) - 1, random.randrange(start, end)))
        length = random.choice((0, 1, 16, 48, 513, 4096, 0xFFFF_FFFF))
        piece = DESCRIPTOR.pack(address, length, random.getrandbits(3), random.randrange(8))
        at &= ~15
    else:
        piece = random.randbytes(random.choice((1, 2, 2, 4, 16)))
    ground.memory.write(GuestAddress(at), piece)


def offer(random: Random, memory: GuestMemory, layout: QueueLayout, buffers: int) -> None:
    """Chains in the ring at *layout*, most of them good, whose buffers are in the page at *buffers*.

    Available in a split ring; in a packed one if its marks happen to be so.
    """
    size = min(layout.size, 8)
    for slot in range(size):
        address = buffers + random.randrange(0xC00) if random.random() < 0.98 else random.getrandbits(64)
        length = random.choice((1, 16, 64, 513))
        flags, following = random.choice(((0, 0), (2, 0), (2, 0), (1, slot + 1), (3, slot + 1), (4, 0)))
        marks = random.choice((0, 1 << 7, 1 << 15)) if random.random() < 0.5 else 0
        piece = DESCRIPTOR.pack(address, length, flags | marks, following % size)
        memory.write(GuestAddress(layout.descriptors + 16 * slot), piece)
    index_at = GuestAddress(layout.available + 2)
    index = int.from_bytes(memory.read(index_at, 2), "little")
    for step in range(random.randrange(1, 3)):
        place = GuestAddress(layout.available + 4 + 2 * ((index + step) % layout.size))
        memory.write(place, random.randrange(size).to_bytes(2, "little"))
    memory.write(index_at, (index + step + 1 & 0xFFFF).to_bytes(2, "little"))


def add_request(driver: DriverQueue[str], at: int) -> None:
    """Make a chain available whose buffers are from *at* on, which must hold zeros."""
    driver.add([Buffer(GuestAddress(at), _REQUEST)], [Buffer(GuestAddress(at + _REQUEST), _ROOM)], "request")


def came_back(driver: DriverQueue[str]) -> bool:
    """Whether that chain has."""
    done = driver.reap()
    return [token for token, _ in done] == ["request"] and 0 <= done[0][1] <= _ROOM
