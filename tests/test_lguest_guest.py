"""The scripted guest, before a launcher that is written out here: a page, a ring and its service."""

import errno
import mmap
import struct

import pytest
from lguest_double import GuestProgram, LguestDouble
from lguest_guest import LINUX_2_6_33, LINUX_3_11, RNG, Linux, Release, RngDriver, session

from lguestlib.abi.lguest import initialize_request, irq_request
from lguestlib.abi.mmap import MAP_ANONYMOUS, MAP_PRIVATE
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.region import Region
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.split_device import SplitDeviceQueue

MAP_32BIT = 0x40
RAM = 4 << 20
RING = RAM + 4096
RNG_DEVICE = struct.pack("<5BHHI", 4, 1, 0, 0, 0, 256, 1, RING >> 12)


def boot_parameters(command_line: bytes) -> bytes:
    page = bytearray(4096 + len(command_line) + 1)
    page[0x1E8] = 1
    page[0x206:0x208] = b"\x07\x02"
    page[0x211] = 0x40
    page[0x228:0x22C] = struct.pack("<I", 4096)
    page[0x230:0x234] = struct.pack("<I", 0x100_0000)
    page[0x23C] = 1
    page[0x2D0:0x2E4] = struct.pack("<QQI", 0, RAM, 1)
    page[4096:-1] = command_line
    return bytes(page)


class Launcher:
    """One with one rng, which gives ten bytes at a time, and no eventfd: each kick comes out."""

    def __init__(self, program: GuestProgram) -> None:
        self.told: list[int] = []
        """The statuses it was told of."""
        self.early = bytearray()
        self.words = b""
        self._ring: SplitDeviceQueue | None = None
        mapping = mmap.mmap(-1, RAM + 4 * 4096, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT)
        with GuestMemory([Region(GuestAddress(0), len(mapping), mapping)]) as self._memory:
            self._memory.write(GuestAddress(0), boot_parameters(b"root=/dev/vda"))
            self._memory.write(GuestAddress(RAM), RNG_DEVICE)
            with LguestDouble(program) as self._file:
                base = self._memory.host_address(GuestAddress(0))
                self._file.write(initialize_request(base, len(mapping) >> 12, 0x10_0000))
                self._run()
            self.failure = self._file.failure
            self._reset()

    def _run(self) -> None:
        while True:
            try:
                address = int.from_bytes(self._file.pread(4), "little")
            except OSError as error:
                assert error.errno == errno.ENOENT
                self.words = self._file.pread(4096)
                return
            if address == RAM:
                self.told.append(self._memory.read(GuestAddress(RAM + 4), 1)[0])
                if self.told[-1] == 0:
                    self._reset()
            elif address == RING:
                self._serve()
            else:
                text = self._memory.read(GuestAddress(address), 17)
                self.early += text[: text.index(0)]

    def _reset(self) -> None:
        if self._ring:
            self._ring.release()
            self._ring = None
        self._memory.zero(GuestAddress(RING), 3 * 4096)

    def _serve(self) -> None:
        if not self._ring:
            layout = QueueLayout.contiguous(0, 256, GuestAddress(RING), 4096)
            self._ring = SplitDeviceQueue(layout, self._memory, 0)
        for chain in self._ring.pop_many():
            chain.writable[0][:10] = b"r" * 10
            self._ring.push(chain, 10)
        if self._ring.should_interrupt():
            self._file.write(irq_request(1))


@pytest.mark.parametrize(
    ("release", "statuses"), [(LINUX_3_11, [0, 3, 0, 3, 0]), (LINUX_2_6_33, [0, 1, 3, 7, 0, 1, 3, 7, 0, 1])]
)
def test_a_release_tells_of_its_statuses_and_comes_up_again_after_a_reset(
    release: Release, statuses: list[int]
) -> None:
    def steps(linux: Linux) -> None:
        assert (linux.memory_size, linux.command_line) == (RAM, "root=/dev/vda")
        for _ in range(2):
            rng = RngDriver(linux.of_type(RNG))
            assert [rng.read(), rng.read()] == [b"r" * 10, b"r" * 10]
            rng.remove()

    launcher = Launcher(session(steps, release))
    assert launcher.failure is None
    assert launcher.words == b"CRASH: Power down\0"
    assert launcher.told == statuses
    assert launcher.early == b"Linux on lguest, 4 MiB: root=/dev/vda\n"


def test_an_interrupt_that_does_not_come_is_the_guests_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SplitDeviceQueue, "should_interrupt", lambda ring: False)

    def steps(linux: Linux) -> None:
        rng = RngDriver(linux.of_type(RNG))
        rng.queue.add([], [(linux.allocate(16), 16)], None)
        rng.queue.kick()
        linux.wait_until(lambda: rng.queue.free == 256, 0.05)

    launcher = Launcher(session(steps))
    assert "no interrupt came" in str(launcher.failure)
    assert b"no interrupt came" in launcher.words
