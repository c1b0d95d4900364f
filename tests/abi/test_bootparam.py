"""The zero page, byte for byte where the boot protocol's documentation puts it."""

import ctypes

from lguestlib.abi import bootparam
from lguestlib.abi.bootparam import boot_e820_entry, boot_params, setup_header
from lguestlib.abi.layout import offset_of

# Documentation/arch/x86/boot.rst, from the start of the image and of the zero page
HEADER_AT = 0x1F1
FIELDS = {
    "setup_sects": 0x1F1, "syssize": 0x1F4, "boot_flag": 0x1FE, "header": 0x202, "version": 0x206,
    "type_of_loader": 0x210, "loadflags": 0x211, "code32_start": 0x214, "ramdisk_image": 0x218,
    "ramdisk_size": 0x21C, "heap_end_ptr": 0x224, "cmd_line_ptr": 0x228, "initrd_addr_max": 0x22C,
    "kernel_alignment": 0x230, "relocatable_kernel": 0x234, "xloadflags": 0x236, "cmdline_size": 0x238,
    "hardware_subarch": 0x23C, "payload_offset": 0x248, "payload_length": 0x24C, "setup_data": 0x250,
    "pref_address": 0x258, "init_size": 0x260, "handover_offset": 0x264, "kernel_info_offset": 0x268,
}  # fmt: skip


def test_the_header_is_where_the_documentation_puts_it() -> None:
    assert {name: HEADER_AT + offset_of(setup_header, name) for name in FIELDS} == FIELDS
    assert offset_of(boot_params, "hdr") == HEADER_AT


def test_the_zero_page_is_a_page_with_the_memory_map_in_its_place() -> None:
    assert ctypes.sizeof(boot_params) == 4096
    assert (offset_of(boot_params, "e820_entries"), offset_of(boot_params, "e820_table")) == (0x1E8, 0x2D0)
    assert ctypes.sizeof(boot_e820_entry) == 20


def test_a_memory_map_is_written_as_lguests_launcher_wrote_it() -> None:
    page = boot_params(e820_entries=1)
    page.e820_table[0] = boot_e820_entry(addr=0, size=64 << 20, type=bootparam.E820_TYPE_RAM)
    page.hdr.version, page.hdr.hardware_subarch = 0x207, bootparam.X86_SUBARCH_LGUEST
    page.hdr.loadflags |= bootparam.KEEP_SEGMENTS
    image = bytes(page)
    assert image[0x1E8] == 1
    assert image[0x2D0:0x2E4] == bytes(8) + (64 << 20).to_bytes(8, "little") + bytes([1, 0, 0, 0])
    assert image[0x206:0x208] == bytes([0x07, 0x02])
    assert (image[0x211], image[0x23C]) == (0x40, 1)


def test_the_magic_numbers_are_what_an_image_has() -> None:
    assert bootparam.HEADER_MAGIC.to_bytes(4, "little") == b"HdrS"
    assert bootparam.BOOT_FLAG.to_bytes(2, "little") == b"\x55\xaa"
