"""A front-end's connection that sends whatever it is told to, and says what the other end does about it."""

import array
import select
import socket
import time
from collections.abc import Sequence
from typing import TypeVar

from lguestlib.runtime.vhost_user.stream import MessageStream
from lguestlib.virtio.errors import VirtioError
from lguestlib.virtio.vhost_user.frontend import Request
from lguestlib.virtio.vhost_user.message import Message, ProtocolError

Answer = TypeVar("Answer")


class Gone(VirtioError):
    """The back-end has ended the connection, or is not there."""


class Hang(VirtioError):
    """The back-end does not do what it should within the time."""


class Line(MessageStream):
    """The connection to the back-end at *path*, whose answers may take so many *seconds*.

    Raises Gone, Hang.
    """

    def __init__(self, path: str, seconds: float) -> None:
        self._seconds = seconds
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(seconds)
        try:
            connection.connect(path)
        except TimeoutError:
            connection.close()
            raise Hang("it takes no connection") from None
        except BlockingIOError:
            # What Linux says where as many wait as there may.
            connection.close()
            raise Hang("it takes no connection: too many wait already") from None
        except OSError as error:
            connection.close()
            raise Gone(f"no connection: {error.strerror or error}") from None
        super().__init__(connection)
        self.fd = connection.fileno()

    @property
    def peer(self) -> int:
        """The process that listens there, as far as the kernel tells."""
        return int.from_bytes(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")

    @property
    def has_ended(self) -> bool:
        """Whether the back-end has ended the connection."""
        ended = select.poll()
        ended.register(self.fd, select.POLLRDHUP)
        return bool(ended.poll(0))

    def put(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, of a message or not, and descriptors with the first of them.  Raises Gone, Hang."""
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._socket.sendmsg([data], control, socket.MSG_NOSIGNAL)
            self._socket.sendall(data[sent:], socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise Hang("it does not read what it is sent") from None
        except OSError:
            raise Gone("the connection has ended") from None

    def get(self, seconds: float | None = None) -> Message:
        """The next message.  Raises Gone, Hang, ProtocolError."""
        self._deadline = time.monotonic() + (self._seconds if seconds is None else seconds)
        try:
            message = self.receive()
        except TimeoutError:
            raise Hang("no answer") from None
        except OSError:
            raise Gone("the connection has ended") from None
        except ProtocolError as error:
            if "ends inside a message" in str(error):
                raise Gone("the connection has ended inside a message") from None
            raise
        if message is None:
            raise Gone("the connection has ended")
        return message

    def _receive_part(self, size: int) -> tuple[bytes, list[int]]:
        there = select.poll()
        there.register(self.fd, select.POLLIN)
        if not there.poll(max(0.0, self._deadline - time.monotonic()) * 1000):
            raise TimeoutError
        return super()._receive_part(size)

    def ask(self, request: Request[Answer]) -> Answer:
        """The answer to *request*, whose reply has no descriptors.

        Raises RequestRefused; Gone, Hang, ProtocolError.
        """
        try:
            self.put(request.message.encode(), request.message.fds)
            return request.answer(self.get() if request.answered else None)
        except Hang as error:
            raise Hang(f"{request.message.name}: {error}") from None
