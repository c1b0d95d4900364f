"""One message, and how a stream of bytes and descriptors becomes messages (QEMU's docs/interop/vhost-user.rst)."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lguestlib.abi import vhost_user as abi
from lguestlib.abi.layout import size_of
from lguestlib.virtio.errors import VirtioError

PAYLOAD_MAX = 4096
"""Bytes after a header that a peer may announce; the longest message known has 2056."""

FDS_MAX = 8
"""Descriptors with one message (a memory table of eight regions)."""

_HEADER_SIZE = size_of(abi.vhost_user_header)


class ProtocolError(VirtioError):
    """The peer has sent what the protocol does not allow: the connection is of no more use."""


@dataclass(frozen=True)
class Message:
    """A request or its reply; *fds* belong to whoever has the message."""

    request: int
    payload: bytes = b""
    fds: tuple[int, ...] = ()
    flags: int = abi.VHOST_USER_VERSION

    @property
    def name(self) -> str:
        """The request for people: "SET_VRING_NUM"."""
        return REQUEST_NAMES.get(self.request, f"request {self.request}")

    @property
    def need_reply(self) -> bool:
        """Whether the sender wants to know how it went."""
        return bool(self.flags & abi.VHOST_USER_NEED_REPLY_MASK)

    def encode(self) -> bytes:
        """Header and payload, as sent."""
        return bytes(abi.vhost_user_header(self.request, self.flags, len(self.payload))) + self.payload

    def number(self) -> int:
        """The payload as one u64.  Raises ProtocolError for a payload of another size."""
        if len(self.payload) != 8:
            raise ProtocolError(f"{self.name}: {len(self.payload)} bytes of payload, not 8")
        return int.from_bytes(self.payload, sys.byteorder)


def u64(value: int) -> bytes:
    """A payload that `Message.number` reads."""
    return value.to_bytes(8, sys.byteorder)


REQUEST_NAMES = {
    value: name.removeprefix("VHOST_USER_")
    for name, value in vars(abi).items()
    if name.startswith(("VHOST_USER_GET_", "VHOST_USER_SET_", "VHOST_USER_RESET_"))
    or name in ("VHOST_USER_ADD_MEM_REG", "VHOST_USER_REM_MEM_REG")
}


class MessageReader:
    """Puts messages together from what a socket gives, however it is cut (T14).

    Descriptors that have come for a message not yet complete are in `fds`.
    """

    def __init__(self) -> None:
        self.fds: list[int] = []
        self._begun = b""
        self._header: abi.vhost_user_header | None = None

    @property
    def wanted(self) -> int:
        """Bytes until the next step; never more, so that no descriptor of the next message comes early."""
        size = self._header.size + _HEADER_SIZE if self._header else _HEADER_SIZE
        return size - len(self._begun)

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> Message | None:
        """Take at most `wanted` bytes, and the descriptors with them; the message they complete, if they do.

        Raises ProtocolError for a header that cannot be, for too many
        descriptors, and for the end of the stream (no *data*) inside a message.
        """
        self.fds += fds
        if len(self.fds) > FDS_MAX:
            raise ProtocolError(f"more than {FDS_MAX} descriptors with one message")
        if not data:
            raise ProtocolError(f"the stream ends inside a message, after {len(self._begun)} bytes of it")
        self._begun += data
        if len(self._begun) == _HEADER_SIZE:
            self._header = self._checked(abi.vhost_user_header.from_buffer_copy(self._begun))
        if self._header is None or self.wanted:
            return None
        message = Message(
            self._header.request, self._begun[_HEADER_SIZE:], tuple(self.fds), self._header.flags
        )
        self._begun, self._header = b"", None
        self.fds = []
        return message

    @property
    def between_messages(self) -> bool:
        """Whether the stream may end here."""
        return not self._begun

    @staticmethod
    def _checked(header: abi.vhost_user_header) -> abi.vhost_user_header:
        if header.flags & abi.VHOST_USER_VERSION_MASK != abi.VHOST_USER_VERSION:
            raise ProtocolError(f"request {header.request}: flags {header.flags:#x} are not of version 1")
        if header.size > PAYLOAD_MAX:
            raise ProtocolError(
                f"request {header.request}: {header.size} bytes announced, more than {PAYLOAD_MAX}"
            )
        return header
