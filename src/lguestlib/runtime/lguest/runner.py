"""A device at work on lguest's bus: an eventfd and an interrupt for each queue."""

import errno
import threading
from collections.abc import Callable

from lguestlib.abi.lguest import eventfd_request, irq_request
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.device_runner import DeviceRunner
from lguestlib.runtime.failure import describe
from lguestlib.runtime.lguest.file import LguestFile
from lguestlib.runtime.lguest.first_kick import FirstKick
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.device import Device
from lguestlib.virtio.effects import DriverNear, DriverReady, Effect
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
        self._first_kick: FirstKick | None = None
        interrupts = [LguestInterrupt(file, irq, tracer) for irq in transport.irqs]
        super().__init__(transport.device, transport, memory, interrupts, report, tracer)
        transport.device.on_config_change = self._config_changed

    @property
    def first_kick(self) -> bool:
        """Whether a kick has come of a driver that has not said yet that it is ready."""
        return self._first_kick is not None and self._first_kick.came

    def apply(self, effect: Effect) -> None:
        """Do what the driver has asked for, on the thread that runs the guest; done when this returns."""
        self._end_wait()
        super().apply(effect)
        if isinstance(effect, DriverReady) and not self._attached:
            self._attach()
        if isinstance(effect, DriverNear) and self._attached:
            for kick in self.kicks:
                # From when its threads were stopped.
                kick.clear()
            self._first_kick = FirstKick(self.kicks, threading.current_thread())

    def _end_wait(self) -> None:
        if self._first_kick is not None:
            self._first_kick.end()
            self._first_kick = None

    def stop(self) -> None:
        self._end_wait()
        super().stop()

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
