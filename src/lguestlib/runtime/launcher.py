"""Makes a machine as asked, boots it, boots it again when it wants, and ends it cleanly."""

import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Self

from lguestlib.runtime.attachments import Attachment, ConsoleAttachment, Say, attach
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.boot import Boot
from lguestlib.runtime.gil import SWITCH_INTERVAL
from lguestlib.runtime.launch.choice import choose_hypervisor, way_of
from lguestlib.runtime.launch.plan import Plan
from lguestlib.runtime.machine import Outcome, Reboot, Stopped
from lguestlib.runtime.options import (
    BridgedNetwork,
    DeviceOption,
    DiskImage,
    HostNetwork,
    MachineOptions,
    PrivateNetwork,
    ScratchDisk,
)
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.devices.console import Console

QUEUES_MAX = 64
"""Of a disk, each with a thread of its own; of a network, with two."""


class Launcher:
    """A machine as *options* ask, with its console on *terminal*; `close` gives everything back.

    To be made while the process has one thread: it may move the process into a
    network namespace.  *say* is given lines for people, once it boots.  Raises
    LaunchError.
    """

    def __init__(
        self, options: MachineOptions, terminal: Terminal, say: Say, tracer: Tracer | None = None
    ) -> None:
        self._notes: list[str] = []
        self.hypervisor = choose_hypervisor(options, self._notes.append)
        self._way = way_of(self.hypervisor, options)
        self._way.check(options)
        self._say = say
        self._machine: Boot | None = None
        self._stopping = False
        # Held by whoever looks at the machine while another thread may be about to close it.
        self._lock = threading.Lock()
        attachments: list[Attachment] = []
        with ExitStack() as opened:
            for option in options.devices:
                attachments.append(attach(_with_queues(option, options.cpus), self._notes.append, tracer))
                opened.callback(attachments[-1].close)
            self._opened = opened.pop_all()
        attachments.append(ConsoleAttachment(terminal))
        self._plan = Plan(options, attachments, terminal, say, self._notes.append, tracer)

    def run(self, booted: Callable[[Boot], None] = lambda machine: None) -> Outcome:
        """Boot, and boot again as often as the guest wants; return how it ended.

        *booted* is told of each machine before its guest starts.  Raises LaunchError.
        """
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        try:
            while True:
                with self._way.build(self._plan) as machine:
                    outcome = self._boot(machine, booted)
                if self._stopping or outcome != Reboot():
                    return Stopped() if self._stopping else outcome
                self._say("the guest starts over")
        finally:
            sys.setswitchinterval(interval)

    def _boot(self, machine: Boot, booted: Callable[[Boot], None]) -> Outcome:
        for note in self._notes:
            self._say(note)
        self._notes.clear()
        with self._lock:
            self._machine = machine
        try:
            booted(machine)
            if self._stopping:
                return Stopped()
            machine.start()
            outcome = machine.wait()
            if outcome != Stopped():
                machine.finish()
            return outcome
        finally:
            # Its descriptors are about to be closed.
            with self._lock:
                self._machine = None

    def request_stop(self) -> None:
        """Make `run` end soon with `Stopped`; any thread may call this."""
        with self._lock:
            self._stopping = True
            if self._machine:
                self._machine.request_stop()

    def resized(self) -> None:
        """The terminal's size has changed; any thread may call this."""
        with self._lock:
            for runner in self._machine.runners if self._machine else ():
                if isinstance(runner.device, Console):
                    runner.device.resized()

    def close(self) -> None:
        """Close disks and networks."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def _with_queues(option: DeviceOption, cpus: int) -> DeviceOption:
    """A disk or network with a queue for each processor, if its *option* asks for no more than one."""
    kinds = DiskImage | ScratchDisk | HostNetwork | BridgedNetwork | PrivateNetwork
    if isinstance(option, kinds) and option.queues == 1:
        return replace(option, queues=min(cpus, QUEUES_MAX))
    return option
