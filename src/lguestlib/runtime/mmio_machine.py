"""A machine whose devices are behind virtio-mmio registers."""

from abc import abstractmethod
from collections.abc import Callable

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.machine import Machine
from lguestlib.runtime.mmio_runner import MmioDeviceRunner
from lguestlib.runtime.runner import MmioRunner
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.vhost_user.external import ExternalDevice, ExternalDeviceRunner
from lguestlib.virtio.device import Device
from lguestlib.virtio.mmio import REGION_SIZE

DEVICES_AT = GuestAddress(0xD000_0000)
"""Guest-physical address of the first device's registers; the others follow."""

DEVICES_MAX = 64


class MmioMachine(Machine[MmioRunner]):
    """Base of `lguestlib.runtime.kvm` and `lguestlib.runtime.inprocess`."""

    # Not NOTIFICATION_DATA where a queue's number is matched by KVM: with more beside it each
    # notification would leave the guest.
    transport_features = 0
    """What its devices are offered with beside their own features."""

    def add(self, device: Device) -> MmioRunner:
        """Put *device* on the bus, behind those before it.

        Raises ValueError if the bus is full, or *memory* cannot be shared as the device needs.
        """
        if len(self.runners) == DEVICES_MAX:
            raise ValueError(f"{device.name}: the bus has no room for more than {DEVICES_MAX} devices")
        runner = self._runner(device)
        try:
            self._attach(runner, len(self.runners))
        except BaseException:
            runner.close()
            raise
        self.runners.append(runner)
        return runner

    def _runner(self, device: Device) -> MmioRunner:
        return mmio_runner(
            device, self.memory, self.report, self.tracer, lambda: self._stopping, self._interrupt_fd(),
            self.transport_features,
        )  # fmt: skip

    def address_of(self, slot: int) -> GuestAddress:
        """The guest-physical address of the registers of the device in *slot*."""
        return GuestAddress(DEVICES_AT + slot * REGION_SIZE)

    def access(self, address: int) -> tuple[MmioRunner, int] | None:
        """The device whose registers hold guest-physical *address*, and the offset into them."""
        slot, offset = divmod(address - DEVICES_AT, REGION_SIZE)
        return (self.runners[slot], offset) if 0 <= slot < len(self.runners) else None

    def _interrupt_fd(self) -> int | None:
        """The eventfd that interrupts the guest for the next device; None for one of its own."""
        return None

    @abstractmethod
    def _attach(self, runner: MmioRunner, slot: int) -> None:
        """Connect the device's kicks and interrupt with the guest."""


def mmio_runner(
    device: Device,
    memory: GuestMemory,
    report: Callable[[str], None],
    tracer: Tracer | None,
    give_up: Callable[[], bool],
    interrupt_fd: int | None = None,
    own: int = 0,
) -> MmioRunner:
    """What runs *device* behind virtio-mmio registers, here or in another process; *give_up* as there."""
    if isinstance(device, ExternalDevice):
        return ExternalDeviceRunner(device, memory, report, give_up, interrupt_fd, own)
    return MmioDeviceRunner(device, memory, report, tracer, interrupt_fd, own)
