"""Makes a machine as asked, boots it, boots it again when it wants, and ends it cleanly."""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Self

from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.image import ImageError
from lguestlib.runtime.attachments import Attachment, ConsoleAttachment, Say, attach
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.inprocess.machine import InprocessMachine
from lguestlib.runtime.inprocess.shell import shell
from lguestlib.runtime.kvm import KvmMachine, KvmUnusable, open_kvm
from lguestlib.runtime.kernel import load_kernel
from lguestlib.runtime.machine import DEVICES_AT, DEVICES_MAX, Machine, Outcome, Reboot, Stopped
from lguestlib.runtime.options import MEBIBYTE, HypervisorName, MachineOptions
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.devices.console import Console

SWITCH_INTERVAL = 10e-6
"""Seconds a queue's thread waits for the GIL before it asks for it: the default is 5 ms."""

MEMORY_MIN = 4 * MEBIBYTE


class Launcher:
    """A machine as *options* ask, with its console on *terminal*; `close` gives everything back.

    To be made while the process has one thread: it may move the process into a
    network namespace.  *say* is given lines for people, once it boots.  Raises
    LaunchError.
    """

    def __init__(
        self, options: MachineOptions, terminal: Terminal, say: Say, tracer: Tracer | None = None
    ) -> None:
        self.options = options
        self._notes: list[str] = []
        self.hypervisor = choose_hypervisor(options, self._notes.append)
        self._say = say
        self._tracer = tracer
        self._machine: Machine | None = None
        self._console: Console | None = None
        self._stopping = False
        # Held by whoever looks at the machine while another thread may be about to close it.
        self._lock = threading.Lock()
        _check_memory(options.memory)
        _check_bus(len(options.devices) + 1)
        self._attachments: list[Attachment] = []
        with ExitStack() as opened:
            for option in options.devices:
                attachment = attach(option, self._notes.append, tracer)
                opened.callback(attachment.close)
                self._attachments.append(attachment)
            self._attachments.append(ConsoleAttachment(terminal))
            self._opened = opened.pop_all()

    def run(self, booted: Callable[[Machine], None] = lambda machine: None) -> Outcome:
        """Boot, and boot again as often as the guest wants; return how it ended.

        *booted* is told of each machine before its guest starts.  Raises LaunchError.
        """
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        try:
            while True:
                with self._build() as machine:
                    outcome = self._boot(machine, booted)
                if self._stopping or outcome != Reboot():
                    return Stopped() if self._stopping else outcome
                self._say("the guest starts over")
        finally:
            sys.setswitchinterval(interval)

    def _boot(self, machine: Machine, booted: Callable[[Machine], None]) -> Outcome:
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
                self._machine = self._console = None

    def request_stop(self) -> None:
        """Make `run` end soon with `Stopped`; any thread may call this."""
        with self._lock:
            self._stopping = True
            if self._machine:
                self._machine.request_stop()

    def resized(self) -> None:
        """The terminal's size has changed; any thread may call this."""
        with self._lock:
            if self._machine and self._console:
                self._console.resized()

    def close(self) -> None:
        """Close disks and networks."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def _build(self) -> Machine:
        """A machine with fresh memory and devices, ready to start."""
        try:
            memory = GuestMemory.anonymous(self.options.memory)
        except OSError as error:
            raise LaunchError(f"--memory {self.options.memory // MEBIBYTE}: {error.strerror}") from None
        try:
            machine = self._on(memory)
        except BaseException:
            memory.close()
            raise
        try:
            self._add_devices(machine)
            if isinstance(machine, KvmMachine):
                words = [*machine.device_parameters(), *self._words()]
                load_kernel(machine, self.options.kernel, self.options.initrd, " ".join(words))
        except ImageError as error:
            machine.close()
            raise LaunchError(str(error)) from None
        except BaseException:
            machine.close()
            raise
        return machine

    def _on(self, memory: GuestMemory) -> Machine:
        if self.hypervisor == "inprocess":
            return InprocessMachine(memory, shell(" ".join(self._words())), self._say, self._tracer)
        try:
            return KvmMachine(memory, self._say, self._tracer)
        except KvmUnusable as error:
            raise LaunchError(f"kvm: {error}") from None

    def _add_devices(self, machine: Machine) -> None:
        counts: dict[type[Attachment], int] = {}
        for attachment in self._attachments:
            number = counts[type(attachment)] = counts.get(type(attachment), -1) + 1
            device = attachment.device(number)
            machine.add(device)
            if isinstance(device, Console):
                self._console = device

    def _words(self) -> list[str]:
        """The command line, without the devices: a kernel of the user's is told nothing else."""
        if self.options.kernel is not None:
            return list(self.options.arguments)
        words = [word for attachment in self._attachments for word in attachment.guest_parameters()]
        return [*words, *self.options.arguments]


def choose_hypervisor(options: MachineOptions, say: Say) -> HypervisorName:
    """The hypervisor to use: for "auto" kvm if it is usable, and *say* is told what and why.

    Raises LaunchError where the one asked for cannot be used, or not for that guest.
    """
    if options.hypervisor == "inprocess":
        if options.kernel is not None:
            raise LaunchError(
                f"--hypervisor inprocess: it cannot run {options.kernel} (leave the kernel away, or use kvm)"
            )
        return "inprocess"
    try:
        os.close(open_kvm())
    except KvmUnusable as error:
        if options.hypervisor == "kvm" or options.kernel is not None:
            raise LaunchError(f"kvm: {error}") from None
        say(f"hypervisor: inprocess, because kvm is not usable: {error}")
        return "inprocess"
    if options.hypervisor == "auto":
        say("hypervisor: kvm, because /dev/kvm is usable")
    return "kvm"


def _check_memory(size: int) -> None:
    given = f"--memory {size // MEBIBYTE}"
    if size < MEMORY_MIN:
        raise LaunchError(f"{given}: at least {MEMORY_MIN // MEBIBYTE} MiB are needed")
    if size > DEVICES_AT:
        raise LaunchError(f"{given}: at most {DEVICES_AT // MEBIBYTE} MiB fit below the devices")
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > held:
        raise LaunchError(f"{given}: this host has {held // MEBIBYTE} MiB (give the guest less)")


def _check_bus(devices: int) -> None:
    if devices > DEVICES_MAX:
        raise LaunchError(
            f"{devices} devices: the bus has room for {DEVICES_MAX}, the console included"
            " (name fewer --block, --tunnet and --rng)"
        )
