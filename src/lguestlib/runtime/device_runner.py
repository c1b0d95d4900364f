"""One device at work, whatever its transport: its kicks, its interrupts, and a thread per queue."""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.failure import describe, without_frames
from lguestlib.runtime.gil import meeting_place
from lguestlib.runtime.interrupt import Interrupt
from lguestlib.runtime.kick import EventfdKick
from lguestlib.runtime.queue_thread import QueueThread
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.transfer_thread import TransferThread
from lguestlib.virtio.device import Device
from lguestlib.virtio.device_queue import new_device_queue
from lguestlib.virtio.effects import (
    DriverFailed,
    DriverNear,
    DriverReady,
    Effect,
    Notify,
    QueueReady,
    QueueStop,
    Reset,
)
from lguestlib.virtio.errors import VirtioError
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.status import Status

_FINISH_LOOK_SECONDS = 0.05


class Transport(Protocol):
    """What a runner knows of the model of its device's transport."""

    @property
    def status(self) -> Status:
        """The device status field."""

    @property
    def features(self) -> int:
        """The features negotiated."""

    @property
    def layouts(self) -> Sequence[QueueLayout]:
        """The layouts of the ready queues."""

    def reset_done(self) -> None:
        """Every queue has stopped."""

    def queue_stopped(self, index: int) -> None:
        """Queue *index* no longer touches its ring."""

    def fail(self) -> None:
        """The device has failed: only a reset helps it."""


class DeviceRunner:
    """Runs *device* on guest *memory* as its driver asks through a *transport*, each queue with its interrupt.

    Kicks and interrupts live as long as the runner; threads and rings from the
    driver's start of the device to the next reset.  *report* is given a line for people
    when the device fails.
    """

    def __init__(
        self,
        device: Device,
        transport: Transport,
        memory: GuestMemory,
        interrupts: Sequence[Interrupt],
        report: Callable[[str], None],
        tracer: Tracer | None = None,
    ) -> None:
        self.device = device
        self.queues = tuple(device.queues())
        self.kicks = [EventfdKick(tracer=tracer) for _ in self.queues]
        self.counters = [QueueCounters() for _ in self.queues]
        self.failure: Exception | None = None
        """What the device failed of, until it is reset."""
        self._transport = transport
        self._memory = memory
        self._interrupts = interrupts
        self._report = report
        # What one queue sends out comes back by another's: a ping's echo within the call that sent it.
        meet = any(queue.from_outside for queue in self.queues)
        self._processors = [meeting_place(queue.party) if meet else None for queue in self.queues]
        self._threads: dict[int, QueueThread] = {}
        # Held by whoever starts or stops threads, never by a queue's thread.
        self._lock = threading.Lock()
        self._failing = threading.Lock()

    def apply(self, effect: Effect) -> None:
        """Do what the driver has asked for; done when this returns."""
        transport = self._transport
        with self._lock:
            match effect:
                case Notify(index):
                    self.kicks[index].signal()
                case DriverReady(features):
                    try:
                        self.device.activate(features)
                    except Exception as error:
                        self._fail(self.device.name, error)
                    for layout in transport.layouts:
                        self._start(layout)
                case DriverNear():
                    pass
                case QueueReady(layout):
                    if transport.status & Status.DRIVER_OK:
                        self._start(layout)
                case QueueStop(index):
                    self._stop([index])
                    transport.queue_stopped(index)
                case Reset() | DriverFailed():
                    self._stop(list(self._threads))
                    self.failure = None
                    try:
                        self.device.deactivate()
                    finally:
                        transport.reset_done()
        if effect == DriverFailed():
            self._report(f"{self.device.name}: its driver has given it up")

    def _interrupt_for_failure(self) -> None:
        """Interrupt a driver that is to look at the device's status."""

    def _start(self, layout: QueueLayout) -> None:
        if self.failure:
            return
        index = layout.index
        queue = self.queues[index]
        try:
            ring = new_device_queue(layout, self._memory, self._transport.features)
        except VirtioError as error:
            self._fail(f"{self.device.name} {queue.name}", error)
            return
        kind = TransferThread if queue.transfers else QueueThread
        thread = kind(
            f"{self.device.name} {queue.name}", queue, ring, self.kicks[index], self._interrupts[index],
            self.counters[index], self._thread_failed, self._processors[index],
        )  # fmt: skip
        try:
            thread.start()
        except Exception as error:
            # There may be no more threads.
            ring.release()
            self._fail(thread.name, error)
            return
        self._threads[index] = thread
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
        self._transport.fail()
        self._interrupt_for_failure()
        self._report(f"{where}: {describe(error)}; the device has stopped until it is reset")

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
