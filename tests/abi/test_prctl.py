"""prctl(2): a thread's name."""

import threading
from pathlib import Path

import pytest

from lguestlib.abi.prctl import NAME_SIZE, name_thread


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
