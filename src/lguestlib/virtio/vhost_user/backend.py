"""The back-end's side of vhost-user as a table-driven state machine.

`BackEnd.receive` takes a request, with its descriptors, and returns the effect
it asks of the back-end's owner, if any; when the owner has seen to it, or could
not, `BackEnd.finish` gives the reply, if there is to be one.  A ring's wanted
state is declared rather than commanded: the owner is told which rings to look
at, and makes them as `BackEnd.setup` says.

                     memory, NUM, ADDR, KICK, enabled
       no setup   ------------------------------------>   setup
      (stopped)   <------------------------------------   (a thread serves it)
                     GET_VRING_BASE; disabled; reset

A kick that came before is in the eventfd still, and a ring is looked at once
when it starts, so none is lost (T8).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lguestlib.abi import vhost_user as abi
from lguestlib.abi.layout import size_of
from lguestlib.memory.address import GuestAddress, UserAddress
from lguestlib.virtio.device import Device
from lguestlib.virtio.device_queue import inflight_area_size
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QUEUE_SIZE_MAX, QueueLayout, size_possible
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.status import Status
from lguestlib.virtio.vhost_user.memory_table import REGIONS_MAX, MemoryRegion, MemoryTable, RingAddresses
from lguestlib.virtio.vhost_user.message import FDS_MAX, Message, ProtocolError, u64

LOG_ALL = 1 << abi.VHOST_F_LOG_ALL
PROTOCOL_FEATURES = 1 << abi.VHOST_USER_F_PROTOCOL_FEATURES

OFFERED = sum(
    1 << bit
    for bit in (
        abi.VHOST_USER_PROTOCOL_F_MQ,
        abi.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
        abi.VHOST_USER_PROTOCOL_F_REPLY_ACK,
        abi.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
        abi.VHOST_USER_PROTOCOL_F_CONFIG,
        abi.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
        abi.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
        abi.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
        abi.VHOST_USER_PROTOCOL_F_STATUS,
    )
)
"""Protocol features."""

_REPLY = abi.VHOST_USER_VERSION | abi.VHOST_USER_REPLY_MASK
_INFLIGHT_SIZE = 20
"""Without the padding at the end, which some send and some do not."""


class Area(NamedTuple):
    """*size* bytes at byte *offset* of the file *fd*."""

    fd: int
    size: int
    offset: int


@dataclass(frozen=True)
class MapMemory:
    """The guest's memory is *table* from now on; regions not known before are in these files.

    Then every ring that has a setup is to be looked at.
    """

    table: MemoryTable
    files: dict[MemoryRegion, int]


@dataclass(frozen=True)
class Arrange:
    """Make these rings as their setups say."""

    indices: tuple[int, ...]


@dataclass(frozen=True)
class StopQueue:
    """Stop this ring and drain it, and tell `BackEnd.stopped` where it goes on (T9)."""

    index: int


@dataclass(frozen=True)
class Reset:
    """Stop every ring and forget what the driver has set."""


@dataclass(frozen=True)
class MapLog:
    """Writes are logged here from now on; then every ring that has a setup is to be looked at."""

    area: Area


@dataclass(frozen=True)
class NewInflight:
    """Make room for a record of requests in flight, of so many bytes; the result is its file."""

    length: int


@dataclass(frozen=True)
class MapInflight:
    """Requests in flight are recorded in the first *length* bytes here, for rings of this *size*.

    The *features* so far say what kind of ring.
    """

    area: Area
    length: int
    size: int
    features: int


Effect = MapMemory | Arrange | StopQueue | Reset | MapLog | NewInflight | MapInflight


@dataclass(frozen=True)
class QueueSetup:
    """A ring to be served: where, from which state on, with which features and descriptors.

    *addresses*: where that is for the front-end; *log_used*: where its used ring
    is logged; *generation* counts changes of what else it depends on: memory, the
    log, the record of requests in flight.
    """

    layout: QueueLayout
    addresses: RingAddresses
    base: QueueState
    features: int
    kick: int
    call: int
    log_used: GuestAddress | None
    generation: int


@dataclass
class _Ring:
    size: int = 0
    addresses: RingAddresses | None = None
    log_used: GuestAddress | None = None
    base: QueueState | None = None
    kick: int = -1
    call: int = -1
    error: int = -1
    enabled: bool = False

    @property
    def ready(self) -> bool:
        """Whether it is to be served once features are negotiated."""
        return self.enabled and bool(self.size) and self.kick >= 0 and self.addresses is not None


@dataclass
class BackEnd:
    """The conversation about *device*, from one connection's start to its end.

    It holds the descriptors it is given; those no longer wanted are in
    `discarded`, to be closed by the owner once it has seen to the effect.
    """

    device: Device
    discarded: list[int] = field(default_factory=list)
    failed: bool = False
    """Set by the owner: the device has failed, and only a reset helps it."""

    def __post_init__(self) -> None:
        self.rings = [_Ring() for _ in self.device.queues()]
        self.offered = self.device.offered | PROTOCOL_FEATURES | LOG_ALL
        self.features = 0
        """The features negotiated, virtio's and vhost's."""
        self.protocol_features = 0
        self.table = self._table_before = MemoryTable()
        self.channel = -1
        """The socket for requests of the back-end's own; -1 before there is one."""
        self._status = 0
        self._generation = 0
        self._message: Message | None = None

    def receive(self, message: Message) -> Effect | None:
        """Take a request and its descriptors; what the owner is to do, if anything.

        Raises ProtocolError: then the connection has come to its end.
        """
        self._message = message
        held: list[int] = list(message.fds)
        self.discarded += held
        self._table_before = self.table
        rule = RULES.get(message.request)
        if rule is None:
            raise ProtocolError(f"{message.name}: not known here")
        if rule.feature is not None and not self.protocol_features & 1 << rule.feature:
            raise ProtocolError(f"{message.name}: its protocol feature was not negotiated")
        if message.flags & abi.VHOST_USER_REPLY_MASK:
            raise ProtocolError(f"{message.name}: marked as a reply")
        if not rule.size[0] <= len(message.payload) <= rule.size[1]:
            raise ProtocolError(f"{message.name}: {len(message.payload)} bytes of payload")
        if not rule.fds[0] <= len(message.fds) <= rule.fds[1]:
            raise ProtocolError(f"{message.name}: {len(message.fds)} descriptors")
        return rule.handle(self, message)

    def finish(self, result: int = 0, error: Exception | None = None) -> Message | None:
        """The reply to the request, whose effect gave *result* or failed with *error*.

        Raises ProtocolError where it failed and the front-end has not asked to be told.
        """
        message, self._message = self._message, None
        assert message is not None
        rule = RULES[message.request]
        if error is not None:
            self.table = self._table_before
        if rule.reply is not None and error is None:
            payload, fds = rule.reply(self, message, result)
            return Message(message.request, payload, fds, _REPLY)
        acknowledged = message.need_reply and self.protocol_features & 1 << abi.VHOST_USER_PROTOCOL_F_REPLY_ACK
        if rule.reply is None and acknowledged:
            return Message(message.request, u64(error is not None), (), _REPLY)
        if error is not None:
            raise ProtocolError(f"{message.name}: {error}")
        return None

    @property
    def status(self) -> int:
        """The device status, as the front-end set it and the device is."""
        return self._status | (Status.NEEDS_RESET if self.failed else 0)

    @property
    def idle(self) -> bool:
        """Whether no ring is to be served."""
        return not any(map(self._is_served, self.rings))

    def setup(self, index: int) -> QueueSetup | None:
        """How ring *index* is to be served; None where it is not.

        Raises ProtocolError for a ring that is in no memory.
        """
        ring = self.rings[index]
        if not self._is_served(ring) or ring.addresses is None:
            return None
        layout = QueueLayout(index, ring.size, *map(self.table.guest_address, ring.addresses))
        return QueueSetup(
            layout, ring.addresses, self._base(ring), self.features, ring.kick, ring.call, ring.log_used,
            self._generation,
        )  # fmt: skip

    def stopped(self, index: int, state: QueueState) -> None:
        """Ring *index* has been stopped, for whatever reason, and goes on from there when it starts again."""
        self.rings[index].base = state

    def config_change(self) -> Message | None:
        """What to send on `channel` when the device's config space has changed; None where nobody listens."""
        if self.channel < 0 or not self.protocol_features & 1 << abi.VHOST_USER_PROTOCOL_F_CONFIG:
            return None
        # Without a wish for a reply: both ends must never wait for each other (T19).
        return Message(abi.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)

    def close(self) -> list[int]:
        """The conversation is over: every descriptor still held, to be closed."""
        held = [*self.discarded, self.channel]
        for ring in self.rings:
            held += [ring.kick, ring.call, ring.error]
        self.rings = [_Ring() for _ in self.rings]
        self.discarded, self.channel = [], -1
        return [fd for fd in held if fd >= 0]

    # What the requests do, in the order of their numbers.

    def _set_features(self, message: Message) -> Effect | None:
        features = message.number()
        if features & ~self.offered:
            raise ProtocolError(f"SET_FEATURES: {features & ~self.offered:#x} were not offered")
        if not features & Feature.VERSION_1:
            raise ProtocolError(f"SET_FEATURES: {features:#x} lacks VERSION_1, which this device needs")
        if not self.idle and (features ^ self.features) & ~LOG_ALL:
            raise ProtocolError("SET_FEATURES: changed while rings are served")
        self.features = features
        if not features & PROTOCOL_FEATURES:
            for ring in self.rings:
                ring.enabled = True
        return self._arrange_all()

    def _reset_owner(self, message: Message) -> Effect | None:
        # Deprecated, and read in several ways: all agree on the rings.
        for ring in self.rings:
            ring.enabled = False
        return self._arrange_all()

    def _set_mem_table(self, message: Message) -> Effect | None:
        count = abi.vhost_user_mem_table.from_buffer_copy(message.payload).nregions
        start, size = size_of(abi.vhost_user_mem_table), size_of(abi.vhost_user_mem_region)
        # User-mode Linux sends the room for two, however many there are.
        if count != len(message.fds) or len(message.payload) < start + count * size:
            raise ProtocolError(
                f"SET_MEM_TABLE: {count} regions, {len(message.fds)} descriptors, {len(message.payload)} bytes"
            )
        regions = [MemoryRegion.decode(message.payload[start + number * size :]) for number in range(count)]
        return self._map(MemoryTable(regions), dict(zip(regions, message.fds)))

    def _map(self, table: MemoryTable, files: dict[MemoryRegion, int]) -> Effect:
        self._table_before, self.table = self.table, table
        self._generation += 1
        return MapMemory(table, files)

    def _set_log_base(self, message: Message) -> Effect | None:
        log = abi.vhost_user_log.from_buffer_copy(message.payload)
        self._generation += 1
        return MapLog(Area(message.fds[0], log.mmap_size, log.mmap_offset))

    def _set_vring_num(self, message: Message) -> Effect | None:
        ring, index, size = self._stopped_ring(message)
        if not size_possible(size, self.features):
            kind = "size" if self.features & Feature.RING_PACKED else "power of two"
            raise ProtocolError(f"SET_VRING_NUM: {size} is no {kind} up to {QUEUE_SIZE_MAX}")
        ring.size = size
        return Arrange((index,))

    def _set_vring_addr(self, message: Message) -> Effect | None:
        wire = abi.vhost_vring_addr.from_buffer_copy(message.payload)
        ring = self._ring(message, wire.index)
        addresses = RingAddresses(
            *map(UserAddress, (wire.desc_user_addr, wire.avail_user_addr, wire.used_user_addr))
        )
        if self._is_served(ring) and addresses != ring.addresses:
            raise ProtocolError(f"SET_VRING_ADDR: ring {wire.index} is served (GET_VRING_BASE stops it)")
        for address in addresses:
            self.table.guest_address(address)
        ring.addresses = addresses
        ring.log_used = (
            GuestAddress(wire.log_guest_addr) if wire.flags & 1 << abi.VHOST_VRING_F_LOG else None
        )
        return Arrange((wire.index,))

    def _set_vring_base(self, message: Message) -> Effect | None:
        ring, _, base = self._stopped_ring(message)
        if base > 0xFFFF and not self.features & Feature.RING_PACKED:
            raise ProtocolError(f"SET_VRING_BASE: {base:#x} is no 16-bit index")
        ring.base = QueueState.from_base(base)
        return None

    def _get_vring_base(self, message: Message) -> Effect | None:
        index = abi.vhost_vring_state.from_buffer_copy(message.payload).index
        self._discard_kick(self._ring(message, index))
        return StopQueue(index)

    def _reply_vring_base(self, message: Message, result: int) -> tuple[bytes, tuple[int, ...]]:
        index = abi.vhost_vring_state.from_buffer_copy(message.payload).index
        return bytes(abi.vhost_vring_state(index, self._base(self.rings[index]).base)), ()

    def _set_vring_kick(self, message: Message) -> Effect | None:
        index, fd = self._ring_fd(message)
        if fd < 0:
            raise ProtocolError(f"SET_VRING_KICK: ring {index} without a descriptor would have to be polled (T11)")
        self._discard_kick(self.rings[index])
        self.rings[index].kick = fd
        return Arrange((index,))

    def _set_vring_call(self, message: Message) -> Effect | None:
        index, fd = self._ring_fd(message)
        self._discard(self.rings[index].call)
        self.rings[index].call = fd
        return Arrange((index,))

    def _set_vring_err(self, message: Message) -> Effect | None:
        index, fd = self._ring_fd(message)
        self._discard(self.rings[index].error)
        self.rings[index].error = fd
        return None

    def _set_protocol_features(self, message: Message) -> Effect | None:
        features = message.number()
        if features & ~OFFERED:
            raise ProtocolError(f"SET_PROTOCOL_FEATURES: {features & ~OFFERED:#x} were not offered")
        self.protocol_features = features
        return None

    def _set_vring_enable(self, message: Message) -> Effect | None:
        wire = abi.vhost_vring_state.from_buffer_copy(message.payload)
        if wire.num > 1:
            raise ProtocolError(f"SET_VRING_ENABLE: {wire.num} is neither 0 nor 1")
        self._ring(message, wire.index).enabled = bool(wire.num)
        return Arrange((wire.index,))

    def _set_backend_req_fd(self, message: Message) -> Effect | None:
        self._discard(self.channel)
        self.channel = self._keep(message.fds[0])
        return None

    def _config_part(self, message: Message) -> abi.vhost_user_config:
        part = abi.vhost_user_config.from_buffer_copy(message.payload)
        data = len(message.payload) - size_of(abi.vhost_user_config)
        if part.size != data or part.offset + part.size > abi.VHOST_USER_CONFIG_SIZE_MAX:
            raise ProtocolError(f"{message.name}: {part.size} bytes at {part.offset}, {data} in the message")
        return part

    def _get_config(self, message: Message) -> Effect | None:
        self._config_part(message)
        return None

    def _reply_config(self, message: Message, result: int) -> tuple[bytes, tuple[int, ...]]:
        part = self._config_part(message)
        data = self.device.config()[part.offset : part.offset + part.size]
        return bytes(part) + data.ljust(part.size, b"\0"), ()

    def _set_config(self, message: Message) -> Effect | None:
        part = self._config_part(message)
        self.device.write_config(part.offset, message.payload[size_of(abi.vhost_user_config) :])
        return None

    def _inflight(self, message: Message) -> abi.vhost_user_inflight:
        if len(message.payload) not in _INFLIGHT:
            raise ProtocolError(f"{message.name}: {len(message.payload)} bytes of payload")
        wire = abi.vhost_user_inflight.from_buffer_copy(
            message.payload.ljust(size_of(abi.vhost_user_inflight), b"\0")
        )
        size = wire.queue_size
        if not 0 < wire.num_queues <= len(self.rings) or not size_possible(size, self.features):
            raise ProtocolError(f"{message.name}: {wire.num_queues} rings of {size}")
        return wire

    def _get_inflight_fd(self, message: Message) -> Effect | None:
        wire = self._inflight(message)
        return NewInflight(inflight_area_size(wire.num_queues, wire.queue_size, self.features))

    def _reply_inflight(self, message: Message, result: int) -> tuple[bytes, tuple[int, ...]]:
        wire = self._inflight(message)
        wire.mmap_size = inflight_area_size(wire.num_queues, wire.queue_size, self.features)
        wire.mmap_offset = 0
        return bytes(wire)[: len(message.payload)], (result,)

    def _set_inflight_fd(self, message: Message) -> Effect | None:
        wire = self._inflight(message)
        if not self.idle:
            raise ProtocolError("SET_INFLIGHT_FD: rings are served")
        length = inflight_area_size(wire.num_queues, wire.queue_size, self.features)
        if wire.mmap_size < length:
            raise ProtocolError(f"SET_INFLIGHT_FD: {wire.mmap_size} bytes are too few")
        self._generation += 1
        area = Area(message.fds[0], wire.mmap_size, wire.mmap_offset)
        return MapInflight(area, length, wire.queue_size, self.features)

    def _reset_device(self, message: Message) -> Effect | None:
        self._forget()
        return Reset()

    def _add_mem_reg(self, message: Message) -> Effect | None:
        region = self._single_region(message)
        return self._map(self.table.with_region(region), {region: message.fds[0]})

    def _rem_mem_reg(self, message: Message) -> Effect | None:
        table, _ = self.table.without(self._single_region(message))
        return self._map(table, {})

    @staticmethod
    def _single_region(message: Message) -> MemoryRegion:
        return MemoryRegion.decode(message.payload[size_of(abi.vhost_user_mem_table) :])

    def _set_status(self, message: Message) -> Effect | None:
        status = message.number()
        if status > 0xFF:
            raise ProtocolError(f"SET_STATUS: {status:#x} is no device status")
        self._status = status
        if status == 0:
            self._forget()
            return Reset()
        return None

    def _nothing(self, message: Message) -> Effect | None:
        """Its reply is all there is to it, or the note it wants taken is of no use here (SET_OWNER, SET_LOG_FD)."""
        return None

    # What they share.

    def _is_served(self, ring: _Ring) -> bool:
        return bool(self.features) and ring.ready

    def _base(self, ring: _Ring) -> QueueState:
        return ring.base or QueueState.start(self.features)

    def _ring(self, message: Message, index: int) -> _Ring:
        if index >= len(self.rings):
            raise ProtocolError(f"{message.name}: ring {index} of {len(self.rings)}")
        return self.rings[index]

    def _stopped_ring(self, message: Message) -> tuple[_Ring, int, int]:
        wire = abi.vhost_vring_state.from_buffer_copy(message.payload)
        ring = self._ring(message, wire.index)
        if self._is_served(ring):
            raise ProtocolError(f"{message.name}: ring {wire.index} is served (GET_VRING_BASE stops it; T15)")
        return ring, wire.index, wire.num

    def _ring_fd(self, message: Message) -> tuple[int, int]:
        number = message.number()
        index, no_fd = number & abi.VHOST_USER_VRING_IDX_MASK, bool(number & abi.VHOST_USER_VRING_NOFD_MASK)
        if number >> 9 or no_fd == bool(message.fds):
            raise ProtocolError(f"{message.name}: {number:#x} with {len(message.fds)} descriptors")
        self._ring(message, index)
        return index, -1 if no_fd else self._keep(message.fds[0])

    def _keep(self, fd: int) -> int:
        self.discarded.remove(fd)
        return fd

    def _discard(self, fd: int) -> None:
        if fd >= 0:
            self.discarded.append(fd)

    def _discard_kick(self, ring: _Ring) -> None:
        self._discard(ring.kick)
        ring.kick = -1

    def _arrange_all(self) -> Effect:
        return Arrange(tuple(range(len(self.rings))))

    def _forget(self) -> None:
        """A reset: no ring is set up any more; memory and protocol features stay (RESET_DEVICE)."""
        for ring in self.rings:
            self._discard_kick(ring)
        # Where the driver's interrupts are is told once, not after each reset.
        self.rings = [_Ring(call=ring.call, error=ring.error) for ring in self.rings]
        self.features = 0
        self._status = 0
        self.failed = False


Handler = Callable[[BackEnd, Message], Effect | None]
Reply = Callable[[BackEnd, Message, int], tuple[bytes, tuple[int, ...]]]


class Rule(NamedTuple):
    """What a request looks like: bytes of payload and descriptors, from and to; what it does and answers."""

    handle: Handler
    size: tuple[int, int] = (0, 0)
    fds: tuple[int, int] = (0, 0)
    reply: Reply | None = None
    feature: int | None = None
    """The protocol feature bit it belongs to."""


def _reply_number(number: Callable[[BackEnd], int]) -> Reply:
    return lambda backend, message, result: (u64(number(backend)), ())


_NUMBER = (8, 8)
_CONFIG_SIZE = size_of(abi.vhost_user_config)
_CONFIG = (_CONFIG_SIZE, _CONFIG_SIZE + abi.VHOST_USER_CONFIG_SIZE_MAX)
_TABLE_SIZE = size_of(abi.vhost_user_mem_table)
_REGION_SIZE = size_of(abi.vhost_user_mem_region)
_INFLIGHT = (_INFLIGHT_SIZE, 24)

RULES = {
    abi.VHOST_USER_GET_FEATURES: Rule(
        BackEnd._nothing, reply=_reply_number(lambda backend: backend.offered)
    ),
    abi.VHOST_USER_SET_FEATURES: Rule(BackEnd._set_features, _NUMBER),
    abi.VHOST_USER_SET_OWNER: Rule(BackEnd._nothing),
    abi.VHOST_USER_RESET_OWNER: Rule(BackEnd._reset_owner),
    abi.VHOST_USER_SET_MEM_TABLE: Rule(
        BackEnd._set_mem_table, (_TABLE_SIZE, _TABLE_SIZE + FDS_MAX * _REGION_SIZE), (0, FDS_MAX)
    ),
    abi.VHOST_USER_SET_LOG_BASE: Rule(
        BackEnd._set_log_base, (16, 16), (1, 1), _reply_number(lambda backend: 0),
        abi.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
    ),
    abi.VHOST_USER_SET_LOG_FD: Rule(BackEnd._nothing, fds=(1, 1)),
    abi.VHOST_USER_SET_VRING_NUM: Rule(BackEnd._set_vring_num, _NUMBER),
    abi.VHOST_USER_SET_VRING_ADDR: Rule(BackEnd._set_vring_addr, (40, 40)),
    abi.VHOST_USER_SET_VRING_BASE: Rule(BackEnd._set_vring_base, _NUMBER),
    abi.VHOST_USER_GET_VRING_BASE: Rule(
        BackEnd._get_vring_base, _NUMBER, reply=BackEnd._reply_vring_base
    ),
    abi.VHOST_USER_SET_VRING_KICK: Rule(BackEnd._set_vring_kick, _NUMBER, (0, 1)),
    abi.VHOST_USER_SET_VRING_CALL: Rule(BackEnd._set_vring_call, _NUMBER, (0, 1)),
    abi.VHOST_USER_SET_VRING_ERR: Rule(BackEnd._set_vring_err, _NUMBER, (0, 1)),
    abi.VHOST_USER_GET_PROTOCOL_FEATURES: Rule(
        BackEnd._nothing, reply=_reply_number(lambda backend: OFFERED)
    ),
    abi.VHOST_USER_SET_PROTOCOL_FEATURES: Rule(BackEnd._set_protocol_features, _NUMBER),
    abi.VHOST_USER_GET_QUEUE_NUM: Rule(
        BackEnd._nothing, reply=_reply_number(lambda backend: len(backend.rings)),
        feature=abi.VHOST_USER_PROTOCOL_F_MQ,
    ),
    abi.VHOST_USER_SET_VRING_ENABLE: Rule(BackEnd._set_vring_enable, _NUMBER),
    abi.VHOST_USER_SET_BACKEND_REQ_FD: Rule(
        BackEnd._set_backend_req_fd, fds=(1, 1), feature=abi.VHOST_USER_PROTOCOL_F_BACKEND_REQ
    ),
    abi.VHOST_USER_GET_CONFIG: Rule(
        BackEnd._get_config, _CONFIG, reply=BackEnd._reply_config, feature=abi.VHOST_USER_PROTOCOL_F_CONFIG
    ),
    abi.VHOST_USER_SET_CONFIG: Rule(BackEnd._set_config, _CONFIG, feature=abi.VHOST_USER_PROTOCOL_F_CONFIG),
    abi.VHOST_USER_GET_INFLIGHT_FD: Rule(
        BackEnd._get_inflight_fd, _INFLIGHT, reply=BackEnd._reply_inflight,
        feature=abi.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    ),
    abi.VHOST_USER_SET_INFLIGHT_FD: Rule(
        BackEnd._set_inflight_fd, _INFLIGHT, (1, 1), feature=abi.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
    ),
    abi.VHOST_USER_RESET_DEVICE: Rule(
        BackEnd._reset_device, feature=abi.VHOST_USER_PROTOCOL_F_RESET_DEVICE
    ),
    abi.VHOST_USER_GET_MAX_MEM_SLOTS: Rule(
        BackEnd._nothing, reply=_reply_number(lambda backend: REGIONS_MAX),
        feature=abi.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    ),
    abi.VHOST_USER_ADD_MEM_REG: Rule(
        BackEnd._add_mem_reg, (_TABLE_SIZE + _REGION_SIZE,) * 2, (1, 1),
        feature=abi.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    ),
    abi.VHOST_USER_REM_MEM_REG: Rule(
        BackEnd._rem_mem_reg, (_TABLE_SIZE + _REGION_SIZE,) * 2, (0, 1),
        feature=abi.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    ),
    abi.VHOST_USER_SET_STATUS: Rule(
        BackEnd._set_status, _NUMBER, feature=abi.VHOST_USER_PROTOCOL_F_STATUS
    ),
    abi.VHOST_USER_GET_STATUS: Rule(
        BackEnd._nothing, reply=_reply_number(lambda backend: backend.status),
        feature=abi.VHOST_USER_PROTOCOL_F_STATUS,
    ),
}  # fmt: skip
"""Every request that is known; all others end the connection (T14, T18)."""
