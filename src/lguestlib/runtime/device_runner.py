"""One device at work: its transport, its kicks, its interrupt, and a thread per queue."""

import threading
from collections.abc import Callable

from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.failure import describe, without_frames
from lguestlib.runtime.gil import meeting_place
from lguestlib.runtime.interrupt import EventfdInterrupt
from lguestlib.runtime.kick import EventfdKick
from lguestlib.runtime.queue_thread import QueueThread
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.transfer_thread import TransferThread
from lguestlib.virtio.device import Device
from lguestlib.virtio.effects import DriverReady, Effect, Notify, QueueReady, QueueStop, Reset
from lguestlib.virtio.errors import VirtioError
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.mmio import MmioTransport
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.status import Status

_FINISH_LOOK_SECONDS = 0.05


class DeviceRunner:
    """Runs *device* on guest *memory* as its driver asks through `transport`.

    Kicks and the interrupt live as long as the runner; threads and rings from
    DRIVER_OK to the next reset.  *report* is given a line for people when the
    device fails.  *interrupt_fd*, if there is one to use, becomes the runner's.
    """

    def __init__(
        self,
        device: Device,
        memory: GuestMemory,
        report: Callable[[str], None],
        tracer: Tracer | None = None,
        interrupt_fd: int | None = None,
    ) -> None:
        self.device = device
        self.transport = MmioTransport(device)
        self.queues = tuple(device.queues())
        self.kicks = [EventfdKick(tracer=tracer) for _ in self.queues]
        self.interrupt = EventfdInterrupt(self.transport.used_buffer, interrupt_fd, tracer)
        self.counters = [QueueCounters() for _ in self.queues]
        self.failure: Exception | None = None
        """What the device failed of, until it is reset."""
        self._memory = memory
        self._report = report
        # What one queue sends out comes back by another's: a ping's echo within the call that sent it.
        self._processor = meeting_place() if any(queue.from_outside for queue in self.queues) else None
        self._threads: dict[int, QueueThread] = {}
        # Held by whoever starts or stops threads, never by a queue's thread.
        self._lock = threading.Lock()
        self._failing = threading.Lock()
        device.on_config_change = self._config_changed

    def read(self, offset: int, size: int) -> bytes:
        """The driver reads *size* bytes of the registers at *offset*."""
        return self.transport.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """The driver writes *data* to the registers at *offset*; done when this returns."""
        effect = self.transport.write(offset, data)
        if effect is not None:
            self._apply(effect)

    def _apply(self, effect: Effect) -> None:
        with self._lock:
            match effect:
                case Notify(index):
                    self.kicks[index].signal()
                case DriverReady(features):
                    try:
                        self.device.activate(features)
                    except Exception as error:
                        self._fail(self.device.name, error)
                    for layout in self.transport.layouts:
                        self._start(layout)
                case QueueReady(layout):
                    if self.transport.status & Status.DRIVER_OK:
                        self._start(layout)
                case QueueStop(index):
                    self._stop([index])
                    self.transport.queue_stopped(index)
                case Reset():
                    self._stop(list(self._threads))
                    self.failure = None
                    try:
                        self.device.deactivate()
                    finally:
                        self.transport.reset_done()

    def _start(self, layout: QueueLayout) -> None:
        if self.failure:
            return
        index = layout.index
        queue = self.queues[index]
        try:
            ring = SplitDeviceQueue(layout, self._memory, self.transport.features)
        except VirtioError as error:
            self._fail(f"{self.device.name} {queue.name}", error)
            return
        kind = TransferThread if queue.transfers else QueueThread
        thread = kind(
            f"{self.device.name} {queue.name}", queue, ring, self.kicks[index], self.interrupt,
            self.counters[index], self._thread_failed, self._processor,
        )  # fmt: skip
        self._threads[index] = thread
        thread.start()
        if self.failure:
            # Another has failed meanwhile, and did not know of this one.
            thread.request_stop()

    def _stop(self, indices: list[int]) -> None:
        threads = [self._threads.pop(index) for index in indices if index in self._threads]
        for thread in threads:
            thread.request_stop()
        for thread in threads:
            thread.stop()

    def _thread_failed(self, thread: QueueThread, error: Exception) -> None:
        self._fail(thread.name, error)

    def _fail(self, where: str, error: Exception) -> None:
        """The device stops working until the driver resets it (virtio 1.3, 2.1.2)."""
        with self._failing:
            if self.failure:
                return
            self.failure = without_frames(error)
        for thread in list(self._threads.values()):
            thread.request_stop()
        self.transport.fail()
        self.interrupt.signal_config()
        self._report(f"{where}: {describe(error)}; the device has stopped until it is reset")

    def _config_changed(self, device: Device) -> None:
        if self.transport.status & Status.DRIVER_OK:
            self.transport.config_changed()
            self.interrupt.signal_config()

    def finish(self, give_up: Callable[[], bool]) -> None:
        """Serve what the driver has made available and then no more; *give_up* is asked now and then.

        Queues whose work comes from outside are none of it.
        """
        with self._lock:
            threads = [
                thread for index, thread in self._threads.items() if not self.queues[index].from_outside
            ]
        for thread in threads:
            thread.request_finish()
        for thread in threads:
            while not thread.join(_FINISH_LOOK_SECONDS) and not give_up():
                continue

    def stop(self) -> None:
        """Stop every queue's thread; what was begun is finished."""
        with self._lock:
            self._stop(list(self._threads))

    def close(self) -> None:
        """Stop, and close the descriptors; the hypervisor has let go of them."""
        self.stop()
        for kick in self.kicks:
            kick.close()
        self.interrupt.close()
