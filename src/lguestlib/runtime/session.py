"""A machine with its console on this process's standard input and output, and ended by its signals.

Signals are taken by a thread that sleeps until there is one.  A Python handler
would run on the main thread, and not before what that sleeps in returns: a
signal that comes just before it falls asleep would do nothing.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from lguestlib.runtime.attachments import Say
from lguestlib.runtime.backend.script import Script, typed_ahead
from lguestlib.runtime.backend.terminal import INPUT, OUTPUT, Terminal
from lguestlib.runtime.boot import Boot
from lguestlib.runtime.counters import QueueCounters
from lguestlib.runtime.launcher import Launcher
from lguestlib.runtime.machine import Outcome
from lguestlib.runtime.options import MachineOptions
from lguestlib.runtime.runner import Served
from lguestlib.runtime.signals import ENDING
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.uml.terminal import PatientTerminal


@dataclass(frozen=True)
class Ended:
    """How a session ended, and what the queues of its last boot have done, by device and queue.

    The machine was stopped by *signal* if that is not 0 (SIGINT stands for the
    way out by ^C), or because of *hangup*, if not empty: why nobody takes its output.
    """

    outcome: Outcome
    signal: int
    hangup: str
    counters: tuple[tuple[str, QueueCounters], ...]


class Session:
    """Runs a machine as *options* ask, once, on the main thread.

    *commands*, if not None, are typed instead of what comes on standard input.
    *say* is given lines for people.
    """

    def __init__(
        self,
        options: MachineOptions,
        commands: Sequence[bytes] | None,
        say: Say,
        tracer: Tracer | None = None,
    ) -> None:
        self._options = options
        self._commands = commands
        self._say = say
        self._tracer = tracer
        self._signal = 0
        self._hangup = ""
        self._stop: Callable[[], None] = lambda: None
        self._runners: tuple[Served, ...] = ()
        self._signals = {number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN}
        self._signals |= {signal.SIGWINCH, signal.SIGCONT}

    def run(self) -> Ended:
        """Boot, and return when all is over and the terminal as it was.  Raises LaunchError."""
        with ExitStack() as entered:
            terminal = entered.enter_context(self._console())
            entered.enter_context(self._signals_blocked())
            launcher = entered.enter_context(Launcher(self._options, terminal, self._say, self._tracer))
            self._stop = launcher.request_stop
            entered.enter_context(self._signals_taken(launcher, terminal))
            entered.enter_context(terminal.raw())
            outcome = launcher.run(self._booted)
        return Ended(outcome, self._signal, self._hangup, tuple(self._counters()))

    @contextmanager
    def _console(self) -> Iterator[Terminal]:
        is_uml = self._options.hypervisor == "uml"
        kind = PatientTerminal if is_uml else Terminal
        if self._commands is None:
            yield kind(INPUT, OUTPUT, self._escaped, self._hung_up, self._tracer)
        elif self._options.kernel is None and not is_uml and not self._options.linux:
            with Script(self._commands, OUTPUT, self._hung_up, self._tracer) as script:
                yield script
        else:
            with typed_ahead(self._commands) as fd:
                yield kind(fd, OUTPUT, self._escaped, self._hung_up, self._tracer)

    def _booted(self, machine: Boot) -> None:
        self._runners = tuple(machine.runners)

    def _counters(self) -> Iterator[tuple[str, QueueCounters]]:
        for runner in self._runners:
            for queue, counters in zip(runner.queues, runner.counters):
                yield f"{runner.device.name} {queue.name}", counters

    def _escaped(self) -> None:
        self._end(signal.SIGINT)

    def _hung_up(self, error: OSError) -> None:
        self._end(0, os.strerror(error.errno or 0))

    def _end(self, number: int, hangup: str = "") -> None:
        """Stop the machine; the first reason is the one that counts."""
        if not self._signal and not self._hangup:
            self._signal, self._hangup = number, hangup
        self._stop()

    @contextmanager
    def _signals_blocked(self) -> Iterator[None]:
        """Inside the ``with`` block signals wait, and in every thread started there."""
        # And who reads the terminal from the background is told so, not stopped.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals | {signal.SIGTTIN})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @contextmanager
    def _signals_taken(self, launcher: Launcher, terminal: Terminal) -> Iterator[None]:
        """Inside the ``with`` block they end the machine, or tell what has become of the terminal."""
        over = threading.Event()

        def take() -> None:
            while True:
                number = signal.sigwait(self._signals)
                if over.is_set():
                    return
                if number == signal.SIGWINCH:
                    launcher.resized()
                elif number == signal.SIGCONT:
                    terminal.resume()
                else:
                    self._end(number)

        thread = threading.Thread(target=take, name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            # Any will do, and this one does nothing should the thread have gone with another.
            os.kill(os.getpid(), signal.SIGWINCH)
            thread.join()
