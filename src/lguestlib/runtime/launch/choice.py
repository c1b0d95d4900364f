"""What a guest runs on: asked for, or chosen by what it is and what this host has."""

import os

from lguestlib.runtime.attachments import Say
from lguestlib.runtime.errors import LaunchError
from lguestlib.runtime.launch.kernel import kernel_kind
from lguestlib.runtime.launch.plan import Way
from lguestlib.runtime.options import HypervisorName, MachineOptions
from lguestlib.runtime.vm import KvmUnusable, open_kvm

# A module is imported when it is chosen: they take longer than anything else at the start.


def choose_hypervisor(options: MachineOptions, say: Say) -> HypervisorName:
    """The hypervisor to use: for "auto" kvm if it is usable, and *say* is told what and why.

    Raises LaunchError where the one asked for cannot be used, or not for that guest.
    """
    match options.hypervisor:
        case "uml":
            from lguestlib.runtime.launch import uml

            uml.check_usable(options)
            return "uml"
        case ("inprocess" | "lguest") as named if options.linux:
            raise LaunchError(f"--hypervisor {named}: it cannot run --linux (use kvm)")
        case "inprocess":
            if options.kernel is not None:
                raise LaunchError(
                    f"--hypervisor inprocess: it cannot run {options.kernel}"
                    " (leave the kernel away, or use kvm or uml)"
                )
            return "inprocess"
        case "lguest":
            from lguestlib.runtime.launch import lguest

            lguest.check_usable(options)
            return "lguest"
    is_auto, lguest_unusable = options.hypervisor == "auto", ""
    if is_auto and options.kernel is not None and kernel_kind(options.kernel).is_32_bit:
        from lguestlib.runtime.launch import lguest
        from lguestlib.runtime.lguest.file import DEVICE

        try:
            lguest.check_usable(options)
        except LaunchError as error:
            lguest_unusable = f"{error}; "
        else:
            say(f"hypervisor: lguest, because {DEVICE} is usable and {options.kernel} is a 32-bit kernel")
            return "lguest"
    try:
        os.close(open_kvm())
    except KvmUnusable as error:
        if not is_auto or options.kernel is not None or options.linux:
            raise LaunchError(f"{lguest_unusable}kvm: {error}") from None
        say(f"hypervisor: inprocess, because kvm is not usable: {error}")
        return "inprocess"
    if is_auto:
        say("hypervisor: kvm, because /dev/kvm is usable")
    return "kvm"


def way_of(hypervisor: HypervisorName, options: MachineOptions) -> Way:
    """How a machine is made on that *hypervisor*.  Raises LaunchError for what only a PC has, elsewhere.

    A Linux on kvm wants a PC; a small program of 32 bits does not, but by PCI.
    """
    wants_pc = options.linux or options.transport == "pci"
    wants_pc = wants_pc or options.kernel is not None and kernel_kind(options.kernel).wants_pc
    is_pc = hypervisor == "kvm" and wants_pc
    if options.cpus > 1 and not (is_pc and (options.linux or options.kernel is not None)):
        raise LaunchError(
            f"--cpus {options.cpus}: for a Linux on kvm (run --linux, or MEM KERNEL with a bzImage or a 64-bit kernel)"
        )
    if options.transport == "pci" and not is_pc:
        raise LaunchError("--transport pci: on kvm alone (--hypervisor kvm)")
    match hypervisor:
        case "uml":
            from lguestlib.runtime.launch import uml

            return uml
        case "lguest":
            from lguestlib.runtime.launch import lguest

            return lguest
        case "kvm" if is_pc:
            from lguestlib.runtime.launch import pc

            return pc
        case "kvm":
            from lguestlib.runtime.launch import kvm

            return kvm
    from lguestlib.runtime.launch import inprocess

    return inprocess
