"""Which kernel `run --linux` boots, and which modules go with it."""

import os
from pathlib import Path

import pytest

from lguestlib.runtime.backend.random import KernelRandom
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.pc.host_kernel import HostKernel
from lguestlib.virtio.devices.entropy import Entropy

RELEASE = os.uname().release


def put(root: Path, *files: str) -> None:
    for file in files:
        place = root / file.format(release=RELEASE)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("")


@pytest.mark.parametrize("place", ["boot/vmlinuz-{release}", "lib/modules/{release}/vmlinuz", "boot/vmlinuz"])
def test_the_kernel_is_where_distributions_have_it(tmp_path: Path, place: str) -> None:
    put(tmp_path, place)
    kernel = HostKernel.find(tmp_path)
    assert kernel.path == str(tmp_path / place.format(release=RELEASE))
    assert kernel.modules == tmp_path / "lib/modules" / RELEASE


def test_the_one_of_this_release_comes_first(tmp_path: Path) -> None:
    put(tmp_path, "boot/vmlinuz", "boot/vmlinuz-{release}", "boot/vmlinuz-0.1")
    assert HostKernel.find(tmp_path).path.endswith(f"boot/vmlinuz-{RELEASE}")


def test_without_one_there_is_a_line_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=rf"--linux: .*/boot/vmlinuz-{RELEASE}: No such file .*run MEM KERNEL"):
        HostKernel.find(tmp_path)


def test_the_modules_are_the_bus_drivers_and_the_devices(tmp_path: Path) -> None:
    folder = tmp_path / "lib/modules" / RELEASE
    put(tmp_path, "boot/vmlinuz")
    folder.mkdir(parents=True)
    (folder / "modules.builtin").write_text("kernel/virtio.ko\n")
    (folder / "modules.dep").write_text(
        "kernel/virtio_pci.ko: kernel/virtio_ring.ko kernel/virtio.ko\nkernel/virtio_ring.ko:\n"
        "kernel/virtio_mmio.ko:\nkernel/virtio-rng.ko: kernel/virtio_ring.ko\n"
    )
    kernel, said = HostKernel.find(tmp_path), list[str]()
    devices = [Entropy(KernelRandom(), "rng0")]
    orders = {"pci": ["virtio_ring.ko", "virtio_pci.ko"], "mmio": ["virtio_mmio.ko", "virtio_ring.ko"]}
    for transport, first in orders.items():
        found = kernel.drivers(devices, "mmio" if transport == "mmio" else "pci", said.append)
        assert [path.name for path in found] == [*first, "virtio-rng.ko"]
    assert said == []


def test_a_kernel_without_the_bus_driver_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "lib/modules" / RELEASE
    put(tmp_path, "boot/vmlinuz", f"lib/modules/{RELEASE}/modules.builtin", f"lib/modules/{RELEASE}/modules.dep")
    assert folder.is_dir()
    with pytest.raises(LaunchError, match="no module virtio_pci"):
        HostKernel.find(tmp_path).drivers([], "pci", print)
