"""`conform`: our own back-ends pass, what is wrong with others is found, and how it is told."""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from xml.etree import ElementTree

import pytest
from runtime.rigs import nothing_left
from runtime.scripted_back_end import PROTOCOL, ScriptedBackEnd, silence
from sessions import Session, one_line, run
from storage_daemon import StorageDaemon

from lguestlib.abi import vhost_user as abi
from lguestlib.runtime.vhost_user.compare import compare, workload
from lguestlib.runtime.vhost_user.conform import Examination, Result, Unsuitable, Verdict
from lguestlib.runtime.vhost_user.server import Server
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.conformance.case import Case, ConversationCase, Fault, Flicker, PackedCase, RingCase
from lguestlib.virtio.conformance.catalogue import CASES, select
from lguestlib.virtio.conformance.ring import DISK_SECTORS, MemoryDisk
from lguestlib.virtio.device import Device
from lguestlib.virtio.devices.block import Block
from lguestlib.virtio.split_device import SplitDeviceQueue
from lguestlib.virtio.transfer import Transfer
from lguestlib.virtio.vhost_user.backend import BackEnd, Effect
from lguestlib.virtio.vhost_user.message import Message


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where the device is found."""
    return str(tmp_path / "device.sock")


@contextmanager
def serving(device: Device, path: str) -> Iterator[Server]:
    """*device* behind a socket, in this process."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    server = Server(device, listener, lambda line: None)
    server.start()
    try:
        yield server
    finally:
        server.close()
        os.unlink(path)


def over_a_socket(kind: str) -> list[Case]:
    return [
        case for case in CASES
        if isinstance(case, (RingCase, PackedCase, ConversationCase)) and case.applies.device in ("any", kind)
    ]  # fmt: skip


def results(path: str, cases: list[Case], kind: str = "blk", writes: bool = True, seconds: float = 2.0) -> list[Result]:
    return list(Examination(path, kind, writes, seconds).run(cases))


def only(path: str, *names: str, seconds: float = 0.3) -> list[Result]:
    return results(path, list(select(names)), seconds=seconds)


def bad(found: list[Result]) -> list[tuple[str, str, str]]:
    return [(each.case.name, each.verdict.value, each.note) for each in found if not each.verdict.is_good]


# Our own.


@contextmanager
def served(path: str, *words: str) -> Iterator[None]:
    """`serve`, a process, with these words."""
    with Session("serve", words[0], "--socket-path", path, *words[1:]) as session:
        session.expect("listening on", messages=True)
        yield
        session.signal(signal.SIGTERM)
        assert session.end().status == 0


@pytest.fixture
def disk(tmp_path: Path) -> str:
    """An image as large as it has to be."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MemoryDisk().data))
    return str(image)


def test_every_case_that_goes_over_a_socket_passes_against_our_own_disk(path: str, disk: str) -> None:
    with nothing_left(), served(path, "blk", "--blk-file", disk, "--num-queues", "2"):
        found = results(path, over_a_socket("blk"))
    assert bad(found) == []
    skipped = {each.case.name: each.note for each in found if each.verdict is Verdict.SKIP}
    assert all("wants a device" in note or "is not offered" in note for note in skipped.values()), skipped
    assert len(skipped) < 8
    for each in found:
        if isinstance(each.case, ConversationCase) and each.case.refused:
            assert "refused" in each.note or "disconnected" in each.note, each.case.name
        if isinstance(each.case, (RingCase, PackedCase)) and each.verdict is Verdict.PASS:
            refused = "ring failed" in each.note or "disconnected" in each.note
            if any(isinstance(step, Flicker) for step in each.case.steps):
                # What is half of the one descriptor and half of the other lies outside memory.
                continue
            assert refused is any(isinstance(event, Fault) for event in each.case.events), each


@pytest.mark.parametrize(
    "words", [["net", "--loopback"], ["rng"], ["console", "--pty"]], ids=lambda words: words[0]
)
def test_our_other_devices_pass_what_is_for_them(path: str, words: list[str]) -> None:
    with served(path, *words):
        found = results(path, over_a_socket(words[0]), words[0])
    assert bad(found) == []
    assert sum(each.verdict is Verdict.PASS for each in found) > 80


def test_a_read_only_disk_is_written_to_in_vain(path: str) -> None:
    with serving(Block(MemoryDisk(read_only=True)), path):
        found = only(path, "T24 a write to a read-only disk")
    assert [each.verdict for each in found] == [Verdict.PASS]


def test_without_write_nothing_is_written(path: str) -> None:
    disk = MemoryDisk()
    before = bytes(disk.data)
    with serving(Block(disk), path):
        found = results(path, [case for case in over_a_socket("blk") if "write" in case.title.split()], writes=False)
    assert bytes(disk.data) == before
    assert "writes to the disk (--write)" in {each.note for each in found}


# What is wrong with others is found.


class Faulty(Block):
    """A disk with *fault*, which is given each chain once it is served, and tells the bytes written."""

    def __init__(self, fault: Callable[[Chain, int], int]) -> None:
        super().__init__(MemoryDisk())
        self._fault = fault

    def serve_request(self, chain: Chain, begun: list[Transfer] | None = None) -> int:
        return self._fault(chain, super().serve_request(chain))


def fault_found(path: str, fault: Callable[[Chain, int], int], *names: str) -> list[tuple[str, str, str]]:
    armed = False

    def when_armed(chain: Chain, written: int) -> int:
        return fault(chain, written) if armed else written

    with serving(Faulty(when_armed), path):
        examination = Examination(path, "blk", False, 0.3)
        armed = True
        return bad(list(examination.run(list(select(names)))))


READ = "S19 a read fills its buffers and says so"


def test_wrong_data_is_found(path: str) -> None:
    def spoil(chain: Chain, written: int) -> int:
        chain.writable[0][7] ^= 1
        return written

    ((name, verdict, note),) = fault_found(path, spoil, READ)
    assert (name, verdict) == (READ, "fail") and note.startswith("wrong data at BUFFERS+0x1007")


def test_a_write_outside_the_buffers_is_found(path: str) -> None:
    def stray(chain: Chain, written: int) -> int:
        chain.readable[0][3] ^= 1
        return written

    ((_, verdict, note),) = fault_found(path, stray, READ)
    assert verdict == "fail" and note.startswith("wrote outside the buffers, at 0x110003")


def test_a_request_that_is_never_served_is_a_hang(path: str) -> None:
    def refuse(chain: Chain, written: int) -> int:
        raise InterruptedError

    ((_, verdict, note),) = fault_found(path, refuse, READ)
    assert verdict == "hang" and "1 requests are not served" in note


def test_a_device_that_fails_over_what_is_legal_is_found(path: str) -> None:
    def fail(chain: Chain, written: int) -> int:
        raise OSError("no more")

    ((_, verdict, note), *_) = fault_found(path, fail, READ)
    assert verdict == "fail" and note.startswith("ring failed over what breaks no rule")


def test_a_used_length_over_what_was_offered_is_found(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    armed = False
    returned = SplitDeviceQueue.push_many

    def too_long(queue: SplitDeviceQueue, chains: list[Chain]) -> None:
        if armed:
            for chain in chains:
                chain.writable_length += 100
                chain.written += 100
        returned(queue, chains)

    monkeypatch.setattr(SplitDeviceQueue, "push_many", too_long)
    with serving(Block(MemoryDisk()), path):
        examination = Examination(path, "blk", False, 0.3)
        armed = True
        ((_, verdict, note),) = bad(list(examination.run(list(select([READ])))))
    assert verdict == "fail" and note.startswith("a used length of 613 for head 0, which has room for 513")


def test_a_descriptor_that_is_kept_is_found(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    received = BackEnd.receive

    def keep(backend: BackEnd, message: Message) -> Effect | None:
        if message.request == abi.VHOST_USER_SET_VRING_NUM:
            kept.extend(map(os.dup, message.fds))
        return received(backend, message)

    monkeypatch.setattr(BackEnd, "receive", keep)
    with serving(Block(MemoryDisk()), path):
        found = only(path, "T14 eight descriptors with a message that carries none")
    for fd in kept:
        os.close(fd)
    ((_, verdict, note),) = bad(found)
    assert verdict == "fail" and "8 descriptors more than before are open" in note


def test_a_back_end_that_is_gone_is_found_and_the_rest_is_skipped(path: str) -> None:
    with serving(Block(MemoryDisk()), path):
        examination = Examination(path, "blk", False, 0.3)
    found = list(examination.run(list(select(["S3"]))))
    assert [each.verdict.value for each in found] == ["disconnect", *["skip"] * 5]
    assert "no connection: No such file or directory" in found[0].note
    assert found[1].note == "the back-end has not survived a case before"


def test_a_back_end_that_dies_is_started_again(tmp_path: Path) -> None:
    """qemu-storage-daemon 7.2 takes a ring's number as it is."""
    image, socket_path = tmp_path / "disk.img", tmp_path / "disk.sock"
    image.write_bytes(bytes(1 << 16))
    daemons = [StorageDaemon(image, socket_path)]
    try:
        examination = Examination(
            str(socket_path), revive=lambda: daemons.append(StorageDaemon(image, socket_path))
        )
        daemons[0].kill()
        found = list(examination.run(list(select(["S3 head just past the table", READ]))))
    finally:
        for daemon in daemons:
            daemon.kill()
    assert len(daemons) == 2
    assert [each.verdict.value for each in found] == ["disconnect", "pass"]


CRASHING = """
import os, signal, socket, sys
from lguestlib.runtime.vhost_user.server import Server
from lguestlib.virtio.conformance.ring import MemoryDisk
from lguestlib.virtio.devices.block import Block

class Crashing(Block):
    def serve_request(self, chain, begun=None):
        if chain.read(2) == b"\\x77\\x77":
            os._exit(9)
        return super().serve_request(chain, begun)

listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(sys.argv[1])
listener.listen()
server = Server(Crashing(MemoryDisk()), listener, print)
server.start()
signal.pause()
"""


def test_a_crash_is_found_and_the_next_case_has_another_process(path: str, tmp_path: Path) -> None:
    script = tmp_path / "crashing.py"
    script.write_text(CRASHING)
    command = f"exec {sys.executable} {script} {path}"
    names = "S33 a kind of request that there is not,T1 features that were not offered"
    status, output, errors = run("conform", "--socket", path, "--start", command, "--only", names, "--json")
    assert (status, errors) == (1, "")
    (crash, other) = json.loads(output)["cases"]
    assert (crash["verdict"], other["verdict"]) == ("disconnect", "pass")
    assert crash["notes"][-1] == "the back-end has died"


def test_an_interrupt_ends_what_was_started_too(path: str, disk: str) -> None:
    command = f"exec {sys.executable} -m lguestlib serve blk --socket-path {path} --blk-file {disk}"
    with Session("conform", "--socket", path, "--start", command) as session:
        session.expect("pass       S2 ")
        session.signal(signal.SIGINT)
        assert session.end().status == 128 + signal.SIGINT
    assert not os.path.exists(path)


def test_who_does_not_answer_hangs_and_who_serves_nothing_is_not_suitable(path: str) -> None:
    with ScriptedBackEnd(answers={abi.VHOST_USER_GET_FEATURES: silence}, path=Path(path)):
        with pytest.raises(Unsuitable, match="GET_FEATURES: no answer"):
            Examination(path, seconds=0.1)
    with ScriptedBackEnd(path=Path(path), protocol=PROTOCOL & ~(1 << abi.VHOST_USER_PROTOCOL_F_CONFIG)):
        with pytest.raises(Unsuitable, match="a request is not served"):
            Examination(path, seconds=0.1)


def test_a_disk_too_small_is_not_suitable(path: str) -> None:
    disk = MemoryDisk()
    del disk.data[512:]
    with serving(Block(disk), path), pytest.raises(Unsuitable, match="a disk of 1 sectors, and 128 are needed"):
        Examination(path)


# The command.


def test_it_is_run_shown_and_ended_with_0(path: str) -> None:
    with serving(Block(MemoryDisk()), path):
        status, output, errors = run("conform", "--socket", path, "--only", "S8,cve-2022-2132,T11", "--timeout", "5")
    assert (status, errors) == (0, "")
    assert "pass       S8 an indirect table after direct descriptors\n" in output
    assert "skip       S33 a packet in single bytes" in output
    table = output.partition("\n\n")[2].splitlines()
    assert table[0].split() == ["pass", "fail", "hang", "disconnect", "skip"]
    assert table[1].split() == ["split", "ring", "3", "0", "0", "0", "1"]
    assert table[2].split() == ["transports", "4", "0", "0", "0", "1"]


def test_it_is_told_to_programs(path: str, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    with serving(Block(MemoryDisk()), path):
        words = ["conform", "--socket", path, "--only", "S7 indirect and chained,Y4", "--json", "--junit", str(junit)]
        status, output, errors = run(*words)
    assert (status, errors) == (0, "")
    report = json.loads(output)
    assert (report["socket"], report["device"]) == (path, "blk")
    assert [case["verdict"] for case in report["cases"]] == ["pass", "skip"]
    assert report["cases"][0]["ids"] == ["S7"] and report["cases"][0]["notes"] == ["ring failed"]
    suite = ElementTree.parse(junit).getroot()
    assert suite.attrib["tests"] == "2" and suite.attrib["failures"] == "0" and suite.attrib["skipped"] == "1"
    assert suite[0].attrib["classname"] == "S7" and suite[1][0].tag == "skipped"


def test_a_failure_is_status_1_and_a_failure_in_every_form(path: str, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    requests = count()

    def spoil(chain: Chain, written: int) -> int:
        # What is found at first is what there is.
        if next(requests) >= DISK_SECTORS:
            chain.writable[0][0] ^= 1
        return written

    with serving(Faulty(spoil), path):
        status, output, _ = run("conform", "--socket", path, "--only", READ, "--junit", str(junit))
    assert status == 1
    assert output.count("fail       S19 a read fills its buffers and says so") == 2
    failure = ElementTree.parse(junit).getroot()[0][0]
    assert failure.tag == "failure" and failure.attrib["type"] == "fail" and "wrong data" in failure.attrib["message"]


def test_every_case_is_listed_without_a_back_end() -> None:
    status, output, errors = run("conform", "--list")
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert len(lines) == len(CASES)
    assert any(line.startswith("ring+thread+vhost-user  S8 an indirect table after direct") for line in lines)
    listed = json.loads(run("conform", "--list", "--json", "--only", "P7").output)
    assert {case["name"].split()[0] for case in listed} == {"P7"} and listed[0]["runners"] == ["ring", "thread", "vhost-user"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["conform"], "conform: --socket PATH is missing (--list shows the cases without)"),
        (["conform", "--list", "--only", "S99"], "--only S99: no such case (--list shows them)"),
        (["conform", "--socket", "x", "--seed", "3"], "conform: --seed 3 goes with --against PATH"),
        (["conform", "--socket", "x", "--against", "y", "--only", "S1"], "conform --against: it has no cases,"),
        (["conform", "--socket", "x", "--device", "gpu"], "argument --device: invalid choice: 'gpu'"),
    ],
)
def test_a_wrong_command_line_is_status_2(words: list[str], line: str) -> None:
    status, _, errors = run(*words)
    assert status == 2 and one_line(errors).startswith(line)


def test_no_back_end_is_one_line_and_status_1(path: str) -> None:
    status, _, errors = run("conform", "--socket", path)
    assert status == 1
    assert one_line(errors).startswith(f"{path}: it serves no plain request: no connection: No such file")


def test_a_back_end_is_started_by_a_command_and_ended(path: str, image: Path) -> None:
    command = f"exec {sys.executable} -m lguestlib serve blk --socket-path {path} --blk-file {image}"
    status, output, errors = run("conform", "--socket", path, "--start", command, "--only", "S4")
    assert status == 0 and "pass       S4 a loop of one" in output, errors
    assert not os.path.exists(path)


def test_a_command_that_starts_nothing_is_one_line(path: str) -> None:
    status, _, errors = run("conform", "--socket", path, "--start", "exit 3")
    assert status == 1 and one_line(errors) == f"--start exit 3: it does not listen at {path}"


# The same to two.


def test_a_device_agrees_with_itself(tmp_path: Path) -> None:
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    with serving(Block(MemoryDisk()), first), serving(Block(MemoryDisk()), second):
        words = ["conform", "--socket", first, "--against", second, "--count", "400", "--seed", "11", "--write"]
        status, output, errors = run(*words)
    assert (status, errors) == (0, "")
    assert output == "400 requests, 0 answered differently (again: --device blk --write --seed 11 --count 400)\n"


def test_a_difference_is_told_with_what_replays_it(tmp_path: Path) -> None:
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    disk = MemoryDisk()
    disk.data[100 * 512] ^= 1
    with serving(Block(MemoryDisk()), first), serving(Block(disk), second):
        words = ["conform", "--socket", first, "--against", second, "--count", "200", "--seed", "5"]
        status, output, _ = run(*words)
        assert status == 1 and "(the data differ)" in output and output.endswith("--seed 5 --count 200)\n")
        assert run(*words).output == output
        for line in output.splitlines()[:-1]:
            count, start = line.partition("a read of ")[2].split()[0], line.partition("sectors at ")[2].split(",")[0]
            assert int(start) <= 100 < int(start) + int(count)


def test_who_ends_the_connection_differs_and_the_rest_is_compared(tmp_path: Path) -> None:
    first, second = str(tmp_path / "a"), str(tmp_path / "b")

    def fails_now_and_then(chain: Chain, written: int) -> int:
        if chain.writable_length > 15 * 512:
            raise OSError("too much")
        return written

    with serving(Block(MemoryDisk()), first), serving(Faulty(fails_now_and_then), second):
        found = [each for each in compare(first, second, "blk", 3, 150, False, 1.0)]
    assert len(found) == 150
    differing = [each for each in found if each]
    assert 0 < len(differing) < 40
    assert {str(each.second) for each in differing} == {"the ring has failed"}


def test_a_workload_is_the_same_for_the_same_seed() -> None:
    for kind in ("blk", "net", "console", "rng"):
        assert list(workload(kind, 9, 50, True, True)) == list(workload(kind, 9, 50, True, True))
        assert list(workload(kind, 9, 50, True, True)) != list(workload(kind, 10, 50, True, True))
