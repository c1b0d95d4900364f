"""The Kernel-based Virtual Machine on x86, linux/kvm.h and asm/kvm.h.

The layouts are those of the interpreter's own ABI: where a 32-bit one differs,
so do the sizes in the request numbers.
"""

import ctypes
from typing import TYPE_CHECKING, Annotated

from lguestlib.abi.ioctl import IO, IOR, IOW, IOWR
from lguestlib.abi.layout import NativeStructure, Union, i32, offset_of, u8, u16, u32, u64

KVM_API_VERSION = 12
KVMIO = 0xAE

KVM_CAP_IRQCHIP = 0
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_NR_VCPUS = 9
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_MP_STATE = 14
KVM_CAP_IRQ_ROUTING = 25
KVM_CAP_IRQFD = 32
KVM_CAP_PIT2 = 33
KVM_CAP_IOEVENTFD = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_INTERNAL_ERROR_DATA = 40
KVM_CAP_GET_TSC_KHZ = 61
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_SIGNAL_MSI = 77
KVM_CAP_READONLY_MEM = 81
KVM_CAP_ENABLE_CAP_VM = 98
KVM_CAP_IOEVENTFD_ANY_LENGTH = 122
KVM_CAP_SPLIT_IRQCHIP = 121
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_DIRTY_LOG_RING = 192

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_DIRTY_RING_FULL = 31

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4

KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3


class kvm_run_hw(NativeStructure):
    """linux/kvm.h, kvm_run.hw: KVM_EXIT_UNKNOWN."""

    hardware_exit_reason: u64


class kvm_run_fail_entry(NativeStructure):
    """linux/kvm.h, kvm_run.fail_entry: KVM_EXIT_FAIL_ENTRY."""

    hardware_entry_failure_reason: u64
    cpu: u32


class kvm_run_ex(NativeStructure):
    """linux/kvm.h, kvm_run.ex: KVM_EXIT_EXCEPTION."""

    exception: u32
    error_code: u32


class kvm_run_io(NativeStructure):
    """linux/kvm.h, kvm_run.io: KVM_EXIT_IO; the data is *data_offset* bytes from the start of kvm_run."""

    direction: u8
    size: u8
    port: u16
    count: u32
    data_offset: u64


class kvm_run_mmio(NativeStructure):
    """linux/kvm.h, kvm_run.mmio: KVM_EXIT_MMIO; for a read the answer goes into *data*."""

    phys_addr: u64
    data: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 8]
    len: u32
    is_write: u8


class kvm_run_hypercall(NativeStructure):
    """linux/kvm.h, kvm_run.hypercall: KVM_EXIT_HYPERCALL; the answer goes into *ret*."""

    nr: u64
    args: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 6]
    ret: u64
    longmode: u32
    pad: u32


class kvm_run_internal(NativeStructure):
    """linux/kvm.h, kvm_run.internal: KVM_EXIT_INTERNAL_ERROR, *ndata* words of detail."""

    suberror: u32
    ndata: u32
    data: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 16]


class kvm_run_system_event(NativeStructure):
    """linux/kvm.h, kvm_run.system_event: KVM_EXIT_SYSTEM_EVENT, *ndata* words of detail."""

    type: u32
    ndata: u32
    data: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 16]


class kvm_run_eoi(NativeStructure):
    """linux/kvm.h, kvm_run.eoi: KVM_EXIT_IOAPIC_EOI."""

    vector: u8


class kvm_run_msr(NativeStructure):
    """linux/kvm.h, kvm_run.msr: KVM_EXIT_X86_RDMSR and WRMSR; the answer goes into *data* or *error*."""

    error: u8
    pad: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 7]
    reason: u32
    index: u32
    data: u64


class kvm_run_exit(Union):
    """linux/kvm.h, the nameless union in kvm_run: exit_reason tells which member counts."""

    hw: kvm_run_hw
    fail_entry: kvm_run_fail_entry
    ex: kvm_run_ex
    io: kvm_run_io
    mmio: kvm_run_mmio
    hypercall: kvm_run_hypercall
    internal: kvm_run_internal
    system_event: kvm_run_system_event
    eoi: kvm_run_eoi
    msr: kvm_run_msr
    padding: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 256]


class kvm_run(NativeStructure):
    """linux/kvm.h: a virtual CPU's page shared with KVM, mapped from its descriptor."""

    _anonymous_ = ("exit",)

    request_interrupt_window: u8
    immediate_exit: u8
    padding1: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 6]
    exit_reason: u32
    ready_for_interrupt_injection: u8
    if_flag: u8
    flags: u16
    cr8: u64
    apic_base: u64
    exit: kvm_run_exit
    kvm_valid_regs: u64
    kvm_dirty_regs: u64
    s: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 2048]

    if TYPE_CHECKING:  # what _anonymous_ does at run time
        hw: kvm_run_hw
        fail_entry: kvm_run_fail_entry
        ex: kvm_run_ex
        io: kvm_run_io
        mmio: kvm_run_mmio
        hypercall: kvm_run_hypercall
        internal: kvm_run_internal
        system_event: kvm_run_system_event
        eoi: kvm_run_eoi
        msr: kvm_run_msr


KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1


class kvm_userspace_memory_region(NativeStructure):
    """linux/kvm.h: for KVM_SET_USER_MEMORY_REGION; *memory_size* in bytes, 0 removes the slot."""

    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64


class kvm_dirty_log(NativeStructure):
    """linux/kvm.h: for KVM_GET_DIRTY_LOG; *dirty_bitmap* the address of one bit per page, in u64s."""

    slot: u32
    padding1: u32
    dirty_bitmap: u64


class kvm_enable_cap(NativeStructure):
    """linux/kvm.h: for KVM_ENABLE_CAP."""

    cap: u32
    flags: u32
    args: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 4]
    pad: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 64]


KVM_PIT_SPEAKER_DUMMY = 1


class kvm_pit_config(NativeStructure):
    """linux/kvm.h: for KVM_CREATE_PIT2."""

    flags: u32
    pad: Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 15]


class kvm_irq_level(NativeStructure):
    """linux/kvm.h: for KVM_IRQ_LINE."""

    irq: u32
    level: u32


KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1


class kvm_irqfd(NativeStructure):
    """linux/kvm.h: for KVM_IRQFD."""

    fd: u32
    gsi: u32
    flags: u32
    resamplefd: u32
    pad: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 16]


KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2


class kvm_ioeventfd(NativeStructure):
    """linux/kvm.h: for KVM_IOEVENTFD; *len* is 1, 2, 4 or 8 bytes, or 0 for any."""

    datamatch: u64
    addr: u64
    len: u32
    fd: i32
    flags: u32
    pad: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 36]


KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2

KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2


class kvm_irq_routing_irqchip(NativeStructure):
    """linux/kvm.h: a route to a pin of an interrupt controller, KVM_IRQ_ROUTING_IRQCHIP."""

    irqchip: u32
    pin: u32


class kvm_irq_routing_msi(NativeStructure):
    """linux/kvm.h: a route to a message, KVM_IRQ_ROUTING_MSI."""

    address_lo: u32
    address_hi: u32
    data: u32
    devid: u32


class kvm_irq_routing_entry_u(Union):
    """linux/kvm.h, kvm_irq_routing_entry.u: the entry's type tells which member counts."""

    irqchip: kvm_irq_routing_irqchip
    msi: kvm_irq_routing_msi
    pad: Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 8]


class kvm_irq_routing_entry(NativeStructure):
    """linux/kvm.h: where one global system interrupt goes."""

    gsi: u32
    type: u32
    flags: u32
    pad: u32
    u: kvm_irq_routing_entry_u


IRQ_ROUTING_ENTRIES = 1024
"""How many entries this declaration of kvm_irq_routing has room for; KVM takes up to 4096."""


class kvm_irq_routing(NativeStructure):
    """linux/kvm.h: for KVM_SET_GSI_ROUTING; the first *nr* entries are the whole new table."""

    nr: u32
    flags: u32
    entries: Annotated[
        ctypes.Array[kvm_irq_routing_entry], kvm_irq_routing_entry * IRQ_ROUTING_ENTRIES
    ]


KVM_MSI_VALID_DEVID = 1 << 0


class kvm_msi(NativeStructure):
    """linux/kvm.h: for KVM_SIGNAL_MSI."""

    address_lo: u32
    address_hi: u32
    data: u32
    flags: u32
    devid: u32
    pad: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 12]


KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0


class kvm_cpuid_entry2(NativeStructure):
    """asm/kvm.h: what the CPUID instruction returns for one function and index."""

    function: u32
    index: u32
    flags: u32
    eax: u32
    ebx: u32
    ecx: u32
    edx: u32
    padding: Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 3]


KVM_MAX_CPUID_ENTRIES = 256
"""The most entries KVM takes or returns (arch/x86/include/asm/kvm_host.h)."""


class kvm_cpuid2(NativeStructure):
    """asm/kvm.h: for the CPUID requests; *nent* is the room on the way in, the entries on the way out."""

    nent: u32
    padding: u32
    entries: Annotated[ctypes.Array[kvm_cpuid_entry2], kvm_cpuid_entry2 * KVM_MAX_CPUID_ENTRIES]


class kvm_regs(NativeStructure):
    """asm/kvm.h: the general registers, for KVM_GET_REGS and KVM_SET_REGS."""

    rax: u64
    rbx: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    rsp: u64
    rbp: u64
    r8: u64
    r9: u64
    r10: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64
    r15: u64
    rip: u64
    rflags: u64


class kvm_segment(NativeStructure):
    """asm/kvm.h: a segment register with its hidden part."""

    base: u64
    limit: u32
    selector: u16
    type: u8
    present: u8
    dpl: u8
    db: u8
    s: u8
    l: u8  # noqa: E741
    g: u8
    avl: u8
    unusable: u8
    padding: u8


class kvm_dtable(NativeStructure):
    """asm/kvm.h: a descriptor table register."""

    base: u64
    limit: u16
    padding: Annotated[ctypes.Array[ctypes.c_uint16], ctypes.c_uint16 * 3]


class kvm_sregs(NativeStructure):
    """asm/kvm.h: the system registers, for KVM_GET_SREGS and KVM_SET_SREGS."""

    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    interrupt_bitmap: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 4]


class kvm_fpu(NativeStructure):
    """asm/kvm.h: the x87 and SSE registers, for KVM_GET_FPU and KVM_SET_FPU, which leaves *mxcsr* alone."""

    fpr: Annotated[ctypes.Array[ctypes.Array[ctypes.c_uint8]], (ctypes.c_uint8 * 16) * 8]
    fcw: u16
    fsw: u16
    ftwx: u8
    pad1: u8
    last_opcode: u16
    last_ip: u64
    last_dp: u64
    xmm: Annotated[ctypes.Array[ctypes.Array[ctypes.c_uint8]], (ctypes.c_uint8 * 16) * 16]
    mxcsr: u32
    pad2: u32


class kvm_msr_entry(NativeStructure):
    """asm/kvm.h: one model-specific register."""

    index: u32
    reserved: u32
    data: u64


MSR_ENTRIES = 64
"""How many entries this declaration of kvm_msrs has room for; KVM takes up to 255."""


class kvm_msrs(NativeStructure):
    """asm/kvm.h: for KVM_GET_MSRS and KVM_SET_MSRS, which return how many of *nmsrs* they did."""

    nmsrs: u32
    pad: u32
    entries: Annotated[ctypes.Array[kvm_msr_entry], kvm_msr_entry * MSR_ENTRIES]


KVM_APIC_REG_SIZE = 0x400


class kvm_lapic_state(NativeStructure):
    """asm/kvm.h: the local APIC's registers, for KVM_GET_LAPIC and KVM_SET_LAPIC."""

    regs: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * KVM_APIC_REG_SIZE]


KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4


class kvm_mp_state(NativeStructure):
    """linux/kvm.h: for KVM_GET_MP_STATE and KVM_SET_MP_STATE."""

    mp_state: u32


# The arrays at the end of these three are not part of the sizes in the request numbers.
_CPUID2_SIZE = offset_of(kvm_cpuid2, "entries")
_IRQ_ROUTING_SIZE = offset_of(kvm_irq_routing, "entries")
_MSRS_SIZE = offset_of(kvm_msrs, "entries")

KVM_GET_API_VERSION = IO(KVMIO, 0x00)
KVM_CREATE_VM = IO(KVMIO, 0x01)
KVM_CHECK_EXTENSION = IO(KVMIO, 0x03)
KVM_GET_VCPU_MMAP_SIZE = IO(KVMIO, 0x04)
KVM_GET_SUPPORTED_CPUID = IOWR(KVMIO, 0x05, _CPUID2_SIZE)
KVM_CREATE_VCPU = IO(KVMIO, 0x41)
KVM_GET_DIRTY_LOG = IOW(KVMIO, 0x42, ctypes.sizeof(kvm_dirty_log))
KVM_SET_USER_MEMORY_REGION = IOW(KVMIO, 0x46, ctypes.sizeof(kvm_userspace_memory_region))
KVM_SET_TSS_ADDR = IO(KVMIO, 0x47)
KVM_SET_IDENTITY_MAP_ADDR = IOW(KVMIO, 0x48, ctypes.sizeof(ctypes.c_uint64))
KVM_CREATE_IRQCHIP = IO(KVMIO, 0x60)
KVM_IRQ_LINE = IOW(KVMIO, 0x61, ctypes.sizeof(kvm_irq_level))
KVM_SET_GSI_ROUTING = IOW(KVMIO, 0x6A, _IRQ_ROUTING_SIZE)
KVM_IRQFD = IOW(KVMIO, 0x76, ctypes.sizeof(kvm_irqfd))
KVM_CREATE_PIT2 = IOW(KVMIO, 0x77, ctypes.sizeof(kvm_pit_config))
KVM_IOEVENTFD = IOW(KVMIO, 0x79, ctypes.sizeof(kvm_ioeventfd))
KVM_RUN = IO(KVMIO, 0x80)
KVM_GET_REGS = IOR(KVMIO, 0x81, ctypes.sizeof(kvm_regs))
KVM_SET_REGS = IOW(KVMIO, 0x82, ctypes.sizeof(kvm_regs))
KVM_GET_SREGS = IOR(KVMIO, 0x83, ctypes.sizeof(kvm_sregs))
KVM_SET_SREGS = IOW(KVMIO, 0x84, ctypes.sizeof(kvm_sregs))
KVM_GET_MSRS = IOWR(KVMIO, 0x88, _MSRS_SIZE)
KVM_SET_MSRS = IOW(KVMIO, 0x89, _MSRS_SIZE)
KVM_GET_FPU = IOR(KVMIO, 0x8C, ctypes.sizeof(kvm_fpu))
KVM_SET_FPU = IOW(KVMIO, 0x8D, ctypes.sizeof(kvm_fpu))
KVM_GET_LAPIC = IOR(KVMIO, 0x8E, ctypes.sizeof(kvm_lapic_state))
KVM_SET_LAPIC = IOW(KVMIO, 0x8F, ctypes.sizeof(kvm_lapic_state))
KVM_SET_CPUID2 = IOW(KVMIO, 0x90, _CPUID2_SIZE)
KVM_GET_MP_STATE = IOR(KVMIO, 0x98, ctypes.sizeof(kvm_mp_state))
KVM_SET_MP_STATE = IOW(KVMIO, 0x99, ctypes.sizeof(kvm_mp_state))
KVM_SET_TSC_KHZ = IO(KVMIO, 0xA2)
KVM_GET_TSC_KHZ = IO(KVMIO, 0xA3)
KVM_ENABLE_CAP = IOW(KVMIO, 0xA3, ctypes.sizeof(kvm_enable_cap))
KVM_SIGNAL_MSI = IOW(KVMIO, 0xA5, ctypes.sizeof(kvm_msi))
