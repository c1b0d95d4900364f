"""Linux as a process: User-mode Linux."""

import sys

from lguestlib.abi.virtio_ids import VIRTIO_ID_BLOCK
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.initramfs.archive import make_initramfs
from lguestlib.runtime.launch.limits import check_memory
from lguestlib.runtime.launch.plan import Plan, closed_on_error
from lguestlib.runtime.options import MEBIBYTE, MachineOptions, VhostUserDisk
from lguestlib.runtime.uml.kernel import UmlKernel
from lguestlib.runtime.uml.machine import UmlMachine

MEMORY_MIN = 48 * MEBIBYTE
"""Less, and the kernel does not come to its first file system."""


def check_usable(options: MachineOptions) -> None:
    """Raise LaunchError where there is no such kernel, or not for these devices."""
    for device in options.devices:
        if isinstance(device, VhostUserDisk):
            raise LaunchError(
                f"--block vhost-user:{device.path}: User-mode Linux reaches it without us"
                f" (--append virtio_uml.device={device.path}:{VIRTIO_ID_BLOCK})"
            )
    UmlKernel.find(options.kernel)


def check(options: MachineOptions) -> None:
    check_memory(options.memory, sys.maxsize, MEMORY_MIN)


def build(plan: Plan) -> UmlMachine:
    options = plan.options
    kernel = UmlKernel.find(options.kernel)
    with closed_on_error(UmlMachine(kernel, options.memory, plan.say, plan.tracer)) as machine:
        plan.add_devices(machine.add)
        if options.initrd is not None:
            machine.boot(options.initrd, options.arguments)
        else:
            devices = [server.device for server in machine.runners]
            archive = make_initramfs(kernel.drivers(devices, plan.note), options.script)
            machine.boot(archive.pack(), [*plan.device_words, *options.arguments])
    return machine
