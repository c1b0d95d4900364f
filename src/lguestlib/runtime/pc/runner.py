"""A device at work behind a PCI function: here, or in another process."""

from collections.abc import Callable

from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.device_runner import DeviceRunner
from lguestlib.runtime.pc.registers import PciRegisters
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.vhost_user.external import ExternalDevice, ExternalRunner
from lguestlib.runtime.vhost_user.frontend import BackEndError
from lguestlib.virtio.device import Device
from lguestlib.virtio.effects import DriverReady, Effect


class PciDeviceRunner(DeviceRunner):
    """Runs *device* on guest *memory* as its driver asks through the *registers*, which become the runner's."""

    def __init__(
        self,
        device: Device,
        registers: PciRegisters,
        memory: GuestMemory,
        report: Callable[[str], None],
        tracer: Tracer | None = None,
    ) -> None:
        self.registers = registers
        super().__init__(device, registers.function.transport, memory, registers.interrupts, report, tracer)
        registers.connect(self.kicks, self.apply)
        device.on_config_change = lambda device: registers.config_changed()

    def _interrupt_for_failure(self) -> None:
        self.registers.config_interrupt.signal()

    def close(self) -> None:
        super().close()
        self.registers.close()


class ExternalPciRunner(ExternalRunner):
    """Has another process serve *device*, which interrupts by messages alone.  Otherwise as `PciDeviceRunner`."""

    def __init__(
        self,
        device: ExternalDevice,
        registers: PciRegisters,
        memory: GuestMemory,
        report: Callable[[str], None],
        give_up: Callable[[], bool],
    ) -> None:
        self.registers = registers
        calls = [interrupt.fd for interrupt in registers.interrupts]
        signal_config = registers.config_interrupt.signal
        super().__init__(device, registers.function.transport, memory, calls, signal_config, report, give_up)
        registers.connect(self.kicks, self.apply)

    def apply(self, effect: Effect) -> None:
        """Do what the driver has asked for; done when this returns."""
        if isinstance(effect, DriverReady) and not self.registers.function.msix.enabled:
            with self._lock:
                self._fail(BackEndError(self.device.path, "its driver does without MSI-X (pci=nomsi?)"))
        super().apply(effect)

    def close(self) -> None:
        super().close()
        self.registers.close()
