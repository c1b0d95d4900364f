"""Makes a machine as asked, boots it, boots it again when it wants, and ends it cleanly."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Literal, Self

from lguestlib.abi.virtio_ids import VIRTIO_ID_BLOCK
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.image import ImageError
from lguestlib.memory.region import Region
from lguestlib.runtime.attachments import Attachment, ConsoleAttachment, Say, attach
from lguestlib.runtime.backend.terminal import Terminal
from lguestlib.runtime.boot import Boot
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.initramfs.archive import make_initramfs
from lguestlib.runtime.gil import SWITCH_INTERVAL
from lguestlib.runtime.inprocess.machine import InprocessMachine
from lguestlib.runtime.inprocess.shell import shell
from lguestlib.runtime.kvm import KvmMachine
from lguestlib.runtime.kernel import kernel_kind, load_kernel, load_lguest_kernel, load_pc_kernel
from lguestlib.runtime.lguest.file import DEVICE as LGUEST
from lguestlib.runtime.lguest.file import DevLguest, LguestUnusable
from lguestlib.runtime.lguest.machine import LguestMachine
from lguestlib.runtime.lguest.runner import LguestDeviceRunner
from lguestlib.runtime.machine import Outcome, Reboot, Stopped
from lguestlib.runtime.mmio_machine import DEVICES_AT, DEVICES_MAX, MmioMachine
from lguestlib.runtime.options import (
    MEBIBYTE,
    DeviceOption,
    DiskImage,
    HypervisorName,
    MachineOptions,
    ScratchDisk,
    TransportName,
    VhostUserDisk,
)
from lguestlib.runtime.pc.host_kernel import HostKernel
from lguestlib.runtime.pc.machine import MEMORY_MAX, PcMachine, pc_memory
from lguestlib.runtime.trace import Tracer
from lguestlib.runtime.uml.kernel import UmlKernel
from lguestlib.runtime.uml.machine import UmlMachine
from lguestlib.runtime.vm import KvmUnusable, open_kvm
from lguestlib.virtio.device import Device
from lguestlib.virtio.devices.console import Console
from lguestlib.virtio.lguest import BusFull
from lguestlib.virtio.pci.bus import DEVICES_MAX as BUS_MAX

MEMORY_MIN = 4 * MEBIBYTE

QUEUES_MAX = 64
"""Of a disk, each with a thread of its own."""

EARLY_CONSOLE_WORDS = ("earlyprintk=ttyS0", "console=hvc0")
"""What makes a kernel show its messages: on the serial port, until the console is there."""

OWN_LINUX_WORDS = ("console=hvc0", "quiet", "verdict=/dev/ttyS1")
"""The command line of a Linux with an init of ours, which tells its verdict on the second serial port."""

LGUEST_MEMORY_MAX = (min(1 << 32, sys.maxsize) // MEBIBYTE - 2) * MEBIBYTE
"""What has an address of 32 bits and one interpreter can map, device pages and guard pages beside it."""

UML_MEMORY_MIN = 48 * MEBIBYTE
"""Less, and the kernel does not come to its first file system."""


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
        self._terminal = terminal
        self._say = say
        self._tracer = tracer
        self._machine: Boot | None = None
        self._console: Console | None = None
        self._stopping = False
        # Held by whoever looks at the machine while another thread may be about to close it.
        self._lock = threading.Lock()
        self._is_pc = self.hypervisor == "kvm" and is_pc_guest(options)
        self._transport: TransportName = options.transport or "pci"
        _check_pc_options(options, self._is_pc)
        _check_memory(options.memory, "pc" if self._is_pc else self.hypervisor)
        if self.hypervisor in ("kvm", "inprocess"):
            _check_bus(len(options.devices) + 1, BUS_MAX if self._is_pc and self._transport == "pci" else DEVICES_MAX)
        self._attachments: list[Attachment] = []
        with ExitStack() as opened:
            for option in options.devices:
                attachment = attach(_with_queues(option, options.cpus), self._notes.append, tracer)
                opened.callback(attachment.close)
                self._attachments.append(attachment)
            self._attachments.append(ConsoleAttachment(terminal))
            self._opened = opened.pop_all()

    def run(self, booted: Callable[[Boot], None] = lambda machine: None) -> Outcome:
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

    def _boot(self, machine: Boot, booted: Callable[[Boot], None]) -> Outcome:
        for note in self._notes:
            self._say(note)
        self._notes.clear()
        if self.options.verbose and isinstance(machine, LguestMachine):
            for runner in machine.runners:
                self._say(_placed(runner))
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

    def _build(self) -> Boot:
        """A machine with fresh memory and devices, ready to start."""
        if self.hypervisor == "uml":
            return self._user_mode_linux()
        if self.hypervisor == "lguest":
            return self._lguest()
        if self._is_pc:
            return self._pc()
        try:
            memory = self._memory()
        except OSError as error:
            raise self._no_memory(error) from None
        try:
            machine = self._on(memory)
        except BaseException:
            memory.close()
            raise
        try:
            self._add_devices(machine.add)
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

    def _user_mode_linux(self) -> UmlMachine:
        kernel = UmlKernel.find(self.options.kernel)
        machine = UmlMachine(kernel, self.options.memory, self._say, self._tracer)
        try:
            self._add_devices(machine.add)
            if self.options.initrd is not None:
                machine.boot(self.options.initrd, self.options.arguments)
                return machine
            devices = [server.device for server in machine.runners]
            archive = make_initramfs(kernel.drivers(devices, self._notes.append), self.options.script)
            machine.boot(archive.pack(), [*self._device_words(), *self.options.arguments])
            return machine
        except BaseException:
            machine.close()
            raise

    def _pc(self) -> PcMachine:
        host = HostKernel.find() if self.options.linux else None
        try:
            memory = pc_memory(self.options.memory, any(attachment.shares_memory for attachment in self._attachments))
        except OSError as error:
            raise self._no_memory(error) from None
        try:
            machine = PcMachine(
                memory, self._say, self._tracer, self.options.cpus, self._transport, self._take_early_text
            )
        except KvmUnusable as error:
            memory.close()
            raise LaunchError(f"kvm: {error}") from None
        except BaseException:
            memory.close()
            raise
        try:
            self._add_devices(machine.add)
            self._load_pc(machine, host)
            return machine
        except ImageError as error:
            machine.close()
            raise LaunchError(str(error)) from None
        except BaseException:
            machine.close()
            raise

    def _load_pc(self, machine: PcMachine, host: HostKernel | None) -> None:
        """Put the user's kernel into *machine*, or the *host*'s, with an initramfs of ours if he has named none."""
        options = self.options
        if host is None:
            console = () if options.kernel is None else _console_words(options.arguments)
            load_pc_kernel(machine, options.kernel, options.initrd, " ".join([*console, *self._words()]))
            return
        words = [*OWN_LINUX_WORDS, *self._device_words(), *options.arguments]
        initrd: str | bytes | None = options.initrd
        if initrd is None:
            devices = [runner.device for runner in machine.runners]
            initrd = make_initramfs(host.drivers(devices, self._transport, self._say), options.script).pack()
        load_pc_kernel(machine, host.path, initrd, " ".join(words))

    def _lguest(self) -> LguestMachine:
        try:
            machine = LguestMachine(self.options.memory, self._say, self._tracer, DevLguest, self._take_early_text)
        except LguestUnusable as error:
            raise LaunchError(f"lguest: {error}") from None
        except OSError as error:
            raise self._no_memory(error) from None
        assert self.options.kernel is not None
        try:
            self._add_devices(machine.add)
            load_lguest_kernel(machine, self.options.kernel, self.options.initrd, " ".join(self._words()))
            return machine
        except BusFull as error:
            machine.close()
            raise LaunchError(f"{error} (name fewer --block, --tunnet and --rng)") from None
        except ImageError as error:
            machine.close()
            raise LaunchError(str(error)) from None
        except BaseException:
            machine.close()
            raise

    def _take_early_text(self, text: bytes) -> None:
        """Show what the guest says before it has a console on what will be that."""
        left = memoryview(bytearray(text))
        with suppress(InterruptedError):
            while left:
                left = left[self._terminal.write([left]) :]

    def _no_memory(self, error: OSError) -> LaunchError:
        return LaunchError(f"--memory {self.options.memory // MEBIBYTE}: {error.strerror}")

    def _memory(self) -> GuestMemory:
        if any(attachment.shares_memory for attachment in self._attachments):
            return GuestMemory([Region.memfd(GuestAddress(0), self.options.memory)])
        return GuestMemory.anonymous(self.options.memory)

    def _on(self, memory: GuestMemory) -> MmioMachine:
        if self.hypervisor == "inprocess":
            return InprocessMachine(memory, shell(" ".join(self._words())), self._say, self._tracer)
        try:
            return KvmMachine(memory, self._say, self._tracer)
        except KvmUnusable as error:
            raise LaunchError(f"kvm: {error}") from None

    def _add_devices(self, add: Callable[[Device], object]) -> None:
        counts: dict[str, int] = {}
        for attachment in self._attachments:
            number = counts[attachment.kind] = counts.get(attachment.kind, -1) + 1
            device = attachment.device(number)
            add(device)
            if isinstance(device, Console):
                self._console = device

    def _words(self) -> list[str]:
        """The command line, without the devices: a kernel of the user's is told nothing else."""
        if self.options.kernel is not None:
            return list(self.options.arguments)
        return [*self._device_words(), *self.options.arguments]

    def _device_words(self) -> list[str]:
        """What a guest that is ours is told of its devices."""
        return [word for attachment in self._attachments for word in attachment.guest_parameters()]


def choose_hypervisor(options: MachineOptions, say: Say) -> HypervisorName:
    """The hypervisor to use: for "auto" kvm if it is usable, and *say* is told what and why.

    Raises LaunchError where the one asked for cannot be used, or not for that guest.
    """
    if options.hypervisor == "uml":
        for device in options.devices:
            if isinstance(device, VhostUserDisk):
                raise LaunchError(
                    f"--block vhost-user:{device.path}: User-mode Linux reaches it without us"
                    f" (--append virtio_uml.device={device.path}:{VIRTIO_ID_BLOCK})"
                )
        UmlKernel.find(options.kernel)
        return "uml"
    if options.linux and options.hypervisor in ("inprocess", "lguest"):
        raise LaunchError(f"--hypervisor {options.hypervisor}: it cannot run --linux (use kvm)")
    if options.hypervisor == "inprocess":
        if options.kernel is not None:
            raise LaunchError(
                f"--hypervisor inprocess: it cannot run {options.kernel}"
                " (leave the kernel away, or use kvm or uml)"
            )
        return "inprocess"
    if options.hypervisor == "lguest":
        _check_lguest(options)
        return "lguest"
    lguest = ""
    if options.hypervisor == "auto" and options.kernel is not None and kernel_kind(options.kernel).is_32_bit:
        try:
            _check_lguest(options)
        except LaunchError as error:
            lguest = f"{error}; "
        else:
            say(f"hypervisor: lguest, because {LGUEST} is usable and {options.kernel} is a 32-bit kernel")
            return "lguest"
    try:
        os.close(open_kvm())
    except KvmUnusable as error:
        if options.hypervisor == "kvm" or options.kernel is not None or options.linux:
            raise LaunchError(f"{lguest}kvm: {error}") from None
        say(f"hypervisor: inprocess, because kvm is not usable: {error}")
        return "inprocess"
    if options.hypervisor == "auto":
        say("hypervisor: kvm, because /dev/kvm is usable")
    return "kvm"


def _check_lguest(options: MachineOptions) -> None:
    """Raise LaunchError where lguest cannot be used, or not for that guest."""
    if options.kernel is None:
        raise LaunchError("--hypervisor lguest: it has no built-in guest (run MEM KERNEL boots a 32-bit Linux)")
    for device in options.devices:
        if isinstance(device, VhostUserDisk):
            raise LaunchError(
                f"--block vhost-user:{device.path}: lguest's memory is not to be shared (use kvm, or a disk image)"
            )
    try:
        DevLguest().close()
    except LguestUnusable as error:
        raise LaunchError(f"lguest: {error}") from None


def _placed(runner: LguestDeviceRunner) -> str:
    """A line that tells of a device and where its guest finds it."""
    transport = runner.transport
    queues = " and ".join(queue.name for queue in runner.queues)
    irqs = " and ".join(map(str, transport.irqs))
    rings = " and ".join(f"{layout.descriptors:#x}" for layout in transport.layouts)
    return (
        f"{runner.device.name}: {queues}, interrupts {irqs}, rings at {rings}, described at {transport.address:#x}"
    )


def _with_queues(option: DeviceOption, cpus: int) -> DeviceOption:
    """A disk with a queue for each processor, if its *option* asks for no more than one."""
    if isinstance(option, DiskImage | ScratchDisk) and option.queues == 1:
        return replace(option, queues=min(cpus, QUEUES_MAX))
    return option


def _console_words(arguments: Sequence[str]) -> Sequence[str]:
    """What a kernel's command line lacks to be seen."""
    return () if any(word.startswith("console=") for word in arguments) else EARLY_CONSOLE_WORDS


def is_pc_guest(options: MachineOptions) -> bool:
    """Whether the guest is to have a PC: Linux wants one, and a small program of 32 bits does not, but by PCI."""
    return options.linux or options.transport == "pci" or options.kernel is not None and kernel_kind(options.kernel).wants_pc


def _check_pc_options(options: MachineOptions, is_pc: bool) -> None:
    """Raise LaunchError for what only a PC has, where the guest is on none, and for more processors than make sense."""
    if options.cpus > 1 and not (is_pc and (options.linux or options.kernel is not None)):
        raise LaunchError(
            f"--cpus {options.cpus}: for a Linux on kvm (run --linux, or MEM KERNEL with a bzImage or a 64-bit kernel)"
        )
    if options.transport == "pci" and not is_pc:
        raise LaunchError("--transport pci: on kvm alone (--hypervisor kvm)")


def _check_memory(size: int, hypervisor: HypervisorName | Literal["pc"]) -> None:
    given = f"--memory {size // MEBIBYTE}"
    least = UML_MEMORY_MIN if hypervisor == "uml" else MEMORY_MIN
    if size < least:
        raise LaunchError(f"{given}: at least {least // MEBIBYTE} MiB are needed")
    most = {"uml": sys.maxsize, "pc": MEMORY_MAX, "lguest": LGUEST_MEMORY_MAX}.get(hypervisor, DEVICES_AT)
    if size > most:
        raise LaunchError(f"{given}: at most {most // MEBIBYTE} MiB fit below the devices")
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > held:
        raise LaunchError(f"{given}: this host has {held // MEBIBYTE} MiB (give the guest less)")


def _check_bus(devices: int, most: int) -> None:
    if devices > most:
        raise LaunchError(
            f"{devices} devices: the bus has room for {most}, the console included"
            " (name fewer --block, --tunnet and --rng)"
        )
