"""The in-process guest: the built-in guest's shell, in Python, command for command."""

import socket
import struct
import time
from collections.abc import Callable, Iterator

from lguestlib.abi import virtio_blk as blk
from lguestlib.abi import virtio_console as console
from lguestlib.abi import virtio_net as net
from lguestlib.abi.virtio_ids import VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_RNG
from lguestlib.memory.address import GuestAddress
from lguestlib.runtime.inprocess.driver import GuestDevice, Pages
from lguestlib.runtime.inprocess.machine import InprocessMachine
from lguestlib.runtime.inprocess.network import ECHO_FRAME_SIZE, RECEIVE, NetworkCard
from lguestlib.runtime.inprocess.terminal import GuestTerminal, LineTooLong
from lguestlib.runtime.machine import Crash, Outcome, PowerOff, Reboot
from lguestlib.virtio.devices.block import SECTOR
from lguestlib.virtio.features import Feature
from lguestlib.virtio.mmio_driver import MmioDriver
from lguestlib.virtio.split_driver import Buffer

PAGES_AT = GuestAddress(0x10_0000)
_U32_MAX, _U64_MAX = (1 << 32) - 1, (1 << 64) - 1
RANDOM_MAX = 1024
PINGS_MAX = 1000

_HEADER = struct.Struct("<IIQ")
_NAMES = {
    VIRTIO_ID_NET: "net", VIRTIO_ID_BLOCK: "block", VIRTIO_ID_CONSOLE: "console", VIRTIO_ID_RNG: "rng",
}  # fmt: skip
_FEATURES = {
    VIRTIO_ID_NET: {"MAC": 1 << net.VIRTIO_NET_F_MAC},
    VIRTIO_ID_BLOCK: {"FLUSH": 1 << blk.VIRTIO_BLK_F_FLUSH, "RO": 1 << blk.VIRTIO_BLK_F_RO},
    VIRTIO_ID_CONSOLE: {"SIZE": 1 << console.VIRTIO_CONSOLE_F_SIZE},
    VIRTIO_ID_RNG: {},
}
"""What this guest's drivers know of each device type, beside the ring's features."""
_RING_FEATURES = {"EVENT_IDX": int(Feature.RING_EVENT_IDX), "VERSION_1": int(Feature.VERSION_1)}


class _Refused(Exception):
    """A command that fails; the message is the one line the user gets."""


class _Ended(Exception):
    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


def shell(command_line: str) -> Callable[[InprocessMachine], Outcome]:
    """The program of a guest started with *command_line*, of which it knows ``ip=GUEST::GATEWAY``."""
    return lambda machine: Shell(machine, command_line).run()


class Shell:
    """Finds the devices of *machine*, brings them up, and serves whoever is at the console."""

    def __init__(self, machine: InprocessMachine, command_line: str) -> None:
        self._machine = machine
        self._pages = Pages(PAGES_AT)
        self._failed = False
        self._terminal: GuestTerminal | None = None
        self._network: NetworkCard | None = None
        self._disks: list[GuestDevice] = []
        self._entropy: GuestDevice | None = None
        self._request = self._pages.take(_HEADER.size + 1)
        self._data = Buffer(self._pages.take(RANDOM_MAX), RANDOM_MAX)
        address, self._gateway = _addresses(command_line)
        self._devices = list(self._discover(address))
        self._quiet = "quiet" in command_line.split()
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("help", "show this", self._help),
            "ping": ("ping [ADDRESS [COUNT]]", "send echo requests, to the gateway unless told", self._ping),
            "read": ("read SECTOR [DISK]", "show a sector", self._read),
            "write": ("write SECTOR TEXT", "fill a sector of disk 0", self._write),
            "flush": ("flush [DISK]", "wait until what was written is on stable storage", self._flush),
            "rand": ("rand N", "show N random bytes", self._rand),
            "stat": ("stat", "show the devices and their counters", self._stat),
            "reset": ("reset [N]", "reset every device but the console, N times, under load", self._reset),
            "off": ("off", "switch off", self._off),
            "reboot": ("reboot", "start over", self._reboot),
        }

    def _discover(self, address: bytes) -> Iterator[GuestDevice]:
        counts: dict[str, int] = {}
        for runner in self._machine.runners:
            kind = MmioDriver(runner).device_type
            name = _NAMES.get(kind)
            if name is None:
                continue
            number = counts[name] = counts.get(name, -1) + 1
            device = GuestDevice(
                f"{name}{number}", runner, self._machine.memory, self._pages, sum(_FEATURES[kind].values())
            )
            if kind == VIRTIO_ID_CONSOLE and not self._terminal:
                self._terminal = GuestTerminal(device, self._pages, self._sleep)
            elif kind == VIRTIO_ID_NET and not self._network:
                self._network = NetworkCard(device, address, self._pages, self._sleep)
            elif kind == VIRTIO_ID_BLOCK:
                self._disks.append(device)
            elif kind == VIRTIO_ID_RNG and not self._entropy:
                self._entropy = device
            yield device

    def run(self) -> Outcome:
        """Serve until told to end; a guest without a console ends at once."""
        if not self._terminal:
            return Crash("the guest has no console")
        for device in self._devices:
            self._start(device)
        if not self._quiet:
            size = sum(region.size for region in self._machine.memory.regions) >> 20
            self._print(f"lguestlib in-process guest: {size} MiB, {len(self._devices)} devices; try help")
        try:
            while True:
                self._terminal.write("> ")
                try:
                    self._execute(self._terminal.read_line())
                except LineTooLong:
                    self._failed = True
                    self._print("the line is too long")
        except _Ended as ended:
            return ended.outcome
        finally:
            for device in self._devices:
                device.release()

    def _start(self, device: GuestDevice) -> None:
        device.start()
        for owner in (self._terminal, self._network):
            if owner and owner.device is device:
                owner.start()
        if self._network and self._network.device is device:
            self._network.handle_received()

    def _sleep(self, deadline: float | None = None) -> bool:
        """HLT, and the interrupt handlers; False at *deadline*, in seconds of the monotonic clock."""
        seconds = None if deadline is None else deadline - time.monotonic()
        woken = self._machine.wait_for_interrupt(seconds)
        for device in self._devices:
            if device.interrupted():
                self._print(f"{device.name}: the device has failed; starting it again")
                self._start(device)
        if self._network:
            self._network.handle_received()
        return woken

    def _print(self, line: str) -> None:
        if self._terminal:
            self._terminal.write(line + "\n")

    def _execute(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        if not name:
            return
        command = self._commands.get(name)
        try:
            if not command:
                raise _Refused("unknown command; try help")
            command[2](rest.strip())
        except _Refused as refusal:
            self._failed = True
            self._print(f"{name}: {refusal}")

    def _help(self, rest: str) -> None:
        _words(rest, 0)
        for usage, purpose, _ in self._commands.values():
            self._print(f"  {usage:<24}{purpose}")

    def _ping(self, rest: str) -> None:
        address, count_word = _words(rest, 2)
        target = self._gateway
        if address:
            try:
                target = socket.inet_pton(socket.AF_INET, address)
            except OSError:
                raise _Refused(f"'{address}' is not an address") from None
        count = _number(count_word, 1, PINGS_MAX, f"a count from 1 to {PINGS_MAX}") if count_word else 1
        network = self._network
        if not network:
            raise _Refused("no network")
        if not network.address:
            raise _Refused("no address of our own; boot with ip=GUEST::GATEWAY:NETMASK")
        if not target:
            raise _Refused("no gateway; name an address")
        name = socket.inet_ntoa(target)
        neighbour = network.resolve(target)
        if not neighbour:
            raise _Refused(f"no such host on the network: {name}")
        # Told of when all are done, so that the console is silent in between.
        trips = [network.ping(neighbour) for _ in range(count)]
        for seconds in trips:
            if seconds is None:
                self._print(f"no answer from {name}")
            else:
                self._print(f"reply from {name}: {ECHO_FRAME_SIZE} bytes, {seconds * 1e6:.3f} us")
        if count_word:
            self._print(f"{count} sent, {count - trips.count(None)} received")
        self._failed |= None in trips

    def _disk(self, word: str) -> GuestDevice:
        number = _number(word, 0, _U32_MAX, "a disk number") if word else 0
        if number >= len(self._disks):
            raise _Refused(f"no disk {number}" if word else "no disk")
        return self._disks[number]

    def _sector(self, disk: GuestDevice, word: str) -> int:
        if not word:
            raise _Refused("which sector?")
        sector = _number(word, 0, _U64_MAX, "a sector number")
        capacity = int.from_bytes(disk.driver.config(0, 8), "little")
        if sector >= capacity:
            raise _Refused(f"sector {sector} is past the end of the disk (capacity {capacity} sectors)")
        return sector

    def _transfer(self, disk: GuestDevice, kind: int, sector: int) -> None:
        """One block request on the data buffer's first sector, none of it for a flush."""
        header = Buffer(self._request, _HEADER.size)
        status = Buffer(GuestAddress(self._request + _HEADER.size), 1)
        data = Buffer(self._data.address, SECTOR)
        memory = self._machine.memory
        memory.write(header.address, _HEADER.pack(kind, 0, sector) + b"\xff")
        readable = [header] + [data] * (kind == blk.VIRTIO_BLK_T_OUT)
        self._complete(disk, readable, [data] * (kind == blk.VIRTIO_BLK_T_IN) + [status])
        result = memory.read(status.address, 1)[0]
        if result == blk.VIRTIO_BLK_S_UNSUPP:
            raise _Refused("the disk does not support it")
        if result != blk.VIRTIO_BLK_S_OK:
            raise _Refused("I/O error")

    def _complete(self, device: GuestDevice, readable: list[Buffer], writable: list[Buffer]) -> int:
        """Submit one request on *device*'s queue 0 and sleep until it is done; return the bytes written."""
        queue = device.queues[0]
        ring = queue.ring
        queue.submit(readable, writable, self._data)
        while queue.ring is ring:
            used = queue.reap()
            if used:
                return used[0].written
            if not ring.enable_interrupts():
                self._sleep()
        raise _Refused("the device has failed")

    def _read(self, rest: str) -> None:
        sector_word, disk_word = _words(rest, 2)
        disk = self._disk(disk_word)
        self._transfer(disk, blk.VIRTIO_BLK_T_IN, self._sector(disk, sector_word))
        for line in _hexdump(self._machine.memory.read(self._data.address, SECTOR)):
            self._print(line)

    def _write(self, rest: str) -> None:
        word, _, text = rest.partition(" ")
        disk = self._disk("")
        sector = self._sector(disk, word)
        data = text.lstrip().encode("latin-1")
        if len(data) > SECTOR:
            raise _Refused("the text is longer than a sector")
        if disk.features & 1 << blk.VIRTIO_BLK_F_RO:
            raise _Refused("the disk is read-only")
        self._machine.memory.write(self._data.address, data.ljust(SECTOR, b"\0"))
        self._transfer(disk, blk.VIRTIO_BLK_T_OUT, sector)
        self._print(f"wrote sector {sector}")

    def _flush(self, rest: str) -> None:
        (disk_word,) = _words(rest, 1)
        disk = self._disk(disk_word)
        # A disk that does not offer it writes through (5.2.6.2).
        if disk.features & 1 << blk.VIRTIO_BLK_F_FLUSH:
            self._transfer(disk, blk.VIRTIO_BLK_T_FLUSH, 0)
        self._print("flushed")

    def _rand(self, rest: str) -> None:
        (word,) = _words(rest, 1)
        if not word:
            raise _Refused("how many bytes?")
        wanted = _number(word, 1, RANDOM_MAX, f"a number from 1 to {RANDOM_MAX}")
        if not self._entropy:
            raise _Refused("no entropy device")
        data = b""
        while len(data) < wanted:
            written = self._complete(self._entropy, [], [Buffer(self._data.address, wanted - len(data))])
            data += self._machine.memory.read(self._data.address, written)
        for start in range(0, wanted, 32):
            self._print(data[start : start + 32].hex())

    def _stat(self, rest: str) -> None:
        _words(rest, 0)
        for device in self._devices:
            bits = _FEATURES[device.driver.device_type] | _RING_FEATURES
            known = [name for name, bit in bits.items() if device.features & bit]
            parts = [f"{device.name}: features {' '.join(known)}", f"{device.interrupts} interrupts"]
            parts += [f"{queue.name}: {queue.requests} requests, {queue.kicks} kicks" for queue in device.queues]
            self._print("; ".join(parts))

    def _reset(self, rest: str) -> None:
        (word,) = _words(rest, 1)
        count = _number(word, 1, _U32_MAX, "a count") if word else 1
        devices = [
            device for device in self._devices if not self._terminal or device is not self._terminal.device
        ]
        for _ in range(count):
            self._machine.checkpoint()
            for device in devices:
                self._load(device)
                device.stop()
                self._start(device)
        self._print(f"{count} resets, ok")

    def _load(self, device: GuestDevice) -> None:
        """Give *device* something to do, and do not wait for it."""
        if device in self._disks:
            header = Buffer(self._request, _HEADER.size)
            self._machine.memory.write(header.address, _HEADER.pack(blk.VIRTIO_BLK_T_IN, 0, 0))
            status = Buffer(GuestAddress(self._request + _HEADER.size), 1)
            device.queues[0].submit([header], [Buffer(self._data.address, SECTOR), status], self._data)
        elif device is self._entropy:
            device.queues[RECEIVE].submit([], [self._data], self._data)
        elif self._network and device is self._network.device and self._gateway:
            self._network.ask(self._gateway)

    def _off(self, rest: str) -> None:
        _words(rest, 0)
        raise _Ended(PowerOff(int(self._failed)))

    def _reboot(self, rest: str) -> None:
        _words(rest, 0)
        raise _Ended(Reboot())


def _addresses(command_line: str) -> tuple[bytes, bytes]:
    """The guest's IPv4 address and its gateway's from ``ip=GUEST::GATEWAY...``, empty where not given."""
    for word in command_line.split():
        if word.startswith("ip="):
            guest, _, gateway, *_ = [*word[3:].split(":"), "", "", ""]
            return socket.inet_aton(guest) if guest else b"", socket.inet_aton(gateway) if gateway else b""
    return b"", b""


def _words(rest: str, most: int) -> list[str]:
    """The arguments of a command that takes *most* of them, empty where they are not given."""
    words = rest.split()
    if len(words) > most:
        raise _Refused(f"'{words[most]}' is one word too many")
    return words + [""] * (most - len(words))


def _number(word: str, low: int, high: int, what: str) -> int:
    try:
        number = int(word[2:], 16) if word.startswith("0x") else int(word)
    except ValueError:
        number = -1
    if not low <= number <= high:
        raise _Refused(f"'{word}' is not {what}")
    return number


def _hexdump(data: bytes) -> Iterator[str]:
    """*data* as ``hexdump -C`` shows it."""
    previous, folded = b"", False
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        if row == previous:
            if not folded:
                yield "*"
            folded = True
            continue
        previous, folded = row, False
        left, right = row[:8].hex(" "), row[8:].hex(" ")
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
        yield f"{start:08x}  {left}  {right}  |{text}|"
    yield f"{len(data):08x}"
