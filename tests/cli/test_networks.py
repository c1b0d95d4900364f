"""`run` and the kernel's network, in network namespaces: nothing here touches the host's own."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sessions
from sessions import Namespace, Session, one_line, ordinary_user, programs_or_skip, run

GUEST = "192.168.19.2"


@pytest.fixture
def network() -> Iterator[Namespace]:
    sessions.root_or_skip()
    programs_or_skip(ping="iputils-ping")
    with Namespace() as namespace:
        yield namespace


def test_the_kernels_thousand_pings_are_all_answered(hypervisor: str, network: Namespace) -> None:
    arguments = ("run", "--hypervisor", hypervisor, "--tunnet", "192.168.19.1")
    with Session(*arguments, prefix=network.prefix) as session:
        session.prompt()
        shown = network.call("ping", "-q", "-c", "1000", "-i", "0.002", "-W", "1", GUEST)
        assert "1000 packets transmitted, 1000 received, 0% packet loss" in shown
        # And the guest is as it was.
        assert "reply from 192.168.19.1" in session.command("ping")
        session.type("off\n")
        assert session.end().status == 0
    assert network.interfaces() == []


def test_the_interface_of_a_named_network_is_the_hosts(network: Namespace) -> None:
    arguments = ("run", "--hypervisor", "inprocess", "--tunnet", "10.1.2.254/24:02:00:00:00:00:07")
    with Session(*arguments, prefix=network.prefix) as session:
        session.expect("network: tap0 has 10.1.2.254/24, the guest 10.1.2.253\n", messages=True)
        session.prompt()
        assert "inet 10.1.2.254/24 " in network.call("ip", "address", "show", "tap0")
        network.call("ping", "-q", "-c", "1", "10.1.2.253")
        assert "lladdr 02:00:00:00:00:07 " in network.call("ip", "neighbour", "show", "10.1.2.253")


def test_a_reboot_keeps_the_interface(hypervisor: str, network: Namespace) -> None:
    arguments = ("run", "--hypervisor", hypervisor, "--tunnet", "192.168.19.1")
    with Session(*arguments, prefix=network.prefix) as session:
        session.prompt()
        before = network.call("ip", "-o", "link", "show", "tap0").partition(":")[0]
        session.type("reboot\n")
        session.prompt()
        assert network.call("ip", "-o", "link", "show", "tap0").partition(":")[0] == before
        network.call("ping", "-q", "-c", "1", GUEST)


def test_two_at_once_take_two_networks_and_never_one_address(network: Namespace) -> None:
    def start(address: str) -> Session:
        return Session("run", "--hypervisor", "inprocess", "--tunnet", address, prefix=network.prefix)

    with start("192.168.19.1") as one, start("192.168.20.1") as other:
        one.prompt()
        other.prompt()
        assert network.interfaces() == ["tap0", "tap1"]
        for guest in (GUEST, "192.168.20.2"):
            network.call("ping", "-q", "-c", "1", guest)
        status, _, errors = run("run", "--tunnet", "192.168.19.1", prefix=network.prefix)
        assert status == 1
        assert one_line(errors) == "--tunnet 192.168.19.1: this host has that address already (give another)"
        assert network.interfaces() == ["tap0", "tap1"]


def test_in_a_bridge_the_guest_reaches_the_bridges_address(network: Namespace) -> None:
    network.call("ip", "link", "add", "br7", "type", "bridge")
    network.call("ip", "address", "add", "10.0.0.1/24", "dev", "br7")
    network.call("ip", "link", "set", "br7", "up")
    words = ["--tunnet", "bridge:br7:02:00:00:00:00:05", "--append", "ip=10.0.0.5::10.0.0.1:255.255.255.0"]
    with Session("run", "--hypervisor", "inprocess", *words, prefix=network.prefix) as session:
        session.expect("network: tap0 is a port of br7\n", messages=True)
        session.prompt()
        assert "tap0" in network.call("ip", "link", "show", "master", "br7")
        assert "reply from 10.0.0.1" in session.command("ping")
        network.call("ping", "-q", "-c", "1", "10.0.0.5")


@pytest.mark.parametrize(("name", "reason"), [("br9", "no such bridge"), ("lo", "not a bridge")])
def test_a_bridge_that_is_none_is_named(network: Namespace, name: str, reason: str) -> None:
    status, _, errors = run("run", "--tunnet", f"bridge:{name}", prefix=network.prefix)
    assert status == 1
    assert one_line(errors) == f"--tunnet bridge:{name}: {reason} (ip link show type bridge lists them)"
    assert network.interfaces() == []


def test_the_default_network_is_a_tap_device_that_only_the_guest_sees(hypervisor: str) -> None:
    sessions.root_or_skip()
    before = Path("/proc/net/dev").read_text().count(":")
    with Session("run", "--hypervisor", hypervisor) as session:
        told = session.expect(f"ping {GUEST} reaches the guest)", messages=True)
        session.prompt()
        assert "network: tap0 has 192.168.19.1/24 in a namespace of its own (nsenter -n -t " in told
        assert "reply from 192.168.19.1" in session.command("ping")
        assert Path("/proc/net/dev").read_text().count(":") == before
        words = str(re.findall(r"\((nsenter .*) reaches", told)[-1]).split()
        pinged = subprocess.run([*words, "-q", "-c", "2", "-i", "0.2"], capture_output=True, text=True)
        assert pinged.returncode == 0, pinged.stderr


def test_an_ordinary_user_has_a_tap_device_in_a_user_namespace(hypervisor: str, tmp_path: Path) -> None:
    sessions.user_namespaces_or_skip()
    prefix, command = ordinary_user(tmp_path)
    with Session("run", "--hypervisor", hypervisor, prefix=prefix, command=command) as session:
        told = session.expect(f"ping {GUEST} reaches the guest)", messages=True)
        session.prompt()
        status = Path(f"/proc/{session.pid}/status").read_text()
        assert re.search(r"^Uid:\t65534\t65534\t65534\t65534$", status, re.MULTILINE)
        assert "in a namespace of its own (nsenter -U --preserve-credentials -n -t " in told
        assert "reply from 192.168.19.1" in session.command("ping")
        # The user's own ping, as the launcher says.
        words = str(re.findall(r"\((nsenter .*) reaches", told)[-1]).split()
        as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        words = [*as_user, *words, "-q", "-c", "2", "-i", "0.2"]
        pinged = subprocess.run(words, capture_output=True, text=True)
        assert pinged.returncode == 0, pinged.stderr
        session.type("off\n")
        assert session.end().status == 0


def test_an_ordinary_users_disk_is_written(hypervisor: str, tmp_path: Path) -> None:
    prefix, command = ordinary_user(tmp_path)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    image.chmod(0o666)
    # The namespace is entered before the disk is opened, and after.
    for commands in (("--block=disk.img", "--rng"), ("--rng", "--block=disk.img")):
        arguments = ("run", "--hypervisor", hypervisor, *commands, "--exec", "ping; write 1 hello")
        assert run(*arguments, prefix=prefix, command=command).status == 0
        assert image.read_bytes()[512:518] == b"hello\0"


def test_an_ordinary_user_without_devices_has_all_in_the_process(tmp_path: Path) -> None:
    sessions.user_namespaces_or_skip()
    prefix, command = ordinary_user(tmp_path, {"kvm": "600", "net/tun": "600"})
    status, output, errors = run("run", "--exec", "ping; rand 16", prefix=prefix, command=command)
    assert status == 0 and "reply from 192.168.19.1" in output
    hypervisor, network = errors.splitlines()
    assert hypervisor.startswith("lguestlib: hypervisor: inprocess, because kvm is not usable: /dev/kvm: ")
    reason = "no TAP device can be had: /dev/net/tun: Permission denied"
    assert network == f"lguestlib: network: a host inside this process, because {reason}"


@pytest.mark.parametrize(
    ("devices", "setup", "reason"),
    [
        ({}, "mount -t tmpfs dev /dev && mknod -m 666 /dev/null c 1 3", "No such file or directory"),
        ({"kvm": "600"}, "true", "Permission denied"),
    ],
)
def test_kvm_asked_for_and_not_to_be_had_is_one_line(
    tmp_path: Path, devices: dict[str, str], setup: str, reason: str
) -> None:
    prefix, command = ordinary_user(tmp_path, devices, setup)
    status, _, errors = run("run", "--hypervisor", "kvm", prefix=prefix, command=command)
    assert status == 1
    assert re.fullmatch(rf"kvm: /dev/kvm: {reason} \(.+\)", one_line(errors))


def test_an_interface_on_the_host_is_not_an_ordinary_users_to_make(tmp_path: Path) -> None:
    for mode, reason in (("666", "Operation not permitted"), ("600", "Permission denied")):
        prefix, command = ordinary_user(tmp_path, {"net/tun": mode})
        words = ("run", "--hypervisor", "inprocess", "--tunnet", "192.168.77.1")
        status, _, errors = run(*words, prefix=prefix, command=command)
        assert status == 1
        line = one_line(errors)
        assert line.startswith("--tunnet 192.168.77.1: no TAP interface: ")
        assert reason in line and "(run as root, or leave --tunnet away" in line


def test_root_without_the_right_to_namespaces_makes_itself_a_user_namespace() -> None:
    sessions.user_namespaces_or_skip()
    less = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    status, output, errors = run("run", "--hypervisor", "inprocess", "--exec", "ping", prefix=less)
    assert status == 0 and "reply from" in output
    assert "nsenter -U --preserve-credentials " in errors


def test_where_namespaces_are_refused_a_host_in_the_process_answers() -> None:
    sessions.user_namespaces_or_skip()
    script = 'echo 0 >/proc/sys/user/max_net_namespaces; exec "$@"'
    refusing = ["unshare", "-U", "-r", "sh", "-ec", script, "sh"]
    status, output, errors = run("run", "--hypervisor", "inprocess", "--exec", "ping", prefix=refusing)
    assert status == 0 and "reply from" in output
    assert "network: a host inside this process, because no TAP device can be had: unshare: " in errors
