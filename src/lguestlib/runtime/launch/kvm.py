"""A small program of 32 bits on KVM: the built-in guest, or a user's."""

import os

from lguestlib.memory.image.image import ImageError
from lguestlib.memory.image.linux_boot import LinuxBoot, ram_map
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.kvm import KvmMachine
from lguestlib.runtime.launch.kernel import about, opened, setup_of
from lguestlib.runtime.launch.limits import check_bus, check_memory
from lguestlib.runtime.launch.plan import Plan, closed_on_error
from lguestlib.runtime.mmio_machine import DEVICES_AT, DEVICES_MAX
from lguestlib.runtime.options import MachineOptions
from lguestlib.runtime.vm import KvmUnusable


def check(options: MachineOptions) -> None:
    check_memory(options.memory, DEVICES_AT)
    check_bus(len(options.devices), DEVICES_MAX)


def build(plan: Plan) -> KvmMachine:
    with closed_on_error(plan.memory()) as memory:
        try:
            machine = KvmMachine(memory, plan.say, plan.tracer)
        except KvmUnusable as error:
            raise LaunchError(f"kvm: {error}") from None
    with closed_on_error(machine):
        plan.add_devices(machine.add)
        words = [*machine.device_parameters(), *plan.words]
        _load(machine, plan.options.kernel, plan.options.initrd, " ".join(words))
    return machine


def _load(machine: KvmMachine, kernel: str | None, initrd: str | None, command_line: str) -> None:
    """Place the kernel at path *kernel*, or the built-in guest, and what it is told, and point the CPU at it.

    *initrd* is a path or None.  Raises ImageError, which names what it is about.
    """
    with opened(kernel, initrd) as (image, ramdisk):
        with about(f"kernel {kernel}: "):
            if image.bits != 32:
                raise ImageError(f"{image.format}: the entry is 64-bit; boot the bzImage made from it")
            image.place(machine.memory)
        boot = LinuxBoot(image, ram_map(machine.memory), os.fsencode(command_line), ramdisk, setup_of(kernel))
        machine.boot(image.entry, boot.place(machine.memory).address)
