"""The guest's network card at work: it pings, and answers those who ask."""

import time
from collections.abc import Callable

from lguestlib.memory.address import GuestAddress
from lguestlib.runtime.inprocess.driver import QUEUE_SIZE, GuestDevice, Pages
from lguestlib.runtime.packets import FRAME_MAX, Station, answer, arp_reply, arp_request, echo_reply, echo_request
from lguestlib.virtio.devices.net import HEADER_SIZE
from lguestlib.virtio.split_driver import Buffer

RECEIVE, TRANSMIT = 0, 1
BUFFER_SIZE = 2048

ARP_TRIES = 3
ANSWER_SECONDS = 1.0
ECHO_DATA = bytes(range(56))
ECHO_FRAME_SIZE = 98
_IDENTIFIER = 0x6C67


class NetworkCard:
    """The station with IPv4 *address* (4 bytes, or empty for none yet) behind *device*.

    *sleep* waits for interrupts until a time of the monotonic clock, and lets
    every device's be handled; it returns False at that time.
    """

    def __init__(
        self, device: GuestDevice, address: bytes, pages: Pages, sleep: Callable[[float], bool]
    ) -> None:
        self.device = device
        self.address = address
        self._sleep = sleep
        self._neighbours: dict[bytes, Station] = {}
        self._sequence = 0
        self._echoed = -1
        self._receive_buffers = [Buffer(pages.take(BUFFER_SIZE), BUFFER_SIZE) for _ in range(QUEUE_SIZE)]
        self._transmit_buffers = [pages.take(BUFFER_SIZE) for _ in range(QUEUE_SIZE)]
        self._free: list[GuestAddress] = []
        self._station = Station(b"", address)

    def start(self) -> None:
        """The device has just been brought up: give it all receive buffers."""
        self._station = Station(self.device.driver.config(0, 6), self.address)
        self._free = list(self._transmit_buffers)
        # A sent frame's buffer is taken back when the next is sent: no interrupt for that.
        self.device.queues[TRANSMIT].ring.disable_interrupts()
        for buffer in self._receive_buffers:
            self.device.queues[RECEIVE].submit((), (buffer,), buffer)

    def handle_received(self) -> None:
        """Look at every frame that has come in, answer it if it asks, and ask for an interrupt at the next."""
        queue = self.device.queues[RECEIVE]
        while True:
            for buffer, written in queue.reap():
                frame = self.device.memory.read(buffer.address, written)[HEADER_SIZE:]
                queue.submit((), (buffer,), buffer)
                self._handle(frame)
            if not queue.ring.enable_interrupts():
                return

    def _handle(self, frame: bytes) -> None:
        if not self.address:
            return
        reply = answer(frame, self._station)
        if reply:
            self.send(reply)
            return
        neighbour = arp_reply(frame)
        if neighbour:
            self._neighbours[neighbour.address] = neighbour
        echo = echo_reply(frame, self.address)
        if echo and echo.identifier == _IDENTIFIER and echo.sequence == self._sequence:
            self._echoed = echo.sequence

    def send(self, frame: bytes) -> None:
        """Send *frame*; dropped, as by any network, while the device is too slow."""
        queue = self.device.queues[TRANSMIT]
        self._free += [sent.buffer.address for sent in queue.reap()]
        if not self._free:
            return
        packet = bytes(HEADER_SIZE) + frame[:FRAME_MAX]
        buffer = Buffer(self._free.pop(), len(packet))
        self.device.memory.write(buffer.address, packet)
        queue.submit((buffer,), (), buffer)
        queue.ring.disable_interrupts()

    def ask(self, target: bytes) -> None:
        """Send a who-has for IPv4 address *target*, and do not wait."""
        self.send(arp_request(self._station, target))

    def resolve(self, target: bytes) -> Station | None:
        """Who has IPv4 address *target*, asking up to three times, a second each."""
        for _ in range(ARP_TRIES):
            if target in self._neighbours:
                break
            self.ask(target)
            self._wait(lambda: target in self._neighbours)
        return self._neighbours.get(target)

    def ping(self, target: Station) -> float | None:
        """Seconds until *target* echoes, or None if it does not within one."""
        self._sequence = self._sequence + 1 & 0xFFFF
        start = time.perf_counter()
        self.send(echo_request(self._station, target, _IDENTIFIER, self._sequence, ECHO_DATA))
        if not self._wait(lambda: self._echoed == self._sequence):
            return None
        return time.perf_counter() - start

    def _wait(self, happened: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not happened():
            if not self._sleep(deadline):
                return happened()
        return True
