"""The front-end on its socket: what it asks in which order, what it waits for, and for how long."""

import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import interpreters
import pytest
from runtime.rigs import eventually, nothing_left, open_descriptors
from runtime.scripted_back_end import CONFIG, PROTOCOL, REPLY, ScriptedBackEnd, number, silence

from lguestlib.abi import vhost_user as abi
from lguestlib.abi.eventfd import SIGNAL, eventfd
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.region import Region
from lguestlib.runtime.backend.random import KernelRandom
from lguestlib.runtime.vhost_user.frontend import BackEndError, BackEndRefused, FrontEnd, Happening
from lguestlib.runtime.vhost_user.listen import Listener
from lguestlib.runtime.vhost_user.server import Server
from lguestlib.virtio.device import RING_FEATURES
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.errors import QueueLayoutError
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.vhost_user.frontend import PROTOCOL_FEATURES
from lguestlib.virtio.vhost_user.message import Message

SECONDS = 0.25
"""How long a front-end waits here."""

LAYOUT = QueueLayout.contiguous(0, 16, GuestAddress(0x1000))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def backend() -> Iterator[ScriptedBackEnd]:
    with ScriptedBackEnd() as made:
        yield made


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    regions = [Region.memfd(GuestAddress(0), 1 << 20), Region.memfd(GuestAddress(1 << 30), 1 << 16)]
    with GuestMemory(regions) as made:
        yield made


@pytest.fixture
def eventfds() -> Iterator[tuple[int, int]]:
    kick, call = eventfd(), eventfd()
    yield kick, call
    os.close(kick)
    os.close(call)


def connected(backend: ScriptedBackEnd, channel: bool = False) -> FrontEnd:
    return FrontEnd(backend.connection, "there", SECONDS, channel=channel)


BEGINNING = ["GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "SET_OWNER"]
RING = [
    "SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_ERR", "SET_VRING_CALL", "SET_VRING_KICK",
]  # fmt: skip


def test_it_begins_by_negotiating(backend: ScriptedBackEnd) -> None:
    with connected(backend) as front_end:
        assert backend.names == [*BEGINNING, "GET_QUEUE_NUM"]
        assert struct.unpack("<Q", backend.received[2].payload)[0] == 1 << 0 | 1 << 3 | 1 << 9
        assert (front_end.features, front_end.rings_max) == (int(RING_FEATURES), 2)
        assert front_end.has_config and front_end.config(8, 4) == CONFIG[8:12]


def test_a_channel_is_handed_over_where_it_is_wanted(backend: ScriptedBackEnd) -> None:
    with connected(backend, channel=True):
        assert backend.names == [*BEGINNING, "SET_BACKEND_REQ_FD", "GET_QUEUE_NUM"]
        assert struct.unpack("<Q", backend.received[2].payload)[0] == PROTOCOL


def test_a_back_end_without_protocol_features_is_asked_nothing_that_needs_them(
    memory: GuestMemory, eventfds: tuple[int, int]
) -> None:
    with (
        ScriptedBackEnd(features=int(RING_FEATURES)) as backend,
        connected(backend, channel=True) as front_end,
    ):
        front_end.share(memory, int(RING_FEATURES))
        front_end.start_queue(LAYOUT, *eventfds)
        front_end.stop_queue(LAYOUT)
        front_end.reset()
        ring = [*RING, "GET_FEATURES", "GET_VRING_BASE"]
        assert backend.names == ["GET_FEATURES", "SET_OWNER", "SET_FEATURES", "SET_MEM_TABLE", *ring]
        assert struct.unpack("<Q", backend.received[2].payload)[0] == int(RING_FEATURES)
        assert not any(message.need_reply for message in backend.received)
        assert (front_end.rings_max, front_end.has_config) == (0, False)
        with pytest.raises(BackEndRefused, match="^there: the back-end does not offer .* CONFIG$"):
            front_end.config(0, 4)


def test_memory_is_told_of_as_it_is_mapped_here(backend: ScriptedBackEnd, memory: GuestMemory) -> None:
    with connected(backend) as front_end:
        front_end.share(memory, 1 << 32)
        features, table = backend.received[-2:]
        assert struct.unpack("<Q", features.payload)[0] == 1 << 32 | PROTOCOL_FEATURES
        low, high = memory.regions
        assert struct.unpack("<II8Q", table.payload) == (
            2, 0, 0, 1 << 20, low.host_address, 0, 1 << 30, 1 << 16, high.host_address, 0,
        )  # fmt: skip
        memory.write(GuestAddress(5), b"shared")
        assert os.pread(table.fds[0], 6, 5) == b"shared"
        assert [os.fstat(fd).st_size for fd in table.fds] == [1 << 20, 1 << 16]


def test_memory_that_cannot_be_handed_over_is_refused(backend: ScriptedBackEnd) -> None:
    with connected(backend) as front_end, GuestMemory.anonymous(1 << 16, GuestAddress(0x5000)) as memory:
        with pytest.raises(ValueError, match=r"^guest memory at 0x5000: this process's alone \(make it by "):
            front_end.share(memory, 0)
    regions = [Region.memfd(GuestAddress(number << 16), 4096) for number in range(9)]
    with ScriptedBackEnd() as other, connected(other) as front_end, GuestMemory(regions) as memory:
        with pytest.raises(ValueError, match="^guest memory: 9 regions, and a back-end takes 8$"):
            front_end.share(memory, 0)


def test_a_ring_is_set_up_at_the_addresses_of_this_process(
    backend: ScriptedBackEnd, memory: GuestMemory, eventfds: tuple[int, int]
) -> None:
    kick, call = eventfds
    layout = QueueLayout(1, 16, GuestAddress(0x1000), GuestAddress(1 << 30), GuestAddress(0x2000))
    with connected(backend) as front_end:
        front_end.share(memory, int(RING_FEATURES))
        before = len(backend.received)
        front_end.start_queue(layout, kick, call, QueueState(7))
        messages = backend.received[before:]
        assert [message.name for message in messages] == [*RING, "SET_VRING_ENABLE", "GET_FEATURES"]
        low, high = (region.host_address for region in memory.regions)
        assert [message.payload for message in messages[:2]] == [
            struct.pack("<II", 1, value) for value in (16, 7)
        ]
        assert struct.unpack("<II4Q", messages[2].payload) == (1, 0, low + 0x1000, low + 0x2000, high, 0)
        assert messages[6].payload == struct.pack("<II", 1, 1)
        os.write(kick, SIGNAL)
        assert os.read(backend.fd(abi.VHOST_USER_SET_VRING_KICK, 1), 8) == SIGNAL
        os.write(backend.fd(abi.VHOST_USER_SET_VRING_CALL, 1), SIGNAL)
        assert os.read(call, 8) == SIGNAL


def test_a_ring_that_cannot_be_is_never_told_of(
    backend: ScriptedBackEnd, memory: GuestMemory, eventfds: tuple[int, int]
) -> None:
    with connected(backend) as front_end:
        with pytest.raises(ValueError, match="^a ring without memory"):
            front_end.start_queue(LAYOUT, *eventfds)
        front_end.share(memory, 0)
        before = len(backend.received)
        for at in (0x1001, 1 << 20, (1 << 20) - 64):
            with pytest.raises(QueueLayoutError):
                front_end.start_queue(QueueLayout.contiguous(0, 16, GuestAddress(at)), *eventfds)
        assert len(backend.received) == before


def test_an_interrupt_that_the_back_end_made_non_blocking_is_blocking_again(
    backend: ScriptedBackEnd, memory: GuestMemory, eventfds: tuple[int, int]
) -> None:
    def unblock(message: Message) -> Message:
        os.set_blocking(message.fds[0], False)
        return number(message, 0)

    backend.answer(abi.VHOST_USER_SET_VRING_CALL, unblock)
    with connected(backend) as front_end:
        front_end.share(memory, 0)
        front_end.start_queue(LAYOUT, *eventfds)
        assert os.get_blocking(eventfds[1])


def used(memory: GuestMemory, index: int) -> None:
    memory.write(GuestAddress(LAYOUT.used + 2), index.to_bytes(2, "little"))


def test_t9_a_stopped_ring_is_drained_though_the_back_end_answers_before(
    backend: ScriptedBackEnd, memory: GuestMemory, eventfds: tuple[int, int]
) -> None:
    base = struct.pack("<II", 0, 3)
    backend.answer(
        abi.VHOST_USER_GET_VRING_BASE, lambda message: Message(message.request, base, (), REPLY)
    )
    with connected(backend) as front_end:
        front_end.share(memory, 0)
        front_end.start_queue(LAYOUT, *eventfds)
        used(memory, 2)
        timer = threading.Timer(0.05, used, (memory, 3))
        timer.start()
        start = time.monotonic()
        assert front_end.stop_queue(LAYOUT) == QueueState(3)
        assert 0.04 < time.monotonic() - start < SECONDS
        timer.join()


@pytest.mark.parametrize("served", [True, False])
def test_a_ring_is_stopped_when_all_that_is_available_is_served_or_the_time_is_over(
    backend: ScriptedBackEnd, memory: GuestMemory, eventfds: tuple[int, int], served: bool
) -> None:
    stopped: list[float] = []

    def stop(message: Message) -> Message:
        stopped.append(time.monotonic())
        used(memory, 2)
        return Message(message.request, struct.pack("<II", 0, 2), (), REPLY)

    backend.answer(abi.VHOST_USER_GET_VRING_BASE, stop)
    with connected(backend) as front_end:
        front_end.share(memory, 0)
        front_end.start_queue(LAYOUT, *eventfds)
        memory.write(GuestAddress(LAYOUT.available + 2), (2).to_bytes(2, "little"))
        timer = threading.Timer(0.05, used, (memory, 2 if served else 1))
        timer.start()
        start = time.monotonic()
        assert front_end.stop_queue(LAYOUT, finish=True) == QueueState(2)
        timer.join()
        assert 0.04 < stopped[0] - start < SECONDS if served else stopped[0] - start >= SECONDS


@pytest.mark.parametrize("goes", [False, True])
def test_a_ring_whose_requests_are_never_finished_ends_the_conversation(
    backend: ScriptedBackEnd, memory: GuestMemory, eventfds: tuple[int, int], goes: bool
) -> None:
    with connected(backend) as front_end:
        front_end.share(memory, 0)
        front_end.start_queue(LAYOUT, *eventfds)
        used(memory, 1)
        timer = threading.Timer(0.05, backend.end if goes else lambda: None)
        timer.start()
        start = time.monotonic()
        with pytest.raises(BackEndError, match="^there: ring 0: stopped, and requests not finished$"):
            front_end.stop_queue(LAYOUT)
        assert (time.monotonic() - start < SECONDS) == goes
        with pytest.raises(BackEndError, match="not finished$"):
            front_end.config(0, 4)
        timer.join()


def test_a_device_is_reset_where_it_can_be() -> None:
    with ScriptedBackEnd(protocol=PROTOCOL | 1 << abi.VHOST_USER_PROTOCOL_F_RESET_DEVICE) as backend:
        with connected(backend) as front_end:
            front_end.reset()
            assert backend.names[-1] == "RESET_DEVICE"


def test_a_refusal_is_an_error_and_the_conversation_goes_on(
    backend: ScriptedBackEnd, memory: GuestMemory
) -> None:
    backend.answer(abi.VHOST_USER_SET_MEM_TABLE, lambda message: number(message, 1))
    with connected(backend) as front_end:
        with pytest.raises(BackEndRefused, match=r"^there: SET_MEM_TABLE: the back-end has refused it "):
            front_end.share(memory, 0)
        with pytest.raises(BackEndRefused, match="GET_CONFIG: the back-end has refused 61 bytes at 0$"):
            front_end.config(0, 61)
        assert front_end.config(0, 60) == CONFIG
        front_end.write_config(32, b"\1")
        assert backend.received[-1].payload == struct.pack("<III", 32, 1, 0) + b"\1"


def closing(message: Message) -> Message:
    """With descriptors that nobody has asked for."""
    return Message(message.request, bytes(8), (0, 1, 2), REPLY)


ENDS: dict[str, tuple[Callable[[Message], Message | bytes | None], str]] = {
    "silence": (silence, r"GET_QUEUE_NUM: no answer for 0.25 s \(has it another front-end, or is it st"),
    "half a header": (lambda message: b"\x11\0\0\0\5", "GET_QUEUE_NUM: no answer for 0.25 s"),
    "half a payload": (lambda message: struct.pack("<IIIH", 17, 5, 8, 1), "GET_QUEUE_NUM: no answer for "),
    "another's reply": (lambda message: number(Message(2), 0), "GET_QUEUE_NUM: answered with a reply to SE"),
    "a request": (lambda message: Message(17, bytes(8)), "GET_QUEUE_NUM: answered with flags 0x1"),
    "descriptors": (closing, "GET_QUEUE_NUM: answered with 3 descriptors"),
    "no payload": (lambda message: Message(17, b"", (), REPLY), "GET_QUEUE_NUM: answered with 0 bytes"),
    "a long payload": (lambda message: Message(17, bytes(4096), (), REPLY), "GET_QUEUE_NUM: answered with "),
    "a longer one": (lambda message: struct.pack("<III", 17, 5, 4097), "request 17: 4097 bytes announced"),
    "another protocol": (lambda message: b"HTTP/1.1 400 Bad\r\n", "request 1347703880: flags .* are not "),
    "zeros": (lambda message: bytes(64), "request 0: flags 0x0 are not of version 1"),
    "too many descriptors": (
        lambda message: Message(17, bytes(8), tuple([0] * 9), REPLY), "more than 8 descriptors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_a_back_end_that_breaks_the_protocol_is_an_error_and_never_a_hang(name: str) -> None:
    answer, reason = ENDS[name]
    before = open_descriptors()
    with ScriptedBackEnd(answers={abi.VHOST_USER_GET_QUEUE_NUM: answer}) as backend:
        start = time.monotonic()
        with pytest.raises(BackEndError, match=f"^there: {reason}") as caught:
            connected(backend)
        assert time.monotonic() - start < 2 * SECONDS
        assert not isinstance(caught.value, BackEndRefused)
    assert open_descriptors() == before


@pytest.mark.parametrize("request_number", [1, 15, 16, 3, 17])
def test_a_back_end_that_goes_is_an_error_at_once(request_number: int) -> None:
    with ScriptedBackEnd() as backend:

        def leave(message: Message) -> None:
            backend.socket.shutdown(socket.SHUT_RDWR)

        backend.answer(request_number, leave)
        start = time.monotonic()
        reason = r"the back-end has closed the connection \(it may have said why\)"
        with pytest.raises(BackEndError, match=f"^there: [A-Z_]+: {reason}"):
            connected(backend)
        assert time.monotonic() - start < SECONDS


def test_a_reply_that_comes_byte_by_byte_does_not_go_on_for_ever() -> None:
    with ScriptedBackEnd() as backend:

        def trickle(message: Message) -> None:
            data = struct.pack("<III", 17, 5, 4096) + bytes(4096)
            for at in range(len(data)):
                try:
                    backend.socket.sendall(data[at : at + 1])
                except OSError:
                    return
                time.sleep(0.001)

        backend.answer(abi.VHOST_USER_GET_QUEUE_NUM, trickle)
        with pytest.raises(BackEndError, match="^there: a message in more than 64 pieces"):
            connected(backend)


def test_after_the_end_nothing_is_asked_any_more(backend: ScriptedBackEnd) -> None:
    with connected(backend) as front_end:
        backend.answer(abi.VHOST_USER_GET_CONFIG, silence)
        with pytest.raises(BackEndError, match="GET_CONFIG: no answer"):
            front_end.config(0, 4)
        received = len(backend.received)
        with pytest.raises(BackEndError, match="GET_CONFIG: no answer"):
            front_end.write_config(0, b"x")
        assert len(backend.received) == received
        assert front_end.wait() == Happening.GONE
    with pytest.raises(BackEndError, match="GET_CONFIG: no answer"):
        front_end.config(0, 4)
    with ScriptedBackEnd() as other:
        front_end = connected(other)
        front_end.close()
        front_end.close()
        with pytest.raises(BackEndError, match="^there: the connection was closed$"):
            front_end.config(0, 4)


def test_whoever_waits_for_a_reply_may_be_told_to_wait_no_longer(backend: ScriptedBackEnd) -> None:
    hurry = threading.Event()
    with FrontEnd(backend.connection, "there", 60.0, hurry.is_set) as front_end:
        backend.answer(abi.VHOST_USER_GET_CONFIG, silence)
        threading.Timer(0.02, hurry.set).start()
        start = time.monotonic()
        with pytest.raises(BackEndError):
            front_end.config(0, 4)
        assert time.monotonic() - start < 1.0


def listen(happenings: list[Happening], front_end: FrontEnd) -> threading.Thread:
    def follow() -> None:
        while not happenings or happenings[-1] != Happening.GONE:
            happenings.append(front_end.wait())

    thread = threading.Thread(target=follow)
    thread.start()
    return thread


def test_what_nobody_has_asked_for_is_told(
    backend: ScriptedBackEnd, memory: GuestMemory, eventfds: tuple[int, int]
) -> None:
    happenings: list[Happening] = []
    with connected(backend, channel=True) as front_end:
        front_end.share(memory, 0)
        front_end.start_queue(LAYOUT, *eventfds)
        thread = listen(happenings, front_end)
        channel = backend.channel()
        channel.send(Message(abi.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG))
        eventually(lambda: happenings == [Happening.CONFIG_CHANGED], "the change")
        os.write(backend.fd(abi.VHOST_USER_SET_VRING_ERR), SIGNAL)
        eventually(lambda: happenings[1:] == [Happening.FAILED], "the failure")
        front_end.wake()
        eventually(lambda: happenings[2:] == [Happening.WOKEN], "the wake-up")
        backend.end()
        thread.join()
        assert happenings[3:] == [Happening.GONE]
        channel.close()


def test_t19_the_back_end_is_answered_while_it_is_asked(backend: ScriptedBackEnd) -> None:
    """A back-end with one thread, which waits for us while we wait for it."""
    happenings: list[Happening] = []
    answers: list[Message | None] = []
    with connected(backend, channel=True) as front_end:
        channel = backend.channel()

        def ask_back(message: Message) -> Message:
            flags = abi.VHOST_USER_VERSION | abi.VHOST_USER_NEED_REPLY_MASK
            for request in (abi.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, 77):
                channel.send(Message(request, flags=flags))
                answers.append(channel.receive())
            return number(message, 0)

        backend.answer(abi.VHOST_USER_SET_CONFIG, ask_back)
        thread = listen(happenings, front_end)
        front_end.write_config(0, b"x")
        assert answers == [Message(2, bytes(8), (), REPLY), Message(77, struct.pack("<Q", 1), (), REPLY)]
        assert happenings == [Happening.CONFIG_CHANGED]
        front_end.end()
        thread.join()
        channel.close()


@pytest.mark.parametrize("sent", [b"", b"garbage that is no message", struct.pack("<III", 2, 0x1, 8)])
def test_a_channel_that_is_broken_costs_nothing_but_itself(backend: ScriptedBackEnd, sent: bytes) -> None:
    happenings: list[Happening] = []
    with connected(backend, channel=True) as front_end:
        thread = listen(happenings, front_end)
        fd = backend.fd(abi.VHOST_USER_SET_BACKEND_REQ_FD)
        if sent:
            os.write(fd, sent)
        else:
            with socket.socket(fileno=os.dup(fd)) as theirs:
                theirs.shutdown(socket.SHUT_RDWR)
        hung_up = select.poll()
        hung_up.register(fd, select.POLLRDHUP)
        assert hung_up.poll(5000)
        assert front_end.config(0, 4) == CONFIG[:4]
        backend.end()
        thread.join()
        assert happenings == [Happening.GONE]


def test_descriptors_that_come_on_the_channel_are_closed(backend: ScriptedBackEnd) -> None:
    happenings: list[Happening] = []
    with connected(backend, channel=True) as front_end:
        channel = backend.channel()
        before = open_descriptors()
        thread = listen(happenings, front_end)
        channel.send(Message(abi.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, b"", (0, 1)))
        eventually(lambda: happenings == [Happening.CONFIG_CHANGED], "the change")
        assert open_descriptors() == before
        front_end.end()
        thread.join()
        channel.close()


def test_requests_from_several_threads_get_each_its_own_reply(backend: ScriptedBackEnd) -> None:
    wrong: list[int] = []
    with connected(backend) as front_end:

        def ask(offset: int) -> None:
            for _ in range(50):
                if front_end.config(offset, 2) != CONFIG[offset : offset + 2]:
                    wrong.append(offset)

        threads = [threading.Thread(target=ask, args=(offset,)) for offset in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


FEW_DESCRIPTORS = """
import os, resource, sys
from lguestlib.runtime.vhost_user.frontend import BackEndError, FrontEnd
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
lowest = os.dup(0)
os.close(lowest)
before = os.listdir("/proc/self/fd")
for more in range(10):
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + more, limits[1]))
    try:
        FrontEnd.connect(sys.argv[1], channel=True).close()
        print("connected")
    except BackEndError as error:
        print(error.reason)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert os.listdir("/proc/self/fd") == before
"""


def test_too_few_descriptors_are_an_error_with_the_remedy_and_none_is_lost(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    listener = Listener(path)
    server = Server(Entropy(KernelRandom()), listener.socket, print)
    server.start()
    try:
        lines = interpreters.run([sys.executable, "-W", "error"], "-c", FEW_DESCRIPTORS, path).splitlines()
    finally:
        server.close()
        listener.close()
    failed = lines.index("connected")
    assert failed >= 3 and lines[failed:] == ["connected"] * (10 - failed)
    assert all(line.endswith("Too many open files (ulimit -n raises the limit)") for line in lines[:failed])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", r"No such file or directory \(start the back-end before, or name its socket\)"),
        ("abandoned", r"Connection refused \(is the back-end listening there\?\)"),
        ("file", r"Connection refused \(is the back-end listening there\?\)"),
        ("datagrams", r"Protocol wrong type for socket \(it is no stream socket\)"),
        ("full", r"Resource temporarily unavailable \(is it busy with another front-end\?\)"),
        ("x" * 200, r"AF_UNIX path too long \(107 bytes are the most\)"),
    ],
)
def test_where_no_back_end_is_the_reason_and_the_remedy_are_said(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with (
        socket.socket(socket.AF_UNIX) as abandoned,
        socket.socket(socket.AF_UNIX) as full,
        socket.socket(socket.AF_UNIX) as first,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
    ):
        abandoned.bind("abandoned")
        full.bind("full")
        full.listen(0)
        first.connect("full")
        datagrams.bind("datagrams")
        start = time.monotonic()
        with pytest.raises(BackEndError, match=f"^{name}: {reason}$") as caught:
            FrontEnd.connect(name)
        assert time.monotonic() - start < 1.0
        assert caught.value.path == name
