"""vhost-user messages through a Unix socket, with their descriptors."""

import array
import errno
import os
import socket
from collections.abc import Iterable

from lguestlib.virtio.vhost_user.message import FDS_MAX, Message, MessageReader, ProtocolError

_FD_SIZE = array.array("i").itemsize
# Room for one more than is allowed, so that too many are seen, and closed.
_CONTROL_SIZE = socket.CMSG_SPACE((FDS_MAX + 1) * _FD_SIZE)


class MessageStream:
    """The messages on *connection*, which this owns."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def receive(self) -> Message | None:
        """Sleep until the next message; None at the end of the stream.

        Its descriptors are close-on-exec and the caller's.  Raises ProtocolError,
        having closed what had come with what was not a message; OSError.
        """
        reader = MessageReader()
        try:
            while True:
                data, fds = self._receive_part(reader.wanted)
                if not data and not fds and reader.between_messages:
                    return None
                message = reader.feed(data, fds)
                if message is not None:
                    return message
        except BaseException:
            close_all(reader.fds)
            raise

    def _receive_part(self, size: int) -> tuple[bytes, list[int]]:
        # Our own loop: socket.recv_fds would leave them open over an exec (Y5).
        data, control, flags, _ = self._socket.recvmsg(size, _CONTROL_SIZE, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, items in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(items[: len(items) - len(items) % _FD_SIZE])
        if flags & socket.MSG_CTRUNC:
            close_all(fds)
            raise ProtocolError("descriptors with a message were cut off: too many, or no room for them here")
        return data, list(fds)

    def send(self, message: Message, flags: int = 0) -> None:
        """Send *message*, whose descriptors stay the caller's, with send(2)'s *flags*.  Raises OSError."""
        data = message.encode()
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", message.fds))] if message.fds else []
        sent = self._socket.sendmsg([data], control, socket.MSG_NOSIGNAL | flags)
        if sent < len(data):
            self._socket.sendall(data[sent:], socket.MSG_NOSIGNAL | flags)

    def end(self) -> None:
        """Wake whoever sleeps in `receive`: the stream has ended.  Any thread may."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The peer has gone already.
            return

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that came with a message, whatever their file systems have to say to that."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise
