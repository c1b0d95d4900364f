"""`run`: what a user types and what comes of it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sessions
from sessions import Session, one_line, run, tick_seconds

from lguestlib.runtime.guest import image_path

SECTOR = 512


def test_a_sector_written_by_the_guest_is_in_the_image(hypervisor: str, image: Path) -> None:
    typed = "read 0\nwrite 1 hello\nread 1\nflush\nrand 16\nping\noff\n"
    status, output, errors = run("run", "--hypervisor", hypervisor, "--block", str(image), typed=typed)
    assert status == 0, (output, errors)
    assert "wrote sector 1" in output and "flushed" in output
    assert "|hello...........|" in output
    assert re.search(r"^[0-9a-f]{32}$", output, re.MULTILINE)
    assert re.search(r"^reply from 192\.168\.19\.1: ", output, re.MULTILINE)
    assert image.read_bytes() == bytes(SECTOR) + b"hello".ljust(SECTOR, b"\0") + bytes(65536 - 2 * SECTOR)


def test_auto_says_which_hypervisor_it_takes_and_why() -> None:
    errors = run("run", "--exec", "off").errors.splitlines()
    assert re.match(r"lguestlib: hypervisor: (kvm|inprocess), because ", errors[0])
    assert re.match(r"lguestlib: network: ", errors[1])


@pytest.mark.parametrize(
    ("commands", "status"),
    [
        ("", 0),
        (" ;; ; ", 0),
        ("ping; rand 16", 0),
        ("help\nping", 0),
        ("nonsense; ping", 1),
        ("read 99999999", 1),
        ("off; nonsense", 0),
        ("nonsense; off", 1),
        ("off now", 1),
    ],
)
def test_the_exit_status_of_exec_is_the_guests_verdict(commands: str, status: int) -> None:
    result = run("run", "--hypervisor", "inprocess", "--exec", commands)
    assert result.status == status, result
    assert "> off" in result.output.splitlines()[-1]


def test_the_guest_on_either_hypervisor_has_a_verdict(hypervisor: str) -> None:
    assert run("run", "--hypervisor", hypervisor, "--exec", "ping").status == 0
    assert run("run", "--hypervisor", hypervisor, "--exec", "nonsense").status == 1


def test_exec_says_what_the_guest_does_not_know() -> None:
    output = run("run", "--hypervisor", "inprocess", "--exec", "frobnicate 1").output
    assert "frobnicate: unknown command; try help\n" in output


def test_exec_goes_on_after_a_reboot_with_devices_and_network_kept(hypervisor: str, image: Path) -> None:
    arguments = ("run", "--hypervisor", hypervisor, "--block", str(image))
    commands = "write 3 before; ping; reboot; read 3; ping; reboot"
    status, output, errors = run(*arguments, "--exec", commands)
    assert status == 0
    assert errors.count("the guest starts over") == 2
    assert output.count("reply from") == 2
    assert "|before..........|" in output.partition("> reboot")[2]


def test_a_command_with_bytes_that_are_no_text_is_typed_as_it_is(image: Path) -> None:
    commands = b"write 0 \xff\xfe"
    assert run("run", "--hypervisor", "inprocess", "--block", str(image), "--exec", commands).status == 0
    assert image.read_bytes()[:3] == b"\xff\xfe\0"


def test_many_commands_longer_than_any_pipe_are_all_typed() -> None:
    result = run("run", "--hypervisor", "inprocess", "--exec", "rand 1;" * 200 + "x" * 100_000)
    assert result.status == 1
    assert result.output.count("> rand 1\n") == 200


def test_what_is_typed_after_a_reboot_reaches_the_guest(hypervisor: str) -> None:
    with Session("run", "--hypervisor", hypervisor) as session:
        session.prompt()
        session.type("reboot\n")
        session.expect("the guest starts over", messages=True)
        assert "try help" in session.prompt()
        assert "reply from" in session.command("ping")
        session.type("off\n")
        assert session.end().status == 0


def test_at_the_end_of_input_the_guest_runs_on() -> None:
    with Session("run", "--hypervisor", "inprocess") as session:
        session.type("ping\n")
        session.end_input()
        session.expect("reply from")
        session.prompt()
        assert session.process.poll() is None
        session.signal(signal.SIGTERM)
        assert session.end().status == 143


def test_disks_appear_in_the_order_given_and_one_image_twice_is_one(tmp_path: Path) -> None:
    first, second = tmp_path / "first.img", tmp_path / "second.img"
    first.write_bytes(b"first".ljust(SECTOR, b"\0"))
    second.write_bytes(b"second".ljust(SECTOR, b"\0"))
    disks = [f"--block={second}", f"--block={first},readonly", f"--block={second}"]
    result = run("run", "--hypervisor", "inprocess", *disks, "--exec", "read 0 1; write 0 new; read 0 2")
    assert result.status == 0
    assert result.output.index("|first...") < result.output.index("|new...")
    assert second.read_bytes() == b"new".ljust(SECTOR, b"\0")


def test_a_read_only_disk_stays_as_it_is(hypervisor: str, image: Path) -> None:
    disk = f"{image},readonly"
    result = run("run", "--hypervisor", hypervisor, "--block", disk, "--exec", "read 0; write 0 x")
    assert result.status == 1 and "write: " in result.output
    assert image.read_bytes() == bytes(65536)


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff,\n image"
    Path(os.fsdecode(name)).write_bytes(bytes(SECTOR))
    assert run("run", "--hypervisor", "inprocess", "--block", name, "--exec", "write 0 x").status == 0
    assert Path(os.fsdecode(name)).read_bytes()[:2] == b"x\0"
    missing = one_line(run("run", "--block", name + b"\x1b[2J", "--exec", "off").errors)
    assert "No such file" in missing and "\\x1b[2J" in missing


def test_as_many_disks_as_the_bus_takes_and_no_more(hypervisor: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(SECTOR))
    # A network and an entropy device are there without being named, and the console.
    result = run("run", "--hypervisor", hypervisor, *[f"--block={image}"] * 61, "--exec", "read 0 60")
    assert result.status == 0, result
    result = run("run", "--hypervisor", hypervisor, *[f"--block={image}"] * 62, "--exec", "off")
    assert result.status == 1
    assert one_line(result.errors).startswith("65 devices: the bus has room for 64, the console included (")


def test_two_runs_at_once_do_not_know_of_each_other(hypervisor: str) -> None:
    words = ("run", "--hypervisor", hypervisor)
    with Session(*words) as one, Session(*words) as other:
        for session in (one, other):
            session.prompt()
        for session in (one, other):
            assert "reply from" in session.command("ping")
        for session in (one, other):
            session.type("off\n")
            assert session.end().status == 0


def test_a_kernel_gets_the_devices_named_its_words_and_what_is_typed_ahead(image: Path) -> None:
    sessions.kvm_or_skip()
    guest = str(image_path())
    words = ["--tunnet=192.168.19.1", "--rng", "run", "nonsense"]
    # Words of any bytes, and options before, between and after them.
    kernel = ("32", guest, b"odd\xff", "--block", str(image), "root=/dev/vda")
    status, output, errors = run("run", *kernel, "--exec", "stat; read 0; off", "--", *words)
    assert status == 0, (output, errors)
    assert "32 MiB, 2 devices" in output or "31 MiB, 2 devices" in output
    assert "block0: " in output and "console0: " in output and "rng0: " not in output


def test_verbose_tells_what_each_queue_has_done() -> None:
    errors = run("run", "--hypervisor", "inprocess", "--exec", "read 0; rand 5", "--verbose").errors
    lines = dict(re.findall(r"^lguestlib: (\w+ \w+): (\d+) chains, \d+ bytes, ", errors, re.MULTILINE))
    queues = {"net0 receive", "net0 transmit", "block0 requests", "rng0 requests"}
    assert set(lines) == queues | {"console0 receive", "console0 transmit"}
    assert (lines["block0 requests"], lines["rng0 requests"]) == ("1", "1")


def test_a_guest_at_its_prompt_costs_no_processor_time_and_little_memory(hypervisor: str) -> None:
    # As a user starts it: the development mode has costs of its own.
    command = [sys.executable, "-m", "lguestlib"]
    with Session("run", "--hypervisor", hypervisor, command=command) as session:
        session.prompt()
        before = tick_seconds(session.pid)
        assert before < 1.0
        resident = resident_kibibytes(session.pid)
        assert resident < 40 * 1024
        with pytest.raises(subprocess.TimeoutExpired):
            session.process.wait(1.0)
        assert tick_seconds(session.pid) - before <= 0.02


def resident_kibibytes(pid: int) -> int:
    """The resident memory of the process beside the guest's 64 MiB."""
    total, guest = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(text, 16) for text in line.split()[0].split("-"))
            guest = end - start >= 64 << 20
        elif line.startswith("Rss:") and not guest:
            total += int(line.split()[1])
    return total


def test_closed_descriptors_are_as_dev_null() -> None:
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    assert run("run", "--hypervisor", "inprocess", "--exec", "ping", prefix=shell).status == 0
    shell = ["sh", "-c", 'exec "$@" <&-', "sh"]
    with Session("run", "--hypervisor", "inprocess", prefix=shell) as session:
        session.prompt()
        session.signal(signal.SIGTERM)
        assert session.end().status == 143


def test_input_that_cannot_be_read_as_nohup_leaves_it_has_ended() -> None:
    shell = ["sh", "-c", 'exec "$@" 0>/dev/null', "sh"]
    with Session("run", "--hypervisor", "inprocess", prefix=shell) as session:
        session.prompt()
        session.signal(signal.SIGTERM)
        status, _, errors = session.end()
        assert (status, errors.count("lguestlib: ")) == (143, 1), errors


def test_output_to_a_full_device_ends_it_with_the_reason() -> None:
    shell = ["sh", "-c", 'exec "$@" >/dev/full', "sh"]
    status, _, errors = run("run", "--hypervisor", "inprocess", prefix=shell)
    assert status == 1
    assert errors.endswith("lguestlib: the console's output: No space left on device\n")


def test_a_reader_that_goes_ends_it_with_the_reason(hypervisor: str) -> None:
    with Session("run", "--hypervisor", hypervisor) as session:
        session.prompt()
        session.end_output()
        session.type("help\n")
        status, _, errors = session.end()
        assert status == 1
        assert errors.endswith("lguestlib: the console's output: Broken pipe\n")


def test_a_trace_is_a_chrome_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    assert run("run", "--hypervisor", "inprocess", "--trace", str(trace), "--exec", "read 0").status == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event["name"] == "preadv(disk)" for event in events)


def test_the_guest_has_the_memory_that_was_asked_for(hypervisor: str) -> None:
    # The first MiB of a PC is not all memory.
    output = run("run", "--hypervisor", hypervisor, "--memory", "18", "--exec", "off").output
    assert re.search(r"\b1[78] MiB", output)


def test_the_built_in_guest_finds_its_devices_by_pci(image: Path) -> None:
    sessions.kvm_or_skip()
    words = ("run", "--hypervisor", "kvm", "--transport", "pci", "--block", str(image))
    status, output, errors = run(*words, "--exec", "write 1 hello; flush; read 1; rand 16; ping; reset")
    assert status == 0, (output, errors)
    assert "|hello...........|" in output and "1 resets, ok" in output
    assert re.search(r"^reply from 192\.168\.19\.1: ", output, re.MULTILINE)
    assert image.read_bytes()[SECTOR : SECTOR + 5] == b"hello"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--linux", "64", "vmlinux"), "--linux and KERNEL vmlinux: give one of the two"),
        (("--linux", "--hypervisor", "uml"), "--linux and --hypervisor uml: give one of the two"),
        (("--cpus", "0"), "argument --cpus: '0' is not a number of processors from 1 to 255"),
        (("--transport", "isa"), "argument --transport: invalid choice: 'isa'"),
    ],
)
def test_what_makes_no_sense_on_a_pc_is_a_wrong_command_line(words: tuple[str, ...], line: str) -> None:
    status, _, errors = run("run", *words)
    assert status == 2 and one_line(errors).startswith(line), errors
