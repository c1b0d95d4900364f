"""A guest that writes over descriptors while they are read: a live queue errs in typed ways, and inside buffers (S18)."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runtime.rigs import PATIENCE, nothing_left
from runtime.vhost_user_rig import BUFFERS_AT, FEATURES, GUEST, MEMORY, Echo, FrontEnd, Ring, Served, u64

from lguestlib.abi import vhost_user as abi
from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.errors import QueueError

SECONDS = 1.0
ENTRIES = 8
GOOD = (BUFFERS_AT, BUFFERS_AT + 0x1000)
BAD = (GUEST + MEMORY, GUEST + MEMORY - 8, (1 << 64) - 16, 0)
CANARY = b"\xa5"
REASONS = {kind.reason for kind in QueueError.__subclasses__()} | {
    kind.reason for each in QueueError.__subclasses__() for kind in each.__subclasses__()
}


@contextmanager
def hammered(front: FrontEnd, ring: Ring) -> Iterator[None]:
    """Another process writes over the ring's descriptors while this lasts."""
    words = [front.memory_fd, ring.layout.descriptors - GUEST, ENTRIES, *GOOD * 6, *BAD]
    program = Path(__file__).parent / "hammer_program.py"
    process = subprocess.Popen(
        [sys.executable, str(program), *map(str, words)], pass_fds=[front.memory_fd], stdout=subprocess.PIPE
    )
    with process:
        try:
            assert process.stdout and process.stdout.readline() == b"hammering\n"
            yield
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)


class Avail:
    """The available ring of *ring*, written by hand."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.index = 0

    def publish(self, count: int) -> None:
        memory, at = self.ring.front.memory, self.ring.layout.available
        for _ in range(count):
            entry = (self.index % ENTRIES).to_bytes(2, "little")
            memory.write(GuestAddress(at + 4 + 2 * (self.index % ENTRIES)), entry)
            self.index += 1
        memory.write(GuestAddress(at + 2), (self.index & 0xFFFF).to_bytes(2, "little"))
        self.ring.notify()

    def settled(self) -> bool:
        """Wait until all is used; False where the device has failed."""
        deadline = time.monotonic() + PATIENCE
        while self.ring.used != self.index & 0xFFFF:
            if failed(self.ring):
                return False
            assert time.monotonic() < deadline, "neither used nor refused"
        return True


def failed(ring: Ring) -> bool:
    try:
        return bool(os.eventfd_read(ring.error))
    except BlockingIOError:
        return False


@pytest.mark.parametrize("entries", [1, 3])
def test_s18_descriptors_that_another_process_rewrites_lead_to_no_memory_but_buffers(
    entries: int, tmp_path: Path
) -> None:
    """*entries* chains are made available at a time."""
    device = Echo()
    lengths: Counter[int] = Counter()

    def serve(chain: Chain) -> int:
        lengths[chain.readable_length] += 1
        for piece in chain.writable:
            piece[:] = b"\xee" * len(piece)
        return chain.writable_length

    device.serve = serve
    reasons: Counter[str] = Counter()
    with nothing_left(), Served(device, tmp_path) as served, served.front() as front:
        front.memory.write(GuestAddress(BUFFERS_AT), CANARY * (GUEST + MEMORY - BUFFERS_AT))
        for address in GOOD:
            front.memory.zero(GuestAddress(address), 64)
        ring = front.ring(size=ENTRIES)
        os.set_blocking(ring.error, False)
        with hammered(front, ring):
            begun = time.monotonic()

            def enough() -> bool:
                """Where the processor is shared with many, what is to be seen takes longer."""
                seen = sum(lengths.values()) > 20 and len(reasons) > 3
                return time.monotonic() - begun > (SECONDS if seen else PATIENCE)

            while not enough():
                front.memory.zero(ring.layout.available, 6 + 2 * ENTRIES)
                front.memory.zero(ring.layout.used, 6 + 8 * ENTRIES)
                avail = Avail(ring)
                front.tell(ring)
                for _ in range(50):
                    avail.publish(entries)
                    if not avail.settled():
                        break
                front.set(abi.VHOST_USER_RESET_DEVICE)
                front.set(abi.VHOST_USER_SET_FEATURES, u64(FEATURES))
                for line in served.reports:
                    reasons[next((reason for reason in REASONS if f": {reason} (" in line), line)] += 1
                served.reports.clear()
        assert served.threads() == []
        after = bytearray(front.memory.read(GuestAddress(BUFFERS_AT), GUEST + MEMORY - BUFFERS_AT))
        for address in GOOD:
            after[address - BUFFERS_AT : address - BUFFERS_AT + 64] = CANARY * 64
        assert after == CANARY * len(after)
    assert sum(lengths.values()) > 20 and len(reasons) > 3, (lengths, reasons)
    assert reasons.keys() <= REASONS, reasons
    assert all(length <= 64 * ENTRIES for length in lengths)
