"""A project that uses lguestlib: a device of its own, a ring driven from both sides, and a machine.

Nothing but public names.  The comments say what the types of the names on their
left are; test_downstream.py holds mypy --strict to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.inprocess.driver import GuestDevice, Pages
from lguestlib.runtime.inprocess.machine import InprocessMachine
from lguestlib.runtime.machine import Outcome, PowerOff
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue


class Reverser(Device):
    """Gives back whatever it is told, the other way round."""

    device_type = 62

    def queues(self) -> Sequence[Queue]:
        return (Queue("requests", self.reverse),)

    def reverse(self, chain: Chain) -> int:
        """The service function: returns the bytes written."""
        head = chain.head  # DescriptorIndex
        pieces = chain.readable  # tuple[memoryview[int], ...]
        assert head >= 0
        return chain.write(b"".join(pieces)[::-1])


@dataclass(frozen=True)
class Request:
    """What this driver remembers of a request."""

    number: int
    answer: Buffer


def both_sides(words: Sequence[bytes]) -> list[bytes]:
    """Each of *words* reversed, by way of a ring whose two ends are here."""
    device = Reverser("reverser")
    queue = device.queues()[0]  # Queue
    features = int(Feature.VERSION_1 | Feature.RING_EVENT_IDX)  # int
    answers: list[bytes] = []
    with GuestMemory.anonymous(1 << 20) as memory:
        layout = QueueLayout.contiguous(0, 8, GuestAddress(0x1000))  # QueueLayout
        table = layout.descriptors  # GuestAddress
        host = memory.host_address(table)  # HostAddress
        driver: SplitDriverQueue[Request] = SplitDriverQueue(layout, memory, features)
        ring = SplitDeviceQueue(layout, memory, features)  # SplitDeviceQueue
        for number, word in enumerate(words):
            question = Buffer(GuestAddress(0x4000), len(word))
            answer = Buffer(GuestAddress(0x5000), 100)
            where = question.address  # GuestAddress
            memory.write(where, word)
            head = driver.add([question], [answer], Request(number, answer))  # DescriptorIndex
            wanted = driver.kick_needed()  # bool
            chain = ring.pop()  # Chain | None
            assert chain is not None and chain.head == head and (wanted or number) and host
            ring.push(chain, queue.service(chain))
            position = ring.next_available  # RingIndex
            assert position == number + 1
            for request, written in driver.reap():
                token = request  # Request
                data = memory.read(token.answer.address, written)  # bytes
                answers.append(data)
        ring.release()
        driver.release()
    return answers


def guest(machine: InprocessMachine) -> Outcome:
    """The driver's side in a machine: one question, and sleep until the answer's interrupt."""
    device = GuestDevice("reverser", machine.runners[0], machine.memory, Pages(GuestAddress(0x8000)))
    device.start()
    queue = device.queues[0]  # GuestQueue
    question, answer = Buffer(GuestAddress(0x1000), 5), Buffer(GuestAddress(0x2000), 64)
    machine.memory.write(question.address, b"hello")
    queue.submit([question], [answer], token=answer)
    while not (used := queue.reap()):
        if not queue.ring.enable_interrupts():
            machine.wait_for_interrupt()
            device.interrupted()
    written = used[0].written  # int
    device.release()
    return PowerOff(0 if machine.memory.read(answer.address, written) == b"olleh" else 1)


def machine_of_ones_own() -> Outcome:
    """A machine with the device in it, run until its guest ends."""
    with InprocessMachine(GuestMemory.anonymous(16 << 20), guest, report=print) as machine:
        runner = machine.add(Reverser("reverser"))  # MmioRunner
        place = machine.address_of(0)  # GuestAddress
        assert runner.device.name == "reverser" and place
        machine.start()
        outcome = machine.wait()  # PowerOff | Reboot | Stopped | Crash
        return outcome


if __name__ == "__main__":
    print(both_sides([b"stressed", b"live"]), machine_of_ones_own())
