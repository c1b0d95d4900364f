"""PVH, the boot protocol of Xen's that KVM guests know too (xen/arch-x86/hvm/start_info.h, xen/elfnote.h)."""

from lguestlib.abi.layout import Structure, u32, u64

XEN_ELFNOTE_NAME = b"Xen"
XEN_ELFNOTE_PHYS32_ENTRY = 18
"""The note of a kernel that can be entered so; it holds the address of the entry."""

XEN_HVM_START_MAGIC_VALUE = 0x336EC578

XEN_HVM_MEMMAP_TYPE_RAM = 1
"""And on from there as E820 types."""


class hvm_start_info(Structure):
    """start_info.h: what EBX points to at the entry; written by the launcher."""

    magic: u32
    version: u32
    flags: u32
    nr_modules: u32
    modlist_paddr: u64
    cmdline_paddr: u64
    rsdp_paddr: u64
    memmap_paddr: u64
    memmap_entries: u32
    reserved: u32


class hvm_modlist_entry(Structure):
    """start_info.h: a module; the first is the initial ramdisk."""

    paddr: u64
    size: u64
    cmdline_paddr: u64
    reserved: u64


class hvm_memmap_table_entry(Structure):
    """start_info.h: a range of guest-physical addresses in bytes and its type."""

    addr: u64
    size: u64
    type: u32
    reserved: u32
