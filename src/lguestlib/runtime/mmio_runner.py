"""A device at work behind virtio-mmio registers."""

from collections.abc import Callable

from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.device_runner import DeviceRunner
from lguestlib.runtime.interrupt import EventfdInterrupt
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.device import Device
from lguestlib.virtio.mmio import MmioTransport
from lguestlib.virtio.status import Status


class MmioDeviceRunner(DeviceRunner):
    """Runs *device* on guest *memory* as its driver asks through the registers of `transport`.

    It has one interrupt for all queues: through *interrupt_fd*, if there is one to use,
    which becomes the runner's.  *own* features are the transport's.
    """

    def __init__(
        self,
        device: Device,
        memory: GuestMemory,
        report: Callable[[str], None],
        tracer: Tracer | None = None,
        interrupt_fd: int | None = None,
        own: int = 0,
    ) -> None:
        self.transport = MmioTransport(device, own=own)
        self.interrupt = EventfdInterrupt(self.transport.used_buffer, interrupt_fd, tracer)
        interrupts = [self.interrupt] * len(device.queues())
        super().__init__(device, self.transport, memory, interrupts, report, tracer)
        device.on_config_change = self._config_changed

    def read(self, offset: int, size: int) -> bytes:
        """The driver reads *size* bytes of the registers at *offset*."""
        return self.transport.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """The driver writes *data* to the registers at *offset*; done when this returns."""
        effect = self.transport.write(offset, data)
        if effect is not None:
            self.apply(effect)

    def _interrupt_for_failure(self) -> None:
        self.interrupt.signal_config()

    def _config_changed(self, device: Device) -> None:
        if self.transport.status & Status.DRIVER_OK:
            self.transport.config_changed()
            self.interrupt.signal_config()

    def close(self) -> None:
        super().close()
        self.interrupt.close()
