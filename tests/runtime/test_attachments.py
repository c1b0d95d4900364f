"""The host's side of devices: what they are opened as, what the guest is told, what is given back."""

import os
import sys
from ipaddress import IPv4Interface
from pathlib import Path

import interpreters
import pytest
import sessions
from runtime.rigs import nothing_left
from runtime.scripted_back_end import ScriptedBackEnd
from runtime.test_tap import in_namespace

from lguestlib.runtime.attachments import (
    Attachment,
    ConsoleAttachment,
    DiskAttachment,
    EntropyAttachment,
    NetworkAttachment,
    attach,
    guest_address,
)
from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.runtime.backend.tap import Tap
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.interface import InterfaceAddress
from lguestlib.runtime.options import DiskImage, Randomness, ScratchDisk, VhostUserDisk
from lguestlib.runtime.vhost_user.external import ExternalDisk
from lguestlib.virtio.devices.block import SECTOR, Block
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.devices.entropy import Entropy
from lguestlib.virtio.devices.multiqueue_net import MultiqueueNet
from lguestlib.virtio.devices.net import Net


def nothing_said(line: str) -> None:
    raise AssertionError(line)


def address(text: str) -> InterfaceAddress:
    interface = IPv4Interface(text)
    return InterfaceAddress(interface.ip.packed, interface.network.prefixlen)


@pytest.mark.parametrize(
    ("host", "guest"),
    [
        ("192.168.19.1/24", "192.168.19.2"),
        ("192.168.19.253/24", "192.168.19.254"),
        ("192.168.19.254/24", "192.168.19.253"),
        ("10.0.0.255/8", "10.0.1.0"),
        ("10.0.0.1/30", "10.0.0.2"),
        ("10.0.0.2/30", "10.0.0.1"),
    ],
)
def test_the_guests_address_is_beside_the_hosts_in_its_network(host: str, guest: str) -> None:
    assert str(guest_address(address(host))) == guest


def network(host: str | None, mac: bytes | None = None) -> NetworkAttachment:
    null = PacketNetwork(os.open(os.devnull, os.O_RDWR), "null")
    return NetworkAttachment(null, address(host) if host else None, mac)


def mac_of(attachment: NetworkAttachment) -> bytes:
    device = attachment.device(0)
    assert isinstance(device, Net)
    return device.mac


def test_a_guest_is_told_its_address_its_gateway_and_its_netmask() -> None:
    with nothing_left():
        attachment = network("10.1.2.3/16")
        assert attachment.guest_parameters() == ["ip=10.1.2.4::10.1.2.3:255.255.0.0"]
        attachment.close()


def test_a_card_has_a_pair_for_each_of_its_networks_queues() -> None:
    def test() -> None:
        attachment = NetworkAttachment(Tap(queues=2), address("10.1.2.3/16"), None)
        card = attachment.device(3)
        assert isinstance(card, MultiqueueNet) and (card.name, card.max_pairs, card.mtu) == ("net3", 2, 1500)
        attachment.close()

    in_namespace(test)


def test_a_guest_in_a_bridge_is_told_nothing() -> None:
    attachment = network(None)
    assert attachment.guest_parameters() == []
    attachment.close()


def test_station_addresses_are_local_and_a_guests_own() -> None:
    given = bytes.fromhex("02aabbccddee")
    attachments = [network("10.1.2.3/16"), network("10.1.2.4/16"), network(None), network(None)]
    attachments.append(network(None, given))
    macs = [mac_of(attachment) for attachment in attachments]
    assert macs[0] == bytes.fromhex("02000a010204") and macs[-1] == given
    assert len(set(macs)) == 5 and all(mac[0] & 3 == 2 and len(mac) == 6 for mac in macs)
    # The same again after a reboot.
    assert [mac_of(attachment) for attachment in attachments] == macs
    for attachment in attachments:
        attachment.close()


def test_each_boot_has_a_fresh_device_on_the_same_back_end(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(2 * SECTOR))
    terminal = Terminal(0, 1, lambda: None, lambda error: None)
    with nothing_left():
        attachments: list[tuple[Attachment, type, str]] = [
            (attach(DiskImage(str(image), read_only=True), nothing_said, None), Block, "block3"),
            (attach(ScratchDisk(8192), nothing_said, None), Block, "block3"),
            (attach(Randomness(), nothing_said, None), Entropy, "rng3"),
            (ConsoleAttachment(terminal), Console, "console3"),
        ]
        for attachment, kind, name in attachments:
            one, other = attachment.device(3), attachment.device(3)
            assert type(one) is type(other) is kind and one is not other
            assert one.name == name
            attachment.close()
    assert isinstance(attachments[0][0], DiskAttachment) and isinstance(attachments[2][0], EntropyAttachment)


def test_a_disk_of_a_back_end_is_the_same_over_all_boots_as_its_conversation_is(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with nothing_left(), ScriptedBackEnd(path=path) as backend:
        attachment = attach(VhostUserDisk(str(path)), nothing_said, None)
        assert (attachment.kind, attachment.shares_memory) == ("block", True)
        device = attachment.device(3)
        assert isinstance(device, ExternalDisk) and device.name == "block3"
        assert attachment.device(3) is device and backend.names.count("SET_OWNER") == 1
        attachment.close()


def test_a_back_end_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with pytest.raises(LaunchError) as caught:
        attach(VhostUserDisk(str(path)), nothing_said, None)
    reason = "No such file or directory (start the back-end before, or name its socket)"
    assert str(caught.value) == f"--block vhost-user:{path}: {reason}"


def test_a_disk_that_cannot_be_opened_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = str(tmp_path / "image")
    with pytest.raises(LaunchError) as caught:
        attach(DiskImage(path), nothing_said, None)
    assert str(caught.value) == (
        f"--block {path}: No such file or directory (truncate -s 64M {path} makes an empty one)"
    )


PROGRAM = """
from lguestlib.runtime.attachments import attach
from lguestlib.runtime.options import DEFAULT_NETWORK
import threading
said = []
attachment = attach(DEFAULT_NETWORK, said.append, None)
print(len(said), open("/proc/net/dev").read().count("tap0"))
attachment.close()
print(open("/proc/net/dev").read().count("tap0"), threading.active_count())
"""


def test_a_private_network_goes_when_it_is_closed() -> None:
    sessions.root_or_skip()
    assert interpreters.run([sys.executable], "-c", PROGRAM) == "1 1\n0 1\n"
