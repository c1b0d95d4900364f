"""The x86 boot protocol, asm/bootparam.h (Documentation/arch/x86/boot.rst, zero-page.rst)."""

import ctypes
from typing import Annotated

from lguestlib.abi.layout import PackedStructure, Structure, u8, u16, u32, u64

BOOT_FLAG = 0xAA55
"""setup_header.boot_flag of every kernel image."""
HEADER_MAGIC = int.from_bytes(b"HdrS", "little")
"""setup_header.header of a kernel that speaks the protocol."""
TYPE_OF_LOADER_UNDEFINED = 0xFF
"""setup_header.type_of_loader of a boot loader without a number of its own."""

LOADED_HIGH = 1 << 0
QUIET_FLAG = 1 << 5
KEEP_SEGMENTS = 1 << 6
CAN_USE_HEAP = 1 << 7

XLF_KERNEL_64 = 1 << 0
XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1

X86_SUBARCH_PC = 0
X86_SUBARCH_LGUEST = 1

E820_MAX_ENTRIES_ZEROPAGE = 128
E820_TYPE_RAM = 1
E820_TYPE_RESERVED = 2
E820_TYPE_ACPI = 3
E820_TYPE_NVS = 4

SETUP_NONE = 0
SETUP_E820_EXT = 1
SETUP_DTB = 2
SETUP_RNG_SEED = 9


class setup_header(PackedStructure):
    """asm/bootparam.h: in a kernel image and in boot_params at 0x1f1; the boot loader fills part of it in."""

    setup_sects: u8
    root_flags: u16
    syssize: u32
    ram_size: u16
    vid_mode: u16
    root_dev: u16
    boot_flag: u16
    jump: u16
    header: u32
    version: u16
    realmode_swtch: u32
    start_sys_seg: u16
    kernel_version: u16
    type_of_loader: u8
    loadflags: u8
    setup_move_size: u16
    code32_start: u32
    ramdisk_image: u32
    ramdisk_size: u32
    bootsect_kludge: u32
    heap_end_ptr: u16
    ext_loader_ver: u8
    ext_loader_type: u8
    cmd_line_ptr: u32
    initrd_addr_max: u32
    kernel_alignment: u32
    relocatable_kernel: u8
    min_alignment: u8
    xloadflags: u16
    cmdline_size: u32
    hardware_subarch: u32
    hardware_subarch_data: u64
    payload_offset: u32
    payload_length: u32
    setup_data: u64
    pref_address: u64
    init_size: u32
    handover_offset: u32
    kernel_info_offset: u32


class setup_data(Structure):
    """asm/bootparam.h: the head of a node in the list from setup_header.setup_data; *len* bytes follow.

    *next* is guest-physical, 0 at the list's end.
    """

    next: u64
    type: u32
    len: u32


class boot_e820_entry(PackedStructure):
    """asm/bootparam.h: a range of guest-physical addresses in bytes and its E820_TYPE."""

    addr: u64
    size: u64
    type: u32


class boot_params(PackedStructure):
    """asm/bootparam.h: the zero page, written by the boot loader; what the BIOS would tell is bytes here."""

    screen_info: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 64]
    apm_bios_info: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 20]
    _pad2: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 4]
    tboot_addr: u64
    ist_info: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 16]
    acpi_rsdp_addr: u64
    _pad3: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 8]
    hd0_info: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 16]
    hd1_info: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 16]
    sys_desc_table: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 16]
    olpc_ofw_header: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 16]
    ext_ramdisk_image: u32
    ext_ramdisk_size: u32
    ext_cmd_line_ptr: u32
    _pad4: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 112]
    cc_blob_address: u32
    edid_info: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 128]
    efi_info: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 32]
    alt_mem_k: u32
    scratch: u32
    e820_entries: u8
    eddbuf_entries: u8
    edd_mbr_sig_buf_entries: u8
    kbd_status: u8
    secure_boot: u8
    _pad5: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 2]
    sentinel: u8
    _pad6: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 1]
    hdr: setup_header
    _pad7: Annotated[
        ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * (0x290 - 0x1F1 - ctypes.sizeof(setup_header))
    ]
    edd_mbr_sig_buffer: Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 16]
    e820_table: Annotated[ctypes.Array[boot_e820_entry], boot_e820_entry * E820_MAX_ENTRIES_ZEROPAGE]
    _pad8: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 48]
    eddbuf: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 492]
    _pad9: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 276]
