"""`serve` while the kernel refuses one of its system calls: at worst one front-end is cut off, with one line."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runtime.rigs import eventually
from sessions import Session
from uring import uring_or_skip

from lguestlib.abi import virtio_blk as blk
from lguestlib.runtime.vhost_user.driver import VhostUserDevice
from lguestlib.runtime.vhost_user.frontend import BackEndError

ALL_WELL = "000000"
CUT_OFF = "the front-end is cut off: "
FAILED = "the device has stopped until it is reset"
WAITS = "a connection has to wait: "

THREADS = [
    # The call, its error, which of each thread's calls, what the front-end gets ("" an end), what is said.
    ("recvmsg", "EINTR", 3, ALL_WELL, ""),
    ("recvmsg", "ECONNRESET", 3, "", ""),
    ("recvmsg", "ENOMEM", 5, "", CUT_OFF),
    ("sendmsg", "EPIPE", 3, "", ""),
    ("sendmsg", "ENOBUFS", 3, "", CUT_OFF),
    ("accept4", "EMFILE", 1, ALL_WELL, WAITS),
    ("accept4", "ENOMEM", 1, ALL_WELL, WAITS),
    ("accept4", "ECONNABORTED", 1, ALL_WELL, WAITS),
    ("newfstatat", "EIO", 3, "", CUT_OFF),
    ("mmap", "ENOMEM", 1, "", ""),
    ("clone3", "EAGAIN", 1, "", CUT_OFF),
    ("clone3", "EAGAIN", 2, "", CUT_OFF),
    ("prctl", "EPERM", 1, ALL_WELL, ""),
    ("poll", "EINTR", 1, ALL_WELL, ""),
    ("poll", "ENOMEM", 1, ALL_WELL, ""),
    ("read", "EAGAIN", 1, ALL_WELL, ""),
    ("read", "EINTR", 1, ALL_WELL, ""),
    ("read", "EIO", 1, "", FAILED),
    ("write", "EINTR", 1, ALL_WELL, ""),
    ("write", "EIO", 1, "", FAILED),
    ("preadv2", "EINTR", 1, ALL_WELL, ""),
    ("preadv2", "EIO", 1, "010010", ""),
    ("pwritev2", "ENOSPC", 1, "100100", ""),
    ("fdatasync", "EIO", 1, "001001", ""),
]
TRANSFERS = [
    ("io_uring_setup", "ENOMEM", 1, "", FAILED),
    ("io_uring_setup", "EMFILE", 1, "", FAILED),
    ("mmap", "ENOMEM", 2, "", FAILED),
    ("io_uring_enter", "EINTR", 1, ALL_WELL, ""),
    ("io_uring_enter", "EAGAIN", 1, ALL_WELL, ""),
    ("io_uring_enter", "EBUSY", 2, ALL_WELL, ""),
    ("io_uring_enter", "ENOMEM", 1, "", FAILED),
]
PROCESSES = [
    ("recvmsg", "ENOMEM", 5, "", CUT_OFF),
    ("sendmsg", "ENOMEM", 2, "", ""),
]


def visit(path: str) -> str:
    """Write, read and flush on each of two queues: the statuses, or nothing where it came to another end."""
    statuses = ""
    try:
        with VhostUserDevice.connect(path, queues=2, wanted=1 << blk.VIRTIO_BLK_F_MQ) as disk:
            for queue in disk.queues:
                for kind in (blk.VIRTIO_BLK_T_OUT, blk.VIRTIO_BLK_T_IN, blk.VIRTIO_BLK_T_FLUSH):
                    header = disk.buffer(16, bytes(blk.virtio_blk_outhdr(kind, 0, 0)))
                    data, status = disk.buffer(512, b"x" * 512), disk.buffer(1, b"\xff")
                    match kind:
                        case blk.VIRTIO_BLK_T_OUT:
                            queue.request([header, data], [status])
                        case blk.VIRTIO_BLK_T_IN:
                            queue.request([header], [data, status])
                        case _:
                            queue.request([header], [status])
                    statuses += str(disk.read(status)[0])
    except BackEndError:
        return ""
    return statuses


@contextmanager
def refused(pid: int, call: str, error: str, nth: int, log: Path) -> Iterator[None]:
    """Each thread's *nth* call of *call* fails with *error* while this lasts; one at least does."""
    inject = f"inject={call}:error={error}:when={nth}"
    words = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={call}", "-e", inject, "-p", str(pid)]
    tracer = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        while any("TracerPid:\t0\n" in (task / "status").read_text() for task in tasks):
            if tracer.poll() is not None:
                assert tracer.stderr
                pytest.skip(f"{tracer.stderr.read().strip()} (run as root, where ptrace(2) is allowed)")
            time.sleep(0.005)
        # Until the calls they were in have begun anew.
        time.sleep(0.03)
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate()
    assert "(INJECTED)" in log.read_text()


@pytest.mark.parametrize(
    ("words", "faults"),
    [([], THREADS), (["--aio=io_uring"], TRANSFERS), (["--processes"], PROCESSES)],
    ids=["threads", "transfers", "processes"],
)
def test_a_system_call_that_fails_harms_one_front_end_at_most_and_leaves_nothing(
    words: list[str], faults: list[tuple[str, str, int, str, str]], tmp_path: Path
) -> None:
    if not shutil.which("strace"):
        pytest.skip("no strace (apt-get install strace)")
    if "--aio=io_uring" in words:
        uring_or_skip()
    image, path = tmp_path / "image", str(tmp_path / "device.sock")
    image.write_bytes(bytes(1 << 20))
    with Session("serve", "blk", "--socket-path", path, f"--blk-file={image}", "--num-queues=2", *words) as session:
        session.expect("listening on", messages=True)
        session.expect("\n", messages=True)
        proc = Path(f"/proc/{session.pid}")

        def held() -> tuple[int, int]:
            return len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))

        before = held()
        assert visit(path) == ALL_WELL
        eventually(lambda: held() == before, f"as many descriptors and threads as before: {before}")
        for call, error, nth, wanted, said in faults:
            about = f"{call} {error} {nth}"
            with refused(session.pid, call, error, nth, tmp_path / "trace"):
                assert visit(path) == wanted, about
                eventually(lambda: held() == before, f"{about}: as many descriptors and threads as before")
            assert visit(path) == ALL_WELL, about
            eventually(lambda: held() == before, f"{about}: as many descriptors and threads as before")
            if said:
                line = session.expect("\n", messages=True)
                assert line.startswith("lguestlib: block0") and said in line, about
            assert session.shown == ("", ""), about
        session.signal(signal.SIGTERM)
        result = session.end()
        assert (result.status, result.errors) == (0, "")
