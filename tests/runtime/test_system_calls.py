"""The hot path as strace sees it: in steady state a queue's thread makes the seed's calls and no more."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from lguestlib.runtime.vm import KvmUnusable, open_kvm

SOURCE = Path(__file__).parents[2] / "src"
PINGS = 1000
MARGIN = 20
"""Pings at the start and at the end that are left out, and stray frames that are allowed."""

CONTENTION = 0.05
"""Futex calls of the queue threads for each ping, at most, on a host that does nothing else."""

FREE = not getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether this interpreter, and those that are started, have no GIL."""

ALLOWED = {"net0 receive": {"readv", "write"}, "net0 transmit": {"read", "writev", "write"}}


def strace(tmp_path: Path, hypervisor: str) -> list[str]:
    """All system calls of a session of 1000 pings, a line each with its thread."""
    if not shutil.which("strace"):
        pytest.skip("no strace (apt-get install strace)")
    if hypervisor == "kvm":
        try:
            os.close(open_kvm())
        except KvmUnusable as error:
            pytest.skip(str(error))
    output = tmp_path / "strace"
    command = [sys.executable, "-m", "lguestlib", "run", "--hypervisor", hypervisor]
    done = subprocess.run(
        ["strace", "-f", "-o", output, *command, "--exec", f"ping; ping 192.168.19.1 {PINGS}"],
        env=os.environ | {"PYTHONPATH": str(SOURCE)}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{PINGS} sent, {PINGS} received" in done.stdout
    return output.read_text().splitlines()


def steady(lines: list[str]) -> dict[str, Counter[str]]:
    """Calls by thread and name, from the first pings to the last but a few."""
    names: dict[str, str] = {}
    for line in lines:
        named = re.match(r'(\d+) +prctl\(PR_SET_NAME, "([^"]*)"', line)
        if named:
            names[named[1]] = named[2]
    transmit = next(thread for thread, name in names.items() if name == "net0 transmit")
    sent = [number for number, line in enumerate(lines) if re.match(rf"{transmit} +writev\(", line)]
    calls: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines[sent[MARGIN] : sent[-MARGIN]]:
        begun = re.match(r"(\d+) +(\w+)\(", line)
        if begun and begun[1] in names:
            calls[names[begun[1]]][begun[2]] += 1
    return calls


@pytest.mark.parametrize("hypervisor", ["kvm", "inprocess"])
def test_a_thousand_pings_take_the_seeds_calls_and_no_others(tmp_path: Path, hypervisor: str) -> None:
    calls = steady(strace(tmp_path, hypervisor))
    pings = calls["net0 transmit"]["writev"]
    assert pings >= PINGS - 2 * MARGIN
    for thread, allowed in ALLOWED.items():
        # Where threads do not take turns, who waits for a lock of the interpreter's yields first.
        assert set(calls[thread]) <= allowed | {"futex", *({"sched_yield"} if FREE else ())}, calls
    if not FREE:
        assert abs(calls["net0 transmit"]["read"] - pings) <= MARGIN
    # A thread that is not in the guest's way finds the next ping before it has slept, now and then.
    assert calls["net0 transmit"]["read"] <= pings + MARGIN
    assert abs(calls["net0 receive"]["readv"] - pings) <= MARGIN
    interrupts = calls["net0 receive"]["write"] + calls["net0 transmit"]["write"]
    assert pings - MARGIN <= interrupts <= 2 * pings + MARGIN
    others = {thread: count for thread, count in calls.items() if thread not in ALLOWED and thread != "guest"}
    assert not others, "a queue that has nothing to do makes no calls"


def test_threads_hardly_ever_wait_for_each_other(tmp_path: Path) -> None:
    """Where two want the interpreter at once, one waits in futex(2): the likelier the busier the host.

    A guest that is a thread of this interpreter is always in the way, so this is KVM's.
    """
    shares: list[float] = []
    while len(shares) < 5 and not (shares and min(shares) < CONTENTION):
        calls = steady(strace(tmp_path, "kvm"))
        waits = calls["net0 receive"]["futex"] + calls["net0 transmit"]["futex"]
        shares.append(waits / calls["net0 transmit"]["writev"])
    assert min(shares) < CONTENTION, shares
