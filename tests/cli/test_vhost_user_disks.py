"""`run --block vhost-user:SOCKET`: a disk that another program serves, and what becomes of it."""

import os
import signal
import time
from pathlib import Path

import pytest
from sessions import Session, kvm_or_skip, one_line, run
from storage_daemon import StorageDaemon

SECTOR = 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.sock"


def words(hypervisor: str, path: Path) -> list[str]:
    return ["run", "--hypervisor", hypervisor, "--block", f"vhost-user:{path}"]


def test_what_the_guest_writes_is_in_the_other_programs_image(
    hypervisor: str, image: Path, path: Path
) -> None:
    content = bytearray(os.urandom(len(image.read_bytes())))
    content[5 * SECTOR : 6 * SECTOR] = b"from the host".ljust(SECTOR, b"\0")
    image.write_bytes(content)
    commands = "read 5; write 1 hello; flush; read 1; write 127 last; write 128 past the end; stat"
    with StorageDaemon(image, path):
        result = run(*words(hypervisor, path), "--exec", commands)
    assert "|from the host...|" in result.output and "|hello...........|" in result.output
    assert "sector 128 is past the end of the disk (capacity 128 sectors)" in result.output
    assert result.status == 1
    content[SECTOR : 2 * SECTOR] = b"hello".ljust(SECTOR, b"\0")
    content[127 * SECTOR :] = b"last".ljust(SECTOR, b"\0")
    assert image.read_bytes() == content


def test_resets_under_load_and_reboots_leave_it_working(hypervisor: str, image: Path, path: Path) -> None:
    commands = "write 3 kept; reset 50; read 3; reboot; read 3; reset 5; reboot; write 4 too; read 3"
    with StorageDaemon(image, path):
        result = run(*words(hypervisor, path), "--exec", commands)
    assert result.status == 0, result
    assert result.output.count("|kept............|") == 3
    assert result.errors.count("the guest starts over") == 2 and "block0" not in result.errors
    assert image.read_bytes()[3 * SECTOR : 5 * SECTOR].split(b"\0")[0] == b"kept"


def test_by_pci_the_other_program_has_the_queues_own_message(image: Path, path: Path) -> None:
    kvm_or_skip()
    commands = "write 3 kept; reset 20; read 3; reboot; read 3; flush; write 128 past the end"
    with StorageDaemon(image, path):
        result = run(*words("kvm", path), "--transport", "pci", "--exec", commands)
    assert result.output.count("|kept............|") == 2, result
    assert result.status == 1 and "sector 128 is past the end" in result.output
    assert result.errors.count("the guest starts over") == 1 and "block0" not in result.errors
    assert image.read_bytes()[3 * SECTOR : 4 * SECTOR] == b"kept".ljust(SECTOR, b"\0")


def test_what_is_in_flight_at_a_reset_has_landed_when_it_is_over(
    hypervisor: str, image: Path, path: Path
) -> None:
    """The daemon says that it has stopped before it has: a reset waits for what it still does (T3, T9)."""
    with StorageDaemon(image, path, rate=20):
        result = run(*words(hypervisor, path), "--exec", "reset 10; write 1 x; read 1")
    assert result.status == 0, result
    assert "10 resets, ok" in result.output and "block0" not in result.errors


def test_a_read_only_disk_is_one_to_the_guest(hypervisor: str, image: Path, path: Path) -> None:
    with StorageDaemon(image, path, "writable=off"):
        result = run(*words(hypervisor, path), "--exec", "read 0; write 0 x")
    assert result.status == 1 and "the disk is read-only" in result.output
    assert image.read_bytes() == bytes(65536)


def test_a_disk_with_several_queues_works_with_one(hypervisor: str, image: Path, path: Path) -> None:
    with StorageDaemon(image, path, "writable=on,num-queues=4"):
        result = run(*words(hypervisor, path), "--exec", "write 9 x; read 9; reset 10; read 9", "--verbose")
    assert result.status == 0 and result.output.count("|x...............|") == 2
    assert "block0" not in result.errors


def test_disks_of_both_kinds_are_counted_together(
    hypervisor: str, image: Path, path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(b"second".ljust(SECTOR, b"\0"))
    with StorageDaemon(other, path, "writable=off"):
        disks = ["--block", str(image), "--block", f"vhost-user:{path}", "--block", str(image)]
        commands = "write 0 first; read 0 1; read 0 2"
        result = run("run", "--hypervisor", hypervisor, *disks, "--exec", commands, "--verbose")
    assert result.status == 0, result
    assert result.output.index("|second..........|") < result.output.index("|first...........|")
    # The queues of the one in the middle are not seen here.
    assert "block0 requests: " in result.errors and "block2 requests: " in result.errors
    assert "block1" not in result.errors


def test_one_that_is_killed_fails_its_disk_alone_and_the_next_one_goes_on(
    hypervisor: str, image: Path, path: Path
) -> None:
    with Session(*words(hypervisor, path)) as session:
        first = StorageDaemon(image, path)
        try:
            session.prompt()
            assert session.command("write 7 before") == "wrote sector 7\n"
            first.kill()
            session.expect(f"block0: {path}: the back-end has gone; the device has stopped", messages=True)
            # The guest's driver has reset it and waits for the back-end; everything else works.
            session.expect("trying again every 1 s\n", messages=True)
            session.type("ping\n")
            session.expect("reply from 192.168.19.1")
            session.prompt()
            session.type("read 7\n")
            time.sleep(0.1)
            with StorageDaemon(image, path):
                session.expect(f"block0: {path}: the back-end is there\n", messages=True)
                assert "|before..........|" in session.prompt()
                assert session.command("write 8 after") == "wrote sector 8\n"
                session.type("off\n")
                assert session.end().status == 0
        finally:
            first.kill()
    assert image.read_bytes()[7 * SECTOR :].startswith(b"before\0")
    assert image.read_bytes()[8 * SECTOR :].startswith(b"after\0")


def test_one_that_does_not_answer_keeps_nobody_from_ending(hypervisor: str, image: Path, path: Path) -> None:
    with StorageDaemon(image, path) as daemon, Session(*words(hypervisor, path)) as session:
        session.prompt()
        daemon.process.send_signal(signal.SIGSTOP)
        session.type("read 1\n")
        time.sleep(0.1)
        start = time.monotonic()
        session.signal(signal.SIGTERM)
        assert session.end().status == 143
        assert time.monotonic() - start < 1.0


def test_a_guest_that_waits_for_a_reset_may_be_ended(image: Path, path: Path) -> None:
    with StorageDaemon(image, path) as daemon, Session(*words("inprocess", path)) as session:
        session.prompt()
        daemon.process.send_signal(signal.SIGSTOP)
        session.type("reset\n")
        time.sleep(0.2)
        start = time.monotonic()
        session.signal(signal.SIGTERM)
        assert session.end().status == 143
        assert time.monotonic() - start < 1.0


def test_one_that_another_has_is_an_error_in_bounded_time(image: Path, path: Path) -> None:
    with StorageDaemon(image, path), Session(*words("inprocess", path)) as session:
        session.prompt()
        start = time.monotonic()
        result = run(*words("inprocess", path), "--exec", "off")
        assert result.status == 1 and time.monotonic() - start < 10
        reason = "GET_FEATURES: no answer for 5 s (has it another front-end, or is it stuck?)"
        assert one_line(result.errors) == f"--block vhost-user:{path}: {reason}"
        session.type("off\n")
        assert session.end().status == 0
