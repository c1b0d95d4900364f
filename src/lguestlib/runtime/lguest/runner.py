"""A device at work on lguest's bus: an eventfd and an interrupt for each queue."""

import errno
from collections.abc import Callable

from lguestlib.abi.lguest import eventfd_request, irq_request
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.device_runner import DeviceRunner
from lguestlib.runtime.failure import describe
from lguestlib.runtime.lguest.file import LguestFile
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.device import Device
from lguestlib.virtio.effects import DriverReady, Effect
from lguestlib.virtio.lguest import LguestTransport


class LguestInterrupt:
    """The guest's interrupt *irq*, by LHREQ_IRQ."""

    def __init__(self, file: LguestFile, irq: int, tracer: Tracer | None = None) -> None:
        self._write = file.write
        self._request = irq_request(irq)
        self.tracer = tracer

    def signal(self) -> None:
        try:
            if self.tracer is None:
                self._write(self._request)
            else:
                self.tracer.traced("write", "interrupt", self._write, self._request)
        except OSError as error:
            # The guest is dead, and its requests are seen through.
            if error.errno != errno.ENOENT:
                raise

    def unblock(self) -> None:
        """Nothing sleeps in it."""


class LguestDeviceRunner(DeviceRunner):
    """Runs the device of *transport* in the guest of *file*.

    Its kicks are the driver's once it has been started: an eventfd that is attached to
    an address stays so, and is that queue's over all resets.
    """

    def __init__(
        self,
        transport: LguestTransport,
        file: LguestFile,
        memory: GuestMemory,
        report: Callable[[str], None],
        tracer: Tracer | None = None,
    ) -> None:
        self.transport = transport
        self._file = file
        self._attached = False
        interrupts = [LguestInterrupt(file, irq, tracer) for irq in transport.irqs]
        super().__init__(transport.device, transport, memory, interrupts, report, tracer)
        transport.device.on_config_change = self._config_changed

    def apply(self, effect: Effect) -> None:
        super().apply(effect)
        if isinstance(effect, DriverReady) and not self._attached:
            self._attach()

    def _attach(self) -> None:
        """Have the kernel give the driver's notifications to the queues' threads, from the next entry on."""
        self._attached = True
        try:
            for layout, kick in zip(self.transport.layouts, self.kicks):
                self._file.write(eventfd_request(layout.descriptors, kick.fd))
        except OSError as error:
            # Notifications still come, by the thread that runs the guest.
            self._report(f"{self.device.name}: {describe(error)}; its queues are slow")

    def _config_changed(self, device: Device) -> None:
        self.transport.config_changed()
