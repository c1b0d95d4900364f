"""Rings of another size while a real Linux uses them: `ethtool -G` resets a card's queues one by one.

With LGUESTLIB_LONG=1: on nested KVM, and in QEMU, which keeps such a reset from its back-end.
"""

from pathlib import Path

import pytest
import sessions
from guests.serving import LONG, serving
from linux import Qemu, SocketDevice, add_programs
from nested import GUEST_MODULES, NestedKvm
from sessions import Namespace

from lguestlib.abi.virtio_config import VIRTIO_F_RING_RESET
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.initramfs.archive import make_initramfs
from lguestlib.runtime.initramfs.modules import resolve
from memory.images import real_kernel

RESIZING = """
show() { ethtool -g eth0 | sed -n '/^Current/,$ { /^RX:/p; /^TX:/p }' | tr -d '\\t\\n '; echo; }
ping -q -A 192.168.19.1 >/dev/null &
pinging=$!
for size in 128 64 256 64; do
    ethtool -G eth0 rx $size tx $((size / 2)) || exit 1
    show
    ping -q -A -c 20 -W 2 192.168.19.1 | grep -o ' 0% packet loss'
done
kill $pinging
exit 7
"""
SHOWN = [line for size in (128, 64, 256, 64) for line in (f"RX:{size}TX:{size // 2}", " 0% packet loss")]


@pytest.fixture(autouse=True)
def only_long() -> None:
    if not LONG:
        pytest.skip("takes its time (LGUESTLIB_LONG=1 in the environment)")


def test_the_queues_of_a_card_on_kvm_change_their_size_under_load(tmp_path: Path) -> None:
    kernel = real_kernel()
    [modules] = (kernel.parents[1] / "lib/modules").iterdir()
    try:
        archive = make_initramfs(resolve(modules, GUEST_MODULES), RESIZING.encode())
    except LaunchError as error:
        pytest.skip(str(error))
    add_programs(archive, ["ethtool"])
    initrd = tmp_path / "initrd"
    initrd.write_bytes(archive.pack())
    words = f"run 256 /boot/{kernel.name} --initrd {initrd} --tunnet 192.168.19.1"
    with NestedKvm(tmp_path, files=[initrd]) as machine:
        shown, status = machine.launch(f"{words} quiet ip=192.168.19.2::192.168.19.1:255.255.255.0 verdict=/dev/ttyS1")
    assert status == 7, shown
    assert [line for line in shown.splitlines() if line in SHOWN] == SHOWN, shown


def test_a_guest_of_qemus_cannot_resize_what_its_back_end_would_not_be_told_of(tmp_path: Path) -> None:
    sessions.root_or_skip()
    with Namespace() as namespace:
        namespace.call("ip", "tuntap", "add", "tap0", "mode", "tap")
        namespace.call("ip", "link", "set", "tap0", "up")
        namespace.call("ip", "address", "add", "10.0.0.1/24", "dev", "tap0")
        card = tmp_path / "card"
        words = ["net", f"--socket-path={card}", "--tap=tap0"]
        with (
            serving(*words, prefix=namespace.prefix),
            Qemu([SocketDevice("net", card)], tmp_path, programs=["ethtool"]) as guest,
        ):
            guest.call("ip link set eth0 up && ip address add 10.0.0.2/24 dev eth0")
            assert guest.call("cat /sys/class/net/eth0/device/features")[VIRTIO_F_RING_RESET] == "0"
            for _ in range(2):
                assert " 50 received" in namespace.call("ping", "-n", "-c", "50", "-i", "0.01", "10.0.0.2")
                assert guest.command("ethtool -G eth0 rx 128 tx 64").status != 0
            assert guest.end() == 0
