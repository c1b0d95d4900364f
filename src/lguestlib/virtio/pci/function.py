"""A virtio device as a PCI function: configuration space, a BAR of registers, MSI-X (virtio 1.3, 4.1.2 to 4.1.5)."""

from collections.abc import Sequence
from typing import NamedTuple

from lguestlib.abi import pci, virtio_ids
from lguestlib.abi import virtio_pci as abi
from lguestlib.abi.layout import Structure, offset_of, size_of
from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.device import Device
from lguestlib.virtio.pci.config import ConfigSpace, Identity
from lguestlib.virtio.pci.effects import BarMoved, MsixEnabled, PciEffect, PinLevel
from lguestlib.virtio.pci.msix import MsixTable
from lguestlib.virtio.pci.transport import COMMON_SIZE, NOTIFY_OFF_MULTIPLIER, PciTransport

VENDOR = 0x1AF4
DEVICE_BASE = 0x1040
"""And the virtio device ID (4.1.2)."""
REVISION = 1
"""Of a device that no legacy driver is to take (4.1.2.1)."""

CLASSES = {
    virtio_ids.VIRTIO_ID_NET: 0x020000,
    virtio_ids.VIRTIO_ID_BLOCK: 0x018000,
    virtio_ids.VIRTIO_ID_CONSOLE: 0x078000,
}
CLASS_OTHER = 0x00FF00

BAR = 0
BAR_SIZE = 0x10000
"""Bytes of guest-physical addresses a function takes."""

COMMON_AT = 0x0000
ISR_AT = 0x1000
CONFIG_AT = 0x2000
CONFIG_SIZE = 0x1000
NOTIFY_AT = 0x4000
MSIX_TABLE_AT = 0x8000
MSIX_PENDING_AT = 0xC000

QUEUES_MAX = (MSIX_PENDING_AT - MSIX_TABLE_AT) // pci.PCI_MSIX_ENTRY_SIZE - 1
"""What there are vectors for, with that of the config space."""

_CFG_DATA = offset_of(abi.virtio_pci_cfg_cap, "pci_cfg_data")


class _Window(NamedTuple):
    """The access that configuration space has to a BAR."""

    offset: int
    size: int


class PciFunction:
    """*device* on a PCI bus, interrupting by pin *pin* (1 for INTA) where MSI-X is not enabled; *own* features besides.

    Accesses by any number of threads, one at a time.  What an access asks of the
    owner is in `take_effects` when it is over.  Raises ValueError for more queues
    than there are vectors for.
    """

    def __init__(self, device: Device, pin: int = 1, own: int = 0) -> None:
        queues = len(device.queues())
        if queues > QUEUES_MAX:
            raise ValueError(f"{device.name}: {queues} queues, a PCI function has room for {QUEUES_MAX}")
        self.device = device
        self.msix = MsixTable(queues + 1)
        self.transport = PciTransport(device, self.msix.count, own)
        self.config = ConfigSpace(
            Identity(
                VENDOR, DEVICE_BASE + device.device_type, CLASSES.get(device.device_type, CLASS_OTHER), REVISION,
                VENDOR, DEVICE_BASE + device.device_type, pin,
            )
        )  # fmt: skip
        self.config.add_bar(BAR, BAR_SIZE)
        self._notify_size = NOTIFY_OFF_MULTIPLIER * queues
        self._msix_at = self._add_msix()
        self._window_at = self._add_virtio()
        self._bar: GuestAddress | None = None
        self._pin = self._was_enabled = False
        self._effects: list[PciEffect] = []

    def _add_msix(self) -> int:
        body = b"".join([
            (self.msix.count - 1).to_bytes(2, "little"),
            (MSIX_TABLE_AT | BAR).to_bytes(4, "little"),
            (MSIX_PENDING_AT | BAR).to_bytes(4, "little"),
        ])
        writable = (pci.PCI_MSIX_FLAGS_ENABLE | pci.PCI_MSIX_FLAGS_MASKALL).to_bytes(2, "little")
        return self.config.add_capability(pci.PCI_CAP_ID_MSIX, body, writable)

    def _add_virtio(self) -> int:
        """Name the places of the registers, in the order of preference; where the window is."""
        for kind, offset, length in (
            (abi.VIRTIO_PCI_CAP_COMMON_CFG, COMMON_AT, COMMON_SIZE),
            (abi.VIRTIO_PCI_CAP_ISR_CFG, ISR_AT, 1),
            (abi.VIRTIO_PCI_CAP_DEVICE_CFG, CONFIG_AT, CONFIG_SIZE),
        ):
            self._add_vendor(_cap(abi.virtio_pci_cap, kind, offset, length))
        notify = abi.virtio_pci_notify_cap(
            _cap(abi.virtio_pci_notify_cap, abi.VIRTIO_PCI_CAP_NOTIFY_CFG, NOTIFY_AT, self._notify_size),
            NOTIFY_OFF_MULTIPLIER,
        )
        self._add_vendor(notify)
        window = abi.virtio_pci_cfg_cap(_cap(abi.virtio_pci_cfg_cap, abi.VIRTIO_PCI_CAP_PCI_CFG, 0, 0))
        writable = abi.virtio_pci_cfg_cap(
            abi.virtio_pci_cap(bar=0xFF, offset=0xFFFF_FFFF, length=0xFFFF_FFFF)
        )
        return self._add_vendor(window, bytes(writable)[2:])

    def _add_vendor(self, cap: Structure, writable: bytes = b"") -> int:
        return self.config.add_capability(pci.PCI_CAP_ID_VNDR, bytes(cap)[2:], writable)

    @property
    def bar(self) -> GuestAddress | None:
        """Where the registers are; None while the function does not decode memory."""
        return self._bar

    def notify_address(self, bar: GuestAddress, queue: int) -> GuestAddress:
        """Where *queue* is notified with the registers at *bar*."""
        return GuestAddress(bar + NOTIFY_AT + NOTIFY_OFF_MULTIPLIER * queue)

    def take_effects(self) -> list[PciEffect]:
        """What the accesses since the last call ask of the owner, in their order."""
        effects, self._effects = self._effects, []
        return effects

    def update_pin(self) -> None:
        """Something has become pending, or is not any more: the pin's level may have changed."""
        pending = bool(self.transport.isr) and not self.msix.enabled
        self.config.pin_asserted = pending
        level = pending and not self.config.command & pci.PCI_COMMAND_INTX_DISABLE
        if level != self._pin:
            self._pin = level
            self._effects.append(PinLevel(level))

    def read_config(self, offset: int, size: int) -> bytes:
        """*size* bytes of configuration space at *offset*."""
        data = self.config.read(offset, size)
        if offset <= self._window_at + _CFG_DATA < offset + size and (window := self._window()):
            # The first bytes of the data field are what is read through it (4.1.4.9.1).
            through = self.read(window.offset, window.size)
            at = self._window_at + _CFG_DATA - offset
            data = data[:at] + (through + data[at + window.size :])[: size - at]
        return data

    def write_config(self, offset: int, data: bytes) -> None:
        """Write *data* to configuration space at *offset*."""
        self.config.write(offset, data)
        if offset == self._window_at + _CFG_DATA and (window := self._window()):
            self.write(window.offset, data[: window.size])
        flags = int.from_bytes(self.config.read(self._msix_at + pci.PCI_MSIX_FLAGS, 2), "little")
        changed = self.msix.control(flags)
        if self.msix.enabled != self._was_enabled:
            self._was_enabled = self.msix.enabled
            self._effects.append(MsixEnabled(self.msix.enabled))
        self._effects += changed
        bar = self.config.bar(BAR)
        if bar != self._bar:
            self._bar = bar
            self._effects.append(BarMoved(bar))
        self.update_pin()

    def _window(self) -> _Window | None:
        """What the driver has asked to read or write through configuration space, if it can be (4.1.4.9.2)."""
        raw = self.config.read(self._window_at, size_of(abi.virtio_pci_cap))
        cap = abi.virtio_pci_cap.from_buffer_copy(raw)
        possible = cap.bar == BAR and cap.length in (1, 2, 4) and cap.offset % cap.length == 0
        return _Window(cap.offset, cap.length) if possible and cap.offset < BAR_SIZE else None

    def read(self, offset: int, size: int) -> bytes:
        """*size* bytes the driver reads of the registers at *offset*; zeros where there are none."""
        if offset < ISR_AT:
            return self.transport.read_common(offset, size)
        if (offset, size) == (ISR_AT, 1):
            isr = self.transport.take_isr()
            self.update_pin()
            return bytes([isr])
        if CONFIG_AT <= offset < CONFIG_AT + CONFIG_SIZE:
            return self.transport.read_config(offset - CONFIG_AT, size)
        if MSIX_TABLE_AT <= offset < MSIX_PENDING_AT:
            return self.msix.read(offset - MSIX_TABLE_AT, size)
        if MSIX_PENDING_AT <= offset:
            return self.msix.read_pending(offset - MSIX_PENDING_AT, size)
        self.transport.refused += 1
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        """The driver writes *data* to the registers at *offset*."""
        effects: Sequence[PciEffect] = ()
        if offset < ISR_AT:
            effects = self.transport.write_common(offset, data)
        elif CONFIG_AT <= offset < CONFIG_AT + CONFIG_SIZE:
            self.transport.write_config(offset - CONFIG_AT, data)
        elif NOTIFY_AT <= offset < NOTIFY_AT + self._notify_size:
            effects = self.transport.notify(offset - NOTIFY_AT)
        elif MSIX_TABLE_AT <= offset < MSIX_PENDING_AT:
            effects = self.msix.write(offset - MSIX_TABLE_AT, data)
        else:
            self.transport.refused += 1
        self._effects += effects


def _cap(structure: type[Structure], kind: int, offset: int, length: int) -> abi.virtio_pci_cap:
    """A capability of the kind *structure*, for *length* bytes of the BAR."""
    return abi.virtio_pci_cap(
        cap_vndr=pci.PCI_CAP_ID_VNDR, cap_len=size_of(structure), cfg_type=kind, bar=BAR, offset=offset, length=length
    )
