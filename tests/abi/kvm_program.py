"""A program: run a few instructions on KVM and try its requests, and say as JSON what came of it."""

import ctypes
import errno
import json
import mmap
import os

from lguestlib.abi import kvm
from lguestlib.abi.eventfd import eventfd
from lguestlib.abi.ioctl import ioctl
from lguestlib.abi.mmap import address_of

CODE_AT = 0x1000
MEMORY = 0x8000
PORT, KICK_PORT = 0xE9, 0xEA
LETTER = 0x41
DIRTY_PAGE = 2
CODE = bytes([
    0xB0, LETTER,                      # mov $LETTER, %al
    0xA2, 0x00, DIRTY_PAGE << 4,       # mov %al, DIRTY_PAGE's first byte
    0xE6, KICK_PORT,                   # out %al, $KICK_PORT  taken by the ioeventfd
    0xE6, PORT,                        # out %al, $PORT       leaves for user space
    0xA2, MEMORY & 0xFF, MEMORY >> 8,  # mov %al, MEMORY      so does this: no memory is there
    0xA0, MEMORY & 0xFF, MEMORY >> 8,  # mov MEMORY, %al      and this
    0xF4,                              # hlt
])  # fmt: skip
ANSWER = 0x5A
CONTROL_WORD, OPERAND_AT = 0x27F, 0x1122_3344_5566_7788

_MSR_IA32_CR_PAT = 0x277


def _run(vcpu: int) -> None:
    ioctl(vcpu, kvm.KVM_RUN, 0, "KVM_RUN")


def _registers(vcpu: int) -> None:
    system = kvm.kvm_sregs()
    ioctl(vcpu, kvm.KVM_GET_SREGS, system, "KVM_GET_SREGS")
    system.cs.base = system.cs.selector = 0
    ioctl(vcpu, kvm.KVM_SET_SREGS, system, "KVM_SET_SREGS")
    ioctl(vcpu, kvm.KVM_SET_REGS, kvm.kvm_regs(rip=CODE_AT, rflags=2), "KVM_SET_REGS")


def _exits(vm: int, vcpu: int, run: kvm.kvm_run, shared: mmap.mmap) -> dict[str, object]:
    kick = eventfd()
    watch = kvm.kvm_ioeventfd(
        addr=KICK_PORT, len=1, fd=kick, datamatch=LETTER,
        flags=kvm.KVM_IOEVENTFD_FLAG_PIO | kvm.KVM_IOEVENTFD_FLAG_DATAMATCH,
    )  # fmt: skip
    ioctl(vm, kvm.KVM_IOEVENTFD, watch, "KVM_IOEVENTFD", KICK_PORT)
    told: dict[str, object] = {}

    run.immediate_exit = 1
    try:
        _run(vcpu)
    except InterruptedError as error:
        told["immediate"] = error.errno == errno.EINTR
    run.immediate_exit = 0

    _run(vcpu)
    out = run.io
    told["out"] = [run.exit_reason, out.direction, out.size, out.port, out.count, shared[out.data_offset]]
    told["kicks"] = os.eventfd_read(kick)
    _run(vcpu)
    told["write"] = [run.exit_reason, run.mmio.phys_addr, run.mmio.len, run.mmio.is_write, run.mmio.data[0]]
    _run(vcpu)
    told["read"] = [run.exit_reason, run.mmio.phys_addr, run.mmio.len, run.mmio.is_write]
    run.mmio.data[0] = ANSWER
    _run(vcpu)
    told["halt"] = run.exit_reason
    registers = kvm.kvm_regs()
    ioctl(vcpu, kvm.KVM_GET_REGS, registers, "KVM_GET_REGS")
    told["registers"] = [registers.rip, registers.rax & 0xFF]
    return told


def _cpu_state(system: int, vcpu: int) -> dict[str, object]:
    cpuid = kvm.kvm_cpuid2(nent=kvm.KVM_MAX_CPUID_ENTRIES)
    ioctl(system, kvm.KVM_GET_SUPPORTED_CPUID, cpuid, "KVM_GET_SUPPORTED_CPUID")
    ioctl(vcpu, kvm.KVM_SET_CPUID2, cpuid, "KVM_SET_CPUID2")
    fpu, state, msrs = kvm.kvm_fpu(), kvm.kvm_mp_state(), kvm.kvm_msrs(nmsrs=1)
    ioctl(vcpu, kvm.KVM_GET_FPU, fpu, "KVM_GET_FPU")
    fpu.fcw, fpu.last_dp, fpu.xmm[15][15] = CONTROL_WORD, OPERAND_AT, 0x77
    ioctl(vcpu, kvm.KVM_SET_FPU, fpu, "KVM_SET_FPU")
    fpu = kvm.kvm_fpu()
    ioctl(vcpu, kvm.KVM_GET_FPU, fpu, "KVM_GET_FPU")
    ioctl(vcpu, kvm.KVM_GET_MP_STATE, state, "KVM_GET_MP_STATE")
    ioctl(vcpu, kvm.KVM_SET_MP_STATE, state, "KVM_SET_MP_STATE")
    msrs.entries[0].index = _MSR_IA32_CR_PAT
    got = ioctl(vcpu, kvm.KVM_GET_MSRS, msrs, "KVM_GET_MSRS")
    put = ioctl(vcpu, kvm.KVM_SET_MSRS, msrs, "KVM_SET_MSRS")
    return {
        "cpuid": [0 < cpuid.nent < kvm.KVM_MAX_CPUID_ENTRIES, cpuid.entries[0].function],
        "fpu": [fpu.fcw, fpu.last_dp, fpu.xmm[15][15]],
        "state": state.mp_state == kvm.KVM_MP_STATE_RUNNABLE,
        "msrs": [got, put],
    }


def _interrupt_controllers(system: int) -> str:
    """What KVM says to a wrong request, once it has taken all that a machine's interrupts need."""
    vm = ioctl(system, kvm.KVM_CREATE_VM, 0, "KVM_CREATE_VM")
    ioctl(vm, kvm.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")
    ioctl(vm, kvm.KVM_CREATE_PIT2, kvm.kvm_pit_config(), "KVM_CREATE_PIT2")
    vcpu = ioctl(vm, kvm.KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU")
    lapic = kvm.kvm_lapic_state()
    ioctl(vcpu, kvm.KVM_GET_LAPIC, lapic, "KVM_GET_LAPIC")
    ioctl(vcpu, kvm.KVM_SET_LAPIC, lapic, "KVM_SET_LAPIC")
    routing = kvm.kvm_irq_routing(nr=2)
    line, message = routing.entries[0], routing.entries[1]
    line.gsi, line.type = 5, kvm.KVM_IRQ_ROUTING_IRQCHIP
    line.u.irqchip.irqchip, line.u.irqchip.pin = kvm.KVM_IRQCHIP_IOAPIC, 5
    message.gsi, message.type = 24, kvm.KVM_IRQ_ROUTING_MSI
    message.u.msi.address_lo, message.u.msi.data = 0xFEE0_0000, 0x31
    ioctl(vm, kvm.KVM_SET_GSI_ROUTING, routing, "KVM_SET_GSI_ROUTING")
    ioctl(vm, kvm.KVM_IRQFD, kvm.kvm_irqfd(fd=eventfd(), gsi=24), "KVM_IRQFD", 24)
    ioctl(vm, kvm.KVM_IRQ_LINE, kvm.kvm_irq_level(irq=5, level=1), "KVM_IRQ_LINE", 5)
    ioctl(vm, kvm.KVM_SIGNAL_MSI, kvm.kvm_msi(address_lo=0xFEE0_0000, data=0x31), "KVM_SIGNAL_MSI")
    try:
        ioctl(vm, kvm.KVM_IRQFD, kvm.kvm_irqfd(fd=0xFFFF_FFFF, gsi=24), "KVM_IRQFD", 24)
    except OSError as error:
        return str(error)
    return ""


def _dirty_log(vm: int, slot: kvm.kvm_userspace_memory_region) -> int:
    bitmap = bytearray(8)
    with memoryview(bitmap) as view:
        asked = kvm.kvm_dirty_log(slot=slot.slot, dirty_bitmap=address_of(view))
        ioctl(vm, kvm.KVM_GET_DIRTY_LOG, asked, "KVM_GET_DIRTY_LOG")
    return int.from_bytes(bitmap, "little")


def main() -> dict[str, object]:
    try:
        system = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return {"refused": str(error)}
    version = ioctl(system, kvm.KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION")
    vm = ioctl(system, kvm.KVM_CREATE_VM, 0, "KVM_CREATE_VM")
    memory = mmap.mmap(-1, MEMORY)
    memory[CODE_AT : CODE_AT + len(CODE)] = CODE
    with memoryview(memory) as view:
        slot = kvm.kvm_userspace_memory_region(
            flags=kvm.KVM_MEM_LOG_DIRTY_PAGES, memory_size=MEMORY, userspace_addr=address_of(view)
        )
    ioctl(vm, kvm.KVM_SET_USER_MEMORY_REGION, slot, "KVM_SET_USER_MEMORY_REGION")
    vcpu = ioctl(vm, kvm.KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU")
    size = ioctl(system, kvm.KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")
    shared = mmap.mmap(vcpu, size)
    run = kvm.kvm_run.from_buffer(shared)
    _registers(vcpu)
    told: dict[str, object] = {
        "version": version,
        "room": size >= ctypes.sizeof(kvm.kvm_run),
        "refusal": _interrupt_controllers(system),
    }
    told |= _cpu_state(system, vcpu)  # which must not change once the CPU has run
    told |= _exits(vm, vcpu, run, shared)
    return told | {"dirty": _dirty_log(vm, slot)}


if __name__ == "__main__":
    print(json.dumps(main()))
