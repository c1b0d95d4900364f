"""The owner of a device's registers, who takes his time over what they ask of him."""

from random import Random

from virtio.toy import SIZES

from lguestlib.virtio.effects import DriverReady, Notify, QueueReady, QueueStop, Reset
from lguestlib.virtio.registers import RegisterTransport


class Owner:
    """Does what the transport asks, after a while, and checks that it may be asked that."""

    def __init__(self, random: Random, transport: RegisterTransport) -> None:
        self._random = random
        self._transport = transport
        self._stopping: list[int] = []
        self._resetting = False
        self.alive = False
        self.ready: set[int] = set()
        self.seen: set[type] = set()

    def take(self, effect: object) -> None:
        if effect is not None:
            self.seen.add(type(effect))
        match effect:
            case Reset():
                self._resetting = True
            case DriverReady(features):
                assert not self.alive and not self._resetting
                assert features == self._transport.accepted
                self.alive = True
            case QueueReady(layout):
                assert layout.index not in self.ready and not self._resetting
                assert 0 < layout.size <= SIZES[layout.index] and not layout.size & layout.size - 1
                self.ready.add(layout.index)
            case QueueStop(index):
                assert index in self.ready
                self._stopping.append(index)
            case Notify(index):
                assert 0 <= index < len(SIZES)

    def act(self) -> None:
        if self._resetting and self._random.random() < 0.3:
            self._resetting = self.alive = False
            self.ready.clear()
            self._stopping.clear()
            self._transport.reset_done()
            assert self._transport.status == 0 and not self._transport.layouts
        elif self._stopping and self._random.random() < 0.3:
            index = self._stopping.pop()
            self._transport.queue_stopped(index)
            self.ready.discard(index)
            self._stopping = [other for other in self._stopping if other != index]
