"""prctl(2): a thread's name, and a process's end with its parent."""

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import interpreters
import pytest

from lguestlib.abi.prctl import NAME_SIZE, name_thread, signal_at_parents_end


@pytest.mark.parametrize("name", ["net0-receive", "a-name-longer-than-the-kernel-keeps", ""])
def test_a_thread_is_named_in_the_kernel_as_far_as_it_fits(name: str) -> None:
    seen: list[str] = []

    def run() -> None:
        name_thread(name)
        seen.append(Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [name[: NAME_SIZE - 1] + "\n"]


CHILD = """
import os, signal, time
from lguestlib.abi.prctl import signal_at_parents_end
signal_at_parents_end(signal.SIGKILL)
os.write(1, b"%d\\n" % os.getpid())
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {CHILD!r}])
time.sleep(60)
"""


def test_a_process_ends_with_its_parent() -> None:
    environment = os.environ | {"PYTHONPATH": str(interpreters.SOURCE)}
    with subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        # The child has the pipe, too, and keeps it open as long as it lives.
        assert parent.stdout.read() == b""
        assert select.select([child], [], [], 10.0)[0]
    os.close(child)


def test_there_is_no_such_signal() -> None:
    with pytest.raises(OSError, match="prctl"):
        signal_at_parents_end(signal.SIGKILL + 1000)
