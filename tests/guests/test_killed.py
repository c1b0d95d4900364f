"""A back-end killed outright under load, again and again, while its guest goes on.

QEMU connects to the next one by itself and hands over what was in flight.  One guest
has a disk of each manner of serving, with a file system or a verifying load at work on
each at once.  Five times; with LGUESTLIB_LONG=1, 20.

SIGKILL comes at any moment, or from strace as a thread enters a call that serves a
request, which is in flight then for certain.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import sessions
from guests.serving import LONG, MIB, Load, listening, sparse
from linux import Qemu, SocketDevice
from sessions import Session, check_clean
from uring import uring_or_skip

KILLS = 20 if LONG else 5
FILES = 4
PATIENCE = 60.0

RAW: dict[str, tuple[str, ...]] = {
    "one": (),
    "two": ("--num-queues", "2"),
    "uring": ("--num-queues", "2", "--aio", "io_uring"),
    "direct": ("--aio", "io_uring", "--direct"),
    "processes": ("--num-queues", "2", "--processes"),
}
"""The disks that are written past any file system, and their options.

Requests to "direct", where its file system has O_DIRECT, come back in any order.
"""

PACKED = ("two", "direct", "processes", "tools")
"""Those with packed rings, where there are both kinds."""


class Moment(NamedTuple):
    """As a thread enters such a *call* for that *disk*, or any; it is one of the first *within*."""

    call: str
    disk: str = ""
    within: int = 10


DATA_CALLS = "/^p(read|write)v"
MOMENTS = [
    None, Moment(DATA_CALLS, "one"), Moment("io_uring_enter"),
    Moment(DATA_CALLS, "two"), None, Moment("fdatasync", "system", 2),
]  # fmt: skip
"""One after another; None is any moment."""

RAW_SIZE = (8 if LONG else 2) * MIB


def fio(disks: dict[str, str], version: str, *words: str) -> list[str]:
    """Writes each block of every disk once, in an order of chance, then reads and checks it.

    A block says which *version* it is, 4 bytes in hexadecimal, and where it belongs.
    """
    jobs = [word for name, file in disks.items() for word in (f"--name={name}", f"--filename={file}")]
    return [
        f"--size={RAW_SIZE}", "--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=16",
        "--verify=pattern", f"--verify_pattern=0x{version}%o", "--verify_fatal=1",
        "--verify_state_save=0", *words, *jobs,
    ]  # fmt: skip


def kill(back_end: Session, moment: Moment | None, chance: Random, folder: Path) -> None:
    """Kill it, in that *moment*."""
    if moment is None:
        time.sleep(chance.uniform(0, 0.5))
        back_end.process.kill()
    else:
        words = ["-f", "-o", "/dev/null"]
        words.append(f"--inject={moment.call}:signal=KILL:when={chance.randint(1, moment.within)}")
        if moment.disk:
            words.append(f"--trace-path={folder / moment.disk}.img")
        with Session(*words, "-p", str(back_end.pid), command=["strace"]) as strace:
            strace.expect("attached", messages=True)
            back_end.process.wait(PATIENCE)
    assert back_end.process.wait() == -signal.SIGKILL
    check_clean(back_end.shown[1])
    back_end.close()


def threads_of(pid: int) -> int:
    """How many threads the process *pid* and its children have."""
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    return len(tasks) + sum(threads_of(int(child)) for child in children)


def has_direct(image: Path) -> bool:
    """Whether the file system of *image* has O_DIRECT."""
    try:
        os.close(os.open(image, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A file system's image with fio and its 85 MB of libraries, most of which it never needs."""
    sessions.programs_or_skip(fio="fio", strace="strace")
    sessions.programs_or_skip(mke2fs="e2fsprogs", e2fsck="e2fsprogs", debugfs="e2fsprogs")
    program = shutil.which("fio")
    assert program
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    folder = tmp_path / "tools"
    folder.mkdir()
    for found in [program, *re.findall(r"(/\S+) \(0x", listed)]:
        shutil.copy(found, folder)
    image = sparse(tmp_path / "tools.img", 192 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", folder, image], check=True)
    return image


@pytest.mark.parametrize("rings", ["both", "split", "packed"] if LONG else ["both"])
def test_t17_nothing_is_lost_when_a_back_end_is_killed_under_load(tmp_path: Path, tools: Path, rings: str) -> None:
    uring_or_skip()
    chance = Random(5)
    images = {name: sparse(tmp_path / f"{name}.img", RAW_SIZE) for name in RAW}
    options = {**RAW, "system": (), "tools": ("--read-only",)}
    if not has_direct(images["direct"]):
        options["direct"] = RAW["uring"]
    images["system"] = sparse(tmp_path / "system.img", 64 * MIB)
    words, devices = ["serve"], []
    for name, more in options.items():
        socket = tmp_path / f"{name}.sock"
        words += ["blk", "--socket-path", str(socket), "--blk-file", str(tmp_path / f"{name}.img"), *more]
        queues = 2 if "--num-queues" in more else 1
        packed = rings == "packed" or rings == "both" and name in PACKED
        state = "on" if packed else "off"
        devices.append(SocketDevice("blk", socket, f"num-queues={queues},packed={state}", "reconnect=1"))
    names = {name: f"/dev/vd{'abcdefg'[number]}" for number, name in enumerate(options)}
    subprocess.run(["mke2fs", "-q", "-t", "ext4", images["system"]], check=True)

    def start() -> Session:
        back_end = Session(*words)
        listening(back_end, len(options))
        return back_end

    back_end = start()
    try:
        with Qemu(devices, tmp_path, memory=384, words=["-smp", "2"]) as guest:
            guest.call(f"mkdir /tools && mount -t ext4 -o ro {names['tools']} /tools")
            guest.call(f"mkdir /system && mount -t ext4 {names['system']} /system")
            guest.call("dd if=/dev/urandom of=/tmp/blob bs=64k count=64")
            run = "/tools/ld-linux-x86-64.so.2 --library-path /tools /tools/fio"
            raw = {name: names[name] for name in RAW}
            loads = [
                Load(guest, "fio", " ".join([run, *fio(raw, "$(printf %08x $rounds)")])),
                Load(
                    guest, "dd",
                    f"file=/system/file$((rounds % {FILES})); dd if=/tmp/blob of=$file bs=64k conv=fsync &&"
                    " echo 1 >/proc/sys/vm/drop_caches && cmp $file /tmp/blob",
                ),
            ]  # fmt: skip
            threads = threads_of(back_end.pid)
            for number in range(KILLS):
                restarted = time.time()
                while images["system"].stat().st_mtime < restarted:
                    assert time.time() < restarted + PATIENCE, "the disk is not written any more"
                    time.sleep(0.02)
                # QEMU does not always come back from one that dies while it introduces itself.
                while threads_of(back_end.pid) < threads:
                    assert time.time() < restarted + PATIENCE, "a queue is not served any more"
                    time.sleep(0.02)
                kill(back_end, MOMENTS[number % len(MOMENTS)], chance, tmp_path)
                back_end = start()
            # What was begun before the last kill comes to its end.
            passes, files = (load.stop() for load in loads)
            blob = guest.call("sha256sum </tmp/blob").split()[0]
            guest.call("umount /system")
            assert guest.end() == 0
    finally:
        back_end.close()

    last = f"{passes - 1:08x}"
    check = fio({name: str(images[name]) for name in RAW}, last, "--verify_only")
    checked = subprocess.run(["fio", *check], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    checked = subprocess.run(["e2fsck", "-fn", images["system"]], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert files >= FILES
    for number in range(FILES):
        words = ["debugfs", "-R", f"cat file{number}", str(images["system"])]
        content = subprocess.run(words, capture_output=True, check=True).stdout
        assert sha256(content).hexdigest() == blob, number
