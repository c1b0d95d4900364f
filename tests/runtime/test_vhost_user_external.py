"""A machine's device that another process serves: up, down, reset, and what becomes of it when that dies."""

import os
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from runtime.rigs import PATIENCE, eventually, nothing_left
from runtime.scripted_back_end import PROTOCOL, REPLY, ScriptedBackEnd, number, silence

from lguestlib.abi import virtio_blk as blk
from lguestlib.abi import virtio_mmio as mmio
from lguestlib.abi import vhost_user as abi
from lguestlib.abi.eventfd import SIGNAL
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.region import Region
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.backend.script import Script
from lguestlib.runtime.inprocess.machine import InprocessMachine
from lguestlib.runtime.inprocess.shell import shell
from lguestlib.runtime.machine import PowerOff, Stopped
from lguestlib.runtime.vhost_user import external
from lguestlib.runtime.vhost_user.external import ExternalDeviceRunner, ExternalDisk
from lguestlib.runtime.vhost_user.frontend import BackEndError
from lguestlib.runtime.vhost_user.listen import Listener
from lguestlib.runtime.vhost_user.server import Server
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import RING_FEATURES, Device, Queue
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.errors import QueueLayoutError
from lguestlib.virtio.features import Feature
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.mmio_driver import MmioDriver
from lguestlib.virtio.split_driver import Buffer, SplitDriverQueue
from lguestlib.virtio.status import Status
from lguestlib.virtio.vhost_user.frontend import PROTOCOL_FEATURES
from lguestlib.virtio.vhost_user.message import Message

SIZE = 1 << 20
HEADER, DATA, STATUS = (GuestAddress(0x10_0000 + 0x1000 * number) for number in range(3))
MQ = 1 << blk.VIRTIO_BLK_F_MQ


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(external, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(external, "REPLY_SECONDS", 1.0)
    with nothing_left():
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.sock"


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([Region.memfd(GuestAddress(0), 16 << 20)]) as made:
        yield made


@pytest.fixture
def reports() -> list[str]:
    return []


def taken(fd: int) -> int:
    """The count of the eventfd *fd*, which has been signalled or is about to be."""
    assert select.select([fd], [], [], PATIENCE)[0], "nobody has signalled"
    return int.from_bytes(os.read(fd, 8), "little")


class Served:
    """A device behind the socket *path*, in this process as if it were another."""

    def __init__(self, path: Path, device: Device) -> None:
        self._listener = Listener(str(path))
        self.said: list[str] = []
        self.server = Server(device, self._listener.socket, self.said.append)
        self.server.start()

    def die(self) -> None:
        """Nobody is there any more."""
        self.server.close()
        self._listener.close()


class Disk(Served):
    """A scratch disk there."""

    def __init__(self, path: Path, device: Callable[[FileDisk], Block] = Block) -> None:
        self.disk = FileDisk.scratch(SIZE)
        super().__init__(path, device(self.disk))

    def close(self) -> None:
        self.die()
        self.disk.close()


class Guest:
    """A machine's runner for the disk behind *path*, and the driver of its first queue."""

    def __init__(self, path: Path, memory: GuestMemory, reports: list[str]) -> None:
        self.memory = memory
        self.device = ExternalDisk(str(path), "block0")
        self.runner = ExternalDeviceRunner(self.device, memory, reports.append)
        self.driver = MmioDriver(self.runner)
        self.layout = QueueLayout.contiguous(0, 16, GuestAddress(0x1000))
        self.features = 0
        self._ring: SplitDriverQueue[int] | None = None

    def start(self, wanted: int = -1) -> None:
        self.release()
        self.features = self.driver.negotiate(wanted)
        self._ring = SplitDriverQueue(self.layout, self.memory, self.features)
        self.driver.enable_queue(self.layout)
        self.driver.ready()

    def submit(self, kind: int, sector: int, data: bytes = b"") -> None:
        """A request about one sector."""
        assert self._ring
        self.memory.write(HEADER, bytes(blk.virtio_blk_outhdr(kind, 0, sector)))
        self.memory.write(STATUS, b"\xff")
        self.memory.write(DATA, data)
        buffers, status = [Buffer(DATA, 512)], [Buffer(STATUS, 1)]
        out = [Buffer(HEADER, 16)] + (buffers if kind == blk.VIRTIO_BLK_T_OUT else [])
        self._ring.add(out, status if kind == blk.VIRTIO_BLK_T_OUT else buffers + status, sector)
        if self._ring.kick_needed():
            self.runner.kicks[0].signal()

    def served(self) -> bool:
        """Whether the request has come back."""
        assert self._ring
        return bool(self._ring.reap())

    def write(self, sector: int, data: bytes) -> int:
        """Write a sector and return the status."""
        self.submit(blk.VIRTIO_BLK_T_OUT, sector, data.ljust(512, b"\0"))
        eventually(self.served, "the write's end")
        return self.memory.read(STATUS, 1)[0]

    def read(self, sector: int) -> bytes:
        """A sector, without the zeros at its end."""
        self.submit(blk.VIRTIO_BLK_T_IN, sector)
        eventually(self.served, "the read's end")
        assert self.memory.read(STATUS, 1) == b"\0"
        return self.memory.read(DATA, 512).rstrip(b"\0")

    @property
    def needs_reset(self) -> bool:
        return bool(self.driver.status & Status.NEEDS_RESET)

    def interrupts(self) -> int:
        return int.from_bytes(self.runner.read(mmio.VIRTIO_MMIO_INTERRUPT_STATUS, 4), "little")

    def release(self) -> None:
        if self._ring:
            self._ring.release()
            self._ring = None

    def close(self) -> None:
        self.release()
        self.runner.close()
        self.device.close()


@pytest.fixture
def opened(memory: GuestMemory) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def disk(path: Path, opened: ExitStack) -> Disk:
    made = Disk(path)
    opened.callback(made.close)
    return made


@pytest.fixture
def guest(disk: Disk, path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack) -> Guest:
    made = Guest(path, memory, reports)
    opened.callback(made.close)
    return made


def scripted_guest(
    backend: ScriptedBackEnd, path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack
) -> Guest:
    opened.enter_context(backend)
    made = Guest(path, memory, reports)
    opened.callback(made.close)
    return made


def test_what_the_guest_writes_is_on_the_disk_there(guest: Guest, disk: Disk) -> None:
    guest.start()
    assert guest.write(3, b"hello") == 0
    assert guest.read(3) == b"hello"
    content = bytearray(512)
    disk.disk.read([memoryview(content)], 3 * 512)
    assert content.rstrip(b"\0") == b"hello"
    assert guest.write(SIZE // 512, b"past the end") == 1


def test_it_interrupts_through_the_descriptor_it_was_given(guest: Guest) -> None:
    guest.start()
    guest.write(0, b"x")
    assert taken(guest.runner.interrupt.fd) >= 1
    assert os.get_blocking(guest.runner.interrupt.fd)


def test_used_buffers_are_told_of_as_long_as_the_driver_is_live(guest: Guest) -> None:
    assert guest.interrupts() == 0
    guest.start()
    for _ in range(3):
        assert guest.interrupts() == mmio.VIRTIO_MMIO_INT_VRING
        guest.runner.write(mmio.VIRTIO_MMIO_INTERRUPT_ACK, (3).to_bytes(4, "little"))
    guest.driver.reset()
    assert guest.interrupts() == 0


def test_a_guest_is_offered_what_both_can_and_nothing_of_the_protocols_own(
    path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack
) -> None:
    there = (1 << 64) - 1 & ~int(Feature.RING_EVENT_IDX)
    backend = ScriptedBackEnd(features=there, path=path)
    guest = scripted_guest(backend, path, memory, reports, opened)
    offered = guest.driver.offered()
    ring = int(Feature.VERSION_1 | Feature.RING_INDIRECT_DESC | Feature.RING_RESET)
    # Of the bits that are no device type's, those of the rings we know.
    assert offered & ((1 << 50) - (1 << 24)) == ring
    assert offered & 1 << blk.VIRTIO_BLK_F_FLUSH and not offered & 1 << blk.VIRTIO_BLK_F_SECURE_ERASE
    guest.start(offered & ~(1 << blk.VIRTIO_BLK_F_RO))
    told = [message for message in backend.received if message.request == abi.VHOST_USER_SET_FEATURES]
    assert struct.unpack("<Q", told[-1].payload)[0] == guest.features | PROTOCOL_FEATURES


def test_t4_a_queue_that_is_reset_begins_anew_over_there(
    path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack
) -> None:
    disk = Disk(path, lambda disk: Block(disk, num_queues=2))
    opened.callback(disk.close)
    guest = Guest(path, memory, reports)
    opened.callback(guest.close)
    features = guest.driver.negotiate(int(RING_FEATURES | Feature.RING_RESET) | MQ)
    assert features & Feature.RING_RESET
    layouts = [QueueLayout.contiguous(index, 16, GuestAddress(0x1000 * (index + 1))) for index in range(2)]
    rings = [SplitDriverQueue[int](layout, memory, features) for layout in layouts]
    for layout in layouts:
        guest.driver.enable_queue(layout)
    guest.driver.ready()

    def write(index: int) -> None:
        memory.write(HEADER, bytes(blk.virtio_blk_outhdr(blk.VIRTIO_BLK_T_OUT, 0, index)))
        memory.write(STATUS, b"\xff")
        rings[index].add([Buffer(HEADER, 16), Buffer(DATA, 512)], [Buffer(STATUS, 1)], 0)
        if rings[index].kick_needed():
            guest.runner.kicks[index].signal()
        eventually(lambda: bool(rings[index].reap()), "the write's end")
        assert memory.read(STATUS, 1) == b"\0"

    for turn, size in enumerate((4, 64, 16)):
        for index in (0, 1, 1):
            write(index)
        guest.driver.reset_queue(1)
        rings[1].release()
        # What was there is the guest's to use for other things now.
        memory.write(layouts[1].descriptors, b"\xff" * 256)
        write(0)
        assert memory.read(layouts[1].descriptors, 256) == b"\xff" * 256
        layouts[1] = QueueLayout.contiguous(1, size, GuestAddress(0x8000 + 0x1000 * turn))
        rings[1] = SplitDriverQueue[int](layouts[1], memory, features)
        guest.driver.enable_queue(layouts[1])
    write(1)
    for ring in rings:
        ring.release()
    assert reports == [] and disk.said == []


def test_t8_every_ring_is_kicked_once_when_it_starts(
    path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack
) -> None:
    """For back-ends that do not look by themselves at what came while nobody was there."""
    backend = ScriptedBackEnd(path=path)
    guest = scripted_guest(backend, path, memory, reports, opened)
    guest.start()
    assert taken(backend.fd(abi.VHOST_USER_SET_VRING_KICK)) == 1


def test_a_reset_stops_every_queue_and_then_resets_the_device_there(
    path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack
) -> None:
    backend = ScriptedBackEnd(protocol=PROTOCOL | 1 << abi.VHOST_USER_PROTOCOL_F_RESET_DEVICE, path=path)
    guest = scripted_guest(backend, path, memory, reports, opened)
    guest.start()
    guest.driver.reset()
    assert backend.names[-2:] == ["GET_VRING_BASE", "RESET_DEVICE"]
    guest.start()
    assert backend.names[-3:] == ["SET_VRING_KICK", "SET_VRING_ENABLE", "GET_FEATURES"]


def test_resets_with_a_request_in_flight(guest: Guest, reports: list[str]) -> None:
    for turn in range(300):
        guest.start()
        guest.submit(blk.VIRTIO_BLK_T_IN, turn % 100)
        guest.driver.reset()
    guest.start()
    assert guest.write(1, b"after all") == 0 and guest.read(1) == b"after all"
    assert reports == []


def test_t7_a_queue_that_is_stopped_alone_may_be_enabled_again(guest: Guest) -> None:
    guest.start()
    guest.write(1, b"before")
    guest.runner.write(mmio.VIRTIO_MMIO_QUEUE_SEL, bytes(4))
    guest.runner.write(mmio.VIRTIO_MMIO_QUEUE_READY, bytes(4))
    assert guest.runner.read(mmio.VIRTIO_MMIO_QUEUE_READY, 4) == bytes(4)
    guest.release()
    guest._ring = SplitDriverQueue(guest.layout, guest.memory, guest.features)
    guest.driver.enable_queue(guest.layout)
    assert guest.read(1) == b"before"


class ManyQueues(Block):
    """A disk with four queues."""

    @property
    def features(self) -> int:
        return super().features | MQ

    def config(self) -> bytes:
        config = blk.virtio_blk_config.from_buffer_copy(super().config().ljust(72, b"\0"))
        config.num_queues = 4
        return bytes(config)

    def queues(self) -> tuple[Queue, ...]:
        (queue, *_) = super().queues()
        return (queue,) * 4


def test_there_are_as_many_queues_as_the_back_end_has(
    path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack
) -> None:
    opened.callback(Disk(path, ManyQueues).close)
    guest = Guest(path, memory, reports)
    opened.callback(guest.close)
    assert [queue.name for queue in guest.runner.queues] == [f"requests{index}" for index in range(4)]
    assert guest.driver.offered() & MQ
    assert [guest.driver.queue_size_max(index) for index in range(5)] == [256, 256, 256, 256, 0]
    guest.layout = QueueLayout.contiguous(3, 16, GuestAddress(0x1000))
    guest.start()
    guest.submit(blk.VIRTIO_BLK_T_IN, 0)
    guest.runner.kicks[3].signal()
    eventually(guest.served, "the answer on the last queue")


@pytest.mark.parametrize(
    ("told", "queues", "offered"),
    [(0, 1, False), (1, 1, True), (2, 2, True), (3, 1, False), (0xFFFF, 1, False)],
)
def test_a_number_of_queues_that_cannot_be_is_one_queue(
    path: Path, told: int, queues: int, offered: bool, opened: ExitStack
) -> None:
    def config(message: Message) -> Message:
        config = blk.virtio_blk_config(capacity=8, num_queues=told)
        return Message(message.request, message.payload[:12] + bytes(config)[:60], (), REPLY)

    features = int(RING_FEATURES) | PROTOCOL_FEATURES | MQ
    opened.enter_context(ScriptedBackEnd(features, answers={abi.VHOST_USER_GET_CONFIG: config}, path=path))
    disk = ExternalDisk(str(path), "block0")
    opened.callback(disk.close)
    assert (len(disk.queues()), bool(disk.offered & MQ)) == (queues, offered)


def test_a_short_config_space_offers_no_feature_that_is_not_in_it(path: Path, opened: ExitStack) -> None:
    def config(message: Message) -> Message:
        size = struct.unpack_from("<I", message.payload, 4)[0]
        payload = message.payload[:12] + bytes(size) if size <= 36 else b""
        return Message(message.request, payload, (), REPLY)

    opened.enter_context(
        ScriptedBackEnd((1 << 64) - 1, answers={abi.VHOST_USER_GET_CONFIG: config}, path=path)
    )
    disk = ExternalDisk(str(path), "block0")
    opened.callback(disk.close)
    assert len(disk.config()) == 36
    assert not disk.offered & (1 << blk.VIRTIO_BLK_F_DISCARD | 1 << blk.VIRTIO_BLK_F_WRITE_ZEROES)
    assert disk.offered & 1 << blk.VIRTIO_BLK_F_FLUSH


NO_CONFIG = "the back-end does not offer the protocol feature CONFIG"


@pytest.mark.parametrize(
    ("features", "protocol", "reason"),
    [
        (PROTOCOL_FEATURES, PROTOCOL, "it does not offer VERSION_1, and is too old for this"),
        (int(RING_FEATURES) | PROTOCOL_FEATURES, 1 << 3, NO_CONFIG),
        (int(RING_FEATURES), PROTOCOL, NO_CONFIG),
    ],
)
def test_a_back_end_that_cannot_be_a_disk_is_refused(
    path: Path, features: int, protocol: int, reason: str, opened: ExitStack
) -> None:
    opened.enter_context(ScriptedBackEnd(features, protocol, path=path))
    with pytest.raises(BackEndError, match=f"^{path}: {reason}$"):
        ExternalDisk(str(path), "block0")


def test_the_config_space_is_the_back_ends(
    path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack
) -> None:
    space = bytearray(blk.virtio_blk_config(capacity=8, wce=1))[:60]

    def get(message: Message) -> Message:
        return Message(message.request, message.payload[:12] + bytes(space), (), REPLY)

    def set(message: Message) -> Message:
        offset = message.payload[0]
        if offset != 32:
            return number(message, 1)
        space[offset : offset + len(message.payload) - 12] = message.payload[12:]
        return number(message, 0)

    backend = ScriptedBackEnd(
        answers={abi.VHOST_USER_GET_CONFIG: get, abi.VHOST_USER_SET_CONFIG: set}, path=path
    )
    guest = scripted_guest(backend, path, memory, reports, opened)
    assert guest.driver.config(0, 8) == (8).to_bytes(8, "little")
    # Neither a field that is not to be written nor one past the end does harm.
    for offset, data in ((32, b"\0"), (0, bytes(8)), (59, bytes(4)), (4000, bytes(4))):
        guest.runner.write(mmio.VIRTIO_MMIO_CONFIG + offset, data)
    assert (guest.driver.config(32, 1), guest.driver.config(0, 8)) == (b"\0", (8).to_bytes(8, "little"))
    asked = backend.names.count("GET_CONFIG")
    guest.driver.config(0, 8)
    assert backend.names.count("GET_CONFIG") == asked, "nothing had changed"

    guest.start()
    generation = guest.runner.read(mmio.VIRTIO_MMIO_CONFIG_GENERATION, 4)
    space[0] = 16
    channel = backend.channel()
    channel.send(Message(abi.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG))
    eventually(lambda: bool(guest.interrupts() & mmio.VIRTIO_MMIO_INT_CONFIG), "the config interrupt")
    taken(guest.runner.interrupt.fd)
    assert guest.driver.config(0, 8) == (16).to_bytes(8, "little")
    assert guest.runner.read(mmio.VIRTIO_MMIO_CONFIG_GENERATION, 4) != generation
    assert not guest.needs_reset
    channel.close()


def test_a_back_end_that_dies_fails_its_device_and_one_that_comes_back_is_taken_at_the_reset(
    guest: Guest, disk: Disk, path: Path, reports: list[str], opened: ExitStack
) -> None:
    guest.start()
    guest.write(1, b"before")
    taken(guest.runner.interrupt.fd)
    disk.die()
    eventually(lambda: guest.needs_reset, "the device's cry for a reset")
    assert guest.interrupts() & mmio.VIRTIO_MMIO_INT_CONFIG
    taken(guest.runner.interrupt.fd)
    assert reports == [f"block0: {path}: the back-end has gone; the device has stopped until it is reset"]
    # A conversation that has only just begun is not begun again at once.
    time.sleep(external.RETRY_SECONDS)
    opened.callback(Disk(path).close)
    guest.start()
    assert not guest.needs_reset and guest.runner.failure is None
    assert guest.write(1, b"again") == 0 and guest.read(1) == b"again"
    assert len(reports) == 1


def test_a_driver_that_is_ready_before_the_back_end_waits_for_it(
    guest: Guest, disk: Disk, path: Path, reports: list[str], opened: ExitStack
) -> None:
    guest.start()
    disk.die()
    eventually(lambda: guest.needs_reset, "the device's cry for a reset")
    time.sleep(external.RETRY_SECONDS)
    # As often as it likes: it is told once.
    for _ in range(20):
        guest.start()
    assert not guest.needs_reset
    guest.submit(blk.VIRTIO_BLK_T_IN, 0)
    time.sleep(3 * external.RETRY_SECONDS)
    assert not guest.served()
    assert guest.driver.config(0, 8) == (SIZE // 512).to_bytes(8, "little"), "as it was known last"
    opened.callback(Disk(path).close)
    eventually(guest.served, "the request that was waiting")
    gone, waits, back = reports
    assert gone.endswith("the back-end has gone; the device has stopped until it is reset")
    assert waits.startswith(f"block0: {path}: ") and waits.endswith("; trying again every 0.1 s")
    assert back == f"block0: {path}: the back-end is there"
    assert guest.write(0, b"x") == 0


def test_a_back_end_that_never_stays_is_not_tried_without_pause(
    path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack
) -> None:
    attempts: list[float] = []
    backend = ScriptedBackEnd(path=path)
    guest = scripted_guest(backend, path, memory, reports, opened)
    backend.end()
    backend.connection.close()

    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            with ScriptedBackEnd(path=path) as fickle:

                def leave(message: Message) -> None:
                    attempts.append(time.monotonic())
                    fickle.socket.shutdown(2)

                fickle.answer(abi.VHOST_USER_SET_MEM_TABLE, leave)
                while not ended.is_set() and not any(
                    message.request == abi.VHOST_USER_SET_MEM_TABLE for message in fickle.received
                ):
                    time.sleep(0.002)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    end = time.monotonic() + 10 * external.RETRY_SECONDS
    while time.monotonic() < end:
        # A driver as eager as can be.
        guest.start()
    ended.set()
    thread.join()
    assert 2 <= len(attempts) <= 12
    assert len(reports) < 40


def test_another_device_in_its_place_is_not_taken(
    guest: Guest, disk: Disk, path: Path, reports: list[str], opened: ExitStack
) -> None:
    disk.die()
    eventually(lambda: guest.runner.failure is not None, "the end of the first")
    time.sleep(external.RETRY_SECONDS)
    opened.enter_context(ScriptedBackEnd(path=path))
    guest.start()
    assert reports[-1] == (
        f"block0: {path}: the back-end there has less to offer than the one before; trying again every 0.1 s"
    )


def test_a_device_that_the_back_end_says_has_failed_needs_a_reset(
    path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack
) -> None:
    backend = ScriptedBackEnd(path=path)
    guest = scripted_guest(backend, path, memory, reports, opened)
    guest.start()
    os.write(backend.fd(abi.VHOST_USER_SET_VRING_ERR), SIGNAL)
    eventually(lambda: guest.needs_reset, "the device's cry for a reset")
    said = "the back-end says that the device has failed"
    assert reports == [f"block0: {path}: {said}; the device has stopped until it is reset"]
    guest.start()
    assert not guest.needs_reset and guest.runner.failure is None
    assert backend.names.count("SET_MEM_TABLE") == 2 and backend.names.count("GET_VRING_BASE") == 1


def test_a_broken_ring_is_reported_by_who_serves_it_and_a_reset_mends_it(
    guest: Guest, disk: Disk, reports: list[str]
) -> None:
    guest.start()
    guest.memory.write(GuestAddress(guest.layout.available + 2), (1000).to_bytes(2, "little"))
    guest.runner.kicks[0].signal()
    eventually(lambda: guest.needs_reset, "the device's cry for a reset")
    guest.start()
    assert guest.write(1, b"well again") == 0
    assert len(reports) == 1 and len(disk.said) == 1 and "avail index runs ahead" in disk.said[0]


@pytest.mark.parametrize("address", [0x1001, 16 << 20, 0xFFFF_FFFF_FFFF_F000])
def test_s32_a_ring_that_cannot_be_fails_the_device_and_not_the_conversation(
    guest: Guest, reports: list[str], address: int
) -> None:
    guest.driver.negotiate(-1)
    guest.driver.enable_queue(QueueLayout.contiguous(0, 16, GuestAddress(address)))
    guest.driver.ready()
    assert isinstance(guest.runner.failure, QueueLayoutError) and guest.needs_reset
    assert len(reports) == 1 and reports[0].startswith("block0: queue 0: impossible ring (")
    guest.start()
    assert guest.write(1, b"fine") == 0


@pytest.mark.parametrize("request_number", [abi.VHOST_USER_SET_MEM_TABLE, abi.VHOST_USER_SET_VRING_KICK])
@pytest.mark.parametrize("answer", ["refusal", "silence", "nonsense"])
def test_a_back_end_that_will_not_start_fails_the_device_in_bounded_time(
    request_number: int, answer: str, path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(external, "REPLY_SECONDS", 0.1)
    backend = ScriptedBackEnd(path=path)
    guest = scripted_guest(backend, path, memory, reports, opened)
    answers = {
        "refusal": lambda message: number(message, 1),
        "silence": silence,
        "nonsense": lambda message: bytes(99),
    }
    backend.answer(request_number, answers[answer])
    start = time.monotonic()
    guest.start()
    assert time.monotonic() - start < 0.5
    assert guest.needs_reset
    assert len(reports) == 1 and reports[0].startswith(f"block0: {path}: ")


def test_a_reset_ends_although_the_back_end_does_not_answer(
    path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "REPLY_SECONDS", 0.1)
    backend = ScriptedBackEnd(answers={abi.VHOST_USER_GET_VRING_BASE: silence}, path=path)
    guest = scripted_guest(backend, path, memory, reports, opened)
    guest.start()
    start = time.monotonic()
    guest.driver.reset()
    assert time.monotonic() - start < 0.5
    assert guest.driver.status == Status(0) and guest.runner.failure is None
    assert len(reports) == 1 and "GET_VRING_BASE: no answer for 0.1 s" in reports[0]


def test_memory_that_is_this_processs_alone_is_refused(disk: Disk, path: Path, opened: ExitStack) -> None:
    device = ExternalDisk(str(path), "block0")
    opened.callback(device.close)
    memory = opened.enter_context(GuestMemory.anonymous(1 << 20))
    with pytest.raises(ValueError, match="Region.memfd"):
        ExternalDeviceRunner(device, memory, print)


class SlowBlock(Block):
    """A disk that takes its time over each request."""

    def __init__(self, disk: FileDisk, seconds: float = 0.1) -> None:
        super().__init__(disk, "slow")
        self._seconds = seconds

    def queues(self) -> tuple[Queue, ...]:
        (queue, *_) = super().queues()

        def serve(chain: Chain) -> int:
            time.sleep(self._seconds)
            return queue.service(chain)

        return (Queue("requests", serve),)


def test_finishing_sees_requests_through_and_can_be_given_up(
    path: Path, memory: GuestMemory, reports: list[str], opened: ExitStack
) -> None:
    opened.callback(Disk(path, SlowBlock).close)
    guest = Guest(path, memory, reports)
    opened.callback(guest.close)
    guest.start()
    for sector in range(3):
        guest.submit(blk.VIRTIO_BLK_T_OUT, sector, b"x" * 512)
    start = time.monotonic()
    guest.runner.finish(lambda: False)
    assert guest._ring and len(guest._ring.reap()) == 3
    assert 0.25 < time.monotonic() - start < 2
    guest.start()
    for sector in range(3):
        guest.submit(blk.VIRTIO_BLK_T_OUT, sector, b"x" * 512)
    guest.runner.finish(lambda: True)
    assert len(guest._ring.reap()) < 3
    assert reports == []


def run(path: Path, reports: list[str], *commands: bytes) -> tuple[object, str]:
    """A session with the shell of a guest that has the disk at *path*, and what it showed."""
    screen = os.memfd_create("screen")
    device = ExternalDisk(str(path), "block0")
    memory = GuestMemory([Region.memfd(GuestAddress(0), 16 << 20)])
    try:
        with Script(commands, screen, lambda error: None) as script:
            with InprocessMachine(memory, shell(""), reports.append) as made:
                made.add(device)
                made.add(Console(script))
                made.start()
                outcome = made.wait()
                made.finish()
            return outcome, os.pread(screen, 1 << 20, 0).decode()
    finally:
        device.close()
        os.close(screen)


def test_the_guest_in_this_process_drives_it(disk: Disk, path: Path, reports: list[str]) -> None:
    outcome, shown = run(path, reports, b"write 3 hello", b"read 3", b"reset 20", b"read 3", b"flush")
    assert outcome == PowerOff(0)
    assert shown.count("|hello...........|") == 2 and "20 resets, ok" in shown
    assert reports == [] and disk.said == []


def test_a_machine_stops_promptly_though_its_back_end_does_not_answer(path: Path, reports: list[str]) -> None:
    with ScriptedBackEnd(answers={abi.VHOST_USER_GET_VRING_BASE: silence}, path=path):
        device = ExternalDisk(str(path), "block0")
        memory = GuestMemory([Region.memfd(GuestAddress(0), 16 << 20)])
        machine = InprocessMachine(memory, _reset_and_sleep, reports.append)
        machine.add(device)
        machine.start()
        time.sleep(0.1)
        start = time.monotonic()
        machine.request_stop()
        assert machine.wait() in (Stopped(), PowerOff(0))
        machine.close()
        assert time.monotonic() - start < 0.4
        device.close()
    assert reports == []


def _reset_and_sleep(machine: InprocessMachine) -> PowerOff:
    driver = MmioDriver(machine.runners[0])
    driver.negotiate(-1)
    driver.enable_queue(QueueLayout.contiguous(0, 16, GuestAddress(0x1000)))
    driver.ready()
    # Sleeps in there: the back-end does not say that the queue has stopped.
    driver.reset()
    return PowerOff()
