"""A device of a machine's whose queues another process serves: a vhost-user back-end.

Registers and configuration are this process's.  At DRIVER_OK the guest's rings,
its kicks and its interrupt go to the back-end, and nothing here is on their way.
A back-end that dies fails the device; what comes in its place is taken at the
driver's reset, or as soon as it is there.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from lguestlib.abi import virtio_blk as blk
from lguestlib.abi.virtio_ids import VIRTIO_ID_BLOCK
from lguestlib.memory.guest import GuestMemory, MemoryViews
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.failure import describe, without_frames
from lguestlib.runtime.interrupt import EventfdInterrupt
from lguestlib.runtime.kick import EventfdKick
from lguestlib.runtime.naming import name_this_thread
from lguestlib.runtime.vhost_user.frontend import (
    REPLY_SECONDS,
    BackEndError,
    BackEndRefused,
    FrontEnd,
    Happening,
    check_shareable,
    ring_index,
)
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import RING_FEATURES, Device, Queue
from lguestlib.virtio.effects import DriverReady, Effect, Notify, QueueReady, QueueStop, Reset
from lguestlib.virtio.errors import QueueLayoutError
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.mmio import MmioTransport
from lguestlib.virtio.registers import RegisterTransport
from lguestlib.virtio.status import Status
from lguestlib.virtio.vhost_user.frontend import RINGS_MAX

RETRY_SECONDS = 1.0
"""How long between two attempts to reach a back-end that the driver is waiting for."""

_FINISH_LOOK_SECONDS = 0.01
_DEVICE_FEATURES = (1 << 24) - 1 | (1 << 64) - (1 << 50)
"""The feature bits that are the device type's, and no matter of the transport (virtio 1.3, 2.2)."""


class ExternalDevice(Device):
    """The device of the back-end that listens at *path*, over all its connections.

    Raises BackEndError where there is none that can be used.
    """

    config_sizes: tuple[int, ...] = ()
    """Bytes of config space to ask for, of which the first that is not refused counts."""

    def __init__(self, path: str, name: str) -> None:
        super().__init__(name)
        self.path = path
        self.front_end: FrontEnd | None = None
        """The conversation, while there is one."""
        self._config = b""
        self._config_known = True
        self._offered = 0
        self._queue_names: tuple[str, ...] = ()
        self.connect(lambda: False)

    @property
    def features(self) -> int:
        return self._offered & _DEVICE_FEATURES

    @property
    def offered(self) -> int:
        return self._offered & ~self.withheld

    def queues(self) -> tuple[Queue, ...]:
        return tuple(Queue(name, _served_elsewhere) for name in self._queue_names)

    def config(self) -> bytes:
        front_end = self.front_end
        if front_end and not self._config_known:
            # Before the question: a change after it is asked for again.
            self._config_known = True
            try:
                self._config = self._read_config(front_end)
            except BackEndError:
                # What was known last is the best there is.
                return self._config
        return self._config

    def write_config(self, offset: int, data: bytes) -> None:
        if self.front_end and offset + len(data) <= len(self._config):
            try:
                self.front_end.write_config(offset, data)
            except BackEndError:
                # A field that is not to be written; or the end of the conversation, which others see to.
                return
            self.config_changed()

    def config_changed(self) -> None:
        """The config space is to be asked for when the driver reads it next."""
        self._config_known = False

    def connect(self, give_up: Callable[[], bool]) -> FrontEnd:
        """Begin a conversation, or another one.  Raises BackEndError, also for another device than before."""
        front_end = FrontEnd.connect(self.path, REPLY_SECONDS, give_up, channel=True)
        try:
            if not front_end.features & Feature.VERSION_1:
                raise BackEndError(self.path, "it does not offer VERSION_1, and is too old for this")
            config = self._read_config(front_end)
            offered, names = self.shape(front_end, config)
            if not self._queue_names:
                self._offered, self._queue_names = offered, names
            elif self._offered & ~offered or len(names) < len(self._queue_names):
                raise BackEndError(self.path, "the back-end there has less to offer than the one before")
        except BaseException:
            front_end.close()
            raise
        self._config, self._config_known = config, True
        self.front_end = front_end
        return front_end

    def shape(self, front_end: FrontEnd, config: bytes) -> tuple[int, tuple[str, ...]]:
        """The features to offer, and the names of the queues."""
        return front_end.features & (_DEVICE_FEATURES | RING_FEATURES | Feature.RING_RESET), ("requests",)

    def _read_config(self, front_end: FrontEnd) -> bytes:
        if not self.config_sizes:
            return b""
        *larger, least = self.config_sizes
        for size in larger:
            with suppress(BackEndRefused):
                return front_end.config(0, size)
        return front_end.config(0, least)

    def close(self) -> None:
        """End the conversation."""
        if self.front_end:
            self.front_end.close()
            self.front_end = None


class ExternalDisk(ExternalDevice):
    """A disk, with as many queues as its back-end has."""

    device_type = VIRTIO_ID_BLOCK
    config_sizes = (60, 36)
    """Up to the discard and write-zeroes fields, as most front-ends ask; up to *num_queues*."""

    def shape(self, front_end: FrontEnd, config: bytes) -> tuple[int, tuple[str, ...]]:
        features, names = super().shape(front_end, config)
        whole = len(bytes(blk.virtio_blk_config()))
        fields = blk.virtio_blk_config.from_buffer_copy(config.ljust(whole, b"\0"))
        features &= ~(1 << blk.VIRTIO_BLK_F_SECURE_ERASE)
        if len(config) < self.config_sizes[0]:
            features &= ~(1 << blk.VIRTIO_BLK_F_DISCARD | 1 << blk.VIRTIO_BLK_F_WRITE_ZEROES)
        if not features >> blk.VIRTIO_BLK_F_MQ & 1:
            return features, names
        if not 0 < fields.num_queues <= min(front_end.rings_max or 1, RINGS_MAX):
            return features & ~(1 << blk.VIRTIO_BLK_F_MQ), names
        return features, tuple(f"requests{index}" for index in range(fields.num_queues))


def _served_elsewhere(chain: Chain) -> int:
    """The back-end does."""
    raise NotImplementedError(f"chain {chain.head} is the back-end's to serve")


class ExternalRunner:
    """Has *device*'s queues served on guest *memory* as its driver asks through a *transport*.

    *calls* are the eventfds that interrupt for each queue, which stay their owner's;
    *signal_config* interrupts for the config space.  *give_up* is asked whether to wait
    no longer for the back-end.  Otherwise as `DeviceRunner`.  Raises ValueError for
    memory that cannot be shared.
    """

    def __init__(
        self,
        device: ExternalDevice,
        transport: RegisterTransport,
        memory: GuestMemory,
        calls: Sequence[int],
        signal_config: Callable[[], None],
        report: Callable[[str], None],
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        check_shareable(memory)
        self.device = device
        self.queues = device.queues()
        self._transport = transport
        self._calls = calls
        self._signal_config = signal_config
        self.kicks = [EventfdKick() for _ in self.queues]
        self.counters: tuple[QueueCounters, ...] = ()
        """None: the queues' work is not seen here."""
        self.failure: Exception | None = None
        self._memory = memory
        self._report = report
        self._give_up = give_up
        self._running: dict[int, QueueLayout] = {}
        self._closing = threading.Event()
        self._retrying = False
        self._next_attempt = 0.0
        self._last_attempt = ""
        self._threads: list[threading.Thread] = []
        # Held by whoever starts or stops queues, and by whoever has found the back-end gone.
        self._lock = threading.Lock()
        if device.front_end:
            device.front_end.give_up = self._hurried
            self._watch(device.front_end)

    def apply(self, effect: Effect) -> None:
        """Do what the driver has asked for; done when this returns."""
        with self._lock:
            match effect:
                case Notify(index):
                    self.kicks[index].signal()
                case DriverReady():
                    self._start_all()
                case QueueReady(layout):
                    if self._transport.status & Status.DRIVER_OK:
                        self._start([layout])
                case QueueStop(index):
                    self._stop([index])
                    self._transport.queue_stopped(index)
                case Reset():
                    self._reset()
                    self._transport.reset_done()

    def _start_all(self) -> None:
        try:
            front_end = self._reach()
            front_end.share(self._memory, self._transport.features & self.device.offered)
        except BackEndError as error:
            self._unreachable(error)
            return
        self._start(self._transport.layouts)

    def _start(self, layouts: list[QueueLayout]) -> None:
        front_end = self.device.front_end
        if self.failure or not front_end:
            return
        try:
            for layout in layouts:
                front_end.start_queue(layout, self.kicks[layout.index].fd, self._calls[layout.index])
                self._running[layout.index] = layout
                # Not every back-end looks at a ring before its first kick (T8).
                self.kicks[layout.index].signal()
        except QueueLayoutError as error:
            self._fail(error)
        except BackEndError as error:
            self._lost(front_end, error)

    def _stop(self, indices: list[int]) -> None:
        front_end = self.device.front_end
        try:
            for index in indices:
                layout = self._running.pop(index, None)
                if layout and front_end:
                    # What a device that has failed has not served it never will.
                    finish = not self.failure and not self.queues[index].from_outside
                    front_end.stop_queue(layout, finish)
        except BackEndError as error:
            if front_end:
                self._lost(front_end, error)

    def _reset(self) -> None:
        self._stop(list(self._running))
        self.failure = None
        try:
            self._reach().reset()
        except BackEndError as error:
            # What is needed for DRIVER_OK is asked for again there.
            if self.device.front_end:
                self._lost(self.device.front_end, error)
            self.failure = None

    def _reach(self) -> FrontEnd:
        """The conversation, or another one: not sooner after the last attempt than a retry would be."""
        if self.device.front_end:
            return self.device.front_end
        # One that goes as soon as it has come would keep the guest, and who reads the reports, busy.
        if time.monotonic() < self._next_attempt:
            raise BackEndError(self.device.path, self._last_attempt)
        return self._connect()

    def _connect(self) -> FrontEnd:
        self._last_attempt = "the back-end has not stayed"
        try:
            front_end = self.device.connect(self._hurried)
        except BackEndError as error:
            self._last_attempt = error.reason
            raise
        finally:
            self._next_attempt = time.monotonic() + RETRY_SECONDS
        self._watch(front_end)
        return front_end

    def _hurried(self) -> bool:
        return self._closing.is_set() or self._give_up()

    def _fail(self, error: Exception) -> None:
        """The device stops working until the driver resets it (virtio 1.3, 2.1.2)."""
        if self.failure:
            return
        self.failure = without_frames(error)
        self._transport.fail()
        self._signal_config()
        self._report(f"{self.device.name}: {describe(error)}; the device has stopped until it is reset")

    def _lost(self, front_end: FrontEnd, error: BackEndError) -> None:
        """The conversation in *front_end* has come to its end, unless that was known."""
        if self.device.front_end is not front_end:
            return
        self.device.front_end = None
        self._running.clear()
        # Its own thread wakes by that, and closes it.
        front_end.end()
        if not self._hurried():
            self._fail(error)

    def _unreachable(self, error: BackEndError) -> None:
        """The driver is live and the back-end is not: its requests wait until that is there."""
        if self.device.front_end:
            self._lost(self.device.front_end, error)
        elif not self._retrying:
            self._retrying = True
            self._report(f"{self.device.name}: {error}; trying again every {RETRY_SECONDS:g} s")
            self._begin(self._retry, "retry")

    def _retry(self) -> None:
        while not self._closing.wait(RETRY_SECONDS):
            with self._lock:
                wanted = self._transport.status & Status.DRIVER_OK and not self.failure
                if not wanted or self._closing.is_set():
                    self._retrying = False
                    return
                try:
                    self._connect()
                except BackEndError:
                    continue
                self._retrying = False
                self._report(f"{self.device.name}: {self.device.path}: the back-end is there")
                self._start_all()
            self._config_changed()
            return

    def _watch(self, front_end: FrontEnd) -> None:
        self._begin(lambda: self._follow(front_end), "back-end")

    def _begin(self, run: Callable[[], None], name: str) -> None:
        def named() -> None:
            name_this_thread(f"{self.device.name} {name}")
            run()

        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=named, name=f"{self.device.name} {name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _follow(self, front_end: FrontEnd) -> None:
        """See to what the back-end tells of itself, and to its end.

        Nothing is asked of it here: it may be waiting for an answer itself (T19).
        """
        while True:
            match front_end.wait():
                case Happening.CONFIG_CHANGED:
                    self._config_changed()
                case Happening.FAILED:
                    with self._lock:
                        if self.device.front_end is front_end and self._running:
                            reason = "the back-end says that the device has failed"
                            self._fail(BackEndError(self.device.path, reason))
                case Happening.GONE:
                    with self._lock:
                        self._lost(front_end, BackEndError(self.device.path, "the back-end has gone"))
                    front_end.close()
                    return
                case Happening.WOKEN:
                    if self._closing.is_set():
                        return

    def _config_changed(self) -> None:
        self.device.config_changed()
        if self._transport.status & Status.DRIVER_OK:
            self._transport.config_changed()
            self._signal_config()

    def finish(self, give_up: Callable[[], bool]) -> None:
        """Let the back-end serve what the driver has made available; *give_up* is asked now and then."""
        with self._memory.views() as views:
            while not self._idle(views):
                if give_up():
                    return
                time.sleep(_FINISH_LOOK_SECONDS)
        self.stop()

    def _idle(self, views: MemoryViews) -> bool:
        with self._lock:
            running = list(self._running.values())
        return all(
            self.queues[layout.index].from_outside
            or ring_index(views, layout.available) == ring_index(views, layout.used)
            for layout in running
        )

    def stop(self) -> None:
        """Stop every queue; what was begun is finished."""
        with self._lock:
            self._stop(list(self._running))

    def close(self) -> None:
        """Stop, and close the descriptors; the hypervisor has let go of them.

        The conversation stays the device's.
        """
        self.stop()
        self._closing.set()
        with self._lock:
            # Those that a retry has started meanwhile.
            self._stop(list(self._running))
            threads = self._threads
            if self.device.front_end:
                self.device.front_end.wake()
        for thread in threads:
            thread.join()
        for kick in self.kicks:
            kick.close()


class ExternalDeviceRunner(ExternalRunner):
    """That behind virtio-mmio registers, as `MmioDeviceRunner` with one interrupt for all queues."""

    def __init__(
        self,
        device: ExternalDevice,
        memory: GuestMemory,
        report: Callable[[str], None],
        give_up: Callable[[], bool] = lambda: False,
        interrupt_fd: int | None = None,
        own: int = 0,
    ) -> None:
        self.transport = MmioTransport(device, note=False, own=own)
        self.interrupt = EventfdInterrupt(self.transport.used_buffer, interrupt_fd)
        calls = [self.interrupt.fd] * len(device.queues())
        try:
            super().__init__(
                device, self.transport, memory, calls, self.interrupt.signal_config, report, give_up
            )
        except BaseException:
            self.interrupt.close()
            raise

    def read(self, offset: int, size: int) -> bytes:
        """The driver reads *size* bytes of the registers at *offset*."""
        return self.transport.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """The driver writes *data* to the registers at *offset*; done when this returns."""
        effect = self.transport.write(offset, data)
        if effect is not None:
            self.apply(effect)

    def close(self) -> None:
        super().close()
        self.interrupt.close()
