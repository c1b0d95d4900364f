"""Pings from the guest to the host, with every system call that carried them."""

import os
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

from lguestlib.runtime.attachments import Say
from lguestlib.runtime.backend.script import PROMPT
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.boot import Boot
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.launcher import Launcher
from lguestlib.runtime.machine import Crash
from lguestlib.runtime.options import HostNetwork, MachineOptions, PrivateNetwork
from lguestlib.runtime.trace import Call, OpenCall, Tracer

TRANSMIT_THREAD, RECEIVE_THREAD = "net0 transmit", "net0 receive"
"""The two queue threads a ping passes through."""

BATCH = 500
"""Pings asked for in one command, so that the console is silent in between."""

_REPLY = re.compile(rb"^(?:reply from \S+: \d+ bytes, (\d+\.\d+) us|no answer from \S+)\r?$", re.MULTILINE)

LINUX_SCRIPT = rb"""
ping() {
    busybox ping -A -W 1 -c ${2:-1} $1 | awk -F '[ =]' -v host=$1 -v count=${2:-1} '
        $9 == "time" { trip[$6] = $10 * 1000 }
        END {
            for (i = 0; i < count; i++)
                if (i in trip) printf "reply from %s: 56 bytes, %.1f us\n", host, trip[i]
                else printf "no answer from %s\n", host
        }'
}
off() { exit 0; }
exec </proc/1/fd/1
stty -echo
while printf '\n> '; read -r line; do
    eval "$line"
done
"""
"""For a shell in a Linux guest: to understand and answer what is said here as the built-in guest does."""


@dataclass(frozen=True)
class Ping:
    """One ping: the round trip in microseconds as the guest timed it, None if lost, and the calls it took."""

    round_trip: float | None
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class PingReport:
    """What *pings* a guest on *hypervisor* made, and what the network's threads slept in after the last."""

    hypervisor: str
    pings: tuple[Ping, ...]
    asleep: tuple[OpenCall, ...]

    @property
    def round_trips(self) -> list[float]:
        """The round trips of those that came back, in microseconds, ascending."""
        return sorted(ping.round_trip for ping in self.pings if ping.round_trip is not None)


def percentile(ordered: list[float], share: float) -> float:
    """The smallest of *ordered* values that *share* (0 to 1) of them do not exceed."""
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]


def run_pings(
    options: MachineOptions, count: int, say: Say, tracer: Tracer, progress: Callable[[int], None]
) -> PingReport:
    """Boot the guest, let it ping the host *count* times, and switch it off.

    *tracer* gets all calls of all queue threads; *progress* is told how many
    pings are done.  Raises LaunchError.
    """
    if options.hypervisor == "uml" or options.linux:
        options = replace(options, script=LINUX_SCRIPT)
    with (
        _Talk(_gateway(options), count, tracer, progress) as talk,
        Launcher(options, talk.terminal, say, tracer) as launcher,
    ):
        talk.on_failure = launcher.request_stop
        outcome = launcher.run(talk.start)
        talk.hang_up()
        if isinstance(outcome, Crash):
            raise LaunchError(f"the guest crashed: {outcome.reason}")
        if talk.failure:
            raise LaunchError(talk.failure)
        return PingReport(launcher.hypervisor, tuple(talk.pings), talk.asleep)


def _gateway(options: MachineOptions) -> str:
    for device in options.devices:
        if isinstance(device, HostNetwork | PrivateNetwork):
            return str(IPv4Address(device.address.address))
    raise LaunchError("ping: the machine has no network with the host on it")


class _Talk:
    """The conversation with the guest's console, on a thread of its own."""

    def __init__(self, target: str, count: int, tracer: Tracer, progress: Callable[[int], None]) -> None:
        self.pings: list[Ping] = []
        self.asleep: tuple[OpenCall, ...] = ()
        self.failure = ""
        self.on_failure: Callable[[], None] = lambda: None
        self._target = target
        self._count = count
        self._tracer = tracer
        self._progress = progress
        self._guest_input, self._typed = os.pipe()
        self._shown, self._guest_output = os.pipe()
        self.terminal = Terminal(self._guest_input, self._guest_output, lambda: None, lambda error: None, tracer)
        self._thread = threading.Thread(target=self._run, name="talk", daemon=True)

    def start(self, machine: Boot) -> None:
        """Begin to talk to the guest, which is about to start."""
        self._thread.start()

    def hang_up(self) -> None:
        """The guest has ended: so does the talk.  No matter if it has already, or never began."""
        if self._guest_output >= 0:
            os.close(self._guest_output)
            self._guest_output = -1
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> "_Talk":
        return self

    def __exit__(self, *details: object) -> None:
        self.hang_up()
        for fd in (self._guest_input, self._typed, self._shown):
            os.close(fd)

    def _run(self) -> None:
        try:
            self._until_prompt()
            # The first one finds the neighbour's station address; it does not count.
            self._command(f"ping {self._target}")
            while len(self.pings) < self._count:
                self._ping(min(BATCH, self._count - len(self.pings)))
                self._progress(len(self.pings))
            os.write(self._typed, b"off\n")
        except LaunchError as error:
            self.failure = str(error)
            self.on_failure()

    def _ping(self, count: int) -> None:
        before = len(self._tracer.calls)
        answer = self._command(f"ping {self._target} {count}")
        round_trips = [float(trip) if trip else None for trip in _REPLY.findall(answer)]
        network = {TRANSMIT_THREAD, RECEIVE_THREAD}
        self.asleep = tuple(call for call in self._tracer.open_calls if call.thread in network)
        calls = [call for call in self._tracer.calls[before:] if call.thread in network]
        if len(round_trips) != count:
            shown = answer.decode("latin-1").strip().replace("\n", "; ")
            raise LaunchError(f"ping: {count} pings were asked for, the guest said: {shown}")
        trips = iter(round_trips)
        self.pings += [Ping(next(trips), tuple(part)) for part in split_by_ping(calls, count)]

    def _command(self, line: str) -> bytes:
        os.write(self._typed, line.encode() + b"\n")
        return self._until_prompt()

    def _until_prompt(self) -> bytes:
        shown = b""
        while not shown.endswith(PROMPT):
            piece = os.read(self._shown, 65536)
            if not piece:
                raise LaunchError("ping: the guest ended before it had answered")
            shown += piece
        return shown


def split_by_ping(calls: Iterable[Call], count: int) -> list[list[Call]]:
    """*calls* of the network's threads, parted into those of each of *count* pings, in order of return.

    A ping begins when its transmit thread wakes, or with its writev where the
    thread was awake.
    """
    ordered = sorted(calls, key=lambda call: call.end)
    starts: list[int] = []
    woken = 0
    for call in ordered:
        if call.thread == TRANSMIT_THREAD:
            if call.call == "read":
                woken = call.end
            elif call.call == "writev":
                starts.append(woken or call.start)
                woken = 0
    parts: list[list[Call]] = [[] for _ in range(count)]
    # What else the guest sends, an answer to who-has, belongs to the ping it is next to.
    starts = starts[-count:]
    for call in ordered:
        parts[max(0, min(count, bisect_right(starts, call.end)) - 1)].append(call)
    return parts
