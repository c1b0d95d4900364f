"""What a user gets wrong: one line that names the thing, the value and the remedy, and no traceback."""

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sessions
from sessions import one_line, ordinary_user, run

from lguestlib import cli
from lguestlib.runtime.guest import image_path

USAGE = [
    (["nonsense"], "nonsense: no such command (one of run, serve, ping, probe, bench, conform; --help shows more)"),
    (["--nonsense"], "--nonsense: no such command (one of "),
    (["run", "--nonsense"], "unrecognized arguments: --nonsense (python -m lguestlib run --help shows how)"),
    (["run", "--memory"], "argument --memory: expected one argument ("),
    (["run", "--memory", "0"], "argument --memory: '0' is not a positive number of MiB, such as 64 ("),
    (["run", "--memory", "-5"], "argument --memory: '-5' is not a positive number of MiB, such as 64 ("),
    (["run", "--memory", "64M"], "argument --memory: '64M' is not a positive number of MiB, such as 64 ("),
    (["run", "--memory", "9" * 5000], "argument --memory: '9999"),
    (["run", "--memory", "\u0666\u0664"], "argument --memory: '\u0666\u0664' is not a positive number"),
    (["run", "0", "vmlinux"], "MEM: '0' is not a positive number of MiB, such as 64"),
    (["run", "-1", "vmlinux"], "MEM: '-1' is not a positive number of MiB, such as 64"),
    (["run", "vmlinux", "64"], "MEM: 'vmlinux' is not a positive number of MiB, such as 64"),
    (["run", "64"], "64: MEM comes with a KERNEL (run 64 vmlinux; "),
    (["run", "--memory", "64", "64", "vmlinux"], "--memory and MEM 64: give one of the two"),
    (["run", "--initrd", "x"], "--initrd x: the built-in guest has no use for it (name MEM and KERNEL too)"),
    (["run", "--hypervisor", "xen"], "argument --hypervisor: invalid choice: 'xen' (choose from "),
    (["run", "--block", ""], "argument --block: '' names no file ("),
    (["run", "--block", ",readonly"], "argument --block: ',readonly' names no file ("),
    (["run", "--block", "vhost-user:"], "argument --block: 'vhost-user:' names no socket: vhost-user:/run/di"),
    (["run", "--block", "vhost-user:a,readonly"], "argument --block: 'vhost-user:a,readonly': whether it is"),
    (["run", "--tunnet", ""], "argument --tunnet: '' is not an IPv4 address, such as 192.168.19.1 ("),
    (["run", "--tunnet", "1.2.3"], "argument --tunnet: '1.2.3' is not an IPv4 address, such as 192.168."),
    (["run", "--tunnet", "1.2.3.256"], "argument --tunnet: '1.2.3.256' is not an IPv4 address"),
    (["run", "--tunnet", "1.2.3.4.5"], "argument --tunnet: '1.2.3.4.5' is not an IPv4 address"),
    (["run", "--tunnet", "host.example"], "argument --tunnet: 'host.example' is not an IPv4 address"),
    (["run", "--tunnet", "::1"], "argument --tunnet: '' is not an IPv4 address"),
    (["run", "--tunnet", "1.2.3.4/"], "argument --tunnet: '/' is not a prefix length from 1 to 30"),
    (["run", "--tunnet", "1.2.3.4/0"], "argument --tunnet: '/0' is not a prefix length from 1 to 30"),
    (["run", "--tunnet", "1.2.3.4/31"], "argument --tunnet: '/31' is not a prefix length from 1 to 30"),
    (["run", "--tunnet", "1.2.3.0"], "argument --tunnet: '1.2.3.0/24' is no host's address, such as "),
    (["run", "--tunnet", "1.2.3.255"], "argument --tunnet: '1.2.3.255/24' is no host's address, such as "),
    (["run", "--tunnet", "127.0.0.1"], "argument --tunnet: '127.0.0.1/24' is no host's address, such as "),
    (["run", "--tunnet", "224.0.0.1"], "argument --tunnet: '224.0.0.1/24' is no host's address, such as "),
    (["run", "--tunnet", "0.0.0.0"], "argument --tunnet: '0.0.0.0/24' is no host's address, such as "),
    (["run", "--tunnet", "1.2.3.4:"], "argument --tunnet: '' is not a station address, such as 02:"),
    (["run", "--tunnet", "1.2.3.4:02:00:00"], "argument --tunnet: '02:00:00' is not a station address"),
    (["run", "--tunnet", "1.2.3.4:02:00:00:00:00:0g"], "argument --tunnet: '02:00:00:00:00:0g' is not a st"),
    (["run", "--tunnet", "1.2.3.4:01:00:00:00:00:05"], "argument --tunnet: '01:00:00:00:00:05' is no single"),
    (["run", "--tunnet", "1.2.3.4:00:00:00:00:00:00"], "argument --tunnet: '00:00:00:00:00:00' is no single"),
    (["run", "--tunnet", "bridge:"], "argument --tunnet: 'bridge:' names no bridge: bridge:br0, or "),
    (["run", "--tunnet", "bridge:" + "x" * 16], "argument --tunnet: 'bridge:xxxxxxxxxxxxxxxx' names no "),
    (["run", "--tunnet", "bridge:br0:x"], "argument --tunnet: 'x' is not a station address"),
    (["ping", "--count", "0"], "argument --count: '0' is not a number from 1 to 1000000 ("),
    (["ping", "--count", "many"], "argument --count: 'many' is not a number from 1 to 1000000 ("),
    (["ping", "now"], "unrecognized arguments: now (python -m lguestlib ping --help shows how)"),
    (["probe", "--nonsense"], "unrecognized arguments: --nonsense (python -m lguestlib probe "),
    (["bench", "nonsense"], "nonsense: no such benchmark (one of "),
]


@pytest.mark.parametrize(("words", "line"), USAGE, ids=[" ".join(words)[:40] for words, _ in USAGE])
def test_a_wrong_command_line(words: list[str], line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == cli.USAGE == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert one_line(shown.err).startswith(line)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with what is not a disk, and not a kernel."""
    (tmp_path / "short").write_bytes(bytes(511))
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("#!/bin/sh\n")
    (tmp_path / "zipped").write_bytes(b"\x1f\x8b\x08\x00" + bytes(100))
    (tmp_path / "cut").write_bytes(image_path().read_bytes()[:100])
    (tmp_path / "guest").write_bytes(image_path().read_bytes())
    (tmp_path / "loop").symlink_to("loop")
    os.truncate(os.open(tmp_path / "large", os.O_CREAT | os.O_WRONLY), 64 << 20)
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        yield tmp_path


def lguest_or_its_absence(words: list[str], place: Path) -> str:
    """The one line said where *words* are run with lguest, which this host does not have."""
    if os.path.exists("/dev/lguest"):
        pytest.skip("this host has lguest (rmmod lg)")
    status, output, errors = run(*words, directory=place)
    assert (status, output) == (1, "")
    return one_line(errors)


def test_lguest_where_it_is_absent_has_its_reason_and_remedy(place: Path) -> None:
    line = lguest_or_its_absence(["run", "--hypervisor", "lguest", "64", "guest"], place)
    assert line.startswith("lguest: /dev/lguest: No such file or directory (")
    wide = os.uname().machine == "x86_64"
    assert ("this host's kernel is for x86_64: lguest was in " if wide else "modprobe lg, on ") in line


@pytest.mark.parametrize("words", [["run"], ["ping"]])
def test_lguest_has_no_built_in_guest(words: list[str], place: Path) -> None:
    line = lguest_or_its_absence([*words, "--hypervisor", "lguest"], place)
    assert line.startswith("--hypervisor lguest: it has no built-in guest (run MEM KERNEL boots a 32-bit Linux)")


DISKS = [
    ("missing", r"No such file or directory \(truncate -s 64M missing makes an empty one\)"),
    ("short,ro", r"No such file or directory \(after a file's name only ,readonly has a meaning\)"),
    ("short", r"shorter than one sector of 512 bytes \(truncate -s 1M short makes it longer\)"),
    ("empty", r"shorter than one sector of 512 bytes \(.*\)"),
    ("folder", r"Is a directory \(name a raw disk image or a block device\)"),
    ("folder,readonly", r"neither a regular file nor a block device \(name a raw disk image\)"),
    ("fifo", r"neither a regular file nor a block device \(name a raw disk image\)"),
    ("fifo,readonly", r"neither a regular file nor a block device \(name a raw disk image\)"),
    ("/dev/zero", r"neither a regular file nor a block device \(name a raw disk image\)"),
    ("socket", r"No such device or address"),
    ("loop", r"Too many levels of symbolic links"),
    ("text/disk", r"Not a directory"),
    ("x" * 300, r"File name too long"),
    ("vhost-user:missing", r"No such file or directory \(start the back-end before, or name its socket\)"),
    ("vhost-user:socket", r"Connection refused \(is the back-end listening there\?\)"),
    ("vhost-user:folder", r"Connection refused \(is the back-end listening there\?\)"),
    ("vhost-user:" + "x" * 300, r"AF_UNIX path too long \(107 bytes are the most\)"),
]


@pytest.mark.parametrize(("name", "reason"), DISKS)
def test_an_image_that_is_none(name: str, reason: str, place: Path) -> None:
    status, output, errors = run("run", "--block", name, "--exec", "off", directory=place)
    assert (status, output) == (1, "")
    file = name.removesuffix(",readonly") if "neither" in reason else name
    assert re.fullmatch(rf"--block {re.escape(file)}: {reason}", one_line(errors))


def test_an_image_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(512))
    (tmp_path / "secret").chmod(0o600)
    prefix, command = ordinary_user(tmp_path, {})
    for name, remedy in (("secret", "chmod it, or ask for secret,readonly"), ("secret,readonly", "chmod it")):
        status, _, errors = run("run", "--block", name, "--exec", "off", prefix=prefix, command=command)
        assert status == 1
        assert one_line(errors) == f"--block {name}: Permission denied ({remedy})"


def test_an_image_on_a_file_system_that_is_read_only(tmp_path: Path) -> None:
    sessions.root_or_skip()
    (tmp_path / "image").write_bytes(b"old".ljust(512, b"\0"))
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && cd "$1" && shift && exec "$@"'
    prefix = ["unshare", "-m", "sh", "-ec", script, "sh", str(tmp_path)]
    status, _, errors = run("run", "--block", "image", "--exec", "off", prefix=prefix)
    assert status == 1
    assert one_line(errors) == "--block image: Read-only file system (ask for image,readonly)"
    words = ("run", "--hypervisor", "inprocess", "--block", "image,readonly", "--exec", "read 0")
    status, output, _ = run(*words, prefix=prefix)
    assert status == 0 and "|old......" in output


def test_a_block_device_is_a_disk(tmp_path: Path) -> None:
    sessions.root_or_skip()
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    made = subprocess.run(["losetup", "--show", "-f", str(image)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()} (modprobe loop)")
    device = made.stdout.strip()
    try:
        words = ("run", "--hypervisor", "inprocess", "--block", device)
        assert run(*words, "--exec", "write 2047 last; flush").status == 0
        assert run(*words, "--exec", "read 2048").status == 1
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
    assert image.read_bytes()[-512:-507] == b"last\0"


KERNELS = [
    (["64", ""], "kernel : No such file or directory"),
    (["64", "missing"], "kernel missing: No such file or directory"),
    (["64", "folder"], "kernel folder: is a directory, not a file"),
    (["64", "fifo"], "kernel fifo: is not a regular file: copy it to one"),
    (["64", "empty"], "kernel empty: is empty"),
    (["64", "text"], "kernel text: image: starts with 23 21 2f 62 69 6e, which is neither an ELF"),
    (["64", "zipped"], "kernel zipped: image: compressed with gzip, and damaged: "),
    (["64", "cut"], "kernel cut: ELF32: "),
    (["64", "guest", "--initrd", "missing"], "initrd missing: No such file or directory"),
    (["64", "guest", "--initrd", "empty"], "initrd empty: is empty"),
    (["64", "guest", "--initrd", "large"], "initrd: 0x4000000 bytes do not fit into "),
    (["64", "guest", "x" * 3000], "command line: "),
    (["3", "guest"], "--memory 3: at least 4 MiB are needed"),
    (["100000000", "guest"], "--memory 100000000: at most 3328 MiB fit below the devices"),
    (["9" * 12, "guest"], "--memory 999999999999: at most 3328 MiB fit below the devices"),
]


@pytest.mark.parametrize(("words", "line"), KERNELS, ids=[" ".join(words)[:40] for words, _ in KERNELS])
def test_a_kernel_that_is_none(words: list[str], line: str, place: Path) -> None:
    sessions.kvm_or_skip()
    status, output, errors = run("run", *words, directory=place)
    assert (status, output) == (1, "")
    assert one_line(errors).startswith(line)


def test_a_kernel_is_nothing_for_the_guest_in_this_process(place: Path) -> None:
    status, _, errors = run("run", "--hypervisor", "inprocess", "64", "guest", directory=place)
    assert status == 1
    remedy = "leave the kernel away, or use kvm or uml"
    assert one_line(errors) == f"--hypervisor inprocess: it cannot run guest ({remedy})"


def test_more_memory_than_there_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PHYS_PAGES" else real(name))
    assert cli.main(["run", "--hypervisor", "inprocess", "--memory", "17"]) == 1
    assert one_line(capfd.readouterr().err) == "--memory 17: this host has 16 MiB (give the guest less)"


def test_memory_that_cannot_be_mapped() -> None:
    limited = ["sh", "-c", 'ulimit -v 600000 && exec "$@"', "sh"]
    words = ("run", "--hypervisor", "inprocess", "--memory", "2000", "--exec", "off")
    status, _, errors = run(*words, prefix=limited)
    assert (status, one_line(errors)) == (1, "--memory 2000: Cannot allocate memory")


def test_too_few_descriptors(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    limited = ["sh", "-c", 'ulimit -n 20 && exec "$@"', "sh"]
    disks = [f"--block={image}"] * 30
    status, _, errors = run("run", "--hypervisor", "inprocess", *disks, "--exec", "off", prefix=limited)
    assert status == 1
    assert one_line(errors) == f"--block {image}: Too many open files (ulimit -n raises the limit)"
    limited[2] = limited[2].replace("20", "14")
    status, _, errors = run("run", "--hypervisor", "inprocess", "--exec", "off", prefix=limited)
    assert status == 1
    assert one_line(errors).endswith("Too many open files (ulimit -n raises the limit)")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("folder", r"Is a directory \(name a file that can be written\)"),
        ("missing/trace", r"No such file or directory \(name a file that can be written\)"),
        ("/dev/full", r"No space left on device"),
    ],
)
def test_a_trace_that_cannot_be_written(file: str, reason: str, place: Path) -> None:
    words = ("run", "--hypervisor", "inprocess", "--exec", "off", "--trace", file)
    status, _, errors = run(*words, directory=place)
    assert status == 1
    assert re.fullmatch(rf"lguestlib: --trace {file}: {reason}", errors.splitlines()[-1])
