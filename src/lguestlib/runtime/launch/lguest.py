"""A Linux of 32 bits on lguest."""

import os
import sys

from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.launch.kernel import about, opened
from lguestlib.runtime.launch.limits import check_memory
from lguestlib.runtime.launch.plan import Plan, closed_on_error
from lguestlib.runtime.lguest.file import DevLguest, LguestUnusable
from lguestlib.runtime.lguest.machine import LguestMachine
from lguestlib.runtime.lguest.runner import LguestDeviceRunner
from lguestlib.runtime.options import MEBIBYTE, MachineOptions, VhostUserDisk
from lguestlib.virtio.lguest import BusFull

MEMORY_MAX = (min(1 << 32, sys.maxsize) // MEBIBYTE - 2) * MEBIBYTE
"""What has an address of 32 bits and one interpreter can map, device pages and guard pages beside it."""


def check_usable(options: MachineOptions) -> None:
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


def check(options: MachineOptions) -> None:
    check_memory(options.memory, MEMORY_MAX)


def build(plan: Plan) -> LguestMachine:
    options = plan.options
    assert options.kernel is not None
    try:
        machine = LguestMachine(options.memory, plan.say, plan.tracer, DevLguest, plan.take_early_text)
    except LguestUnusable as error:
        raise LaunchError(f"lguest: {error}") from None
    except OSError as error:
        raise plan.no_memory(error) from None
    with closed_on_error(machine):
        try:
            plan.add_devices(machine.add)
        except BusFull as error:
            raise LaunchError(f"{error} (name fewer --block, --tunnet and --rng)") from None
        with opened(options.kernel, options.initrd) as (image, ramdisk):
            with about(f"kernel {options.kernel}: "):
                machine.check_kernel(image)
            machine.boot(image, ramdisk, os.fsencode(" ".join(plan.words)))
    if options.verbose:
        for runner in machine.runners:
            plan.note(_placed(runner))
    return machine


def _placed(runner: LguestDeviceRunner) -> str:
    """A line that tells of a device and where its guest finds it."""
    transport = runner.transport
    queues = " and ".join(queue.name for queue in runner.queues)
    irqs = " and ".join(map(str, transport.irqs))
    rings = " and ".join(f"{layout.descriptors:#x}" for layout in transport.layouts)
    return (
        f"{runner.device.name}: {queues}, interrupts {irqs}, rings at {rings}, described at {transport.address:#x}"
    )
