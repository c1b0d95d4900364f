"""A machine on KVM: kicks are ioeventfds, interrupts are irqfds.

The guest leaves for user space only to touch a device's other registers: its
notifications go from the kernel straight to the queue's thread, and that
thread's interrupt goes through the in-kernel interrupt controllers, past the
thread that runs the guest.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable

from lguestlib.abi import kvm as abi
from lguestlib.abi.ioctl import ioctl
from lguestlib.abi.virtio_mmio import VIRTIO_MMIO_QUEUE_NOTIFY
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.runtime.machine import Crash, Outcome, PowerOff, Reboot, Stopped
from lguestlib.runtime.mmio_machine import MmioMachine
from lguestlib.runtime.runner import MmioRunner
from lguestlib.runtime.trace import Tracer

DEVICE = "/dev/kvm"

LINES = (5, 6, 7, 9, 10, 11, 12, 14, 15, 3, 4)
"""Interrupt lines of the devices, in bus order; past their number they are shared."""

IDENTITY_MAP_AT = 0xFFFB_C000
TSS_AT = 0xFFFB_D000
"""Four pages that Intel's virtualisation wants, below the top of the 32-bit space."""

PORT_KEYBOARD = 0x64
KEYBOARD_RESET = 0xFE
"""A PC's keyboard controller pulses the reset line when this is written to its port."""

PORT_LAST_WORDS = 0xE9
"""Where a guest writes a line of last words, a character at a time."""

PORT_EXIT = 0xF4
"""Where a guest writes its verdict to switch the machine off."""

CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18
"""The flat segments of the 32-bit boot protocol (Linux, Documentation/arch/x86/boot.rst)."""


class KvmUnusable(Exception):
    """KVM cannot be used here; the message names the reason and the remedy."""


def open_kvm() -> int:
    """A descriptor of /dev/kvm with all this machine needs.  Raises KvmUnusable."""
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
        missing = [name for name, number in NEEDED.items() if capability(fd, number) <= 0]
        if missing:
            raise KvmUnusable(f"{DEVICE}: lacks {', '.join(missing)} (a newer kernel has it)")
    except OSError as error:
        os.close(fd)
        raise KvmUnusable(f"{DEVICE}: {error.strerror}") from None
    except KvmUnusable:
        os.close(fd)
        raise
    return fd


NEEDED = {
    "KVM_CAP_IRQCHIP": abi.KVM_CAP_IRQCHIP,
    "KVM_CAP_USER_MEMORY": abi.KVM_CAP_USER_MEMORY,
    "KVM_CAP_IOEVENTFD": abi.KVM_CAP_IOEVENTFD,
    "KVM_CAP_IRQFD": abi.KVM_CAP_IRQFD,
    "KVM_CAP_IMMEDIATE_EXIT": abi.KVM_CAP_IMMEDIATE_EXIT,
    "KVM_CAP_SET_TSS_ADDR": abi.KVM_CAP_SET_TSS_ADDR,
    "KVM_CAP_EXT_CPUID": abi.KVM_CAP_EXT_CPUID,
}
"""The capabilities without which this machine cannot be built."""


def capability(fd: int, number: int) -> int:
    """What KVM_CHECK_EXTENSION says of capability *number*: 0 for absent."""
    return ioctl(fd, abi.KVM_CHECK_EXTENSION, number, "KVM_CHECK_EXTENSION", DEVICE)


class KvmMachine(MmioMachine):
    """One virtual CPU in flat 32-bit protected mode, with in-kernel interrupt controllers.

    Raises KvmUnusable, or OSError where KVM refuses a request.
    """

    def __init__(
        self, memory: GuestMemory, report: Callable[[str], None], tracer: Tracer | None = None
    ) -> None:
        self._kvm = open_kvm()
        super().__init__(memory, report, tracer)
        self._last_words = bytearray()
        self._vm = self._vcpu = -1
        try:
            self._vm = ioctl(self._kvm, abi.KVM_CREATE_VM, 0, "KVM_CREATE_VM", DEVICE)
            ioctl(self._vm, abi.KVM_SET_TSS_ADDR, TSS_AT, "KVM_SET_TSS_ADDR")
            identity = ctypes.c_uint64(IDENTITY_MAP_AT)
            ioctl(self._vm, abi.KVM_SET_IDENTITY_MAP_ADDR, identity, "KVM_SET_IDENTITY_MAP_ADDR")
            ioctl(self._vm, abi.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")
            for slot, region in enumerate(memory.regions):
                mapped = abi.kvm_userspace_memory_region(
                    slot=slot, guest_phys_addr=region.base, memory_size=region.size,
                    userspace_addr=region.host_address,
                )  # fmt: skip
                ioctl(self._vm, abi.KVM_SET_USER_MEMORY_REGION, mapped, "KVM_SET_USER_MEMORY_REGION")
            self._vcpu = ioctl(self._vm, abi.KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU")
            size = ioctl(self._kvm, abi.KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")
            self._shared = mmap.mmap(self._vcpu, size)
            self._state = abi.kvm_run.from_buffer(self._shared)
            cpuid = abi.kvm_cpuid2(nent=abi.KVM_MAX_CPUID_ENTRIES)
            ioctl(self._kvm, abi.KVM_GET_SUPPORTED_CPUID, cpuid, "KVM_GET_SUPPORTED_CPUID")
            ioctl(self._vcpu, abi.KVM_SET_CPUID2, cpuid, "KVM_SET_CPUID2")
        except BaseException:
            self._abandon()
            raise

    def device_parameters(self) -> list[str]:
        """The command-line words that tell a kernel of the devices (virtio 1.3, 4.2.1)."""
        return [
            f"virtio_mmio.device=4K@{self.address_of(slot):#x}:{LINES[slot % len(LINES)]}"
            for slot in range(len(self.runners))
        ]

    def boot(self, entry: GuestAddress, parameters: GuestAddress) -> None:
        """Point the CPU at *entry* as the 32-bit boot protocol says, boot parameters at *parameters*."""
        system = abi.kvm_sregs()
        ioctl(self._vcpu, abi.KVM_GET_SREGS, system, "KVM_GET_SREGS")
        system.cs = _flat_segment(CODE_SELECTOR, 0xB)
        data = _flat_segment(DATA_SELECTOR, 0x3)
        system.ds = system.es = system.fs = system.gs = system.ss = data
        system.cr0 |= 1
        ioctl(self._vcpu, abi.KVM_SET_SREGS, system, "KVM_SET_SREGS")
        registers = abi.kvm_regs(rip=entry, rsi=parameters, rflags=2)
        ioctl(self._vcpu, abi.KVM_SET_REGS, registers, "KVM_SET_REGS")

    def _attach(self, runner: MmioRunner, slot: int) -> None:
        for index, kick in enumerate(runner.kicks):
            doorbell = abi.kvm_ioeventfd(
                datamatch=index, addr=self.address_of(slot) + VIRTIO_MMIO_QUEUE_NOTIFY, len=4, fd=kick.fd,
                flags=abi.KVM_IOEVENTFD_FLAG_DATAMATCH,
            )  # fmt: skip
            ioctl(self._vm, abi.KVM_IOEVENTFD, doorbell, "KVM_IOEVENTFD", runner.device.name)
        line = abi.kvm_irqfd(fd=runner.interrupt.fd, gsi=LINES[slot % len(LINES)])
        ioctl(self._vm, abi.KVM_IRQFD, line, "KVM_IRQFD", runner.device.name)

    def _detach(self) -> None:
        if hasattr(self, "_state"):
            del self._state
            self._shared.close()
        for fd in (self._vcpu, self._vm, self._kvm):
            if fd >= 0:
                os.close(fd)
        self._vcpu = self._vm = self._kvm = -1

    def _leave(self) -> None:
        # A signal before KVM_RUN would be lost; this flag makes the call return at once.
        self._state.immediate_exit = 1

    def _enter(self) -> Outcome:
        state = self._state
        while not self._stopping:
            try:
                ioctl(self._vcpu, abi.KVM_RUN, 0, "KVM_RUN")
            except InterruptedError:
                continue
            reason = state.exit_reason
            if reason == abi.KVM_EXIT_MMIO:
                self._mmio()
            elif reason == abi.KVM_EXIT_IO:
                outcome = self._port()
                if outcome:
                    return outcome
            elif reason == abi.KVM_EXIT_SHUTDOWN:
                return Crash(f"the guest's CPU has shut down (triple fault){self._where()}")
            else:
                return Crash(f"KVM stopped the guest: {self._describe(reason)}{self._where()}")
        return Stopped()

    def _mmio(self) -> None:
        access = self._state.mmio
        target = self.access(access.phys_addr)
        if access.is_write:
            if target:
                runner, offset = target
                runner.write(offset, bytes(access.data[: access.len]))
        else:
            answer = target[0].read(target[1], access.len) if target else b"\xff" * access.len
            ctypes.memmove(access.data, answer, access.len)

    def _port(self) -> Outcome | None:
        io = self._state.io
        start, end = io.data_offset, io.data_offset + io.size * io.count
        if io.direction == abi.KVM_EXIT_IO_IN:
            self._shared[start:end] = b"\xff" * (end - start)
            return None
        data = self._shared[start:end]
        if io.port == PORT_EXIT:
            return PowerOff(data[0])
        if io.port == PORT_KEYBOARD and data[0] == KEYBOARD_RESET:
            return Reboot()
        if io.port == PORT_LAST_WORDS:
            for character in data:
                if character == 0x0A or len(self._last_words) >= 500:
                    self.report(self._last_words.decode("latin-1"))
                    self._last_words.clear()
                else:
                    self._last_words.append(character)
        return None

    def _describe(self, reason: int) -> str:
        state = self._state
        if reason == abi.KVM_EXIT_INTERNAL_ERROR:
            kinds = {1: "an instruction it cannot emulate", 2: "exceptions nested too deep"}
            kind = kinds.get(state.internal.suberror, f"suberror {state.internal.suberror}")
            return f"internal error, {kind}"
        if reason == abi.KVM_EXIT_FAIL_ENTRY:
            cause = state.fail_entry.hardware_entry_failure_reason
            return f"the processor refused the guest's state (reason {cause:#x})"
        return f"exit reason {reason}"

    def _where(self) -> str:
        registers = abi.kvm_regs()
        ioctl(self._vcpu, abi.KVM_GET_REGS, registers, "KVM_GET_REGS")
        return f" at eip {registers.rip:#x}"


def _flat_segment(selector: int, kind: int) -> abi.kvm_segment:
    """All 4 GiB, 32-bit, present; *kind* is the descriptor's type field."""
    return abi.kvm_segment(base=0, limit=0xFFFF_FFFF, selector=selector, type=kind, present=1, db=1, s=1, g=1)
