"""A back-end that answers as a test tells it, on the other end of a socket pair."""

import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from lguestlib.abi import vhost_user as abi
from lguestlib.runtime.vhost_user.stream import MessageStream, close_all
from lguestlib.virtio.device import RING_FEATURES
from lguestlib.virtio.vhost_user.frontend import PROTOCOL_FEATURES
from lguestlib.virtio.vhost_user.message import Message

REPLY = abi.VHOST_USER_VERSION | abi.VHOST_USER_REPLY_MASK
PROTOCOL = sum(
    1 << feature
    for feature in (
        abi.VHOST_USER_PROTOCOL_F_MQ,
        abi.VHOST_USER_PROTOCOL_F_REPLY_ACK,
        abi.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
        abi.VHOST_USER_PROTOCOL_F_CONFIG,
    )
)
CONFIG = bytes(range(60))

Answer = Callable[[Message], Message | bytes | None]
"""What to send for a request: a message, bytes that may be none, or nothing."""


def number(message: Message, value: int) -> Message:
    """The reply to *message* that is one number."""
    return Message(message.request, struct.pack("<Q", value), (), REPLY)


def silence(message: Message) -> None:
    """No answer at all."""


class ScriptedBackEnd:
    """Offers *features* and *protocol* features and says yes to everything, but where *answers* has its own.

    `connection` is the front-end's end; with *path*, it listens there for one
    front-end instead.
    """

    def __init__(
        self,
        features: int = int(RING_FEATURES) | PROTOCOL_FEATURES,
        protocol: int = PROTOCOL,
        answers: Mapping[int, Answer] | None = None,
        path: Path | None = None,
    ) -> None:
        if path:
            path.unlink(missing_ok=True)
            self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.connection.bind(str(path))
            self.connection.listen()
        else:
            self.connection, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening = path is not None
        self.received: list[Message] = []
        self._features = features
        self._protocol = protocol
        self._answers = dict(answers or {})
        self._stream = None if path else MessageStream(self.socket)
        self._thread = threading.Thread(target=self._run, name="scripted")
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """The requests so far."""
        return [message.name for message in self.received]

    def fd(self, request: int, ring: int = 0) -> int:
        """The descriptor that came last with a *request*, about *ring* where it is about one."""
        found = [message for message in self.received if message.request == request]
        if found[-1].payload:
            found = [message for message in found if message.payload[0] == ring]
        return found[-1].fds[0]

    def channel(self) -> MessageStream:
        """The channel for requests of the back-end's own; the caller's to close."""
        return MessageStream(socket.socket(fileno=os.dup(self.fd(abi.VHOST_USER_SET_BACKEND_REQ_FD))))

    def answer(self, request: int, answer: Answer) -> None:
        """From now on answer *request* so."""
        self._answers[request] = answer

    def _run(self) -> None:
        try:
            if self._stream is None:
                self.socket = self.connection.accept()[0]
                self._stream = MessageStream(self.socket)
            stream = self._stream
            while (message := stream.receive()) is not None:
                self.received.append(message)
                answer = self._answers.get(message.request, self._answer)(message)
                if isinstance(answer, bytes):
                    self.socket.sendall(answer)
                elif answer is not None:
                    stream.send(answer)
        except OSError:
            # The test has ended it.
            return

    def _answer(self, message: Message) -> Message | None:
        match message.request:
            case abi.VHOST_USER_GET_FEATURES:
                return number(message, self._features)
            case abi.VHOST_USER_GET_PROTOCOL_FEATURES:
                return number(message, self._protocol)
            case abi.VHOST_USER_GET_QUEUE_NUM:
                return number(message, 2)
            case abi.VHOST_USER_GET_VRING_BASE:
                return Message(message.request, message.payload[:4] + bytes(4), (), REPLY)
            case abi.VHOST_USER_GET_CONFIG:
                offset, size, _ = struct.unpack_from("<III", message.payload)
                if offset + size > len(CONFIG):
                    return Message(message.request, b"", (), REPLY)
                payload = message.payload[:12] + CONFIG[offset : offset + size]
                return Message(message.request, payload, (), REPLY)
        return number(message, 0) if message.need_reply else None

    def end(self) -> None:
        """Close the connection, as a process does that dies."""
        if self._listening:
            # Wakes who still waits in accept(2); with nobody there any more, a connection is refused.
            self.connection.shutdown(socket.SHUT_RDWR)
            self._listening = False
        if self._stream:
            self._stream.end()
        self._thread.join()

    def close(self) -> None:
        self.end()
        if self._stream:
            self._stream.close()
        self.connection.close()
        for message in self.received:
            close_all(message.fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()
