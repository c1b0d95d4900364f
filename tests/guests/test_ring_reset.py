"""Rings of another size while a real Linux uses them: `ethtool -G` resets a card's queues one by one.

With LGUESTLIB_LONG=1 also on nested KVM, where the queues are the launcher's own.
"""

from pathlib import Path

import pytest
from guests.serving import LONG
from linux import add_programs
from nested import GUEST_MODULES, NestedKvm

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


def test_the_queues_of_a_card_on_kvm_change_their_size_under_load(tmp_path: Path) -> None:
    if not LONG:
        pytest.skip("takes its time (LGUESTLIB_LONG=1 in the environment)")
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
