"""One device as the guest drives it: its registers, its rings, and the pages they are in."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from lguestlib.abi.virtio_mmio import VIRTIO_MMIO_INT_CONFIG
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.runner import MmioRunner
from lguestlib.virtio.device import RING_FEATURES
from lguestlib.virtio.driver_queue import DriverQueue, new_driver_queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.mmio_driver import MmioDriver
from lguestlib.virtio.split_driver import Buffer
from lguestlib.virtio.status import Status

QUEUE_SIZE = 64
PAGE = 4096


class Pages:
    """Hands out guest memory from *start*, page by page; nothing comes back."""

    def __init__(self, start: GuestAddress) -> None:
        self._next = int(start)

    def take(self, size: int) -> GuestAddress:
        """The guest-physical address of *size* bytes, page-aligned."""
        address = self._next
        self._next += -(-size // PAGE) * PAGE
        return GuestAddress(address)


class Used(NamedTuple):
    """A buffer the device has returned, and the bytes it wrote there."""

    buffer: Buffer
    written: int


class GuestQueue:
    """A virtqueue of chains, each known by the buffer it was made for."""

    def __init__(self, index: int, name: str, pages: Pages, kick: Callable[[], None]) -> None:
        self.name = name
        layout = QueueLayout.contiguous(index, QUEUE_SIZE, GuestAddress(0))
        self.layout = QueueLayout.contiguous(index, QUEUE_SIZE, pages.take(layout.end))
        self.requests = 0
        """Chains made available since the machine was made."""
        self.kicks = 0
        """Notifications sent."""
        self._kick = kick
        self._ring: DriverQueue[Buffer] | None = None

    def start(self, memory: GuestMemory, features: int) -> None:
        """Begin with an empty ring."""
        self.stop()
        self._ring = new_driver_queue(self.layout, memory, features)

    def stop(self) -> None:
        """Let go of the ring."""
        if self._ring:
            self._ring.release()
            self._ring = None

    @property
    def ring(self) -> DriverQueue[Buffer]:
        """The ring, once started."""
        assert self._ring is not None
        return self._ring

    def submit(self, readable: Sequence[Buffer], writable: Sequence[Buffer], token: Buffer) -> None:
        """Make a chain available and notify the device if it wants to be; `reap` returns *token*."""
        self.ring.add(readable, writable, token)
        self.requests += 1
        if self.ring.kick_needed():
            self.kicks += 1
            self._kick()

    def reap(self) -> list[Used]:
        """What the device has returned since the last time."""
        return [Used(buffer, written) for buffer, written in self.ring.reap()]


class GuestDevice:
    """The device behind *runner*, with *name* for people; *wanted* features beside the ring's."""

    def __init__(self, name: str, runner: MmioRunner, memory: GuestMemory, pages: Pages, wanted: int = 0) -> None:
        self.name = name
        self.memory = memory
        self.driver = MmioDriver(runner)
        self.features = 0
        self.interrupts = 0
        self._signals = [kick.signal for kick in runner.kicks]
        self.queues = [
            GuestQueue(index, queue.name, pages, partial(self._notify, index))
            for index, queue in enumerate(runner.queues)
        ]
        self._wanted = wanted | (RING_FEATURES & ~Feature.RING_INDIRECT_DESC) | Feature.IN_ORDER

    def start(self) -> None:
        """Reset the device and bring it up with empty rings."""
        self.features = self.driver.negotiate(self._wanted)
        for queue in self.queues:
            queue.start(self.memory, self.features)
            self.driver.enable_queue(queue.layout)
        self.driver.ready()

    def _notify(self, index: int) -> None:
        """Notify the device of what is new in queue *index*: with what it says, or as an ioeventfd would."""
        if self.features & Feature.NOTIFICATION_DATA:
            self.driver.notify(index, self.queues[index].ring.next_available)
        else:
            self._signals[index]()

    def stop(self) -> None:
        """Reset the device and let go of the rings."""
        self.driver.reset()
        self.release()

    def release(self) -> None:
        """Let go of the rings: the device is not to be driven any more."""
        for queue in self.queues:
            queue.stop()

    def interrupted(self) -> bool:
        """Acknowledge the device's interrupt, if it has one; True if it has failed and needs a reset."""
        reasons = self.driver.take_interrupt()
        self.interrupts += bool(reasons)
        return bool(reasons & VIRTIO_MMIO_INT_CONFIG) and bool(self.driver.status & Status.NEEDS_RESET)
