"""Linux, or the built-in guest, on a PC of KVM's."""

import os
from collections.abc import Sequence

from lguestlib.memory.image.linux_boot import LinuxBoot
from lguestlib.memory.image.long_mode import place_long_mode
from lguestlib.memory.image.pvh_boot import PvhBoot
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.initramfs.archive import make_initramfs
from lguestlib.runtime.launch.kernel import about, opened, setup_of
from lguestlib.runtime.launch.limits import check_bus, check_memory
from lguestlib.runtime.launch.plan import Plan, closed_on_error
from lguestlib.runtime.options import MachineOptions, TransportName
from lguestlib.runtime.pc.host_kernel import HostKernel
from lguestlib.runtime.pc.machine import MEMORY_MAX, MMIO_DEVICES_MAX, PcMachine, pc_memory
from lguestlib.runtime.vm import KvmUnusable
from lguestlib.virtio.pci.bus import DEVICES_MAX

EARLY_CONSOLE_WORDS = ("earlyprintk=ttyS0", "console=hvc0")
"""What makes a kernel show its messages: on the serial port, until the console is there."""

OWN_LINUX_WORDS = ("console=hvc0", "quiet", "verdict=/dev/ttyS1")
"""The command line of a Linux with an init of ours, which tells its verdict on the second serial port."""


def check(options: MachineOptions) -> None:
    check_memory(options.memory, MEMORY_MAX)
    check_bus(len(options.devices), MMIO_DEVICES_MAX if options.transport == "mmio" else DEVICES_MAX)


def build(plan: Plan) -> PcMachine:
    options = plan.options
    host = HostKernel.find() if options.linux else None
    try:
        memory = pc_memory(options.memory, plan.shares_memory)
    except OSError as error:
        raise plan.no_memory(error) from None
    transport: TransportName = options.transport or "pci"
    with closed_on_error(memory):
        try:
            machine = PcMachine(memory, plan.say, plan.tracer, options.cpus, transport, plan.take_early_text)
        except KvmUnusable as error:
            raise LaunchError(f"kvm: {error}") from None
    with closed_on_error(machine):
        plan.add_devices(machine.add)
        if host is None:
            console = () if options.kernel is None else _console_words(options.arguments)
            _load(machine, options.kernel, options.initrd, " ".join([*console, *plan.words]))
        else:
            _load_host_kernel(machine, host, plan, transport)
    return machine


def _load_host_kernel(machine: PcMachine, host: HostKernel, plan: Plan, transport: TransportName) -> None:
    """Put this host's kernel into *machine*, with an initramfs of ours if the user has named none."""
    options = plan.options
    initrd: str | bytes | None = options.initrd
    if initrd is None:
        devices = [runner.device for runner in machine.runners]
        drivers = host.drivers(devices, transport, plan.say)
        initrd = make_initramfs(drivers, options.script).pack()
    _load(machine, host.path, initrd, " ".join([*OWN_LINUX_WORDS, *plan.device_words, *options.arguments]))


def _console_words(arguments: Sequence[str]) -> Sequence[str]:
    """What a kernel's command line lacks to be seen."""
    return () if any(word.startswith("console=") for word in arguments) else EARLY_CONSOLE_WORDS


def _load(machine: PcMachine, kernel: str | None, initrd: str | bytes | None, command_line: str) -> None:
    """Place the kernel at path *kernel*, or the built-in guest, and what it is told; the devices are all there.

    *initrd* is a path, the bytes, or None.  A kernel is entered in long mode where
    it can be, and by PVH or in protected mode otherwise.  Raises ImageError, which
    names what it is about.
    """
    path = initrd if isinstance(initrd, str) else None
    with opened(kernel, path) as (image, mapped):
        ramdisk = initrd if isinstance(initrd, bytes) else mapped
        memory, words, e820 = machine.memory, os.fsencode(command_line), machine.memory_map()
        with about(f"kernel {kernel}: "):
            image.place(memory)
        rsdp = machine.place_firmware()
        if image.pvh_entry is not None:
            info = PvhBoot(image, e820, words, ramdisk, rsdp).place(memory).address
            machine.boot_32(image.pvh_entry, ebx=info)
            return
        told = LinuxBoot(image, e820, words, ramdisk, setup_of(kernel), rsdp=rsdp).place(memory)
        if image.long_entry is not None:
            machine.boot_64(image.long_entry, told.address, place_long_mode(memory))
        else:
            machine.boot_32(image.entry, esi=told.address)
