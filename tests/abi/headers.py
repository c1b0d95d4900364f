"""Where C says what each module of `lguestlib.abi` declares, and how to ask the compiler.

A C file with the size of every structure, the place of every field and the value
of every constant is compiled, not run: the answers are read out of the object
file, so no C library of the other word size is needed.
"""

import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from abi.declarations import Declarations


@dataclass(frozen=True)
class Header:
    """The C source of one module, and where its names or their spelling in C differ."""

    includes: tuple[str, ...] = ()
    text: str = ""
    """C written out by hand, for what is in no header of today's kernel."""
    spelled: dict[str, str] = field(default_factory=dict)
    """A constant, a structure or a ``structure.field``, with C's expression, type or member for it."""
    newer: dict[str, int] = field(default_factory=dict)
    """Macros that only newer headers have, with the value their specification gives."""
    nameless: dict[str, tuple[str, str]] = field(default_factory=dict)
    """A union that has no name in C, with the type it is part of and its largest member there."""
    flexible: frozenset[str] = frozenset()
    """The ``structure.field`` that is a flexible array in C and has a fixed length here."""
    unsigned_here: frozenset[str] = frozenset()
    """The ``structure.field`` that is signed in C and, on purpose, unsigned here."""


def _members(structure: str, *members: str) -> dict[str, str]:
    """The types of nameless structures and unions that are members of *structure*."""
    return {f"{structure}_{name}": f"__typeof__(((struct {structure} *)0)->{name})" for name in members}


HEADERS = {
    "bootparam": Header(
        ("asm/bootparam.h", "asm/e820.h"),
        spelled={
            "BOOT_FLAG": "0xAA55",  # this and the next two: Documentation/arch/x86/boot.rst
            "HEADER_MAGIC": "0x53726448",
            "TYPE_OF_LOADER_UNDEFINED": "0xFF",
            "E820_TYPE_RAM": "E820_RAM",
            "E820_TYPE_RESERVED": "E820_RESERVED",
            "E820_TYPE_ACPI": "E820_ACPI",
            "E820_TYPE_NVS": "E820_NVS",
        },
    ),
    "bridge": Header(("linux/sockios.h",)),
    "elf": Header(
        ("linux/elf.h",),
        spelled={
            name: name for name in ("Elf32_Ehdr", "Elf64_Ehdr", "Elf32_Phdr", "Elf64_Phdr", "Elf32_Nhdr")
        },
    ),
    "eventfd": Header(
        ("linux/types.h",), spelled={"BYTES": "sizeof(__u64)", "SIGNAL": '"\\1\\0\\0\\0\\0\\0\\0\\0"'}
    ),
    "fallocate": Header(("linux/falloc.h",)),
    "futex": Header(("linux/futex.h", "asm/unistd.h")),
    "io_uring": Header(
        ("linux/io_uring.h", "asm/unistd.h", "linux/version.h"),
        text="""
            #if LINUX_VERSION_CODE < 0x060500
            #define user_addr resv2
            #endif
            #if LINUX_VERSION_CODE < 0x060C00
            #define min_wait_usec pad
            #endif
        """,
        spelled={"kernel_timespec": "struct __kernel_timespec", "io_uring_sqe.pad2": "__pad2"},
    ),
    "kvm": Header(
        ("linux/kvm.h",),
        spelled={
            "KVM_MAX_CPUID_ENTRIES": "256",  # arch/x86/include/asm/kvm_host.h
            "IRQ_ROUTING_ENTRIES": "1024",  # this and the next: the module's own choice
            "MSR_ENTRIES": "64",
            "kvm_run.exit": "padding",
            "kvm_dirty_log.dirty_bitmap": "padding2",
        }
        | _members("kvm_run", "hw", "fail_entry", "ex", "io", "mmio", "hypercall")
        | _members("kvm_run", "internal", "system_event", "eoi", "msr")
        | _members("kvm_irq_routing_entry", "u"),
        nameless={"kvm_run_exit": ("struct kvm_run", "padding")},
        flexible=frozenset({"kvm_irq_routing.entries", "kvm_cpuid2.entries", "kvm_msrs.entries"}),
    ),
    "lguest": Header(
        ("linux/types.h",),
        text="""
            /* Linux 2.6.30 to 3.19: linux/lguest_launcher.h, and asm/lguest_hcall.h of x86 */
            #define LHREQ_INITIALIZE 0
            #define LHREQ_IRQ 2
            #define LHREQ_EVENTFD 4
            #define LGUEST_VRING_ALIGN 4096
            #define LGUEST_IRQS 32
            #define ERESTART 85
            #define WORD sizeof(__u32)
            struct lguest_device_desc {
                __u8 type, num_vq, feature_len, config_len, status;
                __u8 config[];
            };
            struct lguest_vqconfig {
                __u16 num, irq;
                __u32 pfn;
            };
        """,
    ),
    "membarrier": Header(("linux/membarrier.h", "asm/unistd.h")),
    "memfd": Header(("linux/fcntl.h",)),
    "mmap": Header(("linux/mman.h",)),
    "netdevice": Header(
        ("linux/if.h", "linux/in.h", "linux/if_arp.h", "linux/sockios.h"),
        spelled={
            "ifreq_ifru": "__typeof__(((struct ifreq *)0)->ifr_ifru)",
            "ifreq_ifru.ifru_in": "ifru_addr",
        },
        unsigned_here=frozenset({"ifreq_ifru.ifru_flags"}),
    ),
    "pci": Header(("linux/pci_regs.h",)),
    "poll": Header(("asm/poll.h",), unsigned_here=frozenset({"pollfd.events", "pollfd.revents"})),
    "prctl": Header(("linux/prctl.h",), spelled={"NAME_SIZE": "16"}),  # TASK_COMM_LEN, linux/sched.h
    "sched": Header(("linux/sched.h",)),
    "sigaction": Header(
        ("signal.h",),
        text="""
            struct siginfo_fault {
                int si_signo, si_errno, si_code;
                void *address;
            };
            _Static_assert(
                __builtin_offsetof(struct siginfo_fault, address) == __builtin_offsetof(siginfo_t, si_addr)
                && __builtin_offsetof(struct siginfo_fault, si_code) == __builtin_offsetof(siginfo_t, si_code),
                "siginfo_t");
        """,
        spelled={"siginfo_fault.si_addr": "address"},
    ),
    "signals": Header(("asm/unistd.h",), spelled={"INTERRUPT": "34 + 5"}),  # glibc's SIGRTMIN
    "tun": Header(("linux/ioctl.h", "linux/if_tun.h"), newer={"TUN_F_USO4": 0x20, "TUN_F_USO6": 0x40}),
    "uio": Header(("linux/uio.h",)),
    "vhost_user": Header(
        ("linux/types.h", "linux/vhost_types.h"),
        text="""
            /* docs/interop/vhost-user.rst of QEMU */
            #define VHOST_USER_VERSION 0x1
            #define VHOST_USER_VERSION_MASK 0x3
            #define VHOST_USER_REPLY_MASK 0x4
            #define VHOST_USER_NEED_REPLY_MASK 0x8
            #define VHOST_USER_VRING_IDX_MASK 0xFF
            #define VHOST_USER_VRING_NOFD_MASK 0x100
            #define VHOST_USER_F_PROTOCOL_FEATURES 30
            #define VHOST_USER_PROTOCOL_F_MQ 0
            #define VHOST_USER_PROTOCOL_F_LOG_SHMFD 1
            #define VHOST_USER_PROTOCOL_F_RARP 2
            #define VHOST_USER_PROTOCOL_F_REPLY_ACK 3
            #define VHOST_USER_PROTOCOL_F_NET_MTU 4
            #define VHOST_USER_PROTOCOL_F_BACKEND_REQ 5
            #define VHOST_USER_PROTOCOL_F_CROSS_ENDIAN 6
            #define VHOST_USER_PROTOCOL_F_CRYPTO_SESSION 7
            #define VHOST_USER_PROTOCOL_F_PAGEFAULT 8
            #define VHOST_USER_PROTOCOL_F_CONFIG 9
            #define VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD 10
            #define VHOST_USER_PROTOCOL_F_HOST_NOTIFIER 11
            #define VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD 12
            #define VHOST_USER_PROTOCOL_F_RESET_DEVICE 13
            #define VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS 14
            #define VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS 15
            #define VHOST_USER_PROTOCOL_F_STATUS 16
            #define VHOST_USER_GET_FEATURES 1
            #define VHOST_USER_SET_FEATURES 2
            #define VHOST_USER_SET_OWNER 3
            #define VHOST_USER_RESET_OWNER 4
            #define VHOST_USER_SET_MEM_TABLE 5
            #define VHOST_USER_SET_LOG_BASE 6
            #define VHOST_USER_SET_LOG_FD 7
            #define VHOST_USER_SET_VRING_NUM 8
            #define VHOST_USER_SET_VRING_ADDR 9
            #define VHOST_USER_SET_VRING_BASE 10
            #define VHOST_USER_GET_VRING_BASE 11
            #define VHOST_USER_SET_VRING_KICK 12
            #define VHOST_USER_SET_VRING_CALL 13
            #define VHOST_USER_SET_VRING_ERR 14
            #define VHOST_USER_GET_PROTOCOL_FEATURES 15
            #define VHOST_USER_SET_PROTOCOL_FEATURES 16
            #define VHOST_USER_GET_QUEUE_NUM 17
            #define VHOST_USER_SET_VRING_ENABLE 18
            #define VHOST_USER_SET_BACKEND_REQ_FD 21
            #define VHOST_USER_GET_CONFIG 24
            #define VHOST_USER_SET_CONFIG 25
            #define VHOST_USER_GET_INFLIGHT_FD 31
            #define VHOST_USER_SET_INFLIGHT_FD 32
            #define VHOST_USER_RESET_DEVICE 34
            #define VHOST_USER_GET_MAX_MEM_SLOTS 36
            #define VHOST_USER_ADD_MEM_REG 37
            #define VHOST_USER_REM_MEM_REG 38
            #define VHOST_USER_SET_STATUS 39
            #define VHOST_USER_GET_STATUS 40
            #define VHOST_USER_BACKEND_CONFIG_CHANGE_MSG 2
            #define VHOST_USER_CONFIG_SIZE_MAX 256
            struct vhost_user_header {
                __u32 request, flags, size;
            };
            struct vhost_user_mem_region {
                __u64 guest_phys_addr, memory_size, userspace_addr, mmap_offset;
            };
            struct vhost_user_mem_table {
                __u32 nregions, padding;
            };
            struct vhost_user_log {
                __u64 mmap_size, mmap_offset;
            };
            struct vhost_user_inflight {
                __u64 mmap_size, mmap_offset;
                __u16 num_queues, queue_size;
            };
            struct vhost_user_config {
                __u32 offset, size, flags;
            };
        """,
    ),
    "virtio_blk": Header(("linux/virtio_blk.h",)),
    "virtio_config": Header(
        ("linux/virtio_config.h",),
        newer={  # virtio 1.3, 6
            "VIRTIO_F_NOTIFICATION_DATA": 38,
            "VIRTIO_F_NOTIF_CONFIG_DATA": 39,
            "VIRTIO_F_ADMIN_VQ": 41,
        },
    ),
    "virtio_console": Header(("linux/virtio_console.h",)),
    "virtio_ids": Header(("linux/virtio_ids.h",)),
    "virtio_mmio": Header(("linux/virtio_mmio.h",), newer={"VIRTIO_MMIO_QUEUE_RESET": 0x0C0}),  # virtio 1.3, 4.2.2
    "virtio_net": Header(
        ("linux/virtio_net.h",),
        spelled={"virtio_net_ctrl_hdr.class_": "class"},
        newer={  # virtio 1.3, 5.1.3 and 5.1.6
            "VIRTIO_NET_F_GUEST_USO4": 54,
            "VIRTIO_NET_F_GUEST_USO6": 55,
            "VIRTIO_NET_F_HOST_USO": 56,
            "VIRTIO_NET_HDR_GSO_UDP_L4": 5,
        },
    ),
    "virtio_pci": Header(("linux/virtio_pci.h",)),
    "virtio_ring": Header(("linux/virtio_ring.h",)),
    "xen": Header(
        ("linux/types.h",),
        text="""
            /* xen/include/public/arch-x86/hvm/start_info.h, and elfnote.h */
            #define XEN_ELFNOTE_NAME "Xen"
            #define XEN_ELFNOTE_PHYS32_ENTRY 18
            #define XEN_HVM_START_MAGIC_VALUE 0x336ec578
            #define XEN_HVM_MEMMAP_TYPE_RAM 1
            struct hvm_start_info {
                __u32 magic, version, flags, nr_modules;
                __u64 modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr;
                __u32 memmap_entries, reserved;
            };
            struct hvm_modlist_entry {
                __u64 paddr, size, cmdline_paddr, reserved;
            };
            struct hvm_memmap_table_entry {
                __u64 addr, size;
                __u32 type, reserved;
            };
        """,
    ),
}
"""By module; one that declares nothing needs none."""


@dataclass(frozen=True)
class Question:
    """What *subject* is in C, an expression, and what the module makes of it."""

    subject: str
    expression: str
    here: int


def questions(declared: Declarations, header: Header, table: int) -> list[Question]:
    """Everything *declared* put as questions to C; *table* picks the system call numbers to ask for."""
    asked = []
    for name, number in declared.numbers.items():
        asked.append(Question(name, header.spelled.get(name, name), number))
    for name, numbers in declared.syscalls.items():
        asked.append(Question(name, f"__NR_{name.removeprefix('SYS_')}", numbers[table]))
    for name, digits in declared.texts.items():
        expression, text = header.spelled.get(name, name), bytes.fromhex(digits)
        asked.append(Question(f"length of {name}", f"sizeof({expression}) - 1", len(text)))
        for index, byte in enumerate(text):
            asked.append(Question(f"{name}[{index}]", f"(unsigned char)({expression})[{index}]", byte))
    for name in declared.layouts:
        asked += _layout_questions(name, declared, header)
    return asked


def _layout_questions(name: str, declared: Declarations, header: Header) -> list[Question]:
    layout = declared.layouts[name]
    kind, start, whole = header.spelled.get(name, f"struct {name}"), "0", None
    if name in header.nameless:
        kind, base = header.nameless[name]
        start, whole = f"__builtin_offsetof({kind}, {base})", f"((({kind} *)0)->{base})"
    size, asked = layout.size, []
    for field_name, place in layout.fields.items():
        full = f"{name}.{field_name}"
        member = header.spelled.get(full, field_name)
        there = f"((({kind} *)0)->{member})"
        asked.append(
            Question(f"offset of {full}", f"__builtin_offsetof({kind}, {member}) - {start}", place.offset)
        )
        if full in header.flexible:
            size -= place.size
            continue
        asked.append(Question(f"size of {full}", f"sizeof {there}", place.size))
        if place.signed is not None:
            negative = f"(__typeof__{there})-1 < (__typeof__{there})1"
            asked.append(Question(f"sign of {full}", negative, place.signed or full in header.unsigned_here))
    asked.append(Question(f"size of {name}", f"sizeof {whole or f'({kind})'}", size))
    return asked


def answers(header: Header, asked: list[Question], options: list[str], folder: Path) -> list[int]:
    """C's answers, in order, from gcc with these *options*.  Raises AssertionError with gcc's words."""
    lines = [f"#include <{include}>" for include in header.includes] + [header.text]
    for name, value in header.newer.items():
        lines += [f"#ifndef {name}", f"#define {name} {value}", "#endif"]
    lines.append('__attribute__((section(".answers"))) const unsigned long long answers[] = {')
    lines += [f"(unsigned long long)({question.expression})," for question in asked] + ["};", ""]
    source, object_file, numbers = folder / "ask.c", folder / "ask.o", folder / "answers"
    source.write_text("\n".join(lines))
    # What glibc's headers look for where only the other word size is installed; it would be nearly empty.
    (folder / "gnu").mkdir(exist_ok=True)
    (folder / "gnu/stubs-32.h").touch()
    built = subprocess.run(
        ["gcc", "-w", "-ffreestanding", *options, "-idirafter", str(folder), "-c", str(source), "-o",
         str(object_file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    subprocess.run(["objcopy", "-O", "binary", "-j", ".answers", object_file, numbers], check=True)
    return list(struct.unpack(f"<{len(asked)}Q", numbers.read_bytes()))
