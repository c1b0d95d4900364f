"""A guest for `lguest_double`: Linux's lguest bus driver and virtio drivers, as scripts.

From arch/x86/lguest/boot.c, drivers/lguest/lguest_device.c, drivers/virtio/virtio_ring.c
and the four drivers of Linux 2.6.33, 3.0 and 3.11, as far as a launcher can tell.  It reads
the device page with formats of its own, and finds a launcher's faults by failed assertions.
"""

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lguest_double import PAGE_SIZE, GuestCpu, GuestProgram

ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED = 1, 2, 4, 0x80
NET, BLOCK, CONSOLE, RNG = 1, 2, 3, 4

INDIRECT_DESC, EVENT_IDX, NOTIFY_ON_EMPTY = 1 << 28, 1 << 29, 1 << 24
NET_CSUM, NET_GUEST_CSUM, NET_MAC, NET_GSO = 1 << 0, 1 << 1, 1 << 5, 1 << 6
NET_GUEST_TSO4, NET_GUEST_TSO6, NET_GUEST_ECN, NET_GUEST_UFO = 1 << 7, 1 << 8, 1 << 9, 1 << 10
NET_HOST_TSO4, NET_HOST_TSO6, NET_HOST_ECN, NET_HOST_UFO = 1 << 11, 1 << 12, 1 << 13, 1 << 14
NET_MRG_RXBUF, NET_STATUS = 1 << 15, 1 << 16
BLK_BARRIER, BLK_SIZE_MAX, BLK_SEG_MAX, BLK_GEOMETRY = 1 << 0, 1 << 1, 1 << 2, 1 << 4
BLK_RO, BLK_BLK_SIZE, BLK_SCSI, BLK_FLUSH = 1 << 5, 1 << 6, 1 << 7, 1 << 9
CONSOLE_SIZE = 1 << 0

READ, WRITE, SCSI_COMMAND, FLUSH, GET_ID, BARRIER = 0, 1, 2, 4, 8, 0x8000_0000

BIG_PAGES = 18
"""Of a receive buffer that holds any packet: MAX_SKB_FRAGS and one."""

BLOCK_ROOM = 1 << 17
"""Bytes that one request of the disk's driver transfers at most."""

PATIENCE = 20.0
"""Seconds after which what the guest waits for will not come."""

NEXT, WRITABLE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1
INDIRECT_PIECES = 32
"""Descriptors that an indirect table has room for."""


@dataclass(frozen=True)
class Release:
    """What releases of Linux differ in."""

    notifies_every_status: bool
    """Before 3.1 the launcher is told of each status, and not of the features, which come after DRIVER."""
    ring_features: int
    net_features: int
    block_features: int


_NET = (
    NET_CSUM | NET_GUEST_CSUM | NET_GSO | NET_MAC
    | NET_HOST_TSO4 | NET_HOST_UFO | NET_HOST_TSO6 | NET_HOST_ECN
    | NET_GUEST_TSO4 | NET_GUEST_TSO6 | NET_GUEST_ECN | NET_GUEST_UFO | NET_MRG_RXBUF | NET_STATUS
)  # fmt: skip
_BLOCK = BLK_SEG_MAX | BLK_SIZE_MAX | BLK_GEOMETRY | BLK_RO | BLK_BLK_SIZE | BLK_SCSI | BLK_FLUSH

LINUX_2_6_33 = Release(True, INDIRECT_DESC, _NET | NOTIFY_ON_EMPTY, _BLOCK | BLK_BARRIER)
LINUX_3_0 = Release(True, INDIRECT_DESC | EVENT_IDX, _NET, _BLOCK)
LINUX_3_11 = Release(False, INDIRECT_DESC | EVENT_IDX, _NET, _BLOCK)


class Linux:
    """A 32-bit kernel with lguest support, on *cpu*."""

    def __init__(self, cpu: GuestCpu, release: Release = LINUX_3_11) -> None:
        self.cpu = cpu
        self.release = release
        self.memory_size = 0
        self.command_line = ""
        self.initrd = (0, 0)
        """Its guest-physical address, and its length in whole pages."""
        self.devices: list[LguestDevice] = []
        self.spurious: list[int] = []
        """Interrupts that nobody here handles."""
        self.handlers: dict[int, Callable[[], None]] = {}
        self._free = 0x20_0000

    def boot(self) -> None:
        """Come up to where the bus is scanned and every device has been reset and acknowledged."""
        self.read_boot_parameters()
        self.early_console(f"Linux on lguest, {self.memory_size >> 20} MiB: {self.command_line}\n")
        self.cpu.take_interrupts()
        self.scan()

    def read_boot_parameters(self) -> None:
        """Take what the launcher has left at guest-physical 0."""
        page = self.cpu.read(0, PAGE_SIZE)
        assert page[0x1E8] == 1, "e820_entries"
        start, size, kind = struct.unpack_from("<QQI", page, 0x2D0)
        assert (start, kind) == (0, 1), "the one E820 entry"
        self.memory_size = size
        version, load_flags, subarch = _u16(page, 0x206), page[0x211], _u32(page, 0x23C)
        assert version >= 0x207, "a boot protocol that has hardware_subarch"
        assert load_flags & 0x40, "KEEP_SEGMENTS"
        assert subarch == 1, "hardware_subarch lguest"
        assert _u32(page, 0x230) == 0x100_0000, "kernel_alignment"
        line = self.cpu.read(_u32(page, 0x228), 2048)
        assert b"\0" in line, "a command line that ends"
        self.command_line = line[: line.index(0)].decode()
        self.initrd = (_u32(page, 0x218), _u32(page, 0x21C))
        if self.initrd[1]:
            assert page[0x210] == 0xFF, "type_of_loader"

    def early_console(self, text: str) -> None:
        """early_put_chars: 16 characters at most at a time."""
        data = text.encode()
        scratch = self.allocate(17)
        for start in range(0, len(data), 16):
            self.cpu.write(scratch, data[start : start + 16] + b"\0")
            self.cpu.notify(scratch)

    def scan(self) -> None:
        """scan_devices: register each device of the page."""
        self.devices = []
        offset = 0
        while offset < PAGE_SIZE and self.cpu.read(self.memory_size + offset, 1) != b"\0":
            device = LguestDevice(self, offset)
            self.devices.append(device)
            device.reset()
            device.add_status(ACKNOWLEDGE)
            offset += device.size

    def of_type(self, kind: int, number: int = 0) -> "LguestDevice":
        """The device *number* of a type, in the order of the page."""
        return [device for device in self.devices if device.type == kind][number]

    def allocate(self, size: int, align: int = 16) -> int:
        """The address of *size* bytes for the guest's use, all zero at first."""
        address = -(-self._free // align) * align
        self._free = address + size
        assert self._free <= self.memory_size, "the guest's memory is used up"
        return address

    def wait_until(self, happened: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Sleep until an interrupt has made *happened* true."""
        give_up = time.monotonic() + seconds
        while not happened():
            left = give_up - time.monotonic()
            assert left > 0, "no interrupt came"
            self.interrupts(left)

    def interrupts(self, seconds: float) -> None:
        """Sleep until there are interrupts, or for *seconds*, and handle them."""
        for irq in self.cpu.halt(seconds):
            if irq in self.handlers:
                self.handlers[irq]()
            elif irq:
                self.spurious.append(irq)

    def power_off(self) -> None:
        self.cpu.crash("Power down")

    def panic(self, text: str) -> None:
        self.cpu.crash(text)

    def reboot(self) -> None:
        self.cpu.restart()


def session(steps: Callable[[Linux], None], release: Release = LINUX_3_11) -> GuestProgram:
    """A guest that boots, does *steps* and switches itself off."""

    def program(cpu: GuestCpu) -> None:
        linux = Linux(cpu, release)
        linux.boot()
        steps(linux)
        linux.power_off()

    return program


class LguestDevice:
    """The device at byte *offset* of the page: struct lguest_device with its virtio_config_ops."""

    def __init__(self, linux: Linux, offset: int) -> None:
        self.linux = linux
        self.offset = offset
        self.address = linux.memory_size + offset
        head: tuple[int, int, int, int] = struct.unpack("<4B", linux.cpu.read(self.address, 4))
        self.type, self.num_vq, self.feature_len, self.config_len = head
        self.features = 0
        """Those accepted."""

    @property
    def _features_at(self) -> int:
        return self.address + 5 + 8 * self.num_vq

    @property
    def _config_at(self) -> int:
        return self._features_at + 2 * self.feature_len

    @property
    def size(self) -> int:
        """Bytes of its description."""
        return 5 + 8 * self.num_vq + 2 * self.feature_len + self.config_len

    @property
    def status(self) -> int:
        return self.linux.cpu.read(self.address + 4, 1)[0]

    def write_status(self, status: int) -> None:
        """Without a word to the launcher."""
        self.linux.cpu.write(self.address + 4, bytes([status]))

    def notify_status(self) -> None:
        self.linux.cpu.notify(self.address)

    def add_status(self, bits: int) -> None:
        """lg_set_status."""
        status = self.status | bits
        self.write_status(status)
        if self.linux.release.notifies_every_status or status & FAILED:
            self.notify_status()

    def reset(self) -> None:
        """lg_reset."""
        self.write_status(0)
        self.notify_status()

    @property
    def offered(self) -> int:
        """lg_get_features."""
        return int.from_bytes(self.linux.cpu.read(self._features_at, min(self.feature_len, 4)), "little")

    def accept(self, known: int) -> None:
        """virtio_dev_probe up to the driver's own probe, lg_finalize_features."""
        self.add_status(DRIVER)
        self.features = self.offered & (known | self.linux.release.ring_features)
        accepted = self.features.to_bytes(4, "little")
        self.write_accepted(accepted[: self.feature_len].ljust(self.feature_len, b"\0"))
        if not self.linux.release.notifies_every_status:
            self.notify_status()

    def write_accepted(self, accepted: bytes) -> None:
        self.linux.cpu.write(self._features_at + self.feature_len, accepted)

    def config(self, offset: int, length: int) -> bytes:
        """lg_get."""
        assert offset + length <= self.config_len, "asked for more than the config space has"
        return self.linux.cpu.read(self._config_at + offset, length)

    def queue_config(self, index: int) -> tuple[int, int, int]:
        """lguest_vqconfig: entries, interrupt, page."""
        config: tuple[int, int, int] = struct.unpack(
            "<HHI", self.linux.cpu.read(self.address + 5 + 8 * index, 8)
        )
        return config

    def find_vq(self, index: int, callback: Callable[[], None] | None) -> "Virtqueue":
        """lg_find_vq."""
        assert index < self.num_vq
        size, irq, pfn = self.queue_config(index)
        queue = Virtqueue(self.linux, size, pfn * PAGE_SIZE, self.features, callback is not None)
        self.linux.handlers[irq] = callback or (lambda: None)
        return queue

    def del_vqs(self) -> None:
        """lg_del_vqs: an interrupt that came before is lost, and one that comes now is nobody's."""
        irqs = [self.queue_config(index)[1] for index in range(self.num_vq)]
        for irq in irqs:
            self.linux.handlers[irq] = lambda: None
        self.linux.interrupts(0.0)
        for irq in irqs:
            del self.linux.handlers[irq]


Piece = tuple[int, int]
"""A buffer's guest-physical address and length."""


class Virtqueue:
    """drivers/virtio/virtio_ring.c on a ring at *address* in the legacy layout, aligned to 4096.

    As there, the launcher has zeroed the ring, and the avail index counts on from what is in it.
    """

    def __init__(self, linux: Linux, size: int, address: int, features: int, interrupts: bool) -> None:
        self.linux, self.cpu = linux, linux.cpu
        self.size, self.address = size, address
        self.avail = address + 16 * size
        self.used = -(-(self.avail + 6 + 2 * size) // 4096) * 4096
        assert not any(self.cpu.read(address, self.used + 6 + 8 * size - address)), "a ring that is zero"
        self._event_idx = bool(features & EVENT_IDX)
        self._indirect = bool(features & INDIRECT_DESC)
        self._free = list(range(size))
        self._tokens: dict[int, tuple[object, list[int]]] = {}
        self._tables: dict[int, int] = {}
        self._last_used = 0
        self._added = 0
        if not interrupts:
            self.cpu.store16(self.avail, NO_INTERRUPT)

    @property
    def free(self) -> int:
        return len(self._free)

    def add(self, readable: Sequence[Piece], writable: Sequence[Piece], token: object) -> None:
        """virtqueue_add: in an indirect table if there are several pieces."""
        pieces = [(piece, 0) for piece in readable] + [(piece, WRITABLE) for piece in writable]
        if self._indirect and len(pieces) > 1:
            taken = [self._free.pop(0)]
            table = self._tables.setdefault(taken[0], 0) or self.linux.allocate(16 * INDIRECT_PIECES)
            self._tables[taken[0]] = table
            self._describe(table, list(range(len(pieces))), pieces)
            self.cpu.write(self.address + 16 * taken[0], _descriptor(table, 16 * len(pieces), INDIRECT, 0))
        else:
            taken = [self._free.pop(0) for _ in pieces]
            self._describe(self.address, taken, pieces)
        self._tokens[taken[0]] = (token, taken)
        self.publish(taken[0])

    def _describe(self, table: int, indices: list[int], pieces: Sequence[tuple[Piece, int]]) -> None:
        for position, (index, ((address, length), flags)) in enumerate(zip(indices, pieces)):
            more = position + 1 < len(pieces)
            following = indices[position + 1] if more else 0
            entry = _descriptor(address, length, flags | (NEXT if more else 0), following)
            self.cpu.write(table + 16 * index, entry)

    def publish(self, head: int) -> None:
        """Put *head* into the avail ring, whatever it is."""
        index = self.cpu.load16(self.avail + 2)
        self.cpu.store16(self.avail + 4 + 2 * (index % self.size), head)
        self.cpu.store16(self.avail + 2, index + 1 & 0xFFFF)
        self._added += 1

    def kick(self) -> None:
        """virtqueue_kick: notify if the launcher wants to know."""
        new = self.cpu.load16(self.avail + 2)
        added, self._added = self._added, 0
        if self._event_idx:
            event = self.cpu.load16(self.used + 4 + 8 * self.size)
            needed = (new - event - 1 & 0xFFFF) < added
        else:
            needed = not self.cpu.load16(self.used) & NO_NOTIFY
        if needed:
            self.notify()

    def notify(self) -> None:
        """lg_notify."""
        self.cpu.notify(self.address)

    def get(self) -> tuple[object, int] | None:
        """virtqueue_get_buf: what was added, and how much of it is written."""
        if self.cpu.load16(self.used + 2) == self._last_used:
            return None
        at = self.used + 4 + 8 * (self._last_used % self.size)
        head, length = struct.unpack("<II", self.cpu.read(at, 8))
        assert head in self._tokens, f"id {head} is not a head"
        token, taken = self._tokens.pop(head)
        self._free += taken
        self._last_used = self._last_used + 1 & 0xFFFF
        if self._event_idx and not self.cpu.load16(self.avail) & NO_INTERRUPT:
            self.cpu.store16(self.avail + 4 + 2 * self.size, self._last_used)
        return token, length

    def disable_cb(self) -> None:
        self.cpu.store16(self.avail, self.cpu.load16(self.avail) | NO_INTERRUPT)

    def enable_cb(self) -> bool:
        """virtqueue_enable_cb: whether nothing has been used meanwhile."""
        self.cpu.store16(self.avail, 0)
        self.cpu.store16(self.avail + 4 + 2 * self.size, self._last_used)
        return self.cpu.load16(self.used + 2) == self._last_used


class Driver:
    """A virtio driver bound to *device*; `probe` and `remove` as bind and unbind do."""

    def __init__(self, device: LguestDevice) -> None:
        self.device, self.linux, self.cpu = device, device.linux, device.linux.cpu
        self.probe()

    @property
    def known(self) -> int:
        """The features it knows."""
        return 0

    def probe(self) -> None:
        """virtio_dev_probe: the queues are in use before DRIVER_OK."""
        self.device.accept(self.known)
        self.set_up()
        self.device.add_status(DRIVER_OK)

    def set_up(self) -> None:
        """The driver's own probe."""

    def remove(self) -> None:
        """virtio_dev_remove."""
        self.device.reset()
        self.device.del_vqs()
        self.device.add_status(ACKNOWLEDGE)


class ConsoleDriver(Driver):
    """virtio_console with one port, and hvc."""

    @property
    def known(self) -> int:
        return CONSOLE_SIZE

    def set_up(self) -> None:
        self.input_queue = self.device.find_vq(0, self._received)
        self.output_queue = self.device.find_vq(1, None)
        self._input = bytearray()
        for _ in range(4):
            self.input_queue.add([], [(page := self.linux.allocate(PAGE_SIZE), PAGE_SIZE)], page)
        self.input_queue.kick()
        self._page = self.linux.allocate(PAGE_SIZE)

    def _received(self) -> None:
        while got := self.input_queue.get():
            page, length = got
            assert isinstance(page, int)
            self._input += self.cpu.read(page, length)
            self.input_queue.add([], [(page, PAGE_SIZE)], page)
        self.input_queue.kick()

    def write(self, data: bytes) -> None:
        """put_chars: spins until the launcher has taken it, without an interrupt."""
        self.cpu.write(self._page, data)
        self.output_queue.add([(self._page, len(data))], [], None)
        self.output_queue.kick()
        give_up = time.monotonic() + PATIENCE
        while not self.output_queue.get():
            assert time.monotonic() < give_up, "the console's output was not taken"
            self.cpu.relax()

    @property
    def has_line(self) -> bool:
        """Whether a line of input has come."""
        return b"\n" in self._input

    def read_line(self) -> bytes:
        """Sleep until there is a line of input, and take it without its end."""
        self.linux.wait_until(lambda: self.has_line)
        line, _, rest = bytes(self._input).partition(b"\n")
        self._input[:] = rest
        return line


class RngDriver(Driver):
    """virtio-rng."""

    def set_up(self) -> None:
        self.queue = self.device.find_vq(0, self._done)
        self._have = 0
        self._buffer = self.linux.allocate(64)

    def _done(self) -> None:
        while got := self.queue.get():
            self._have = got[1]

    def read(self) -> bytes:
        """64 bytes at most, and one at least."""
        self._have = 0
        self.queue.add([], [(self._buffer, 64)], None)
        self.queue.kick()
        self.linux.wait_until(lambda: self._have > 0)
        return self.cpu.read(self._buffer, self._have)


class BlockDriver(Driver):
    """virtio_blk.  The first sector is read, for partitions, before DRIVER_OK."""

    @property
    def known(self) -> int:
        return self.linux.release.block_features

    def set_up(self) -> None:
        self.queue = self.device.find_vq(0, self._done)
        self._finished: set[int] = set()
        self._requests = 0
        self._header, self._status = self.linux.allocate(16), self.linux.allocate(1)
        self._data = self.linux.allocate(BLOCK_ROOM, 512)
        (self.capacity,) = struct.unpack("<Q", self.device.config(0, 8))
        """In sectors."""
        self.read(0, 512)

    def _done(self) -> None:
        while got := self.queue.get():
            number, _ = got
            assert isinstance(number, int)
            self._finished.add(number)

    def request(
        self, kind: int, sector: int, payload: bytes = b"", answer: int = 0, pieces: int = 1
    ) -> tuple[int, bytes]:
        """One request's status, and what it answers; *pieces* is how many buffers its data is cut into."""
        header, status, data = self._header, self._status, self._data
        assert max(len(payload), answer) <= BLOCK_ROOM
        self.cpu.write(header, struct.pack("<IIQ", kind, 0, sector))
        self.cpu.write(status, b"\xff")
        self.cpu.write(data, payload)
        length = len(payload) or answer
        cuts = [length * number // pieces for number in range(pieces + 1)]
        buffers = [(data + start, end - start) for start, end in zip(cuts, cuts[1:]) if end > start]
        number = self._requests = self._requests + 1
        readable, writable = ([*buffers], []) if payload else ([], buffers)
        self.queue.add([(header, 16), *readable], [*writable, (status, 1)], number)
        self.queue.kick()
        self.linux.wait_until(lambda: number in self._finished)
        return self.cpu.read(status, 1)[0], self.cpu.read(data, answer)

    def read(self, sector: int, length: int, pieces: int = 1) -> bytes:
        status, data = self.request(READ, sector, answer=length, pieces=pieces)
        assert status == 0, f"read: status {status}"
        return data

    def write(self, sector: int, data: bytes, barrier: bool = False) -> None:
        status, _ = self.request(WRITE | (BARRIER if barrier else 0), sector, data)
        assert status == 0, f"write: status {status}"

    def flush(self) -> None:
        """By what was negotiated."""
        if self.device.features & BLK_FLUSH:
            status, _ = self.request(FLUSH, 0)
            assert status == 0, f"flush: status {status}"

    def identity(self) -> bytes:
        status, identity = self.request(GET_ID, 0, answer=20)
        assert status == 0, f"get id: status {status}"
        return identity.rstrip(b"\0")


class NetDriver(Driver):
    """virtio_net: mergeable buffers, or big or small ones behind a header in a buffer of its own."""

    withheld = 0
    """Features that this one does not know."""

    @property
    def known(self) -> int:
        return self.linux.release.net_features & ~self.withheld

    def set_up(self) -> None:
        self.receive_queue = self.device.find_vq(0, self._received)
        self.transmit_queue = self.device.find_vq(1, lambda: None)
        self.mergeable = bool(self.device.features & NET_MRG_RXBUF)
        self.big = bool(self.device.features & (NET_GUEST_TSO4 | NET_GUEST_TSO6 | NET_GUEST_UFO))
        self.header_size = 12 if self.mergeable else 10
        self.mac = self.device.config(0, 6) if self.device.features & NET_MAC else bytes(6)
        self.frames: list[bytes] = []
        for _ in range(16):
            self._fill()
        self.receive_queue.kick()
        self._sending = (self.linux.allocate(self.header_size), self.linux.allocate(65536))

    def _fill(self, at: int | None = None) -> None:
        pages = BIG_PAGES if self.big and not self.mergeable else 1
        at = at or self.linux.allocate(pages * PAGE_SIZE, PAGE_SIZE)
        if self.mergeable:
            pieces = [(at, PAGE_SIZE)]
        elif self.big:
            # A frame can be as long as an IP packet can.
            pieces = [(at, self.header_size), (at + 16, PAGE_SIZE - 16)]
            pieces += [(at + page * PAGE_SIZE, PAGE_SIZE) for page in range(1, pages)]
        else:
            pieces = [(at, self.header_size), (at + 16, 1518)]
        self.receive_queue.add([], pieces, at)

    def _received(self) -> None:
        self.receive_queue.disable_cb()
        while True:
            while got := self.receive_queue.get():
                self._take(*got)
            self.receive_queue.kick()
            if self.receive_queue.enable_cb():
                return

    def _take(self, at: object, length: int) -> None:
        assert isinstance(at, int)
        if not self.mergeable:
            assert length > self.header_size, f"a packet of {length} bytes"
            self.frames.append(self.cpu.read(at + 16, length - self.header_size))
            self._fill(at)
            return
        (count,) = struct.unpack("<H", self.cpu.read(at + 10, 2))
        frame = self.cpu.read(at + 12, length - 12)
        self._fill(at)
        for _ in range(count - 1):
            got = self.receive_queue.get()
            assert got and isinstance(got[0], int), "fewer buffers than num_buffers says"
            frame += self.cpu.read(got[0], got[1])
            self._fill(got[0])
        self.frames.append(frame)

    def send(self, frame: bytes) -> None:
        """start_xmit: sent buffers are taken back at the next one, without an interrupt."""
        give_up = time.monotonic() + PATIENCE
        self.transmit_queue.disable_cb()
        while not self.transmit_queue.get() and self.transmit_queue.free < self.transmit_queue.size:
            assert time.monotonic() < give_up, "a frame was not sent"
            self.cpu.relax()
        header, data = self._sending
        self.cpu.write(header, bytes(self.header_size))
        self.cpu.write(data, frame)
        self.transmit_queue.add([(header, self.header_size), (data, len(frame))], [], None)
        self.transmit_queue.kick()

    def receive(self) -> bytes:
        """Sleep until there is a frame, and take it."""
        self.linux.wait_until(lambda: bool(self.frames))
        return self.frames.pop(0)


class BigNetDriver(NetDriver):
    """One that has no mergeable buffers, and so has to have room for the longest packet each time."""

    withheld = NET_MRG_RXBUF


class PlainNetDriver(NetDriver):
    """One that has no mergeable buffers and lets nothing be left to it: frames are at most 1518 bytes."""

    withheld = NET_MRG_RXBUF | NET_GUEST_TSO4 | NET_GUEST_TSO6 | NET_GUEST_ECN | NET_GUEST_UFO


def _descriptor(address: int, length: int, flags: int, following: int) -> bytes:
    return struct.pack("<QIHH", address, length, flags, following)


def _u16(page: bytes, offset: int) -> int:
    return int.from_bytes(page[offset : offset + 2], "little")


def _u32(page: bytes, offset: int) -> int:
    return int.from_bytes(page[offset : offset + 4], "little")
