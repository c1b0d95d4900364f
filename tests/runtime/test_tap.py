"""TAP devices and the interfaces they are, in a network namespace of the test's own thread."""

import ctypes
import errno
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import sessions
from runtime.rigs import Rig, buffer, eventually, nothing_left

from lguestlib.abi import tun
from lguestlib.abi import virtio_net as net
from lguestlib.abi.ioctl import ioctl
from lguestlib.abi.libc import failure
from lguestlib.abi.netdevice import ifreq
from lguestlib.abi.sched import CLONE_NEWNET, unshare
from lguestlib.runtime.backend import tap as tap_module
from lguestlib.runtime.backend.tap import DEVICE, Tap
from lguestlib.runtime.interface import InterfaceAddress, Interfaces, netmask
from lguestlib.runtime.namespace import without_ipv6
from lguestlib.runtime.packets import Station, answer, arp_reply, arp_request, echo_reply, echo_request
from lguestlib.virtio.devices.net import HEADER_SIZE, Net

HOST = InterfaceAddress(bytes([10, 9, 8, 1]), 24)
# linux/ethtool.h, linux/sockios.h
ETHTOOL_GTXCSUM, ETHTOOL_GTSO = 0x16, 0x1E
SIOCETHTOOL = 0x8946
# linux/if_ether.h
ETH_P_IP = 0x0800
GUEST = Station(bytes.fromhex("020000000002"), bytes([10, 9, 8, 2]))


def in_namespace(test: Callable[[], None]) -> None:
    """Run *test* on a thread whose network is empty, and its own."""
    sessions.root_or_skip()
    if not os.path.exists(DEVICE):
        pytest.skip(f"{DEVICE} is not there: modprobe tun")
    failures: list[BaseException] = []

    def run() -> None:
        unshare(CLONE_NEWNET)
        try:
            test()
        except BaseException as error:
            failures.append(error)

    with nothing_left():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    if failures:
        raise failures[0]


@contextmanager
def tap_with_host() -> Iterator[Tap]:
    """A TAP device that is up, with the host's address."""
    tap = Tap()
    without_ipv6(tap.name)
    with Interfaces() as interfaces:
        interfaces.set_address(tap.name, HOST)
        interfaces.set_up(tap.name)
    try:
        yield tap
    finally:
        tap.close()


def names() -> list[str]:
    return sorted(name for _, name in socket.if_nameindex())


def send(tap: Tap, frame: bytes) -> int:
    return tap.send([memoryview(bytearray(HEADER_SIZE)), memoryview(bytearray(frame))])


def receive(tap: Tap) -> bytes:
    header, frame = memoryview(bytearray(HEADER_SIZE)), memoryview(bytearray(2000))
    return bytes(frame[: tap.receive([header, frame]) - HEADER_SIZE])


def test_a_tap_device_is_an_interface_for_as_long_as_it_is_open() -> None:
    def test() -> None:
        one, other, named = Tap(), Tap(), Tap("mine")
        assert (one.name, other.name, named.name) == ("tap0", "tap1", "mine")
        assert names() == ["lo", "mine", "tap0", "tap1"]
        with pytest.raises(OSError) as caught:
            Tap("mine")
        assert caught.value.errno == errno.EBUSY
        for tap in (one, other, named):
            tap.close()
        assert names() == ["lo"]

    in_namespace(test)


def made(name: str, flags: int = tun.IFF_TAP | tun.IFF_NO_PI) -> str:
    """An interface that stays, as ``ip tuntap add`` makes it."""
    fd = os.open(DEVICE, os.O_RDWR)
    request = ifreq(ifr_name=name.encode())
    request.ifr_ifru.ifru_flags = flags
    ioctl(fd, tun.TUNSETIFF, request, "TUNSETIFF", name)
    ioctl(fd, tun.TUNSETPERSIST, 1, "TUNSETPERSIST", name)
    os.close(fd)
    return name


def test_an_interface_that_is_there_is_used_and_stays() -> None:
    def test() -> None:
        for flags in (0, tun.IFF_VNET_HDR):
            made("here", tun.IFF_TAP | tun.IFF_NO_PI | flags)
            with Interfaces() as interfaces:
                interfaces.set_mtu("here", 9000)
                interfaces.set_address("here", HOST)
                interfaces.set_up("here")
            for _ in range(2):
                tap = Tap.existing("here")
                assert (tap.name, tap.mtu) == ("here", 9000)
                host = None
                while not host:
                    # The kernel sends nothing for a while after the carrier has come back.
                    if select.select([tap.fd], [], [], 0.05)[0]:
                        host = arp_reply(receive(tap))
                    else:
                        send(tap, arp_request(GUEST, HOST.address))
                assert host.address == HOST.address
                tap.close()
            assert names() == ["here", "lo"]

    in_namespace(test)


def test_t2_headers_are_those_of_the_negotiated_features() -> None:
    def test() -> None:
        with Interfaces() as interfaces:
            tap = Tap()
            interfaces.set_address(tap.name, HOST)
            interfaces.set_up(tap.name)
        for features, size in ((0, 10), (1 << 15, 12), (0, 10), (1 << 32, 12)):
            tap.activate(features)
            host = None
            while not host:
                tap.send([memoryview(bytearray(bytes(size) + arp_request(GUEST, HOST.address)))])
                if select.select([tap.fd], [], [], 0.05)[0]:
                    packet = memoryview(bytearray(2000))
                    length = tap.receive([packet])
                    host = arp_reply(bytes(packet[size:length]))
            assert host.address == HOST.address
        tap.close()

    in_namespace(test)


def test_whoever_opens_it_next_finds_no_offloads_on() -> None:
    def test() -> None:
        tap = Tap.existing(made("here"))
        tap.activate(Tap.offloads)
        assert offloads(tap) == ["tx", "tso"]
        tap.close()
        assert offloads(tap) == []

    in_namespace(test)


def test_a_new_interface_is_no_old_one() -> None:
    def test() -> None:
        with pytest.raises(OSError) as caught:
            Tap(made("here"))
        assert caught.value.errno == errno.EBUSY

    in_namespace(test)


@pytest.mark.parametrize("name", ["missing", "tap%d", "", "longest-name-is", "longest-name-isx", "x" * 100])
def test_an_interface_that_is_not_there_is_named_and_not_made(name: str) -> None:
    def test() -> None:
        made("longest-name-i")
        with pytest.raises(OSError) as caught:
            Tap.existing(name)
        assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, name)
        assert names() == ["lo", "longest-name-i"]

    in_namespace(test)


def test_a_name_is_not_cut_to_that_of_another_interface() -> None:
    def test() -> None:
        made("longest-name-is")
        with pytest.raises(OSError) as caught:
            Tap.existing("longest-name-isx")
        assert caught.value.errno == errno.ENODEV
        Tap.existing("longest-name-is").close()

    in_namespace(test)


def test_an_interface_that_goes_just_before_it_is_opened_is_not_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def test() -> None:
        with pytest.raises(OSError) as caught:
            Tap.existing("gone")
        assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, "gone")
        assert names() == ["lo"]

    monkeypatch.setattr(Interfaces, "index", lambda self, name: 7)
    in_namespace(test)


def test_an_interface_that_another_has_open_is_busy() -> None:
    def test() -> None:
        tap = Tap.existing(made("here"))
        with pytest.raises(OSError) as caught:
            Tap.existing("here")
        assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, "here")
        tap.close()

    in_namespace(test)


def test_what_is_no_tap_interface_with_one_queue_is_refused_with_the_way_to_find_out() -> None:
    def test() -> None:
        made("tunnel", tun.IFF_TUN)
        made("several", tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR | tun.IFF_MULTI_QUEUE)
        for name in ("tunnel", "several", "lo"):
            with pytest.raises(ValueError, match=f"{name}: not a TAP .*ip -details link show {name}"):
                Tap.existing(name)
        assert names() == ["lo", "several", "tunnel"]

    in_namespace(test)


def test_an_interface_that_has_gone_fails_what_is_asked_of_it() -> None:
    def test() -> None:
        tap = Tap.existing(made("here"))
        ioctl(tap.fd, tun.TUNSETPERSIST, 0, "TUNSETPERSIST", "here")
        other, tap.fd = tap.fd, os.open(os.devnull, os.O_RDWR)
        os.close(other)
        with pytest.raises(OSError) as caught:
            tap.mtu
        assert caught.value.errno == errno.ENODEV
        tap.close()

    in_namespace(test)


def test_the_kernel_answers_through_it() -> None:
    def test() -> None:
        with tap_with_host() as tap:
            question = arp_request(GUEST, HOST.address)
            assert send(tap, question) == HEADER_SIZE + len(question)
            host = arp_reply(receive(tap))
            assert host and host.address == HOST.address
            for sequence in range(3):
                send(tap, echo_request(GUEST, host, 5, sequence, bytes(56)))
                # The kernel asks back who the guest is, the first time.
                while not (echo := echo_reply(frame := receive(tap), GUEST.address)):
                    reply = answer(frame, GUEST)
                    assert reply
                    send(tap, reply)
                assert echo.sequence == sequence

    in_namespace(test)


def test_frames_come_by_the_queues_that_are_used_and_go_by_all() -> None:
    def test() -> None:
        tap = Tap(queues=3)
        without_ipv6(tap.name)
        with Interfaces() as interfaces:
            interfaces.set_up(tap.name)
        assert len(tap.pairs) == 3 and tap.pairs[0] is tap
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP)) as host:
            host.bind((tap.name, ETH_P_IP))
            for used in (3, 1, 1, 2, 3, 2, 1):
                tap.use_pairs(used)
                arrived = set(receiving(tap))
                while len(arrived) < used:
                    for port in range(64):
                        host.send(datagram(port))
                    arrived.update(receiving(tap))
                assert arrived == set(range(used))
                for number, queue in enumerate(tap.pairs):
                    queue.send([memoryview(bytearray(bytes(HEADER_SIZE) + datagram(number)))])
                    while (heard := host.recv(100)) != datagram(number):
                        assert heard in map(datagram, range(64)), "what it has sent itself"
        tap.close()
        assert names() == ["lo"]

    in_namespace(test)


def datagram(port: int) -> bytes:
    """An Ethernet frame with an IPv4 UDP datagram: flows are told from each other by *port*."""
    ip = bytes.fromhex("4500 0020 0000 0000 4011 0000") + HOST.address + GUEST.address
    return bytes(12) + ETH_P_IP.to_bytes(2, "big") + ip + bytes([port, port, 0, 7, 0, 12, 0, 0]) + bytes([port] * 4)


def receiving(tap: Tap) -> Iterator[int]:
    """The queues that have frames, for each frame there is."""
    for number, queue in enumerate(tap.pairs):
        while select.select([queue.fd], [], [], 0.01)[0]:
            queue.receive([memoryview(bytearray(2000))])
            yield number


def test_an_interface_with_several_queues_is_made_whole_or_not_at_all() -> None:
    def test() -> None:
        with pytest.raises(OSError) as caught:
            Tap(queues=257)
        assert caught.value.errno == errno.E2BIG and names() == ["lo"]

    in_namespace(test)


def test_a_queue_that_has_gone_fails_the_use_of_it_and_is_tried_again() -> None:
    def test() -> None:
        tap = Tap(queues=3)
        fd, tap.pairs[2].fd = tap.pairs[2].fd, os.open(os.devnull, os.O_RDWR)
        with pytest.raises(OSError) as caught:
            tap.use_pairs(1)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOTTY, tap.name)
        os.close(tap.pairs[2].fd)
        tap.pairs[2].fd = fd
        tap.use_pairs(1)
        tap.use_pairs(3)
        tap.close()

    in_namespace(test)


def test_a_frame_sent_while_the_interface_is_down_is_refused() -> None:
    def test() -> None:
        tap = Tap()
        with pytest.raises(OSError) as caught:
            send(tap, arp_request(GUEST, HOST.address))
        assert caught.value.errno == errno.EIO
        tap.close()

    in_namespace(test)


def offloads(tap: Tap) -> list[str]:
    """The features that ethtool(8) shows as on: what the kernel leaves to the guest to do."""
    on = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for name, command in (("tx", ETHTOOL_GTXCSUM), ("tso", ETHTOOL_GTSO)):
            value = (ctypes.c_uint32 * 2)(command, 0)
            request = ifreq(ifr_name=tap.name.encode())
            request.ifr_ifru.ifru_data = ctypes.addressof(value)
            ioctl(asked.fileno(), SIOCETHTOOL, request, "SIOCETHTOOL", tap.name)
            if value[1]:
                on.append(name)
    return on


def test_the_kernel_leaves_to_the_guest_what_it_has_agreed_to_do_and_no_more() -> None:
    def test() -> None:
        checksum, tso4 = 1 << net.VIRTIO_NET_F_GUEST_CSUM, 1 << net.VIRTIO_NET_F_GUEST_TSO4
        with tap_with_host() as tap:
            assert offloads(tap) == []
            tap.activate(checksum)
            assert offloads(tap) == ["tx"]
            tap.activate(checksum | tso4)
            assert offloads(tap) == ["tx", "tso"]
            tap.activate(0)
            assert offloads(tap) == []

    in_namespace(test)


def test_addresses_are_set_with_their_netmask() -> None:
    def test() -> None:
        with tap_with_host() as tap:
            routes = Path("/proc/thread-self/net/route").read_text().splitlines()[1:]
            [(name, destination, *_, mask)] = [route.split()[:8] for route in routes]
            assert (name, destination, mask) == (tap.name, "0008090A", "00FFFFFF")

    in_namespace(test)


def test_requests_about_interfaces_that_are_not_there_name_them() -> None:
    def test() -> None:
        with Interfaces() as interfaces:
            for request in (
                lambda: interfaces.index("none"),
                lambda: interfaces.mtu("none"),
                lambda: interfaces.set_mtu("none", 1500),
                lambda: interfaces.set_up("none"),
                lambda: interfaces.set_address("none", HOST),
                lambda: interfaces.add_to_bridge("lo", "none"),
            ):
                with pytest.raises(OSError) as caught:
                    request()
                assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, "none")

    in_namespace(test)


@pytest.mark.parametrize(
    ("prefix", "mask"), [(1, "80000000"), (8, "ff000000"), (23, "fffffe00"), (30, "fffffffc")]
)
def test_a_netmask_has_so_many_leading_ones(prefix: int, mask: str) -> None:
    assert netmask(prefix).hex() == mask


STEPS = ["TUNSETIFF", "TUNSETVNETHDRSZ", "TUNSETOFFLOAD"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOMEM, errno.EIO])
@pytest.mark.parametrize("step", range(len(STEPS)), ids=STEPS)
def test_a_tap_device_that_cannot_be_made_leaves_nothing_and_says_which_call_it_was(
    step: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def test() -> None:
        calls = 0

        def refuse(fd: int, request: int, argument: int, call: str, about: str) -> int:
            nonlocal calls
            calls += 1
            if calls == step + 1:
                assert call == STEPS[step]
                raise failure(number, call, about)
            return ioctl(fd, request, argument, call, about)

        monkeypatch.setattr(tap_module, "ioctl", refuse)
        with pytest.raises(OSError, match=STEPS[step]) as caught:
            Tap("mine")
        assert caught.value.errno == number and names() == ["lo"]
        monkeypatch.undo()
        Tap("mine").close()

    in_namespace(test)


def test_without_a_descriptor_there_is_no_tap_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise failure(errno.EMFILE, "open", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError) as caught:
        Tap()
    assert caught.value.errno == errno.EMFILE


def test_an_interface_that_is_down_loses_frames_and_one_that_is_removed_fails_who_receives() -> None:
    def test() -> None:
        with tap_with_host() as tap, ExitStack() as opened:
            card = Net(tap, GUEST.mac)
            receive, transmit = (opened.enter_context(Rig(queue)) for queue in card.queues()[:2])
            for rig in (receive, transmit):
                rig.start()
            receive.submit(0, 0, 2048)

            def ask(token: int) -> None:
                question = bytes(HEADER_SIZE) + arp_request(GUEST, HOST.address)
                transmit.memory.write(buffer(token, len(question)).address, question)
                transmit.submit(token, len(question))
                assert transmit.collect(1) == [(token, 0)]

            subprocess.run(["ip", "link", "set", tap.name, "down"], check=True)
            ask(0)
            assert card.dropped == 1, "EIO"
            subprocess.run(["ip", "link", "set", tap.name, "up"], check=True)
            for token in range(1, 200):
                ask(token)
                if receive.driver.reap():
                    break
                time.sleep(0.02)
            else:
                raise AssertionError("the host does not answer again")
            assert card.dropped == 1 and receive.failures == transmit.failures == []
            receive.submit(1, 0, 2048)
            subprocess.run(["ip", "link", "del", tap.name], check=True)

            def failed() -> bool:
                # What had come before is received first.
                for _ in receive.driver.reap():
                    receive.submit(1, 0, 2048)
                return bool(receive.failures)

            eventually(failed, "the failure")
            assert [getattr(error, "errno") for error in receive.failures] == [errno.EBADFD]
            ask(200)
            assert card.dropped == 2 and transmit.failures == []
            with pytest.raises(OSError):
                card.activate(0)

    in_namespace(test)
