"""A disk served to a real kernel: file systems, two queues, large and sparse, faults of the host's, flushing.

One back-end and one guest of each kind for all of it.  What fails is made to: a
full file system is a small tmpfs in a mount namespace of the back-end's own; EIO
comes from strace, which answers the calls on one image in the kernel's place; a
read that comes back short, from an image that has been cut under the back-end.
"""

import filecmp
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import sessions
from guests.serving import MIB, occupied, serving, sparse
from linux import Linux, Qemu, SocketDevice, UserModeLinux
from sessions import Session

TREE = 64
"""Files of 1 MiB."""

LARGE = 4 << 30
ROOM = 12 * MIB
"""The tmpfs that an image of twice its size is on, with a file that takes half of it."""

DATA_CALLS = "/^p(read|write)v"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of files, and beside it the image of a file system that has it."""
    sessions.programs_or_skip(mke2fs="e2fsprogs", e2fsck="e2fsprogs", debugfs="e2fsprogs", strace="strace")
    folder = tmp_path_factory.mktemp("source")
    for number in range(TREE):
        place = folder / f"tree/{number % 4}/{number % 16}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"file{number}").write_bytes(os.urandom(MIB))
    image = sparse(folder / "source.img", (TREE + 16) * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", folder / "tree", image], check=True)
    return folder


class Rig:
    """A guest whose disks have these names and are served by one process."""

    names = ("system", "source", "refusing", "large", "full", "failing")

    def __init__(self, guest: Linux, back_end: Session, folder: Path) -> None:
        self.guest = guest
        self.back_end = back_end
        self.folder = folder

    def disk(self, name: str) -> str:
        """Its device in the guest."""
        return f"/dev/vd{'abcdef'[self.names.index(name)]}"

    def read(self, name: str, block: int = 0, blocks: int = 16) -> str:
        """The guest's command that reads so many 64 KiB of the disk, past its cache, and fails as they do."""
        return f"dd if={self.disk(name)} of=/dev/null bs=64k skip={block} count={blocks} iflag=direct"

    def write(self, name: str, block: int = 0, blocks: int = 16, source: str = "/dev/urandom") -> str:
        """The same for writing."""
        return f"dd if={source} of={self.disk(name)} bs=64k seek={block} count={blocks} oflag=direct"

    def refuses(self, command: str, reason: str = "I/O error|Input/output error") -> None:
        """*command* fails for that *reason*."""
        output, status = self.guest.command(command)
        assert status == 1 and re.search(reason, output), (output, status)

    def works(self, name: str = "system") -> None:
        """What the guest writes to the disk is there, and in the image: 64 KiB at its start."""
        image = self.image(name)
        self.guest.call("dd if=/dev/urandom of=/tmp/sent bs=64k count=1")
        self.guest.call(self.write(name, 0, 1, "/tmp/sent"))
        sent = self.guest.call("sha256sum </tmp/sent").split()[0]
        got = self.guest.call(f"dd if={self.disk(name)} bs=64k count=1 iflag=direct 2>/dev/null | sha256sum")
        with image.open("rb") as file:
            assert got.split()[0] == sent == sha256(file.read(65536)).hexdigest()

    def image(self, name: str) -> Path:
        """Its file, as this process finds it."""
        if name == "full":
            return Path(f"/proc/{self.back_end.pid}/root{self.folder}/tmpfs/full.img")
        return self.folder / f"{name}.img"

    @contextmanager
    def traced(self, *words: str) -> Iterator[Path]:
        """strace with *words* looks at the back-end's threads; the file that it writes to."""
        log = self.folder / "strace.log"
        words = ("-f", "-y", "-o", str(log), *words, "-p", str(self.back_end.pid))
        with Session(*words, command=["strace"]) as strace:
            strace.expect("attached", messages=True)
            yield log
            strace.signal(signal.SIGTERM)
            strace.end()


def mount_namespace() -> list[str]:
    """The words that give a command a mount namespace where it may mount."""
    words = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-U", "-r", "-m"]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces cannot be made: run as root (sudo sh tests/run)")
    return words


@pytest.fixture(scope="module", params=["uml", "qemu"])
def rig(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("disks")
    setup = (
        f"mkdir tmpfs; mount -t tmpfs -o size={ROOM} lguestlib tmpfs; truncate -s {2 * ROOM} tmpfs/full.img;"
        f' head -c {ROOM // 2} /dev/zero >tmpfs/filler; exec "$@"'
    )
    prefix = [*mount_namespace(), "sh", "-ec", f"cd {folder}; {setup}", "sh"]
    (folder / "source.img").symlink_to(source / "source.img")
    sparse(folder / "system.img", 3 * TREE * MIB)
    sparse(folder / "refusing.img", MIB)
    sparse(folder / "large.img", LARGE)
    sparse(folder / "failing.img", 8 * MIB)
    options = {
        "system": ["--num-queues", "2"],
        "source": ["--read-only"],
        # The guest is not told.
        "refusing": ["--read-only", "--without", "ro"],
    }
    words, devices = [], []
    for name in Rig.names:
        socket = folder / f"{name}.sock"
        image = folder / ("tmpfs/full.img" if name == "full" else f"{name}.img")
        words += ["blk", "--socket-path", str(socket), "--blk-file", str(image), *options.get(name, [])]
        devices.append(SocketDevice("blk", socket, f"num-queues={2 if name == 'system' else 1}"))
    with serving(*words, sockets=len(Rig.names), prefix=prefix) as back_end:
        if request.param == "qemu":
            guest: Linux = Qemu(devices, folder, programs=["mke2fs"], words=["-smp", "2"])
        else:
            guest = UserModeLinux(devices, folder, programs=["mke2fs"])
        with guest:
            yield Rig(guest, back_end, folder)
            assert guest.end() == 0


def test_a_tree_copied_to_a_new_file_system_is_there(rig: Rig, source: Path, tmp_path: Path) -> None:
    """Two disks: all of it is read from one that is read-only."""
    call = rig.guest.call
    call(f"/sbin/mke2fs -q -t ext4 {rig.disk('system')}")
    call("mkdir -p /tmp/from /tmp/to")
    call(f"mount -t ext4 -o ro {rig.disk('source')} /tmp/from")
    call(f"mount -t ext4 {rig.disk('system')} /tmp/to")
    call("cp -a /tmp/from/. /tmp/to && sync && umount /tmp/from /tmp/to")
    image = rig.image("system")
    checked = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    subprocess.run(["debugfs", "-R", f"rdump / {tmp_path}", image], check=True, capture_output=True)
    files = [path.relative_to(source / "tree") for path in (source / "tree").rglob("file*")]
    _, differing, failed = filecmp.cmpfiles(source / "tree", tmp_path, files, shallow=False)
    assert len(files) == TREE and not differing and not failed


def test_a_read_only_disk_refuses_writing(rig: Rig, source: Path) -> None:
    before = (source / "source.img").stat().st_mtime_ns
    assert rig.guest.call(f"cat /sys/block/{rig.disk('source')[5:]}/ro") == "1\n"
    rig.refuses(rig.write("source"), "Operation not permitted")
    # Though the driver would let it:
    assert rig.guest.call(f"cat /sys/block/{rig.disk('refusing')[5:]}/ro") == "0\n"
    rig.refuses(rig.write("refusing"))
    rig.guest.call(rig.read("refusing"))
    assert (source / "source.img").stat().st_mtime_ns == before
    assert not rig.image("refusing").read_bytes().strip(b"\0")


def test_each_queue_is_used(rig: Rig) -> None:
    """User-mode Linux has one processor and uses one of the two queues; QEMU's guest has two."""
    wanted = 2 if rig.guest.name == "qemu" else 1
    assert rig.guest.call("ls /sys/block/vda/mq").split() == ["0", "1"][:wanted]

    def interrupts() -> list[int]:
        lines = rig.guest.call("cat /proc/interrupts").splitlines()
        used = [line for line in lines if re.search(r"virtio(-uml\.)?0-req\.\d$", line)]
        return [sum(map(int, re.findall(r"\s(\d+)(?=\s)", line))) for line in used]

    def bytes_read() -> list[int]:
        """What the thread of each queue has read so far, the disk's content and little else."""
        threads = list(Path(f"/proc/{rig.back_end.pid}/task").iterdir())
        named = {(thread / "comm").read_text().strip(): thread for thread in threads}
        counts = [(named[f"block0 queue{queue}"] / "io").read_text() for queue in range(wanted)]
        return [int(count.split()[1]) for count in counts]

    before = interrupts(), bytes_read()
    assert len(before[0]) == wanted
    for queue in range(wanted):
        rig.guest.call(f"taskset {1 << queue} {rig.read('system', 0, 50)}")
    after = interrupts(), bytes_read()
    assert all(last > first for first, last in zip(before[0], after[0])), (before, after)
    assert all(last >= first + 50 * 65536 for first, last in zip(before[1], after[1])), (before, after)


def test_a_large_disk_is_used_to_its_end_and_stays_sparse(rig: Rig) -> None:
    disk, image = rig.disk("large"), rig.image("large")
    blocks = LARGE // 65536
    assert int(rig.guest.call(f"blockdev --getsize64 {disk}")) == LARGE
    rig.guest.call("dd if=/dev/urandom of=/tmp/last bs=64k count=16")
    rig.guest.call(rig.write("large", blocks - 16, 16, "/tmp/last"))
    assert 16 * 65536 <= occupied(image) <= 2 * MIB
    sent = rig.guest.call("sha256sum </tmp/last")
    got = rig.guest.call(f"dd if={disk} bs=64k skip={blocks - 16} iflag=direct 2>/dev/null | sha256sum")
    assert got == sent
    with image.open("rb") as file:
        file.seek(-16 * 65536, os.SEEK_END)
        assert sha256(file.read()).hexdigest() == sent.split()[0]
    rig.guest.call(rig.read("large", blocks - 1, 1))
    rig.guest.call(f"blkdiscard {disk}")
    assert occupied(image) == 0
    assert image.stat().st_size == LARGE


def test_a_full_host_is_an_error_to_the_guest_until_there_is_room_again(rig: Rig) -> None:
    rig.refuses(rig.write("full", 0, ROOM // 65536))
    # What is there can be read, and written once more; and nothing else minds.
    rig.guest.call(rig.read("full", 0, 2 * ROOM // 65536))
    rig.works("full")
    rig.works("system")
    rig.refuses(rig.write("full", ROOM // 65536, ROOM // 65536))
    (rig.image("full").parent / "filler").unlink()
    rig.guest.call(rig.write("full", 0, ROOM // 65536 - 8))
    rig.works("full")


def test_an_error_of_the_hosts_disk_is_one_to_the_guest_and_passes(rig: Rig) -> None:
    faults = f"--inject={DATA_CALLS},fdatasync:error=EIO"
    with rig.traced(f"--trace-path={rig.image('failing')}", faults) as log:
        rig.refuses(rig.read("failing"))
        rig.refuses(rig.write("failing"))
        rig.refuses(f"dd if=/dev/zero of={rig.disk('failing')} bs=64k count=1 conv=fsync")
        rig.works("system")
    failed = [line for line in log.read_text().splitlines() if "EIO" in line]
    assert len(failed) >= 3 and all("failing.img" in line for line in failed)
    rig.works("failing")
    rig.guest.call(f"dd if=/dev/zero of={rig.disk('failing')} bs=64k count=1 conv=fsync")


def test_an_image_that_was_cut_is_an_error_past_its_end(rig: Rig) -> None:
    """And not the zeroes that are not there."""
    image = rig.image("failing")
    os.truncate(image, 4 * MIB + 4096)
    rig.guest.call(rig.read("failing", 0, 64))
    rig.refuses(rig.read("failing", 64, 1))
    rig.refuses(rig.read("failing", 100, 1))
    rig.works("failing")
    rig.works("system")
    assert image.stat().st_size == 4 * MIB + 4096
    os.truncate(image, 8 * MIB)
    rig.guest.call(rig.read("failing", 64, 64))


def test_t24_a_flush_is_an_fdatasync_and_nothing_else_is(rig: Rig) -> None:
    call = rig.guest.call
    with rig.traced("--trace=fdatasync") as log:
        call(rig.write("failing", 0, 16))
        call(rig.read("failing", 0, 16))
        assert "fdatasync" not in log.read_text()
        call(f"dd if=/dev/urandom of={rig.disk('failing')} bs=64k count=1 conv=fsync")
        assert re.search(r"fdatasync\(\d+<.*failing\.img>\) *= 0", log.read_text())
        call("mkdir -p /tmp/to")
        call(f"/sbin/mke2fs -q -t ext4 -F {rig.disk('failing')}")
        call(f"mount -t ext4 {rig.disk('failing')} /tmp/to")
        count = log.read_text().count("fdatasync(")
        call("echo word >/tmp/to/file && sync")
        assert log.read_text().count("fdatasync(") > count
        call("umount /tmp/to")
