"""A real Linux as the guest: User-mode Linux, with every device served by the launcher's queue threads."""

import fcntl
import json
import shutil
import signal
import struct
import subprocess
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sessions
from sessions import Session, one_line, run

from lguestlib.runtime.initramfs.archive import make_initramfs
from lguestlib.runtime.initramfs.modules import resolve
from lguestlib.runtime.uml.kernel import UmlKernel

UML = ("run", "--hypervisor", "uml")
PROMPT = ":/root # "
KERNEL = "linux.uml"


@pytest.fixture(autouse=True)
def installed() -> None:
    packages = {KERNEL: "user-mode-linux", "busybox": "busybox-static"}
    sessions.programs_or_skip(**packages)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A guest's process and its folder go with the launcher."""
    before = set(Path(tempfile.gettempdir()).glob("lguestlib-*"))
    yield
    assert set(Path(tempfile.gettempdir()).glob("lguestlib-*")) <= before


def guests(pid: int) -> list[int]:
    """The User-mode Linux processes that the launcher *pid* has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = status.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        if name == KERNEL and fields.split()[1] == str(pid):
            found.append(int(status.parent.name))
    return found


def gone(pid: int) -> bool:
    """Whether the process, and every other of the session that it leads, has ended."""
    return not any(
        int(fields[3]) == pid and fields[0] != "Z"
        for status in Path("/proc").glob("[0-9]*/stat")
        if (fields := _fields(status))
    )


def _fields(status: Path) -> list[str]:
    try:
        return status.read_text().rpartition(")")[2].split()
    except OSError:
        return []


def eventually_gone(pid: int) -> None:
    deadline = time.monotonic() + sessions.PATIENCE
    while not gone(pid):
        assert time.monotonic() < deadline, f"{pid} is still there"
        time.sleep(0.01)


def size(session: Session, columns: int, rows: int) -> None:
    fcntl.ioctl(session.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def test_its_shell_runs_commands_on_the_disk_and_the_network_and_its_status_is_the_launchers(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"from the host".ljust(512, b".") + bytes(1 << 20))
    commands = (
        "head -c 13 /dev/vda; echo; blockdev --getsz /dev/vda; echo 'a; b'"
        "; printf 'from the guest' | dd of=/dev/vda bs=512 seek=1 conv=notrunc 2>/dev/null; sync"
        "; ping -c 2 -A 192.168.19.1 | grep received; hostname; ip route | grep default; (exit 7)"
    )
    result = run(*UML, "--block", str(disk), "--exec", commands)
    assert result.output == (
        "from the host\n2049\na; b\n2 packets transmitted, 2 packets received, 0% packet loss\nlguest\n"
        "default via 192.168.19.1 dev eth0 \n"
    )
    assert result.status == 7
    assert disk.read_bytes()[512:526] == b"from the guest"


def test_at_a_terminal_it_has_a_shell_with_job_control_and_the_terminals_size() -> None:
    with Session(*UML, terminal=True) as session:
        size(session, 90, 33)
        session.expect(PROMPT)
        session.type("echo size $(stty size)\n")
        session.expect("size 33 90\r\n")
        size(session, 70, 20)
        deadline = time.monotonic() + sessions.PATIENCE
        while True:
            session.type("echo size $(stty size).\n")
            session.expect("stty size).")
            if "size 20 70" in session.expect("."):
                break
            assert time.monotonic() < deadline
        session.type("cat\n")
        time.sleep(0.2)
        session.type("\x03")
        session.expect("^C")
        session.expect(PROMPT)
        session.type("echo status $?\n")
        session.expect("status 130")
        session.type("sleep 100 | cat\n")
        time.sleep(0.2)
        session.type("\x1a")
        session.expect("Stopped")
        session.type("fg\n")
        time.sleep(0.2)
        session.type("\x03")
        session.expect("^C")
        session.expect(PROMPT)
        session.type("exit 5\n")
        assert session.end().status == 5


def test_a_guest_that_starts_over_finds_its_devices_again() -> None:
    with Session(*UML, terminal=True) as session:
        session.expect(PROMPT)
        [before] = guests(session.pid)
        session.type("reboot -f\n")
        session.expect("lguestlib: the guest starts over")
        session.expect(PROMPT)
        assert before not in guests(session.pid)
        session.type("ping -c 1 192.168.19.1; dd if=/dev/vda of=/dev/null; exit\n")
        assert session.end().status == 0


def test_three_interrupts_end_it() -> None:
    with Session(*UML, terminal=True) as session:
        session.expect(PROMPT)
        [guest] = guests(session.pid)
        for _ in range(3):
            session.type("\x03")
            time.sleep(0.05)
        assert session.end().status == 130
        eventually_gone(guest)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["booting", "up"])
def test_a_signal_ends_the_launcher_and_the_guest(number: int, moment: str) -> None:
    with Session(*UML, "--exec", "echo up; sleep 1000") as session:
        if moment == "up":
            session.expect("up\n")
        else:
            session.expect("network", messages=True)
        found = guests(session.pid)
        session.signal(number)
        assert session.end().status == 128 + number
        for guest in found:
            eventually_gone(guest)


def test_a_launcher_that_is_killed_takes_the_guest_with_it() -> None:
    with Session(*UML, "--exec", "echo up; sleep 1000") as session:
        session.expect("up\n")
        [guest] = guests(session.pid)
        [folder] = {Path(word.partition("=")[2]) for word in _words(guest) if word.startswith("uml_dir=")}
        session.signal(signal.SIGKILL)
        session.process.wait()
        eventually_gone(guest)
        # Nobody is left to remove it.
        shutil.rmtree(folder)


def _words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def test_a_panic_is_a_crash_with_its_reason() -> None:
    result = run(*UML, "--exec", "echo 1 >/proc/sys/kernel/panic_on_oops; echo c >/proc/sysrq-trigger")
    assert result.status == 1
    assert result.errors.splitlines()[-1].startswith("lguestlib: the guest crashed: panic: "), result.errors


def test_it_goes_on_with_the_system_on_a_root_disk(tmp_path: Path) -> None:
    sessions.programs_or_skip(mke2fs="e2fsprogs")
    tree = tmp_path / "tree"
    for name in ("bin", "sbin", "dev", "proc", "sys"):
        (tree / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", tree / "bin")
    (tree / "bin/sh").symlink_to("busybox")
    (tree / "sbin/init").write_text(
        "#!/bin/sh\n/bin/busybox --install -s /bin\nmount | grep -o '/dev/vda on / type ext4 (rw'\n"
        "cat /file >/copy\necho 4 >/proc/exitcode\npoweroff -f\n"
    )
    (tree / "sbin/init").chmod(0o755)
    (tree / "file").write_text("content\n")
    image, other = tmp_path / "root.img", tmp_path / "other.img"
    other.write_bytes(bytes(65536))
    make = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), "16M"]
    subprocess.run(make, check=True, capture_output=True)
    result = run(*UML, "--block", str(other), "--root", str(image))
    assert result.output.startswith("/dev/vda on / type ext4 (rw\n")
    assert result.status == 4
    shown = subprocess.run(["debugfs", "-R", "cat /copy", str(image)], capture_output=True, check=True)
    assert shown.stdout == b"content\n"


def test_an_initrd_of_the_users_is_booted_and_gets_the_commands_typed(tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    modules = resolve(Path("/usr/lib/uml/modules") / UmlKernel.find().release, ["virtio_console"])
    initrd.write_bytes(make_initramfs(modules).pack())
    words = ("--append", "hostname=mine", "--exec", "echo $((6 * 7)); exit 3")
    result = run(*UML, "--initrd", str(initrd), *words)
    assert "\n42\nmine:/root # " in result.output
    assert result.status == 3


def test_what_is_typed_before_it_is_up_is_not_lost() -> None:
    result = run(*UML, typed="echo $((6 * 7))\nexit 3\n")
    assert "\n42\n" in result.output
    assert result.status == 3


def test_a_kernel_of_the_users_gets_its_words_and_the_devices_named(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.symlink_to(shutil.which(KERNEL) or "")
    words = ("--rng", "--exec", "cat /proc/cmdline; ls /sys/bus/virtio/devices; ls /sys/class/net")
    result = run("run", "--hypervisor", "uml", "64", str(kernel), "greeting=hello", *words)
    assert result.status == 0
    assert "mem=64M" in result.output.split() and "greeting=hello" in result.output.split()
    assert result.output.split()[-3:] == ["virtio0", "virtio1", "lo"]
    assert "rng0 is there, but out of the guest's reach" in result.errors


def test_its_pings_take_the_seeds_calls() -> None:
    result = run("ping", "--hypervisor", "uml", "--count", "30", "--json")
    assert result.status == 0, result.errors
    report = json.loads(result.output)
    assert (report["hypervisor"], report["sent"], report["received"]) == ("uml", 30, 30)
    calls = ["read(kick)", "writev(tap)", "write(interrupt)", "readv(tap)", "write(interrupt)"]
    as_the_seed = [
        ping for ping in report["pings"]
        if sorted(f"{call['call']}({call['role']})" for call in ping["calls"]) == sorted(calls)
    ]  # fmt: skip
    assert len(as_the_seed) > 15
    assert all(ping["round_trip_us"] > 1 for ping in report["pings"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--memory", "16"], "--memory 16: at least 48 MiB are needed"),
        (["64", "/missing"], "kernel /missing: No such file or directory (name a User-mode Linux)"),
        (["64", "/bin/true"], "kernel /bin/true: its --version is no kernel's: no User-mode Linux"),
        (["--initrd", "/missing"], "initrd /missing: No such file or directory"),
        (
            ["--root", "/missing"],
            "--root /missing: No such file or directory (truncate -s 64M /missing makes an empty one)",
        ),
        (
            ["--block", "vhost-user:/run/disk.sock"],
            "--block vhost-user:/run/disk.sock: User-mode Linux reaches it without us"
            " (--append virtio_uml.device=/run/disk.sock:2)",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_said_in_one_line(words: list[str], reason: str) -> None:
    result = run(*UML, *words)
    assert result.status == 1
    assert one_line(result.errors) == reason


@pytest.mark.parametrize("word", ["--root", "--initrd"])
def test_the_built_in_guest_has_no_use_for_a_root_or_an_initrd(word: str) -> None:
    result = run("run", word, "x")
    assert result.status == 2
    assert one_line(result.errors).startswith(f"{word} x: the built-in guest has no use for it")


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        (KERNEL, "uml: linux.uml: not found (apt-get install user-mode-linux)"),
        (
            "busybox",
            "busybox: not found, and the guest's programs are in it (apt-get install busybox-static)",
        ),
    ],
)
def test_what_is_not_installed_is_named_with_its_package(missing: str, reason: str, tmp_path: Path) -> None:
    for program in {KERNEL, "busybox"} - {missing}:
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    result = run(*UML, prefix=["/usr/bin/env", f"PATH={tmp_path}"])
    assert result.status == 1
    assert result.errors.splitlines()[-1] == f"lguestlib: {reason}"
