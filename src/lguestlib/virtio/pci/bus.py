"""A PCI bus and its host bridge, reached by ports and by memory (PCI Local Bus 3.0, 3.2.2.3.2; PCI Express, 7.2.2).

The processor gets at the same configuration space both ways: through the address and
data ports 0xCF8 and 0xCFC, and in a window of memory with 4096 bytes a function
(ECAM).  There is bus 0 alone, with a device in each slot of one function.  Whatever
is not there reads as ones, and what is written there is lost.  Any access that is
within one function is one; what goes past its end is not.
"""

from collections.abc import Sequence
from typing import Protocol

from lguestlib.abi import pci
from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.pci.config import ConfigSpace, Identity
from lguestlib.virtio.pci.function import BAR, BAR_SIZE

CONFIG_ADDRESS = 0xCF8
CONFIG_DATA = 0xCFC
PORTS = range(CONFIG_ADDRESS, CONFIG_DATA + 4)
"""The bridge's ports."""

ENABLE = 1 << 31

SLOTS = 32
DEVICES_MAX = SLOTS - 1
ECAM_SIZE = SLOTS * 8 * pci.PCI_CFG_SPACE_EXP_SIZE
"""Bytes of memory that the configuration space of one bus takes."""

HOST_BRIDGE = Identity(vendor=0x1B36, device=0x0008, class_code=0x060000)
"""What is in slot 0: Linux wants to see a host bridge before it believes the ports."""


class Configured(Protocol):
    """What has a configuration space."""

    def read_config(self, offset: int, size: int) -> bytes:
        """*size* bytes of configuration space at *offset*."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Write *data* to configuration space at *offset*."""


class Function(Configured, Protocol):
    """What a device in a slot is to its bus: `PciFunction`, or its owner, who sees to the effects as well."""

    @property
    def bar(self) -> GuestAddress | None:
        """Where the registers are; None while the function does not decode memory."""

    def read(self, offset: int, size: int) -> bytes:
        """*size* bytes the driver reads of the registers at *offset*."""

    def write(self, offset: int, data: bytes) -> None:
        """The driver writes *data* to the registers at *offset*."""


class HostBridgeFunction:
    """Slot 0: configuration space, and nothing behind it."""

    def __init__(self) -> None:
        self._config = ConfigSpace(HOST_BRIDGE)

    def read_config(self, offset: int, size: int) -> bytes:
        """*size* bytes of configuration space at *offset*."""
        return self._config.read(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Write *data* to configuration space at *offset*."""
        self._config.write(offset, data)


class PciBus:
    """Bus 0: the host bridge in slot 0, devices in those behind it."""

    def __init__(self) -> None:
        self.functions: list[Function] = []
        """In slot order, from 1 on."""
        self._bridge = HostBridgeFunction()
        self._address = 0

    def add(self, function: Function) -> int:
        """Put *function* into the next slot, which is returned.  Raises ValueError where all are taken."""
        if len(self.functions) == DEVICES_MAX:
            raise ValueError(f"the bus has no room for more than {DEVICES_MAX} devices")
        self.functions.append(function)
        return len(self.functions)

    def _function(self, number: int) -> Configured | None:
        """The function with the number *number*: bus, slot and function in 16 bits."""
        slot, of_slot = divmod(number, 8)
        if of_slot or slot > len(self.functions):
            return None
        return self.functions[slot - 1] if slot else self._bridge

    def _named(self, port: int, size: int) -> tuple[Configured, int] | None:
        """What CONFIG_ADDRESS names, and the offset into it, for *size* bytes at *port*."""
        lane = port - CONFIG_DATA
        function = self._function(self._address >> 8 & 0xFFFF)
        if not self._address & ENABLE or function is None or lane < 0 or lane + size > 4:
            return None
        return function, (self._address & 0xFC) + lane

    def read_port(self, port: int, size: int) -> bytes:
        """*size* bytes the processor reads from *port*."""
        if (port, size) == (CONFIG_ADDRESS, 4):
            return self._address.to_bytes(4, "little")
        named = self._named(port, size)
        return named[0].read_config(named[1], size) if named else b"\xff" * size

    def write_port(self, port: int, data: bytes) -> None:
        """The processor writes *data* to *port*; CONFIG_ADDRESS takes 32 bits at once and nothing else."""
        if (port, len(data)) == (CONFIG_ADDRESS, 4):
            # Bits 30 to 24 are reserved, and 1 and 0 are always 0.
            self._address = int.from_bytes(data, "little") & 0x80FF_FFFC
        elif named := self._named(port, len(data)):
            named[0].write_config(named[1], data)

    def _mapped(self, offset: int) -> tuple[Configured, int] | None:
        number, register = divmod(offset, pci.PCI_CFG_SPACE_EXP_SIZE)
        function = self._function(number)
        return None if function is None else (function, register)

    def read_ecam(self, offset: int, size: int) -> bytes:
        """*size* bytes the processor reads at *offset* of the window."""
        mapped = self._mapped(offset)
        return mapped[0].read_config(mapped[1], size) if mapped else b"\xff" * size

    def write_ecam(self, offset: int, data: bytes) -> None:
        """The processor writes *data* at *offset* of the window."""
        mapped = self._mapped(offset)
        if mapped:
            mapped[0].write_config(mapped[1], data)

    def at(self, address: int) -> tuple[Function, int] | None:
        """The function whose registers hold guest-physical *address*, and the offset into them."""
        for function in self.functions:
            bar = function.bar
            if bar is not None and 0 <= address - bar < BAR_SIZE:
                return function, address - bar
        return None

    def place(self, window: GuestAddress, lines: Sequence[int]) -> None:
        """As firmware does: every BAR from *window* on, memory decoded, each slot told its pin's line of *lines*.

        *lines* are those of slot 0 and on.
        """
        for slot, function in enumerate(self.functions, 1):
            bar = window + (slot - 1) * BAR_SIZE
            function.write_config(pci.PCI_BASE_ADDRESS_0 + 4 * BAR, bar.to_bytes(8, "little"))
            function.write_config(pci.PCI_INTERRUPT_LINE, bytes([lines[slot]]))
            function.write_config(pci.PCI_COMMAND, pci.PCI_COMMAND_MEMORY.to_bytes(2, "little"))
