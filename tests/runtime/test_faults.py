"""One call of a back-end fails, the first or a later one: what comes of it is typed, and nothing else is harmed."""

import errno
import os
import select
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from runtime.rigs import Rig, buffer, eventually, nothing_left

from lguestlib.abi import uio
from lguestlib.memory.address import GuestAddress
from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.backend.loopback import Loopback
from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.runtime.backend.pty import Pty
from lguestlib.runtime.backend.random import KernelRandom
from lguestlib.runtime.backend.responder import Responder
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.packets import Station, arp_reply, arp_request
from lguestlib.virtio.chain import part
from lguestlib.virtio.device import Queue
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.net import HEADER_SIZE, Net

REQUESTS = 6
SIZE = 4096
NTH = (0, 3)

IN, OUT, FLUSH = 0, 1, 4
OK, IOERR = 0, 1


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@dataclass(frozen=True)
class Short:
    """A call that moves so many bytes of what it is asked to."""

    bytes: int


@dataclass
class Fault:
    """The *nth* call of *name* on the descriptor *fd* (any, if None) has another outcome."""

    outcome: int | Short
    nth: int
    fd: int | None = None
    calls: int = 0
    happened: bool = False

    def install(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        call: Callable[..., object] = getattr(owner, name)

        def faulty(*arguments: object) -> object:
            if self.fd is not None and arguments[0] != self.fd:
                return call(*arguments)
            self.calls += 1
            if self.calls != self.nth + 1:
                return call(*arguments)
            self.happened = True
            if isinstance(self.outcome, int):
                raise OSError(self.outcome, os.strerror(self.outcome))
            if not self.outcome.bytes:
                return 0
            fd, buffers, *more = arguments
            assert isinstance(buffers, (list, tuple))
            return call(fd, part(tuple(buffers), 0, self.outcome.bytes), *more)

        monkeypatch.setattr(owner, name, faulty)


class Disk:
    """A disk's queue, and a neighbour that has nothing to do with it."""

    def __init__(self, disk: FileDisk | None = None) -> None:
        self.disk = disk or FileDisk.scratch(1 << 20)
        self.rig = Rig(Block(self.disk).queues()[0])
        self.neighbour = Rig(Queue("neighbour", lambda chain: chain.write(b"fine")))
        for rig in (self.rig, self.neighbour):
            rig.start()

    def request(self, kind: int, number: int) -> int:
        """Its status."""
        memory = self.rig.memory
        header, data, status = buffer(3 * number, 16), buffer(3 * number + 1, SIZE), buffer(3 * number + 2, 1)
        memory.write(header.address, kind.to_bytes(8, "little") + (8 * number).to_bytes(8, "little"))
        memory.write(status.address, b"\xff")
        if kind == OUT:
            memory.write(data.address, content(number))
        readable = [header, data] if kind == OUT else [header]
        self.rig.driver.add(readable, [data, status] if kind == IN else [status], number)
        self.rig.kick.signal()
        self.rig.collect(1)
        return memory.read(status.address, 1)[0]

    def data(self, number: int) -> bytes:
        return self.rig.memory.read(buffer(3 * number + 1, SIZE).address, SIZE)

    def close(self) -> None:
        self.neighbour.submit(0, writable=4)
        assert self.neighbour.collect(1) == [(0, 4)]
        self.neighbour.close()
        assert self.rig.failures == []
        self.rig.close()
        self.disk.close()


def content(number: int) -> bytes:
    return bytes([number + 1]) * SIZE


DISK = [
    *((call, number, IOERR) for call in ("preadv", "pwritev", "fdatasync") for number in (errno.EIO, errno.ENOMEM)),
    *((call, number, IOERR) for call in ("pwritev", "fdatasync") for number in (errno.ENOSPC, errno.EDQUOT)),
    *((call, errno.EINTR, OK) for call in ("preadv", "pwritev", "fdatasync")),
    *((call, Short(length), OK) for call in ("preadv", "pwritev") for length in (1, 512, SIZE - 1)),
    # Once: it is asked again, and does it then.
    *((call, Short(0), OK) for call in ("preadv", "pwritev")),
]


@pytest.mark.parametrize("nth", NTH)
@pytest.mark.parametrize(("call", "outcome", "status"), DISK)
def test_a_disks_call_that_fails_is_in_that_requests_status_alone(
    call: str, outcome: int | Short, status: int, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Disk()) as device:
        fault = Fault(outcome, nth, device.disk.fd)
        fault.install(monkeypatch, os, call)
        statuses = {kind: [device.request(kind, n) for n in range(REQUESTS)] for kind in (OUT, FLUSH, IN)}
        assert fault.happened
        failing = {"pwritev": OUT, "fdatasync": FLUSH, "preadv": IN}[call]
        wanted = {kind: [OK] * REQUESTS for kind in (OUT, FLUSH, IN)}
        wanted[failing][nth] = status
        assert statuses == wanted
        for number in range(REQUESTS):
            # What was acknowledged is there, and is what is read.
            if wanted[OUT][number] == OK:
                assert os.pread(device.disk.fd, SIZE, SIZE * number) == content(number)
                if wanted[IN][number] == OK:
                    assert device.data(number) == content(number)


@contextmanager
def small_file_system(path: Path) -> Iterator[Path]:
    """A tmpfs of 16 pages of 4 KiB, at *path*."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"{mounted.stderr.strip()} (run as root, where mount(2) is allowed)")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_file_system_that_is_full_fails_the_writes_it_has_no_room_for_and_loses_nothing(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small") as small:
        image, ballast = small / "disk", small / "ballast"
        with open(image, "wb") as file:
            file.truncate(1 << 20)
        ballast.write_bytes(bytes(8 * SIZE))
        with closing(Disk(FileDisk.open(str(image)))) as device:
            statuses = [device.request(OUT, number) for number in range(14)]
            # What there was room for, and from then on nothing.
            fitted = statuses.index(IOERR)
            assert 0 < fitted < 14 and set(statuses[fitted:]) == {IOERR}
            assert [device.request(OUT, number) for number in range(fitted)] == [OK] * fitted, "they have room"
            assert device.request(FLUSH, 0) == OK
            for number in range(14):
                assert device.request(IN, number) == OK
                assert device.data(number) == (content(number) if number < fitted else bytes(SIZE))
            ballast.unlink()
            # It goes on by itself.
            assert [device.request(OUT, number) for number in range(14)] == [OK] * 14
            assert device.request(FLUSH, 0) == OK
        assert image.read_bytes()[: 14 * SIZE] == b"".join(map(content, range(14)))


def network(nth: int, outcome: int, monkeypatch: pytest.MonkeyPatch, call: str) -> tuple[Net, Rig, Rig, Loopback, Fault]:
    loop = Loopback()
    card = Net(loop, b"\2\0\0\0\0\1")
    receive, transmit = (Rig(queue) for queue in card.queues()[:2])
    fault = Fault(outcome, nth, loop.fd if call == "readv" else loop._far)
    fault.install(monkeypatch, uio if call == "readv" else os, call)
    for rig in (receive, transmit):
        rig.start()
    return card, receive, transmit, loop, fault


def exchanged(receive: Rig, transmit: Rig, numbers: Sequence[int]) -> list[bytes]:
    """Send frames of these *numbers*, and what is received of them."""
    for number in numbers:
        transmit.memory.write(buffer(number, 64).address, bytes(HEADER_SIZE) + bytes([number] * 52))
        transmit.submit(number)
        transmit.collect(1)
    return [receive.memory.read(GuestAddress(buffer(1024 + n, 64).address + HEADER_SIZE), 1) for n in numbers]


@pytest.mark.parametrize("nth", NTH)
@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EIO, errno.EBADFD, errno.EINTR])
def test_a_frame_that_cannot_be_sent_is_lost_alone_and_one_interrupted_is_not(
    number: int, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, receive, transmit, loop, fault = network(nth, number, monkeypatch, "writev")
    for token in range(REQUESTS):
        receive.submit(token, 0, 64)
    exchanged(receive, transmit, range(REQUESTS))
    lost = number != errno.EINTR
    receive.collect(REQUESTS - lost)
    kept = [token for token in range(REQUESTS) if token != nth or not lost]
    got = [
        receive.memory.read(GuestAddress(buffer(1024 + place, 64).address + HEADER_SIZE), 1)[0]
        for place in range(len(kept))
    ]
    assert fault.happened and got == kept and card.dropped == lost
    assert receive.failures == transmit.failures == []
    receive.close()
    transmit.close()
    loop.close()


@pytest.mark.parametrize("nth", NTH)
@pytest.mark.parametrize(
    "number", [errno.EINTR, errno.EIO, errno.ENOMEM, errno.EAGAIN, errno.ENOBUFS, errno.EBADFD]
)
def test_a_frame_that_cannot_be_received_fails_the_queue_and_one_interrupted_does_not(
    number: int, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, receive, transmit, loop, fault = network(nth, number, monkeypatch, "readv")
    for token in range(REQUESTS):
        receive.submit(token, 0, 64)
    exchanged(receive, transmit, range(REQUESTS))
    eventually(lambda: fault.happened, "the fault")
    if number == errno.EINTR:
        receive.collect(REQUESTS)
        assert receive.failures == []
    else:
        eventually(lambda: len(receive.failures) == 1, "the failure")
        (failure,) = receive.failures
        assert isinstance(failure, OSError) and failure.errno == number
        # Those that were received are given back, and the one that was not has not been taken.
        assert len(receive.driver.reap()) == nth and receive.ring.state.available == nth
    receive.close()
    transmit.close()
    loop.close()


def pinged(network: Responder) -> bool:
    """Ask who the host is; whether it answers."""
    guest, host = Station(b"\2\0\0\0\0\2", bytes([192, 168, 19, 2])), bytes([192, 168, 19, 1])
    frame = memoryview(bytearray(2000))
    network.send([memoryview(bytearray(HEADER_SIZE)), memoryview(bytearray(arp_request(guest, host)))])
    if not select.select([network.fd], [], [], 0.05)[0]:
        return False
    length = network.receive([frame])
    return arp_reply(bytes(frame[HEADER_SIZE:length])) is not None


class Far:
    """The far end of a responder's network, of which one call of *name* fails, the *nth* one."""

    def __init__(self, end: socket.socket, name: str, nth: int, number: int) -> None:
        self.end = end
        self.fault = Fault(number, nth)
        self._name = name

    def __getattr__(self, name: str) -> object:
        call: Callable[..., object] = getattr(self.end, name)

        def faulty(*arguments: object) -> object:
            self.fault.calls += 1
            if self.fault.calls != self.fault.nth + 1:
                return call(*arguments)
            self.fault.happened = True
            raise OSError(self.fault.outcome, os.strerror(int(str(self.fault.outcome))))

        return faulty if name == self._name else call


def responder(monkeypatch: pytest.MonkeyPatch, call: str, nth: int, number: int) -> tuple[Responder, Far]:
    ends: list[Far] = []

    def pair(*kind: int) -> tuple[socket.socket, Far]:
        near, far = socket_pair(*kind)
        ends.append(Far(far, call, nth, number))
        return near, ends[0]

    socket_pair = socket.socketpair
    monkeypatch.setattr(socket, "socketpair", pair)
    made = Responder("192.168.19.1")
    monkeypatch.undo()
    return made, ends[0]


@pytest.mark.parametrize("nth", NTH)
@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EIO])
def test_an_answer_that_the_host_in_this_process_cannot_send_is_lost_alone(
    number: int, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, far = responder(monkeypatch, "send", nth, number)
    with closing(network):
        assert [pinged(network) for _ in range(REQUESTS)] == [turn != nth for turn in range(REQUESTS)]
        assert far.fault.happened


@pytest.mark.parametrize("nth", NTH)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM])
def test_a_host_in_this_process_that_cannot_receive_fails_the_queue_with_what_the_kernel_said(
    number: int, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, far = responder(monkeypatch, "recv", nth, number)
    card = Net(network, b"\2\0\0\0\0\1")
    with closing(network), closing(Rig(card.queues()[0])) as receive, closing(Rig(card.queues()[1])) as transmit:
        receive.start()
        transmit.start()
        receive.submit(0, 0, 64)
        for token in range(nth):
            # Nothing that the host answers.
            transmit.submit(token)
            transmit.collect(1)
        eventually(lambda: bool(receive.failures), "the failure")
        assert [getattr(failure, "errno") for failure in receive.failures] == [number] and far.fault.happened
        assert receive.driver.reap() == []
        transmit.submit(nth)
        assert transmit.collect(1) == [(nth, 0)] and transmit.failures == [] and card.dropped == 1


def test_a_network_whose_other_end_has_gone_fails_the_queue_and_is_not_asked_for_ever() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    network = PacketNetwork(near.detach(), "packets")
    with closing(network), closing(Rig(Net(network, b"\2\0\0\0\0\1").queues()[0])) as receive:
        receive.start()
        receive.submit(0, 0, 64)
        far.close()
        eventually(lambda: bool(receive.failures), "the failure")
        assert [type(failure) for failure in receive.failures] == [ConnectionResetError]
        assert receive.driver.reap() == []


class Output:
    """A console's output, to a pipe, and what comes out there."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.hangups: list[int | None] = []
        terminal = Terminal(self.reader, self.writer, lambda: None, lambda error: self.hangups.append(error.errno))
        self.rig = Rig(Console(terminal).queues()[1])
        self.rig.start()

    def say(self) -> None:
        for number in range(REQUESTS):
            self.rig.memory.write(buffer(number, 64).address, bytes([number + 65]) * 64)
            self.rig.submit(number)
            self.rig.collect(1)

    def shown(self) -> bytes:
        os.close(self.writer)
        shown = b""
        while piece := os.read(self.reader, 65536):
            shown += piece
        os.close(self.reader)
        return shown

    def close(self) -> None:
        assert self.rig.failures == []
        self.rig.close()


WHOLE = b"".join(bytes([number + 65]) * 64 for number in range(REQUESTS))


@pytest.mark.parametrize("nth", NTH)
@pytest.mark.parametrize("outcome", [errno.EINTR, errno.EAGAIN, Short(1), Short(63)])
def test_what_a_console_says_comes_out_whole_and_once(
    outcome: int | Short, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Output()) as output:
        fault = Fault(outcome, nth, output.writer)
        fault.install(monkeypatch, uio, "writev")
        output.say()
        assert fault.happened and output.shown() == WHOLE and output.hangups == []


@pytest.mark.parametrize("nth", NTH)
@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE, errno.ENOSPC])
def test_output_that_nobody_takes_is_told_of_once_and_dropped(
    number: int, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Output()) as output:
        Fault(number, nth, output.writer).install(monkeypatch, uio, "writev")
        output.say()
        assert output.shown() == WHOLE[: 64 * nth] and output.hangups == [number]


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN, errno.EIO])
def test_what_is_typed_arrives_unless_the_input_has_gone(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keyboard, writer = os.pipe()
    terminal = Terminal(keyboard, writer, lambda: None, lambda error: None)
    with closing(Rig(Console(terminal).queues()[0])) as rig:
        fault = Fault(number, 0, keyboard)
        fault.install(monkeypatch, uio, "readv")
        rig.start()
        rig.submit(0, 0, 64)
        os.write(writer, b"words")
        if number == errno.EIO:
            eventually(lambda: fault.happened, "the fault")
            assert rig.driver.reap() == []
        else:
            assert rig.collect(1) == [(0, 5)]
            assert rig.memory.read(buffer(1024, 5).address, 5) == b"words"
        assert fault.happened and rig.failures == []
    os.close(keyboard)
    os.close(writer)


@pytest.mark.parametrize(("call", "number", "fails"), [
    ("readv", errno.EINTR, False), ("readv", errno.EAGAIN, False), ("readv", errno.EIO, True),
    ("writev", errno.EINTR, False), ("writev", errno.EAGAIN, False), ("writev", errno.EIO, True),
])  # fmt: skip
def test_a_pseudo_terminal_goes_on_or_fails_with_what_the_kernel_said(
    call: str, number: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Pty()) as line:
        fault = Fault(number, 0, line._fd)
        fault.install(monkeypatch, uio, call)
        with closing(Rig(Console(line).queues()[call == "writev"])) as rig:
            rig.start()
            rig.submit(0, 64 if call == "writev" else 0, 0 if call == "writev" else 64)
            if call == "readv":
                os.write(line._end, b"words")
            if fails:
                eventually(lambda: bool(rig.failures), "the failure")
                assert [getattr(failure, "errno") for failure in rig.failures] == [number]
            else:
                assert rig.collect(1) == [(0, 5 if call == "readv" else 0)] and rig.failures == []
        assert fault.happened


@pytest.mark.parametrize("nth", NTH)
def test_randomness_that_cannot_be_had_fails_the_device_and_nothing_else_is_given(
    nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(errno.EIO, nth)
    with closing(Rig(Entropy(KernelRandom()).queues()[0])) as rig:
        fault.install(monkeypatch, os, "urandom")
        rig.start()
        for token in range(nth):
            rig.submit(token, 0, 64)
            assert rig.collect(1) == [(token, 64)]
        rig.submit(nth, 0, 64)
        eventually(lambda: bool(rig.failures), "the failure")
        assert [getattr(failure, "errno") for failure in rig.failures] == [errno.EIO]
        assert rig.driver.reap() == [] and rig.memory.read(buffer(1024 + nth).address, 64) == bytes(64)


@pytest.mark.parametrize("nth", NTH)
@pytest.mark.parametrize(("number", "fails"), [(errno.EAGAIN, False), (errno.EIO, True)])
def test_a_kick_that_cannot_be_read_is_waited_for_or_fails_the_queue(
    number: int, fails: bool, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Rig(Queue("work", lambda chain: 0))) as rig:
        fault = Fault(number, nth, rig.kick.fd)
        fault.install(monkeypatch, os, "read")
        rig.start()
        for token in range(nth):
            rig.submit(token)
            rig.collect(1)

        def happened() -> bool:
            # While the thread was awake it wanted no kick, and has read fewer than there were requests.
            os.eventfd_write(rig.kick.fd, 1)
            return fault.happened

        eventually(happened, "the fault")
        if fails:
            eventually(lambda: bool(rig.failures), "the failure")
            assert [getattr(failure, "errno") for failure in rig.failures] == [number]
        else:
            rig.submit(REQUESTS)
            assert rig.collect(1) == [(REQUESTS, 0)] and rig.failures == []


def back(rig: Rig) -> list[tuple[int, int]]:
    """The chains that are returned next, looked for."""
    found: list[tuple[int, int]] = []

    def looked() -> bool:
        found.extend(rig.driver.reap())
        return bool(found)

    eventually(looked, "a chain's return")
    return found


@pytest.mark.parametrize("nth", NTH)
def test_an_interrupt_that_cannot_be_sent_fails_the_queue_and_what_was_served_is_returned(
    nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Rig(Queue("work", lambda chain: 0))) as rig:
        fault = Fault(errno.EIO, nth, rig.interrupt.fd)
        fault.install(monkeypatch, os, "write")
        rig.start()
        returned: list[tuple[int, int]] = []
        sent = 0
        while not fault.happened:
            assert sent < 100
            rig.driver.enable_interrupts()
            rig.submit(sent)
            sent += 1
            returned += back(rig)
        eventually(lambda: bool(rig.failures), "the failure")
        assert [getattr(failure, "errno") for failure in rig.failures] == [errno.EIO]
        assert returned == [(token, 0) for token in range(sent)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM])
def test_a_stop_whose_kick_fails_is_a_stop_all_the_same(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Rig(Queue("work", lambda chain: 0))) as rig:
        rig.start()
        rig.submit(0)
        rig.collect(1)
        fault = Fault(number, 0, rig.kick.fd)
        fault.install(monkeypatch, os, "write")
        rig.thread.stop()
        assert fault.happened and rig.failures == []
