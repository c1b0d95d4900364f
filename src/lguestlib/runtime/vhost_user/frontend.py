"""A front-end for anybody's vhost-user back-end: its device, to be driven from this process.

Whoever has a guest, or is one, shares its memory and hands over two eventfds for
each ring.  Then ring, kicks and interrupts are the back-end's and the driver's,
and what is here sleeps until something is asked, or has happened.
"""

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Self, TypeVar

from lguestlib.abi import vhost_user as abi
from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd
from lguestlib.memory.address import GuestAddress, UserAddress
from lguestlib.memory.guest import GuestMemory, MemoryViews
from lguestlib.runtime.vhost_user.stream import MessageStream, close_all
from lguestlib.virtio.errors import VirtioError
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.vhost_user.frontend import (
    PROTOCOL_FEATURES,
    Request,
    RequestRefused,
    Requests,
)
from lguestlib.virtio.vhost_user.memory_table import MemoryRegion, RingAddresses
from lguestlib.virtio.vhost_user.message import FDS_MAX, Message, ProtocolError

REPLY_SECONDS = 5.0
"""How long a reply may take, unless told otherwise; a queue that is stopped may have slow work to finish."""

_LOOK_SECONDS = 0.05
_PARTS_MAX = 64
"""Pieces of one message: it comes in two as a rule, and is not to come byte by byte for ever."""
_MEMORY_LOOK_SECONDS = 0.001

Answer = TypeVar("Answer")


class BackEndError(VirtioError):
    """The back-end at *path* is not there, not one, does not answer or has gone; the message is one line."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class BackEndRefused(BackEndError):
    """The back-end has said no to one request, and is there still."""


class Happening(Enum):
    """What `FrontEnd.wait` has woken for."""

    CONFIG_CHANGED = "the config space has changed"
    FAILED = "a ring, or the device, has failed"
    GONE = "the connection has ended"
    WOKEN = "somebody in this process wanted it"


class _PatientStream(MessageStream):
    """A stream that takes so many *seconds* to send or to receive, or less when *give_up* says so."""

    def __init__(self, connection: socket.socket, seconds: float, give_up: Callable[[], bool]) -> None:
        super().__init__(connection)
        self.fd = connection.fileno()
        self._seconds = seconds
        self._give_up = give_up
        self._deadline = 0.0
        self._parts = 0
        connection.settimeout(seconds)

    def receive(self) -> Message | None:
        """The next message; also raises TimeoutError."""
        self._deadline = time.monotonic() + self._seconds
        self._parts = 0
        return super().receive()

    def _receive_part(self, size: int) -> tuple[bytes, list[int]]:
        waiting = select.poll()
        waiting.register(self.fd, select.POLLIN)
        # Not when the time is over and something there: this process may have been stopped meanwhile.
        while not waiting.poll(_LOOK_SECONDS * 1000):
            if time.monotonic() >= self._deadline or self._give_up():
                raise TimeoutError
        self._parts += 1
        if self._parts > _PARTS_MAX:
            raise ProtocolError(f"a message in more than {_PARTS_MAX} pieces")
        return super()._receive_part(size)


class FrontEnd:
    """The conversation on *connection*, which this owns, about the device of the back-end at *path*.

    A reply may take so many *seconds*, and less when *give_up*, asked now and
    then, says so.  With *channel* the back-end can tell of a changed config
    space.  `wait`, on a thread for the purpose, tells of that and of its end.
    Requests may come from any thread.  Raises BackEndError, here and from
    whatever asks the back-end; after one that is no BackEndRefused nothing more
    can be asked, and only `close` is left.
    """

    def __init__(
        self,
        connection: socket.socket,
        path: str,
        seconds: float = REPLY_SECONDS,
        give_up: Callable[[], bool] = lambda: False,
        channel: bool = False,
    ) -> None:
        self.path = path
        self.give_up = give_up
        self._seconds = seconds
        self._stream = self._patient(connection)
        self._channel: _PatientStream | None = None
        self._error = self._wake = -1
        self._requests = Requests()
        self._memory: GuestMemory | None = None
        self._features = 0
        self._failure = ""
        # Held from a request to its reply.
        self._lock = threading.Lock()
        try:
            self._error = eventfd()
            self._wake = eventfd()
            self.features = self._begin(channel)
            """The features the back-end offers, without vhost's own."""
            self.rings_max = self._count_rings()
            """The most rings the device may have, where the back-end says so; else 0."""
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise BackEndError(path, _why_not_connected(error)) from None
            raise

    @classmethod
    def connect(
        cls,
        path: str,
        seconds: float = REPLY_SECONDS,
        give_up: Callable[[], bool] = lambda: False,
        channel: bool = False,
    ) -> Self:
        """The conversation with the back-end that listens at *path*.  Raises BackEndError."""
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(seconds)
            try:
                connection.connect(path)
            except BaseException:
                connection.close()
                raise
        except OSError as error:
            raise BackEndError(path, _why_not_connected(error)) from None
        return cls(connection, path, seconds, give_up, channel)

    def _patient(self, connection: socket.socket) -> _PatientStream:
        return _PatientStream(connection, self._seconds, lambda: self.give_up())

    def _begin(self, channel: bool) -> int:
        requests = self._requests
        offered = self._ask(requests.get_features())
        self._own_features = offered & PROTOCOL_FEATURES
        if self._own_features:
            chosen = requests.choose(self._ask(requests.get_protocol_features()), channel)
            self._ask(requests.set_protocol_features(chosen))
        self._ask(requests.set_owner())
        if requests.has(abi.VHOST_USER_PROTOCOL_F_BACKEND_REQ):
            self._open_channel()
        return offered & ~(PROTOCOL_FEATURES | 1 << abi.VHOST_F_LOG_ALL)

    def _open_channel(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel = self._patient(ours)
        with theirs:
            self._ask(self._requests.set_backend_req_fd(theirs.fileno()))

    def _count_rings(self) -> int:
        if not self._requests.has(abi.VHOST_USER_PROTOCOL_F_MQ):
            return 0
        return self._ask(self._requests.get_queue_num())

    @property
    def connection_fd(self) -> int:
        """The socket, for who waits for its end (POLLRDHUP)."""
        return self._stream.fd

    @property
    def error_fd(self) -> int:
        """The eventfd, readable when a ring has failed, that every ring is given."""
        return self._error

    @property
    def has_config(self) -> bool:
        """Whether there is a config space."""
        return self._requests.has(abi.VHOST_USER_PROTOCOL_F_CONFIG)

    def share(self, memory: GuestMemory, features: int) -> None:
        """The driver has taken *features*, and *memory* is the guest's; to be called before rings start.

        Raises ValueError for memory that cannot be handed over.
        """
        check_shareable(memory)
        regions = memory.regions
        table = [
            MemoryRegion(region.base, region.size, UserAddress(region.host_address), 0) for region in regions
        ]
        self._ask(self._requests.set_features(features | self._own_features))
        self._features = features
        self._ask(self._requests.set_mem_table(table, [region.fd for region in regions]))
        self._memory = memory

    def start_queue(self, layout: QueueLayout, kick: int, call: int, base: QueueState | None = None) -> None:
        """Have the ring at *layout* served from *base* on (None: new), between these two eventfds.

        The descriptors stay the caller's, and blocking: *call* is made so again
        where the back-end changed that, for both ends.  Raises QueueLayoutError.
        """
        memory = self._shared()
        with memory.views() as views:
            layout.check(views, self._features)
        requests, index = self._requests, layout.index
        self._ask(requests.set_vring_num(index, layout.size))
        self._ask(requests.set_vring_base(index, base or QueueState.start(self._features)))
        self._ask(requests.set_vring_addr(index, RingAddresses(*(
            UserAddress(memory.host_address(part))
            for part in (layout.descriptors, layout.available, layout.used)
        ))))  # fmt: skip
        self._ask(requests.set_vring_err(index, self._error))
        self._ask(requests.set_vring_call(index, call))
        self._ask(requests.set_vring_kick(index, kick))
        if self._own_features:
            self._ask(requests.set_vring_enable(index, True))
        # A reply to this one says that the back-end has been through all before.
        self._ask(requests.get_features())
        os.set_blocking(call, True)

    def stop_queue(self, layout: QueueLayout, finish: bool = False) -> QueueState:
        """Stop serving the ring there; return the state to go on from (T9).

        The back-end touches neither it nor its buffers when this returns: what it
        had begun has been returned to the driver.  With *finish* all that is
        available is, unless that takes longer than a reply may.  A packed ring does
        not show either: there the back-end's word is taken, and nothing waited for.
        """
        if self._requests.packed:
            return self._ask(self._requests.get_vring_base(layout.index))
        with self._shared().views() as views:
            if finish:
                # Stopped with requests in flight, qemu-storage-daemon 7.2 breaks down over their interrupts.
                self._until(lambda: ring_index(views, layout.used) == ring_index(views, layout.available))
            base = self._ask(self._requests.get_vring_base(layout.index))
            # And it answers first, and finishes then.
            if not self._until(lambda: ring_index(views, layout.used) == base.available):
                raise self._end(f"ring {layout.index}: stopped, and requests not finished")
        return base

    def _until(self, happened: Callable[[], bool]) -> bool:
        """Wait until something has *happened* in memory; False if that takes longer than a reply may."""
        deadline = time.monotonic() + self._seconds
        gone = select.poll()
        gone.register(self._stream.fd, select.POLLRDHUP)
        while not happened():
            if gone.poll(_MEMORY_LOOK_SECONDS * 1000) or time.monotonic() >= deadline or self.give_up():
                return False
        return True

    def _shared(self) -> GuestMemory:
        if self._memory is None:
            raise ValueError("a ring without memory: share it before")
        return self._memory

    def reset(self) -> None:
        """Have the device forget what the driver has set; every queue has been stopped."""
        if self._requests.has(abi.VHOST_USER_PROTOCOL_F_RESET_DEVICE):
            self._ask(self._requests.reset_device())

    def config(self, offset: int, size: int) -> bytes:
        """*size* bytes of the config space at *offset*.

        Raises BackEndRefused for what is not there, ValueError for more than one
        message carries (256 bytes from the start).
        """
        return self._ask(self._made(lambda: self._requests.get_config(offset, size)))

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes *data* at *offset* of the config space.  Raises as `config`."""
        self._ask(self._made(lambda: self._requests.set_config(offset, data)))

    def _made(self, make: Callable[[], Request[Answer]]) -> Request[Answer]:
        try:
            return make()
        except RequestRefused as error:
            raise BackEndRefused(self.path, str(error)) from None

    def _ask(self, request: Request[Answer]) -> Answer:
        name = request.message.name
        with self._lock:
            if self._failure:
                raise BackEndError(self.path, self._failure)
            reply: Message | None = None
            try:
                self._stream.send(request.message)
                if request.answered:
                    reply = self._stream.receive()
                    if reply is None:
                        raise ConnectionError
                return request.answer(reply)
            except RequestRefused as error:
                raise BackEndRefused(self.path, str(error)) from None
            except ProtocolError as error:
                raise self._end(f"{error} (is it a vhost-user back-end that listens there?)") from None
            except TimeoutError:
                raise self._end(
                    f"{name}: no answer for {self._seconds:g} s (has it another front-end, or is it stuck?)"
                ) from None
            except OSError as error:
                reason = "" if isinstance(error, ConnectionError) else f": {error.strerror}"
                raise self._end(
                    f"{name}: the back-end has closed the connection{reason} (it may have said why)"
                ) from None
            finally:
                if reply is not None:
                    close_all(reply.fds)

    def _end(self, reason: str) -> BackEndError:
        """Nothing more can be asked: a late reply would be taken for that to the next request."""
        self._failure = reason
        self.end()
        return BackEndError(self.path, reason)

    def wait(self) -> Happening:
        """Sleep until something happens that nobody has asked for.

        For one thread at a time.  What has happened when nobody waited is told at
        the next call.
        """
        waiting = select.poll()
        waiting.register(self._stream.fd, select.POLLRDHUP)
        waiting.register(self._error, select.POLLIN)
        waiting.register(self._wake, select.POLLIN)
        while True:
            if self._channel:
                waiting.register(self._channel.fd, select.POLLIN)
            ready = {fd for fd, _ in waiting.poll()}
            if self._wake in ready:
                os.read(self._wake, BYTES)
                return Happening.WOKEN
            if self._stream.fd in ready:
                return Happening.GONE
            if self._error in ready:
                _empty(self._error)
                return Happening.FAILED
            if self._channel:
                ended = self._channel.fd
                if self._listen(self._channel):
                    return Happening.CONFIG_CHANGED
                if not self._channel:
                    waiting.unregister(ended)

    def _listen(self, channel: _PatientStream) -> bool:
        """Take what the back-end has to say; True if its config space has changed."""
        try:
            message = channel.receive()
            if message is None:
                raise ConnectionError
            close_all(message.fds)
            changed, reply = self._requests.heard(message)
            if reply is not None:
                channel.send(reply)
            return changed
        except (OSError, ProtocolError):
            # Its channel is of no more use, its device may be.
            channel.close()
            self._channel = None
            return False

    def wake(self) -> None:
        """Let `wait`, now or the next time, return `Happening.WOKEN`.  Any thread may call this."""
        os.write(self._wake, SIGNAL)

    def end(self) -> None:
        """End the connection, for those too who wait for a reply or in `wait`.  Any thread may call this."""
        self._stream.end()

    def close(self) -> None:
        """End the connection, and close every descriptor; no thread may be in `wait`."""
        self.end()
        with self._lock:
            self._failure = self._failure or "the connection was closed"
            self._close()

    def _close(self) -> None:
        self._stream.close()
        if self._channel:
            self._channel.close()
            self._channel = None
        close_all(fd for fd in (self._error, self._wake) if fd >= 0)
        self._error = self._wake = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def check_shareable(memory: GuestMemory) -> None:
    """Raise ValueError for *memory* that no other process can be handed."""
    if len(memory.regions) > FDS_MAX:
        raise ValueError(f"guest memory: {len(memory.regions)} regions, and a back-end takes {FDS_MAX}")
    for region in memory.regions:
        if region.fd < 0:
            where = f"guest memory at {region.base:#x}"
            raise ValueError(f"{where}: this process's alone (make it by Region.memfd)")


def ring_index(views: MemoryViews, ring: GuestAddress) -> int:
    """The index of the available or used ring at *ring*."""
    with views.slice(GuestAddress(ring + 2), 2) as field, field.cast("H") as index:
        return int(index[0])


def _empty(fd: int) -> None:
    """Read the eventfd *fd*, whose other end may have been quicker."""
    try:
        os.read(fd, BYTES)
    except BlockingIOError:
        return


def _why_not_connected(error: OSError) -> str:
    remedies = {
        errno.ENOENT: "start the back-end before, or name its socket",
        errno.ECONNREFUSED: "is the back-end listening there?",
        errno.EACCES: "run as whoever started it, or chmod it",
        errno.EAGAIN: "is it busy with another front-end?",
        errno.EPROTOTYPE: "it is no stream socket",
        errno.EMFILE: "ulimit -n raises the limit",
    }
    if isinstance(error, TimeoutError):
        return f"no connection within the time ({remedies[errno.EAGAIN]})"
    # The standard library has its own words for a path that is too long, and no number.
    reason = error.strerror or f"{error} (107 bytes are the most)"
    remedy = remedies.get(error.errno or 0)
    return reason + (f" ({remedy})" if remedy else "")
