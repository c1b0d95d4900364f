"""A session as its process sees it; how it looks to a user is in tests/cli."""

import signal
from dataclasses import replace

import pytest
from runtime.rigs import nothing_left

from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.machine import PowerOff
from lguestlib.runtime.options import MEBIBYTE, MachineOptions, Randomness, ScratchDisk
from lguestlib.runtime.session import Ended, Session

OPTIONS = MachineOptions("inprocess", memory=16 * MEBIBYTE, devices=(ScratchDisk(), Randomness()))


def test_signals_threads_and_descriptors_are_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with nothing_left():
        ended = Session(OPTIONS, [b"rand 3"], print).run()
    assert ended.outcome == PowerOff(0) and (ended.signal, ended.hangup) == (0, "")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    assert capfd.readouterr().out.endswith("> off\n")


def test_the_counters_are_those_of_every_queue(capfd: pytest.CaptureFixture[str]) -> None:
    ended: Ended = Session(OPTIONS, [b"read 0", b"read 1"], print).run()
    chains = {queue: counters.chains for queue, counters in ended.counters}
    assert list(chains) == ["block0 requests", "rng0 requests", "console0 receive", "console0 transmit"]
    assert chains["block0 requests"] == 2


def test_a_machine_that_cannot_be_made_leaves_the_signals_alone() -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with nothing_left(), pytest.raises(LaunchError):
        Session(replace(OPTIONS, memory=1), [], print).run()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
