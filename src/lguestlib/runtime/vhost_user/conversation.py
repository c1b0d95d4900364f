"""One front-end's connection: its messages on one thread, its rings served by others."""

import os
import socket
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from lguestlib.abi import memfd, uio
from lguestlib.abi import vhost_user as abi
from lguestlib.abi.eventfd import SIGNAL, is_eventfd
from lguestlib.memory.mapping import MappingLost
from lguestlib.runtime.failure import describe
from lguestlib.runtime.interrupt import has_room
from lguestlib.runtime.vhost_user.rings import Rings, RingsLost, ServedRing
from lguestlib.runtime.vhost_user.stream import MessageStream, close_all
from lguestlib.virtio.device import Device, Queue
from lguestlib.virtio.errors import VirtioError
from lguestlib.virtio.vhost_user.backend import (
    LOG_ALL,
    PROTOCOL_FEATURES,
    Arrange,
    BackEnd,
    Effect,
    MapInflight,
    MapLog,
    MapMemory,
    NewInflight,
    QueueSetup,
    Reset,
    StopQueue,
)
from lguestlib.virtio.vhost_user.message import Message, ProtocolError

_INTERRUPTS = (abi.VHOST_USER_SET_VRING_CALL, abi.VHOST_USER_SET_VRING_ERR)


@dataclass
class _Served:
    """A ring that is served, as it was set up."""

    setup: QueueSetup
    ring: ServedRing


class Conversation:
    """Serves *device* to the front-end on *stream*, from its first message to its last.

    *queues* are the device's, and *rings* has them served.  *report* is given
    lines for people.  With *on_failure* a failure is its to tell people of: it is
    given the reason, on whatever thread.
    """

    def __init__(
        self,
        device: Device,
        queues: Sequence[Queue],
        rings: Rings,
        stream: MessageStream,
        report: Callable[[str], None],
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self._device = device
        self._queues = queues
        self._rings = rings
        self._stream = stream
        self._report = report
        self._on_failure = on_failure or self._report_failure
        self._backend = BackEnd(device)
        self._served: dict[int, _Served] = {}
        self._ending = False
        self._active = False
        self._failed = False
        # Held by whoever lets the device fail, and by whoever closes descriptors that are used for it.
        self._lock = threading.Lock()
        # Held for a moment by whoever sends on the channel or replaces it.
        self._channel_lock = threading.Lock()
        self._channel: MessageStream | None = None
        self._channel_fd = -1

    def run(self) -> None:
        """Answer messages until there are no more, or one that breaks the protocol; then give everything back."""
        self._device.on_config_change = self._config_changed
        try:
            self._rings.open(self.end)
            while (message := self._stream.receive()) is not None:
                self._handle(message)
        except (ConnectionError, RingsLost):
            # It is gone without waiting for its last answer, or has been told of.
            pass
        except Exception as error:
            if not self._ending:
                self._cut_off(error)
        finally:
            self._close()
            if self._rings.loss:
                self._on_loss(self._rings.loss)

    def _on_loss(self, loss: MappingLost) -> None:
        if self._on_failure == self._report_failure:
            self._cut_off(loss)
        else:
            self._on_failure(f"{self._device.name}: {describe(loss)}")

    def _cut_off(self, error: Exception) -> None:
        self._report(f"{self._device.name}: the front-end is cut off: {describe(error)}")

    def end(self) -> None:
        """Make `run` return soon; any thread may call this."""
        self._ending = True
        self._stream.end()

    def _handle(self, message: Message) -> None:
        backend = self._backend
        result, failure = 0, None
        effect = backend.receive(message)
        for fd in message.fds:
            self._check(message, fd)
        if effect is not None:
            try:
                result = self._apply(effect, message)
            except (OSError, ValueError) as error:
                failure = error
        discarded, backend.discarded = backend.discarded, []
        with self._lock:
            close_all(discarded)
        self._follow_channel()
        reply = backend.finish(result, failure)
        if reply is not None:
            try:
                self._stream.send(reply)
            finally:
                close_all(reply.fds)

    @staticmethod
    def _check(message: Message, fd: int) -> None:
        """Raise ProtocolError unless *fd* is of the kind that *message* is to bring."""
        if message.request == abi.VHOST_USER_SET_VRING_KICK:
            # One sleeps in a read of it.
            good, wanted = is_eventfd(fd), "an eventfd"
        elif message.request in _INTERRUPTS:
            # User-mode Linux has a pair of sockets.
            kind = os.fstat(fd).st_mode
            good = is_eventfd(fd) or stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)
            wanted = "an eventfd, a pipe or a socket"
        elif message.request == abi.VHOST_USER_SET_BACKEND_REQ_FD:
            good, wanted = stat.S_ISSOCK(os.fstat(fd).st_mode), "a socket"
        else:
            return
        if not good:
            raise ProtocolError(f"{message.name}: the descriptor is not {wanted}")

    def _apply(self, effect: Effect, message: Message) -> int:
        match effect:
            case MapMemory() | MapLog():
                self._rings.take(effect, message)
                self._arrange_served()
                self._rings.let_go()
            case MapInflight():
                self._rings.take(effect, message)
            case Arrange(indices):
                for index in indices:
                    self._arrange(index)
            case StopQueue(index):
                self._stop_queue(index)
            case Reset():
                self._stop_all()
                self._recovered()
                self._deactivate()
                self._rings.forget_inflight()
            case NewInflight(length):
                return memfd.memfd("vhost-user-inflight", length)
        return 0

    def _arrange_served(self) -> None:
        for index in list(self._served):
            self._arrange(index)

    def _arrange(self, index: int) -> None:
        """Make ring *index* as its setup says; where the device has failed, stop it."""
        served = self._served.get(index)
        setup = None
        try:
            setup = self._backend.setup(index)
            if setup is None or self._failed:
                pass
            elif served is None:
                self._start(index, setup)
            elif setup != served.setup:
                before, served.setup = served.setup, setup
                served.ring.exchange(before, setup)
        except VirtioError as error:
            self._fail(index, f"{self._name(index)}: {describe(error)}")
        if setup is None or self._failed:
            # Whatever it has used is let go of, since it may go now.
            self._stop_ring(index)

    def _start(self, index: int, setup: QueueSetup) -> None:
        if not self._active:
            try:
                self._device.activate(setup.features & ~(LOG_ALL | PROTOCOL_FEATURES))
            except Exception as error:
                self._fail(index, f"{self._device.name}: {describe(error)}")
                return
            self._active = True
        ring = self._rings.start(index, setup, lambda reason: self._fail(index, reason))
        self._served[index] = _Served(setup, ring)

    def _name(self, index: int) -> str:
        return f"{self._device.name} {self._queues[index].name}"

    def _stop_queue(self, index: int) -> None:
        self._stop_ring(index)
        if self._backend.idle:
            self._recovered()
            self._deactivate()

    def _stop_ring(self, index: int) -> None:
        served = self._served.pop(index, None)
        if served:
            self._backend.stopped(index, served.ring.stop())

    def _stop_all(self) -> None:
        for served in self._served.values():
            served.ring.request_stop()
        while self._served:
            self._served.popitem()[1].ring.stop()

    def _fail(self, index: int, reason: str) -> None:
        """Ring *index* stops the device, until it is reset, or all its rings have been stopped."""
        with self._lock:
            if self._failed or self._rings.loss:
                # What is found wrong in memory that has gone is no news.
                return
            self._failed = self._backend.failed = True
            for served in list(self._served.values()):
                served.ring.request_stop()
            told = self._backend.rings[index].error
            if told >= 0 and has_room(told):
                # It may be a pipe that nobody reads any more.
                with suppress(OSError):
                    uio.write(told, SIGNAL)
        self._on_failure(reason)

    def _report_failure(self, reason: str) -> None:
        self._report(f"{reason}; the device has stopped until it is reset")

    def _recovered(self) -> None:
        self._failed = self._backend.failed = False

    def _deactivate(self) -> None:
        if self._active:
            self._active = False
            try:
                self._device.deactivate()
            except Exception as error:
                self._report(f"{self._device.name}: {describe(error)}")

    def _follow_channel(self) -> None:
        """Have the channel for requests of our own that the front-end has given last."""
        fd = self._backend.channel
        if fd == self._channel_fd:
            return
        with self._channel_lock:
            if self._channel:
                self._channel.close()
            self._channel_fd = fd
            self._channel = MessageStream(socket.socket(fileno=os.dup(fd))) if fd >= 0 else None

    def _config_changed(self, device: Device) -> None:
        message = self._backend.config_change()
        with self._channel_lock:
            if message is not None and self._channel:
                # Without waiting for a front-end that does not read: who has not read the last one is told.
                with suppress(OSError):
                    self._channel.send(message, socket.MSG_DONTWAIT)

    def _close(self) -> None:
        self._device.on_config_change = lambda device: None
        # From the last to the first, whatever one of them raises.
        with ExitStack() as closing:
            closing.callback(self._stream.close)
            # Others may have the socket open, too.
            closing.callback(self._stream.end)
            closing.callback(self._deactivate)
            closing.callback(self._follow_channel)
            closing.callback(lambda: close_all(self._backend.close()))
            closing.callback(self._rings.close)
            with suppress(RingsLost):
                self._stop_all()
