"""`serve` and a front-end that takes away what it has shared: that one is cut off, and nobody else notices (T13)."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

import interpreters
import pytest
from cli.test_serve import written
from runtime.rigs import eventually
from runtime.shrinking_program import WHAT
from sessions import Session
from uring import uring_or_skip

from lguestlib.abi import virtio_blk as blk
from lguestlib.runtime.vhost_user.driver import VhostUserDevice

TIMES = 20
PROGRAM = Path(__file__).parent.parent / "runtime" / "shrinking_program.py"
MODES = {"threads": [], "transfers": ["--aio=io_uring"], "processes": ["--processes"]}


class Neighbour:
    """Writes and reads the disk at *path* all the time."""

    def __init__(self, path: str) -> None:
        self.done = 0
        self.error: BaseException | None = None
        self._disk = disk = VhostUserDevice.connect(path)
        self._data, self._room, self._status = disk.buffer(512), disk.buffer(512), disk.buffer(1)
        self._header = disk.buffer(16)
        self._ending = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ending:
                self._turn()
                self.done += 1
        except BaseException as error:
            self.error = error

    def _turn(self) -> None:
        memory, queue, sector = self._disk.memory, self._disk.queues[0], self.done % 128
        data = self.done.to_bytes(4, "big") * 128
        memory.write(self._data.address, data)
        memory.write(self._header.address, bytes(blk.virtio_blk_outhdr(blk.VIRTIO_BLK_T_OUT, 0, sector)))
        memory.write(self._status.address, b"\xff")
        queue.request([self._header, self._data], [self._status])
        assert self._disk.read(self._status) == b"\0"
        memory.write(self._header.address, bytes(blk.virtio_blk_outhdr(blk.VIRTIO_BLK_T_IN, 0, sector)))
        memory.write(self._status.address, b"\xff")
        queue.request([self._header], [self._room, self._status])
        assert self._disk.read(self._status) == b"\0"
        assert self._disk.read(self._room) == data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._ending = True
        self._thread.join()
        self._disk.close()
        if self.error:
            raise self.error


@pytest.mark.parametrize("mode", MODES)
def test_t13_memory_a_log_or_a_record_that_becomes_shorter_under_load_ends_that_connection_alone(
    mode: str, tmp_path: Path
) -> None:
    if mode == "transfers":
        uring_or_skip()
    first, second, images = str(tmp_path / "first.sock"), str(tmp_path / "second.sock"), []
    for name in ("one", "two"):
        images.append(tmp_path / name)
        images[-1].write_bytes(bytes(1 << 20))
    words = ["serve", "blk", "--socket-path", first, f"--blk-file={images[0]}", "--num-queues=2", *MODES[mode]]
    words += ["blk", "--socket-path", second, f"--blk-file={images[1]}"]
    with Session(*words) as session:
        for _ in range(2):
            session.expect("listening on", messages=True)
            session.expect("\n", messages=True)
        with Neighbour(second) as neighbour:
            proc = Path(f"/proc/{session.pid}")

            def held() -> tuple[int, int]:
                return len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))

            eventually(lambda: neighbour.done > 0, "the neighbour's first request")
            before = held()
            front_end = subprocess.Popen(
                [sys.executable, str(PROGRAM), first, str(TIMES), "2"], stdout=subprocess.PIPE, text=True,
                env=os.environ | {"PYTHONPATH": f"{interpreters.SOURCE}:{PROGRAM.parent.parent}"},
            )  # fmt: skip
            shown, _ = front_end.communicate(timeout=60)
            assert front_end.returncode == 0
            assert shown.split() == [WHAT[turn % len(WHAT)] for turn in range(TIMES)]
            eventually(lambda: held() == before, f"as many descriptors and threads as before: {before}")
            assert neighbour.done > TIMES
        with VhostUserDevice.connect(first) as disk:
            assert written(disk, 0, b"y" * 512) == blk.VIRTIO_BLK_S_OK
        session.signal(signal.SIGTERM)
        result = session.end()
    assert result.status == 0
    lines = result.errors.splitlines()
    assert len(lines) == TIMES, result.errors
    assert all(line.startswith("lguestlib: block0") for line in lines), result.errors
    gone = ("its file has become shorter than what is used of it", "guest memory is not there any more")
    assert all(any(words in line for words in gone) for line in lines), result.errors
