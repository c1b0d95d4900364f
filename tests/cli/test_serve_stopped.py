"""One end is stopped for a while (SIGSTOP, SIGCONT): the other waits, without spinning, and nothing is lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import interpreters
import pytest
from cli.test_serve import serving, written
from sessions import Session, tick_seconds
from uring import uring_or_skip

from lguestlib.abi import virtio_blk as blk
from lguestlib.runtime.vhost_user.driver import VhostUserDevice

STOPPED = 0.25
"""Seconds."""

BUSY = Path(__file__).parent.parent / "runtime" / "busy_program.py"
MODES = {"threads": [], "transfers": ["--aio=io_uring"]}


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_front_end_that_is_stopped_is_waited_for_and_has_lost_nothing(mode: str, tmp_path: Path) -> None:
    if mode == "transfers":
        uring_or_skip()
    image, path = tmp_path / "image", str(tmp_path / "device.sock")
    image.write_bytes(bytes(1 << 20))
    with serving("blk", "--socket-path", path, f"--blk-file={image}", *MODES[mode]) as session:
        front_end = subprocess.Popen(
            [sys.executable, str(BUSY), path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": f"{interpreters.SOURCE}:{BUSY.parent.parent}"},
        )  # fmt: skip
        with front_end:
            assert front_end.stdin and front_end.stdout
            assert front_end.stdout.readline() == "busy\n"
            for _ in range(2):
                front_end.send_signal(signal.SIGSTOP)
                time.sleep(0.1)
                assert state(front_end.pid) == "T"
                spent = tick_seconds(session.pid)
                time.sleep(STOPPED)
                assert tick_seconds(session.pid) - spent <= 0.02
                front_end.send_signal(signal.SIGCONT)
                time.sleep(0.02)
            front_end.stdin.write("\n")
            front_end.stdin.flush()
            # Every answer has been held against what was written.
            assert int(front_end.stdout.readline()) >= 16
        assert front_end.returncode == 0
        assert session.shown[1].count("\n") == 1


def test_a_back_end_that_is_stopped_is_waited_for_and_has_lost_nothing(tmp_path: Path) -> None:
    image, path = tmp_path / "image", str(tmp_path / "device.sock")
    image.write_bytes(bytes(1 << 20))
    with serving("blk", "--socket-path", path, f"--blk-file={image}") as session, VhostUserDevice.connect(path) as disk:
        for turn in range(2):
            stop(session)
            going_on = threading.Timer(STOPPED, session.signal, [signal.SIGCONT])
            going_on.start()
            began, spent = time.monotonic(), time.thread_time()
            assert written(disk, turn, bytes([turn + 1]) * 512) == blk.VIRTIO_BLK_S_OK
            assert time.monotonic() - began > STOPPED / 2
            assert time.thread_time() - spent <= 0.05
            going_on.join()
        # A request of the protocol's, too.
        stop(session)
        going_on = threading.Timer(STOPPED, session.signal, [signal.SIGCONT])
        going_on.start()
        assert int.from_bytes(disk.config(0, 8), "little") == 2048
        going_on.join()
    assert image.read_bytes()[: 2 * 512] == b"\1" * 512 + b"\2" * 512


def stop(session: Session) -> None:
    session.signal(signal.SIGSTOP)
    while state(session.pid) != "T":
        time.sleep(0.001)
