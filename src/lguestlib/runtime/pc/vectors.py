"""MSI-X vectors as KVM has them: eventfds whose signals are messages, by way of the routing table.

A source of interrupts, a queue or the config space, has an eventfd for as long as its
device is there.  While its vector sends messages KVM takes the signals; while it is
masked nobody does, and they stay where they are: the interrupt pends, and KVM finds it
when the vector is unmasked (T8).
"""

import select
import threading
from collections.abc import Mapping
from typing import Protocol

from lguestlib.runtime.vm import IOAPIC_PINS, Route
from lguestlib.virtio.pci.effects import Message


class Wires(Protocol):
    """What is asked of the virtual machine, `Vm`."""

    def add_irqfd(self, fd: int, gsi: int, about: object) -> None:
        """A signal of *fd* is interrupt *gsi*; one that it has already is too."""

    def remove_irqfd(self, fd: int, gsi: int, about: object) -> None:
        """It is not any more: signals stay in *fd*."""

    def set_routes(self, routes: Mapping[int, Route]) -> None:
        """Where the interrupts that are messages go."""


class Routes:
    """The routing table of all devices' messages."""

    def __init__(self, wires: Wires) -> None:
        self._wires = wires
        self._routes: dict[int, Route] = {}
        self._next = IOAPIC_PINS
        self._lock = threading.Lock()

    def allocate(self) -> int:
        """The number of an interrupt that nobody has."""
        with self._lock:
            self._next += 1
            return self._next - 1

    def set(self, gsi: int, message: Message) -> None:
        """Interrupt *gsi* is *message* from now on."""
        route = Route(*message)
        with self._lock:
            if self._routes.get(gsi) != route:
                self._routes[gsi] = route
                self._wires.set_routes(self._routes)


class Vectors:
    """The vectors of one device, *about* it in what is raised; *fds* are its sources'."""

    def __init__(self, wires: Wires, routes: Routes, fds: Mapping[int, int], about: str) -> None:
        self._wires = wires
        self._routes = routes
        self._fds = fds
        self._about = about
        self._gsis: dict[int, int] = {}
        self._sending: set[int] = set()
        self._assigned: dict[int, int] = {}
        self._attached: dict[int, int] = {}

    def change(self, vector: int, message: Message | None) -> None:
        """*vector* sends *message*, or is masked."""
        if message is None:
            self._sending.discard(vector)
        else:
            if vector not in self._gsis:
                self._gsis[vector] = self._routes.allocate()
            self._routes.set(self._gsis[vector], message)
            self._sending.add(vector)
        for source, assigned in self._assigned.items():
            if assigned == vector:
                self._attach(source)

    def assign(self, source: int, vector: int | None) -> None:
        """*source* interrupts by *vector*, or not at all."""
        if vector is None:
            self._assigned.pop(source, None)
        else:
            self._assigned[source] = vector
        self._attach(source)

    def _attach(self, source: int) -> None:
        """Have KVM take the signals of *source*, or leave them, as its vector says."""
        vector = self._assigned.get(source, -1)
        wanted = self._gsis[vector] if vector in self._sending else None
        present = self._attached.get(source)
        if wanted == present:
            return
        fd = self._fds[source]
        if present is not None:
            self._wires.remove_irqfd(fd, present, self._about)
            del self._attached[source]
        if wanted is not None:
            self._wires.add_irqfd(fd, wanted, self._about)
            self._attached[source] = wanted

    def pending(self, vector: int) -> bool:
        """Whether a source of *vector* has a signal that nobody has taken."""
        ready = select.poll()
        for source, assigned in self._assigned.items():
            if assigned == vector and source not in self._attached:
                ready.register(self._fds[source], select.POLLIN)
        return bool(ready.poll(0))
