"""The front-end's side of vhost-user: what to send, and what to make of the reply.

`Requests` makes a `Request` for each thing a front-end asks.  Its message is to
be sent and, if it is `answered`, the next message that comes is its reply, which
`Request.answer` checks and decodes.  Nothing else comes that way: what a
back-end has to say by itself comes over a channel of its own (`heard`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from lguestlib.abi import vhost_user as abi
from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.errors import VirtioError
from lguestlib.virtio.features import Feature
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.vhost_user.memory_table import MemoryRegion, RingAddresses
from lguestlib.virtio.vhost_user.message import FDS_MAX, Message, ProtocolError, u64

Answer = TypeVar("Answer", covariant=True)

PROTOCOL_FEATURES = 1 << abi.VHOST_USER_F_PROTOCOL_FEATURES
"""The feature bit without which there are no protocol features, and rings need no enabling."""

RINGS_MAX = abi.VHOST_USER_VRING_IDX_MASK + 1
"""Rings that can be told from each other when their descriptors are handed over."""

_TAKEN = (
    abi.VHOST_USER_PROTOCOL_F_MQ,
    abi.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    abi.VHOST_USER_PROTOCOL_F_CONFIG,
    abi.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
)
_HEADER_MASK = abi.VHOST_USER_VERSION_MASK | abi.VHOST_USER_REPLY_MASK
_REPLY = abi.VHOST_USER_VERSION | abi.VHOST_USER_REPLY_MASK
_CONFIG_SIZE = len(bytes(abi.vhost_user_config()))
_STATE_SIZE = len(bytes(abi.vhost_vring_state()))


class RequestRefused(VirtioError):
    """The back-end has said no, or does not offer it; the conversation may go on."""


@dataclass(frozen=True)
class Request(Generic[Answer]):
    """A *message* to send; the next one that comes is its reply, if it is to be *answered*."""

    message: Message
    answered: bool
    decode: Callable[[bytes], Answer]
    """Makes the answer of the reply's payload; of no bytes where there is no reply."""

    def answer(self, reply: Message | None) -> Answer:
        """What *reply* says; None where it is not `answered`.

        Its descriptors, of which there should be none, stay the caller's.  Raises
        RequestRefused; ProtocolError for what is no reply to this request.
        """
        if reply is None:
            return self.decode(b"")
        name = self.message.name
        if reply.request != self.message.request:
            raise ProtocolError(f"{name}: answered with a reply to {reply.name}")
        if reply.flags & _HEADER_MASK != _REPLY:
            raise ProtocolError(f"{name}: answered with flags {reply.flags:#x}, which are not a reply's")
        if reply.fds:
            raise ProtocolError(f"{name}: answered with {len(reply.fds)} descriptors")
        return self.decode(reply.payload)


class Requests:
    """The requests of one conversation, each as what was negotiated before has it.

    In order: `get_features`; where those have `PROTOCOL_FEATURES`,
    `get_protocol_features` and `set_protocol_features`; then the others.
    """

    def __init__(self) -> None:
        self.protocol_features = 0
        """What was set, as bits."""
        self.packed = False
        """Whether the rings are packed."""

    def has(self, feature: int) -> bool:
        """Whether protocol feature number *feature* was negotiated."""
        return bool(self.protocol_features >> feature & 1)

    @staticmethod
    def choose(offered: int, channel: bool) -> int:
        """The protocol features to take of those *offered*.

        With *channel*, the one for what the back-end has to say by itself, which
        is of use with a config space only.
        """
        wanted = sum(1 << feature for feature in _TAKEN)
        if channel and offered >> abi.VHOST_USER_PROTOCOL_F_CONFIG & 1:
            wanted |= 1 << abi.VHOST_USER_PROTOCOL_F_BACKEND_REQ
        return offered & wanted

    def get_features(self) -> Request[int]:
        """The virtio features the back-end offers, and vhost's own among them."""
        return self._question(abi.VHOST_USER_GET_FEATURES, b"", _number)

    def set_features(self, features: int) -> Request[None]:
        """The virtio features the driver has taken: what is made from now on is for rings of that kind."""
        self.packed = bool(features & Feature.RING_PACKED)
        return self._command(abi.VHOST_USER_SET_FEATURES, u64(features))

    def set_owner(self) -> Request[None]:
        """Begin: this front-end is the one from now on."""
        return self._command(abi.VHOST_USER_SET_OWNER)

    def get_protocol_features(self) -> Request[int]:
        """The protocol features the back-end offers."""
        return self._question(abi.VHOST_USER_GET_PROTOCOL_FEATURES, b"", _number)

    def set_protocol_features(self, features: int) -> Request[None]:
        """Take these protocol features: what is made from now on relies on them."""
        request = self._command(abi.VHOST_USER_SET_PROTOCOL_FEATURES, u64(features))
        self.protocol_features = features
        return request

    def get_queue_num(self) -> Request[int]:
        """The most rings the device may have.  Raises RequestRefused without MQ."""
        self._need(abi.VHOST_USER_PROTOCOL_F_MQ, "MQ")
        return self._question(abi.VHOST_USER_GET_QUEUE_NUM, b"", _number)

    def set_mem_table(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> Request[None]:
        """The guest's memory: these *regions*, of which each is in its file of *fds*.

        Raises ValueError for more than one message can have, or for none.
        """
        if not 0 < len(regions) <= FDS_MAX or len(fds) != len(regions):
            told = f"{len(regions)} memory regions with {len(fds)} files"
            raise ValueError(f"{told}: 1 to {FDS_MAX} fit a message")
        payload = bytes(abi.vhost_user_mem_table(len(regions), 0)) + b"".join(
            region.encode() for region in regions
        )
        return self._command(abi.VHOST_USER_SET_MEM_TABLE, payload, tuple(fds))

    def set_vring_num(self, index: int, size: int) -> Request[None]:
        """Ring *index* has *size* descriptors."""
        return self._command(abi.VHOST_USER_SET_VRING_NUM, _state(index, size))

    def set_vring_base(self, index: int, state: QueueState) -> Request[None]:
        """Ring *index* goes on from *state*."""
        return self._command(abi.VHOST_USER_SET_VRING_BASE, _state(index, state.base))

    def set_vring_addr(
        self, index: int, addresses: RingAddresses, log: GuestAddress | None = None
    ) -> Request[None]:
        """Ring *index* is there; writes of its used ring are logged at *log*, if that is not None."""
        wire = abi.vhost_vring_addr(
            index=index, desc_user_addr=addresses.descriptors, avail_user_addr=addresses.available,
            used_user_addr=addresses.used,
        )  # fmt: skip
        if log is not None:
            wire.flags, wire.log_guest_addr = 1 << abi.VHOST_VRING_F_LOG, log
        return self._command(abi.VHOST_USER_SET_VRING_ADDR, bytes(wire))

    def set_vring_kick(self, index: int, fd: int) -> Request[None]:
        """Ring *index* is kicked through the eventfd *fd*."""
        return self._command(abi.VHOST_USER_SET_VRING_KICK, u64(index), (fd,))

    def set_vring_call(self, index: int, fd: int) -> Request[None]:
        """Ring *index* interrupts through the eventfd *fd*; with -1 it does not."""
        if fd < 0:
            return self._command(abi.VHOST_USER_SET_VRING_CALL, u64(index | abi.VHOST_USER_VRING_NOFD_MASK))
        return self._command(abi.VHOST_USER_SET_VRING_CALL, u64(index), (fd,))

    def set_vring_err(self, index: int, fd: int) -> Request[None]:
        """Ring *index*, when it has failed, says so through the eventfd *fd*."""
        return self._command(abi.VHOST_USER_SET_VRING_ERR, u64(index), (fd,))

    def set_vring_enable(self, index: int, enabled: bool) -> Request[None]:
        """Serve ring *index*, or do not; only where `PROTOCOL_FEATURES` were negotiated."""
        return self._command(abi.VHOST_USER_SET_VRING_ENABLE, _state(index, int(enabled)))

    def get_vring_base(self, index: int) -> Request[QueueState]:
        """Stop ring *index*; the answer is the state it would go on from (T9)."""
        return self._question(abi.VHOST_USER_GET_VRING_BASE, _state(index, 0), partial(_base, index, self.packed))

    def set_backend_req_fd(self, fd: int) -> Request[None]:
        """The back-end's channel is the socket *fd*.  Raises RequestRefused without BACKEND_REQ."""
        self._need(abi.VHOST_USER_PROTOCOL_F_BACKEND_REQ, "BACKEND_REQ")
        return self._command(abi.VHOST_USER_SET_BACKEND_REQ_FD, b"", (fd,))

    def get_config(self, offset: int, size: int) -> Request[bytes]:
        """*size* bytes of the config space at *offset*.

        Raises RequestRefused without CONFIG, ValueError for more than
        VHOST_USER_CONFIG_SIZE_MAX bytes.
        """
        self._need(abi.VHOST_USER_PROTOCOL_F_CONFIG, "CONFIG")
        payload = _config_part(offset, size) + bytes(size)
        return self._question(abi.VHOST_USER_GET_CONFIG, payload, partial(_config, offset, size))

    def set_config(self, offset: int, data: bytes) -> Request[None]:
        """The driver writes *data* at *offset* of the config space.  Raises as `get_config`."""
        self._need(abi.VHOST_USER_PROTOCOL_F_CONFIG, "CONFIG")
        return self._command(abi.VHOST_USER_SET_CONFIG, _config_part(offset, len(data)) + data)

    def reset_device(self) -> Request[None]:
        """Forget all that the driver has set.  Raises RequestRefused without RESET_DEVICE."""
        self._need(abi.VHOST_USER_PROTOCOL_F_RESET_DEVICE, "RESET_DEVICE")
        return self._command(abi.VHOST_USER_RESET_DEVICE)

    def passed_on(self, message: Message) -> Request[None]:
        """What another front-end has asked, with its descriptors.

        Of what has no answer of its own, or 0 (SET_LOG_BASE).
        """
        return self._command(message.request, message.payload, message.fds)

    def heard(self, message: Message) -> tuple[bool, Message | None]:
        """A *message* of the back-end's own: whether the config space has changed, and the reply, if any.

        Requests that are not known are refused where the back-end wants to know
        (T18).  Its descriptors stay the caller's.  Raises ProtocolError.
        """
        if message.flags & _HEADER_MASK != abi.VHOST_USER_VERSION:
            raise ProtocolError(f"back-end request {message.request} with flags {message.flags:#x}")
        changed = message.request == abi.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
        if not (message.need_reply and self.has(abi.VHOST_USER_PROTOCOL_F_REPLY_ACK)):
            return changed, None
        return changed, Message(message.request, u64(not changed), (), _REPLY)

    def _need(self, feature: int, name: str) -> None:
        if not self.has(feature):
            raise RequestRefused(f"the back-end does not offer the protocol feature {name}")

    def _question(
        self, request: int, payload: bytes, decode: Callable[[str, bytes], Answer]
    ) -> Request[Answer]:
        message = Message(request, payload)
        return Request(message, True, partial(decode, message.name))

    def _command(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> Request[None]:
        if not self.has(abi.VHOST_USER_PROTOCOL_F_REPLY_ACK):
            return Request(Message(request, payload, fds), False, _unanswered)
        flags = abi.VHOST_USER_VERSION | abi.VHOST_USER_NEED_REPLY_MASK
        message = Message(request, payload, fds, flags)
        return Request(message, True, partial(_acknowledged, message.name))


def _state(index: int, number: int) -> bytes:
    return bytes(abi.vhost_vring_state(index, number))


def _config_part(offset: int, size: int) -> bytes:
    if offset < 0 or not 0 < size <= abi.VHOST_USER_CONFIG_SIZE_MAX - offset:
        raise ValueError(
            f"config space: {size} bytes at {offset}: messages reach {abi.VHOST_USER_CONFIG_SIZE_MAX} bytes"
        )
    return bytes(abi.vhost_user_config(offset=offset, size=size))


def _sized(name: str, payload: bytes, size: int) -> None:
    if len(payload) != size:
        raise ProtocolError(f"{name}: answered with {len(payload)} bytes, not {size}")


def _number(name: str, payload: bytes) -> int:
    _sized(name, payload, 8)
    return int.from_bytes(payload, "little")


def _unanswered(payload: bytes) -> None:
    """Nothing comes back: it is known later, if at all, how it went."""


def _acknowledged(name: str, payload: bytes) -> None:
    result = _number(name, payload)
    if result:
        raise RequestRefused(f"{name}: the back-end has refused it ({result:#x})")


def _base(index: int, packed: bool, name: str, payload: bytes) -> QueueState:
    _sized(name, payload, _STATE_SIZE)
    wire = abi.vhost_vring_state.from_buffer_copy(payload)
    if wire.index != index or wire.num > 0xFFFF and not packed:
        raise ProtocolError(f"{name}: ring {index} answered as ring {wire.index} with index {wire.num:#x}")
    return QueueState.from_base(wire.num)


def _config(offset: int, size: int, name: str, payload: bytes) -> bytes:
    # A refusal is a size of 0, or nothing at all.
    wire = abi.vhost_user_config.from_buffer_copy(payload.ljust(_CONFIG_SIZE, b"\xff"))
    if not payload or wire.size == 0:
        raise RequestRefused(f"{name}: the back-end has refused {size} bytes at {offset}")
    _sized(name, payload, _CONFIG_SIZE + size)
    if (wire.offset, wire.size) != (offset, size):
        told = f"{wire.size} bytes at {wire.offset}"
        raise ProtocolError(f"{name}: answered with {told}, not {size} at {offset}")
    return payload[_CONFIG_SIZE:]
