"""What the initramfs is made of; what it does is seen where Linux boots to it."""

import gzip
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.initramfs.archive import init_path, make_initramfs
from lguestlib.runtime.initramfs.busybox import find_busybox, is_static
from lguestlib.runtime.initramfs.modules import read_module, resolve

DEPENDENCIES = """\
kernel/drivers/net/virtio_net.ko.xz: kernel/drivers/net/net_failover.ko kernel/net/core/failover.ko
kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko
kernel/net/core/failover.ko:
kernel/drivers/char/virtio-rng.ko.gz: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio.ko:
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
"""


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    folder = tmp_path / "lib/modules/6.1.0"
    folder.mkdir(parents=True)
    (folder / "modules.dep").write_text(DEPENDENCIES)
    (folder / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\nkernel/drivers/tty/virtio-thing.ko\n")
    return folder


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


def test_what_a_module_needs_goes_before_it_and_no_module_goes_twice(modules: Path) -> None:
    found = resolve(modules, ["virtio_net", "virtio_rng", "failover", "virtio_net"])
    assert names(found) == [
        "failover.ko", "net_failover.ko", "virtio_net.ko.xz",
        "virtio.ko", "virtio_ring.ko", "virtio-rng.ko.gz",
    ]  # fmt: skip
    assert found[0] == modules / "kernel/net/core/failover.ko"


@pytest.mark.parametrize("name", ["virtio-rng", "virtio_rng"])
def test_a_dash_in_a_modules_name_is_an_underscore(modules: Path, name: str) -> None:
    assert names(resolve(modules, [name]))[-1] == "virtio-rng.ko.gz"


def test_what_is_built_in_is_left_out(modules: Path) -> None:
    assert resolve(modules, ["ext4", "virtio_thing"]) == []


def test_a_module_the_kernel_does_not_have_is_named(modules: Path) -> None:
    with pytest.raises(LaunchError, match=r"6\.1\.0: the kernel has no module btrfs"):
        resolve(modules, ["failover", "btrfs"])


def test_without_dependencies_the_remedy_is_depmod(modules: Path, tmp_path: Path) -> None:
    (modules / "modules.dep").unlink()
    with pytest.raises(LaunchError, match=rf"modules\.dep: No such file .*\(depmod -b {tmp_path} 6\.1\.0 "):
        resolve(modules, ["failover"])


def test_modules_are_unpacked(tmp_path: Path) -> None:
    content = b"\x7fELF" + bytes(1000)
    for name, packed in {
        "plain.ko": content,
        "a.ko.gz": gzip.compress(content),
        "b.ko.xz": lzma.compress(content),
    }.items():
        (tmp_path / name).write_bytes(packed)
        assert read_module(tmp_path / name) == content


@pytest.mark.parametrize("name", ["a.ko.gz", "a.ko.xz", "a.ko.zst", "missing.ko"])
def test_a_module_that_cannot_be_unpacked_is_named(tmp_path: Path, name: str) -> None:
    if name != "missing.ko":
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(LaunchError, match=name):
        read_module(tmp_path / name)


def test_a_program_that_needs_libraries_is_not_static(tmp_path: Path) -> None:
    for file in ("cut", "text"):
        (tmp_path / file).write_bytes(b"\x7fELF\2\1\1" if file == "cut" else b"#!/bin/sh\n")
    shell = shutil.which("sh")
    assert shell
    for path in (shell, tmp_path / "cut", tmp_path / "text", tmp_path / "missing", tmp_path):
        assert not is_static(path)


def test_busybox_has_to_be_there_and_static(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"busybox: not found, .*apt-get install busybox-static"):
        find_busybox(str(tmp_path))
    dynamic = tmp_path / "busybox"
    shutil.copy(shutil.which("sh") or sys.executable, dynamic)
    with pytest.raises(LaunchError, match=rf"{dynamic}: it is not statically linked.*busybox-static"):
        find_busybox(str(tmp_path))


def test_the_hosts_static_busybox_is_found() -> None:
    try:
        found = find_busybox()
    except LaunchError as error:
        pytest.skip(str(error))
    assert is_static(found)
    assert subprocess.run([found, "true"], check=False).returncode == 0


def test_the_archive_holds_init_busybox_modules_in_order_and_commands(modules: Path, tmp_path: Path) -> None:
    if not shutil.which("cpio"):
        pytest.skip("cpio is not installed: apt-get install cpio")
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"program")
    files = resolve(modules, ["virtio_net"])
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(lzma.compress(b"virtio_net") if file.suffix == ".xz" else file.stem.encode())
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    archive = make_initramfs(files, b"echo hello\n", str(busybox))
    command = ["cpio", "-i", "--quiet", "-f", "dev/*"]
    subprocess.run(command, input=archive.pack(), cwd=unpacked, check=True)
    loaded = sorted((unpacked / "modules").iterdir())
    assert [file.name for file in loaded] == ["000-failover.ko", "001-net_failover.ko", "002-virtio_net.ko"]
    assert [file.read_bytes() for file in loaded] == [b"failover", b"net_failover", b"virtio_net"]
    assert (unpacked / "init").read_bytes() == init_path().read_bytes()
    assert (unpacked / "bin/busybox").read_bytes() == b"program"
    assert (unpacked / "commands").read_bytes() == b"echo hello\n"
    assert b"commands\0" not in make_initramfs((), None, str(busybox)).pack()


def test_a_busybox_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="missing: No such file"):
        make_initramfs((), None, str(tmp_path / "missing"))


def test_init_is_a_script_that_the_shell_takes() -> None:
    shell = shutil.which("dash") or shutil.which("sh")
    assert shell
    assert subprocess.run([shell, "-n", init_path()], check=False).returncode == 0
