"""vhost-user messages over a socket: whole, with descriptors that no other program inherits (T14, Y5)."""

import array
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from runtime.rigs import PATIENCE, nothing_left

from lguestlib.abi.memfd import memfd
from lguestlib.runtime.vhost_user.stream import MessageStream, close_all
from lguestlib.virtio.vhost_user.message import Message, ProtocolError


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def ends() -> Iterator[tuple[MessageStream, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    stream = MessageStream(theirs)
    yield stream, ours
    stream.close()
    ours.close()


def sent(end: socket.socket, data: bytes, fds: list[int]) -> None:
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    assert end.sendmsg([data], control) == len(data)


def test_messages_arrive_as_they_were_sent(ends: tuple[MessageStream, socket.socket]) -> None:
    stream, ours = ends
    messages = [Message(number, bytes([number]) * number) for number in range(20)]
    ours.sendall(b"".join(message.encode() for message in messages))
    assert [stream.receive() for _ in messages] == messages
    ours.shutdown(socket.SHUT_WR)
    assert stream.receive() is None


def test_a_message_arrives_byte_by_byte_and_is_one(ends: tuple[MessageStream, socket.socket]) -> None:
    stream, ours = ends
    message = Message(5, bytes(30))
    received: list[Message | None] = []
    receiving = threading.Thread(target=lambda: received.append(stream.receive()))
    receiving.start()
    for byte in message.encode():
        ours.sendall(bytes([byte]))
        time.sleep(0)
    receiving.join(PATIENCE)
    assert received == [message]


def test_y5_descriptors_are_the_receivers_and_no_other_programs(
    ends: tuple[MessageStream, socket.socket],
) -> None:
    stream, ours = ends
    made = [memfd(str(number), 1 + number) for number in range(8)]
    sent(ours, Message(5, bytes(20)).encode(), made)
    message = stream.receive()
    assert message is not None and len(message.fds) == 8
    assert not set(message.fds) & set(made)
    assert [os.fstat(fd).st_size for fd in message.fds] == list(range(1, 9))
    assert not any(map(os.get_inheritable, message.fds))
    close_all(message.fds)
    close_all(made)


def test_descriptors_stay_with_their_own_message(ends: tuple[MessageStream, socket.socket]) -> None:
    stream, ours = ends
    (fd,) = made = [memfd("one", 1)]
    for number in range(6):
        sent(ours, Message(number, bytes(number)).encode(), made * (number % 3))
    for number in range(6):
        message = stream.receive()
        assert message is not None
        assert (message.request, len(message.fds)) == (number, number % 3)
        close_all(message.fds)
    os.close(fd)


@pytest.mark.parametrize(("first", "second"), [(9, 0), (4, 5), (200, 0), (8, 200), (253, 0)])
def test_t14_of_too_many_descriptors_none_stays_open(
    ends: tuple[MessageStream, socket.socket], first: int, second: int
) -> None:
    stream, ours = ends
    fd = memfd("one", 1)
    data = Message(5, bytes(20)).encode()
    sent(ours, data[:14], [fd] * first)
    if second:
        sent(ours, data[14:], [fd] * second)
    with pytest.raises(ProtocolError, match="descriptors"):
        stream.receive()
    os.close(fd)


def test_a_reply_goes_with_its_descriptors_which_stay_the_senders(
    ends: tuple[MessageStream, socket.socket],
) -> None:
    stream, ours = ends
    fd = memfd("one", 77)
    stream.send(Message(31, b"payload", (fd,)))
    data, fds, flags, _ = socket.recv_fds(ours, 100, 10)
    assert data == Message(31, b"payload").encode()
    assert [os.fstat(each).st_size for each in fds] == [77]
    close_all([*fds, fd])


def test_descriptors_are_all_closed_whatever_their_file_systems_say(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [memfd("one", 1) for _ in range(3)]
    close = os.close

    def complain(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, "what was written is lost")

    monkeypatch.setattr(os, "close", complain)
    close_all(made)
    monkeypatch.undo()
    # But one that is not open is a mistake of ours.
    with pytest.raises(OSError, match="Bad file descriptor"):
        close_all(made)


def test_a_peer_that_has_gone_is_an_error_and_no_signal(ends: tuple[MessageStream, socket.socket]) -> None:
    stream, ours = ends
    ours.close()
    with pytest.raises(BrokenPipeError):
        stream.send(Message(1))


def test_the_end_wakes_who_receives_and_comes_after_what_was_sent(
    ends: tuple[MessageStream, socket.socket],
) -> None:
    stream, ours = ends
    received: list[Message | None] = []
    receiving = threading.Thread(target=lambda: received.append(stream.receive()))
    receiving.start()
    receiving.join(0.01)
    assert received == []
    stream.end()
    receiving.join(PATIENCE)
    assert received == [None]
    stream.end()
    assert ours.recv(10) == b""
