"""A real kernel, entered with nothing but what this layer has put into memory, in QEMU without a BIOS."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import GuestMemory
from lguestlib.memory.image.file import open_image
from lguestlib.memory.image.linux_boot import LinuxBoot, ram_map
from lguestlib.memory.image.parse import parse
from lguestlib.memory.region import Region
from memory.images import real_kernel

MIB = 128

# In place of a BIOS: from the reset vector to protected mode, and to the kernel as boot.rst says.
ROM = """
        .code16
start:  cli
        lgdtl %cs:table
        mov $1, %eax
        mov %eax, %cr0
        ljmpl $0x10, $(0xffff0000 + protected)
        .code32
protected:
        mov $0x18, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        mov ${parameters:#x}, %esi
        xor %ebx, %ebx
        xor %ebp, %ebp
        xor %edi, %edi
        mov ${entry:#x}, %eax
        jmp *%eax
gdt:    .quad 0, 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
table:  .word 31
        .long 0xffff0000 + gdt
        .org 0xfff0
        .code16
        jmp start
        .org 0x10000
"""

# Asks the kernel for its command line and ends the machine.
INIT = """
#include <fcntl.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <termios.h>
#include <unistd.h>
int main(void)
{
    char line[256] = "";
    mknod("/console", S_IFCHR | 0600, makedev(5, 1));
    mkdir("/proc", 0700);
    mount("proc", "/proc", "proc", 0, "");
    int console = open("/console", O_WRONLY);
    read(open("/proc/cmdline", O_RDONLY), line, sizeof line - 1);
    dprintf(console, "init: %s", line);
    tcdrain(console);
    reboot(RB_AUTOBOOT);
}
"""


def _run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _archive(content: bytes) -> bytes:
    """An initramfs with *content* as /init (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    archive = b""
    for name, data, mode in ((b"init\0", content, 0o100755), (b"TRAILER!!!\0", b"", 0)):
        numbers = (1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        archive += b"070701" + b"".join(b"%08x" % number for number in numbers) + name
        archive += bytes(-len(archive) % 4)
        archive += data
        archive += bytes(-len(archive) % 4)
    return archive


def test_debians_kernel_boots_to_its_initrd(tmp_path: Path) -> None:
    kernel, qemu = real_kernel(), shutil.which("qemu-system-x86_64")
    if not qemu or not shutil.which("gcc"):
        pytest.skip("no qemu-system-x86_64 or no gcc (apt-get install qemu-system-x86 gcc libc6-dev)")
    (tmp_path / "init.c").write_text(INIT)
    _run("gcc", "-O1", "-w", "-static", "-o", tmp_path / "init", tmp_path / "init.c")
    region = Region.memfd(GuestAddress(0), MIB << 20)
    with GuestMemory([region]) as memory:
        with open_image(kernel) as data:
            image = parse(data)
            image.place(memory)
            told = LinuxBoot(
                image,
                ram_map(memory),
                b"console=ttyS0 panic=-1 greeting=hello",
                _archive((tmp_path / "init").read_bytes()),
            ).place(memory)
        (tmp_path / "rom.s").write_text(ROM.format(parameters=told.address, entry=image.entry))
        _run("as", "--32", "-o", tmp_path / "rom.o", tmp_path / "rom.s")
        _run(
            "ld", "-m", "elf_i386", "-Ttext=0", "--oformat=binary", "-o", tmp_path / "rom", tmp_path / "rom.o"
        )
        backend = f"size={MIB}M,mem-path=/proc/self/fd/{region.fd},share=on"
        process = subprocess.run(
            [
                qemu, "-accel", "tcg", "-cpu", "max", "-nodefaults", "-nographic", "-no-reboot",
                "-machine", "pc,memory-backend=guest", "-m", str(MIB), "-serial", "stdio",
                "-object", f"memory-backend-file,id=guest,{backend}", "-bios", str(tmp_path / "rom"),
            ],
            pass_fds=[region.fd], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert "init: console=ttyS0 panic=-1 greeting=hello" in lines, "\n".join(lines[-30:])
    assert told.initrd is not None
    tail = (told.initrd.end + 4095) // 4096 * 4096 - 1
    assert any(f"RAMDISK: [mem {told.initrd.start:#010x}-{tail:#010x}]" in line for line in lines)
    entries = [line.partition("BIOS-e820: ")[2] for line in lines if "BIOS-e820: " in line]
    assert entries == [
        "[mem 0x0000000000000000-0x000000000009ffff] usable",
        f"[mem 0x0000000000100000-{(MIB << 20) - 1:#018x}] usable",
    ]
