"""What a PCI device asks of KVM, taken by nobody: doorbells, irqfds and routes as they stand."""

import os
from collections.abc import Mapping

from lguestlib.memory.address import GuestAddress
from lguestlib.runtime.vm import Route


class FakeWires:
    """Keeps what is asked for, and refuses what KVM would."""

    def __init__(self) -> None:
        self.doorbells: dict[int, int] = {}
        self.irqfds: dict[int, int] = {}
        self.routes: dict[int, Route] = {}
        self.taken: list[int] = []
        """The interrupts that came, by number."""

    def add_doorbell(self, address: GuestAddress, length: int, fd: int, about: object) -> None:
        assert address not in self.doorbells
        self.doorbells[address] = fd

    def remove_doorbell(self, address: GuestAddress, length: int, fd: int, about: object) -> None:
        assert self.doorbells.pop(address) == fd

    def add_irqfd(self, fd: int, gsi: int, about: object) -> None:
        assert fd not in self.irqfds, "KVM has EBUSY for this"
        assert gsi in self.routes
        self.irqfds[fd] = gsi
        self.deliver()

    def remove_irqfd(self, fd: int, gsi: int, about: object) -> None:
        self.deliver()
        assert self.irqfds.pop(fd) == gsi

    def set_routes(self, routes: Mapping[int, Route]) -> None:
        self.routes = dict(routes)

    def deliver(self) -> None:
        """As KVM does at once: whatever the attached eventfds have is an interrupt each."""
        for fd, gsi in self.irqfds.items():
            os.set_blocking(fd, False)
            try:
                os.read(fd, 8)
                self.taken.append(gsi)
            except BlockingIOError:
                continue
            finally:
                os.set_blocking(fd, True)
