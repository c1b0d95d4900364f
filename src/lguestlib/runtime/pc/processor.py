"""A processor's state before its first instruction, beyond what KVM gives it."""

import struct

from lguestlib.abi import kvm as abi
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.image.long_mode import CODE_SELECTOR, DATA_SELECTOR, LongMode
from lguestlib.runtime.pc.cpuid import Leaf, guest_cpuid
from lguestlib.runtime.vm import Vcpu, Vm, capability, flat_segment

MSR_IA32_MISC_ENABLE = 0x1A0
_FAST_STRINGS = 1 << 0
MSR_MTRR_DEF_TYPE = 0x2FF
_MTRR_ENABLED_WRITE_BACK = 1 << 11 | 6
"""Intel SDM, volume 4; firmware sets them, and Linux does without PAT where memory types are disabled."""

_APIC_LVT_LINT0, _APIC_LVT_LINT1 = 0x350, 0x360
_LVT_MASKED, _LVT_NMI = 1 << 16, 4 << 8

_CR0_PROTECTED, _CR0_PAGING = 1 << 0, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LONG = 1 << 8 | 1 << 10


def add_processors(vm: Vm, cpus: int) -> None:
    """Give *vm* so many processors; all but the first wait for the guest to start them."""
    supported = [
        Leaf(
            entry.function, entry.index, entry.eax, entry.ebx, entry.ecx, entry.edx,
            bool(entry.flags & abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
        )
        for entry in _entries(vm.supported_cpuid())
    ]  # fmt: skip
    deadline_timer = capability(vm.kvm, abi.KVM_CAP_TSC_DEADLINE_TIMER) > 0
    for cpu in range(cpus):
        vcpu = vm.add_vcpu(_cpuid2(guest_cpuid(supported, cpu, cpus, deadline_timer)))
        _set_registers(vcpu)
        _set_local_apic(vcpu)


def _entries(cpuid: abi.kvm_cpuid2) -> list[abi.kvm_cpuid_entry2]:
    return [cpuid.entries[at] for at in range(cpuid.nent)]


def _cpuid2(leaves: list[Leaf]) -> abi.kvm_cpuid2:
    told = abi.kvm_cpuid2(nent=len(leaves))
    for at, leaf in enumerate(leaves):
        told.entries[at] = abi.kvm_cpuid_entry2(
            leaf.function, leaf.index, abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX if leaf.indexed else 0, leaf.eax,
            leaf.ebx, leaf.ecx, leaf.edx,
        )  # fmt: skip
    return told


def _set_registers(vcpu: Vcpu) -> None:
    values = {MSR_IA32_MISC_ENABLE: _FAST_STRINGS, MSR_MTRR_DEF_TYPE: _MTRR_ENABLED_WRITE_BACK}
    registers = abi.kvm_msrs(nmsrs=len(values))
    for at, (index, value) in enumerate(values.items()):
        registers.entries[at] = abi.kvm_msr_entry(index=index, data=value)
    vcpu.call(abi.KVM_SET_MSRS, registers, "KVM_SET_MSRS")


def _set_local_apic(vcpu: Vcpu) -> None:
    """Its pins lead to no interrupt controller of old, and to NMIs."""
    apic = abi.kvm_lapic_state()
    vcpu.call(abi.KVM_GET_LAPIC, apic, "KVM_GET_LAPIC")
    for register, value in ((_APIC_LVT_LINT0, _LVT_MASKED), (_APIC_LVT_LINT1, _LVT_NMI)):
        apic.regs[register : register + 4] = list(struct.pack("<I", value))
    vcpu.call(abi.KVM_SET_LAPIC, apic, "KVM_SET_LAPIC")


def enter_long_mode(vcpu: Vcpu, entry: GuestAddress, parameters: GuestAddress, mode: LongMode) -> None:
    """Point *vcpu* at *entry* as the 64-bit boot protocol says, the boot parameters' address in RSI."""
    system = abi.kvm_sregs()
    vcpu.call(abi.KVM_GET_SREGS, system, "KVM_GET_SREGS")
    code = flat_segment(CODE_SELECTOR, 0xB)
    code.db, code.l = 0, 1
    system.cs = code
    system.ds = system.es = system.fs = system.gs = system.ss = flat_segment(DATA_SELECTOR, 0x3)
    system.gdt = abi.kvm_dtable(base=mode.gdt.start, limit=mode.gdt.size - 1)
    system.cr0 |= _CR0_PROTECTED | _CR0_PAGING
    system.cr3 = mode.page_tables
    system.cr4 |= _CR4_PAE
    system.efer |= _EFER_LONG
    vcpu.call(abi.KVM_SET_SREGS, system, "KVM_SET_SREGS")
    vcpu.call(abi.KVM_SET_REGS, abi.kvm_regs(rip=entry, rsi=parameters, rflags=2), "KVM_SET_REGS")
