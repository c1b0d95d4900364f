"""A virtual machine of KVM's and its processors: the requests, and nothing of what is in the machine."""

import ctypes
import errno
import mmap
import os
from collections.abc import Mapping
from typing import NamedTuple

from lguestlib.abi import kvm as abi
from lguestlib.abi.ioctl import ioctl
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory

DEVICE = "/dev/kvm"

IDENTITY_MAP_AT = 0xFFFB_C000
TSS_AT = 0xFFFB_D000
"""Four pages that Intel's virtualisation wants, below the top of the 32-bit space."""

IOAPIC_PINS = 24


class KvmUnusable(Exception):
    """KVM cannot be used here; the message names the reason and the remedy."""


NEEDED = {
    "KVM_CAP_IRQCHIP": abi.KVM_CAP_IRQCHIP,
    "KVM_CAP_USER_MEMORY": abi.KVM_CAP_USER_MEMORY,
    "KVM_CAP_IOEVENTFD": abi.KVM_CAP_IOEVENTFD,
    "KVM_CAP_IRQFD": abi.KVM_CAP_IRQFD,
    "KVM_CAP_IMMEDIATE_EXIT": abi.KVM_CAP_IMMEDIATE_EXIT,
    "KVM_CAP_SET_TSS_ADDR": abi.KVM_CAP_SET_TSS_ADDR,
    "KVM_CAP_EXT_CPUID": abi.KVM_CAP_EXT_CPUID,
}
"""The capabilities without which no machine can be built."""


def open_kvm(needed: Mapping[str, int] = NEEDED) -> int:
    """A descriptor of /dev/kvm with all the capabilities *needed*.  Raises KvmUnusable."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        remedies = {
            errno.ENOENT: "load the kvm module of this processor, or enable virtualisation in the firmware",
            errno.EACCES: "join the group that owns it, often: adduser $USER kvm",
            errno.EPERM: "join the group that owns it, often: adduser $USER kvm",
        }
        remedy = remedies.get(error.errno or 0, "")
        raise KvmUnusable(f"{DEVICE}: {error.strerror}" + (f" ({remedy})" if remedy else "")) from None
    try:
        version = ioctl(fd, abi.KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION", DEVICE)
        if version != abi.KVM_API_VERSION:
            raise KvmUnusable(f"{DEVICE}: API version {version}, not {abi.KVM_API_VERSION}")
        missing = [name for name, number in needed.items() if capability(fd, number) <= 0]
        if missing:
            raise KvmUnusable(f"{DEVICE}: lacks {', '.join(missing)} (a newer kernel has it)")
    except OSError as error:
        os.close(fd)
        raise KvmUnusable(f"{DEVICE}: {error.strerror}") from None
    except KvmUnusable:
        os.close(fd)
        raise
    return fd


def capability(fd: int, number: int) -> int:
    """What KVM_CHECK_EXTENSION says of capability *number*: 0 for absent."""
    return ioctl(fd, abi.KVM_CHECK_EXTENSION, number, "KVM_CHECK_EXTENSION", DEVICE)


class Route(NamedTuple):
    """Where a message-signalled interrupt goes."""

    address: int
    data: int


class Vm:
    """A machine with *memory* and in-kernel interrupt controllers, made through the descriptor *kvm*.

    It owns that, and its processors.  Raises OSError where KVM refuses a request.
    """

    def __init__(self, kvm: int, memory: GuestMemory) -> None:
        self.kvm = kvm
        self.vcpus: list[Vcpu] = []
        self._fd = -1
        try:
            self._fd = ioctl(kvm, abi.KVM_CREATE_VM, 0, "KVM_CREATE_VM", DEVICE)
            ioctl(self._fd, abi.KVM_SET_TSS_ADDR, TSS_AT, "KVM_SET_TSS_ADDR")
            identity = ctypes.c_uint64(IDENTITY_MAP_AT)
            ioctl(self._fd, abi.KVM_SET_IDENTITY_MAP_ADDR, identity, "KVM_SET_IDENTITY_MAP_ADDR")
            ioctl(self._fd, abi.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")
            for slot, region in enumerate(memory.regions):
                mapped = abi.kvm_userspace_memory_region(
                    slot=slot, guest_phys_addr=region.base, memory_size=region.size,
                    userspace_addr=region.host_address,
                )  # fmt: skip
                ioctl(self._fd, abi.KVM_SET_USER_MEMORY_REGION, mapped, "KVM_SET_USER_MEMORY_REGION")
        except BaseException:
            self.close()
            raise

    def supported_cpuid(self) -> abi.kvm_cpuid2:
        """All that KVM can give a processor here."""
        cpuid = abi.kvm_cpuid2(nent=abi.KVM_MAX_CPUID_ENTRIES)
        ioctl(self.kvm, abi.KVM_GET_SUPPORTED_CPUID, cpuid, "KVM_GET_SUPPORTED_CPUID")
        return cpuid

    def add_vcpu(self, cpuid: abi.kvm_cpuid2) -> "Vcpu":
        """Another processor, whose local APIC's ID is its number."""
        number = len(self.vcpus)
        fd = ioctl(self._fd, abi.KVM_CREATE_VCPU, number, "KVM_CREATE_VCPU", number)
        try:
            size = ioctl(self.kvm, abi.KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")
            ioctl(fd, abi.KVM_SET_CPUID2, cpuid, "KVM_SET_CPUID2", number)
            self.vcpus.append(Vcpu(fd, size))
        except BaseException:
            os.close(fd)
            raise
        return self.vcpus[-1]

    def add_doorbell(
        self, address: GuestAddress, length: int, fd: int, about: object, match: int | None = None
    ) -> None:
        """A write of *length* bytes to *address*, of any length for 0, signals *fd*; of the value *match* alone."""
        self._doorbell(address, length, fd, about, match, 0)

    def remove_doorbell(self, address: GuestAddress, length: int, fd: int, about: object) -> None:
        """It does not any more; nothing was to match."""
        self._doorbell(address, length, fd, about, None, abi.KVM_IOEVENTFD_FLAG_DEASSIGN)

    def _doorbell(
        self, address: GuestAddress, length: int, fd: int, about: object, match: int | None, flags: int
    ) -> None:
        if match is not None:
            flags |= abi.KVM_IOEVENTFD_FLAG_DATAMATCH
        doorbell = abi.kvm_ioeventfd(datamatch=match or 0, addr=address, len=length, fd=fd, flags=flags)
        ioctl(self._fd, abi.KVM_IOEVENTFD, doorbell, "KVM_IOEVENTFD", about)

    def add_irqfd(self, fd: int, gsi: int, about: object) -> None:
        """A signal of *fd* is interrupt *gsi*; one that it has already is too."""
        ioctl(self._fd, abi.KVM_IRQFD, abi.kvm_irqfd(fd=fd, gsi=gsi), "KVM_IRQFD", about)

    def remove_irqfd(self, fd: int, gsi: int, about: object) -> None:
        """It is not any more: signals stay in *fd*."""
        removed = abi.kvm_irqfd(fd=fd, gsi=gsi, flags=abi.KVM_IRQFD_FLAG_DEASSIGN)
        ioctl(self._fd, abi.KVM_IRQFD, removed, "KVM_IRQFD", about)

    def set_routes(self, routes: Mapping[int, Route]) -> None:
        """Interrupts below `IOAPIC_PINS` go to the I/O APIC's pins, and the others where *routes* says.

        None goes to the interrupt controllers of old.  Raises ValueError for too many.
        """
        count = IOAPIC_PINS + len(routes)
        if count > abi.IRQ_ROUTING_ENTRIES:
            raise ValueError(f"KVM: {count} interrupts are more than the {abi.IRQ_ROUTING_ENTRIES} there is room for")
        table = abi.kvm_irq_routing(nr=count)
        for pin in range(IOAPIC_PINS):
            table.entries[pin].gsi = pin
            table.entries[pin].type = abi.KVM_IRQ_ROUTING_IRQCHIP
            table.entries[pin].u.irqchip = abi.kvm_irq_routing_irqchip(abi.KVM_IRQCHIP_IOAPIC, pin)
        for at, (gsi, (address, data)) in enumerate(routes.items(), IOAPIC_PINS):
            table.entries[at].gsi = gsi
            table.entries[at].type = abi.KVM_IRQ_ROUTING_MSI
            table.entries[at].u.msi = abi.kvm_irq_routing_msi(address & 0xFFFF_FFFF, address >> 32, data)
        ioctl(self._fd, abi.KVM_SET_GSI_ROUTING, table, "KVM_SET_GSI_ROUTING")

    def set_line(self, gsi: int, level: bool) -> None:
        """Interrupt *gsi* is asserted, or is not any more."""
        ioctl(self._fd, abi.KVM_IRQ_LINE, abi.kvm_irq_level(irq=gsi, level=level), "KVM_IRQ_LINE", gsi)

    def close(self) -> None:
        """Give back every descriptor; no processor may be running."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        for fd in (self._fd, self.kvm):
            if fd >= 0:
                os.close(fd)
        self._fd = self.kvm = -1


class Vcpu:
    """A processor, to be run by one thread; *fd* is its own, and *size* that of the memory shared with KVM."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.shared = mmap.mmap(fd, size)
        self.state = abi.kvm_run.from_buffer(self.shared)
        self.exits = 0
        """How often it has left the guest because of something to tell."""

    def run(self) -> int | None:
        """Run until KVM has something to tell: its KVM_EXIT_; None where a signal came first.

        And None where the guest has just started a processor that waited for that.
        """
        try:
            ioctl(self._fd, abi.KVM_RUN, 0, "KVM_RUN")
        except (InterruptedError, BlockingIOError):
            return None
        self.exits += 1
        return self.state.exit_reason

    def leave(self) -> None:
        """Make `run` return at once: a signal before it would be lost otherwise."""
        self.state.immediate_exit = 1

    def call(self, request: int, argument: ctypes.Structure, name: str) -> None:
        """Ask KVM *request* of this processor, by its *name* in what is raised."""
        ioctl(self._fd, request, argument, name)

    def describe(self, reason: int) -> str:
        """Why KVM has stopped the processor with *reason*, and where."""
        registers = abi.kvm_regs()
        self.call(abi.KVM_GET_REGS, registers, "KVM_GET_REGS")
        return f"{self._told(reason)} at eip {registers.rip:#x}"

    def _told(self, reason: int) -> str:
        if reason == abi.KVM_EXIT_SHUTDOWN:
            return "the guest's CPU has shut down (triple fault)"
        if reason == abi.KVM_EXIT_INTERNAL_ERROR:
            kinds = {1: "an instruction it cannot emulate", 2: "exceptions nested too deep"}
            suberror = self.state.internal.suberror
            kind = kinds.get(suberror, f"suberror {suberror}")
            return f"KVM stopped the guest: internal error, {kind}"
        if reason == abi.KVM_EXIT_FAIL_ENTRY:
            cause = self.state.fail_entry.hardware_entry_failure_reason
            return f"KVM stopped the guest: the processor refused the guest's state (reason {cause:#x})"
        return f"KVM stopped the guest: exit reason {reason}"

    def enter_protected_mode(self, entry: GuestAddress, esi: GuestAddress, ebx: GuestAddress) -> None:
        """Point it at *entry* in flat 32-bit protected mode without paging."""
        system = abi.kvm_sregs()
        self.call(abi.KVM_GET_SREGS, system, "KVM_GET_SREGS")
        system.cs = flat_segment(CODE_SELECTOR, 0xB)
        data = flat_segment(DATA_SELECTOR, 0x3)
        system.ds = system.es = system.fs = system.gs = system.ss = data
        system.cr0 |= 1
        self.call(abi.KVM_SET_SREGS, system, "KVM_SET_SREGS")
        self.call(abi.KVM_SET_REGS, abi.kvm_regs(rip=entry, rsi=esi, rbx=ebx, rflags=2), "KVM_SET_REGS")

    def close(self) -> None:
        """Give back descriptor and mapping."""
        del self.state
        self.shared.close()
        os.close(self._fd)


CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18
"""The flat segments of the 32-bit boot protocol (Linux, Documentation/arch/x86/boot.rst)."""


def flat_segment(selector: int, kind: int) -> abi.kvm_segment:
    """All 4 GiB, 32-bit, present; *kind* is the descriptor's type field."""
    return abi.kvm_segment(base=0, limit=0xFFFF_FFFF, selector=selector, type=kind, present=1, db=1, s=1, g=1)
