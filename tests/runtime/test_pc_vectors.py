"""MSI-X vectors as irqfds: nothing is lost while they are masked, moved or not yet there."""

import os
from collections.abc import Iterator
from random import Random

import pytest
from runtime.rigs import nothing_left
from runtime.wires import FakeWires

from lguestlib.abi.eventfd import SIGNAL, eventfd
from lguestlib.memory.address import GuestAddress
from lguestlib.runtime.pc.vectors import Routes, Vectors
from lguestlib.runtime.vm import IOAPIC_PINS, Route
from lguestlib.virtio.pci.effects import CONFIG, Message

A = Message(GuestAddress(0xFEE0_0000), 0x31)
B = Message(GuestAddress(0xFEE0_1000), 0x32)


class Rig:
    """Three sources and the vectors they may have."""

    def __init__(self) -> None:
        self.wires = FakeWires()
        self.fds = {CONFIG: eventfd(), 0: eventfd(), 1: eventfd()}
        self.routes = Routes(self.wires)
        self.vectors = Vectors(self.wires, self.routes, self.fds, "toy")

    def signal(self, source: int) -> None:
        os.write(self.fds[source], SIGNAL)
        self.wires.deliver()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with nothing_left():
        made = Rig()
        yield made
        for fd in made.fds.values():
            os.close(fd)


def test_a_source_with_a_vector_that_sends_is_an_interrupt_of_kvms(rig: Rig) -> None:
    rig.vectors.assign(0, 1)
    assert not rig.wires.irqfds
    rig.vectors.change(1, A)
    [(fd, gsi)] = rig.wires.irqfds.items()
    assert fd == rig.fds[0] and gsi >= IOAPIC_PINS
    assert rig.wires.routes == {gsi: Route(0xFEE0_0000, 0x31)}
    rig.signal(0)
    assert rig.wires.taken == [gsi]


def test_t8_a_signal_before_there_is_a_vector_is_not_lost(rig: Rig) -> None:
    rig.signal(1)
    rig.vectors.change(2, A)
    rig.vectors.assign(1, 2)
    assert len(rig.wires.taken) == 1


def test_a_masked_vector_pends_and_sends_when_it_is_unmasked(rig: Rig) -> None:
    rig.vectors.change(0, A)
    rig.vectors.assign(0, 0)
    rig.vectors.change(0, None)
    assert not rig.wires.irqfds and not rig.vectors.pending(0)
    rig.signal(0)
    assert rig.vectors.pending(0) and not rig.vectors.pending(1)
    assert rig.wires.taken == []
    rig.vectors.change(0, A)
    assert len(rig.wires.taken) == 1 and not rig.vectors.pending(0)


def test_a_vector_that_moves_keeps_its_number_and_its_sources(rig: Rig) -> None:
    rig.vectors.change(0, A)
    rig.vectors.assign(0, 0)
    before = dict(rig.wires.irqfds)
    rig.vectors.change(0, B)
    assert rig.wires.irqfds == before
    assert list(rig.wires.routes.values()) == [Route(0xFEE0_1000, 0x32)]


def test_sources_may_share_a_vector(rig: Rig) -> None:
    for source in rig.fds:
        rig.vectors.assign(source, 1)
    rig.vectors.change(1, A)
    assert len(rig.wires.irqfds) == 3 and len(set(rig.wires.irqfds.values())) == 1
    rig.vectors.change(1, None)
    rig.signal(CONFIG)
    assert rig.vectors.pending(1)
    rig.vectors.assign(CONFIG, None)
    assert not rig.vectors.pending(1)


def test_each_vector_has_a_number_of_its_own_over_all_devices(rig: Rig) -> None:
    other = Vectors(rig.wires, rig.routes, rig.fds, "other")
    for vectors in (rig.vectors, other):
        for vector in range(3):
            vectors.change(vector, A)
    assert len(rig.wires.routes) == 6


def test_t8_whatever_the_driver_does_every_signal_is_an_interrupt_or_pends(rig: Rig) -> None:
    random = Random(4)
    assigned: dict[int, int] = {}
    sending: set[int] = set()
    waiting: set[int] = set()
    for _ in range(5000):
        source, vector = random.choice((CONFIG, 0, 1)), random.randrange(3)
        kind = random.random()
        before = len(rig.wires.taken)
        if kind < 0.3:
            rig.vectors.assign(source, vector)
            assigned[source] = vector
        elif kind < 0.35:
            rig.vectors.assign(source, None)
            assigned.pop(source, None)
        elif kind < 0.6:
            rig.vectors.change(vector, random.choice((A, B)))
            sending.add(vector)
        elif kind < 0.7:
            rig.vectors.change(vector, None)
            sending.discard(vector)
        else:
            rig.signal(source)
            waiting.add(source)
        attached = {each for each in rig.fds if assigned.get(each) in sending}
        assert {rig.fds[each] for each in attached} == rig.wires.irqfds.keys()
        assert len(rig.wires.taken) - before == len(waiting & attached)
        waiting -= attached
        for each in range(3):
            assert rig.vectors.pending(each) == any(assigned.get(other) == each for other in waiting)
