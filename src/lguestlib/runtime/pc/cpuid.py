"""What the CPUID instruction tells a guest: what KVM can give, less what is the host's own business.

Intel SDM, volume 2A, CPUID; AMD APM, volume 3, appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

_HYPERVISOR = 1 << 31
_TSC_DEADLINE = 1 << 24
_HTT = 1 << 28
_ARAT = 1 << 2

_NOT_FOR_GUESTS = 1 << 2 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 15
"""Leaf 1, ECX: debug stores, MONITOR, VMX, SpeedStep, thermal monitor, performance capabilities."""

_AMD_NOT_FOR_GUESTS = 1 << 2 | 1 << 10 | 1 << 12 | 1 << 23 | 1 << 24 | 1 << 28
"""Leaf 0x80000001, ECX: SVM, IBS, SKINIT, performance counters."""

BRAND = b"KVM virtual processor"
"""In place of the name of the host's processor."""

_KEPT = frozenset({
    0x0, 0x1, 0x4, 0x6, 0x7, 0xB, 0xD, 0x4000_0000, 0x4000_0001, 0x8000_0000, 0x8000_0001, 0x8000_0002,
    0x8000_0003, 0x8000_0004, 0x8000_0005, 0x8000_0006, 0x8000_0007, 0x8000_0008, 0x8000_001D, 0x8000_001E,
    0x8000_0021,
})  # fmt: skip
"""The leaves a guest gets.  Not: serial number, performance counters, frequencies, tracing, nested virtualisation."""

_BASIC_MAX = 0xD


@dataclass(frozen=True)
class Leaf:
    """What CPUID returns for *function* and, if *indexed*, *index*."""

    function: int
    index: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0
    indexed: bool = False


def guest_cpuid(supported: Iterable[Leaf], cpu: int, cpus: int, deadline_timer: bool) -> list[Leaf]:
    """The leaves for processor *cpu* of *cpus*, each of them a core of one package.

    *deadline_timer*: KVM emulates the local APIC's TSC deadline.
    """
    told = []
    for leaf in supported:
        if leaf.function not in _KEPT:
            continue
        match leaf.function:
            case 0x0:
                leaf = replace(leaf, eax=min(leaf.eax, _BASIC_MAX))
            case 0x1:
                leaf = _features(leaf, cpu, cpus, deadline_timer)
            case 0x4 | 0x8000_001D:
                leaf = _cache(leaf, cpus)
            case 0x6:
                leaf = Leaf(0x6, eax=_ARAT)
            case 0xB:
                continue
            case 0x8000_0001:
                leaf = replace(leaf, ecx=leaf.ecx & ~_AMD_NOT_FOR_GUESTS)
            case 0x8000_0002 | 0x8000_0003 | 0x8000_0004:
                leaf = _brand(leaf)
            case 0x8000_0008:
                leaf = replace(leaf, ecx=cpus - 1 | _bits(cpus) << 12)
            case 0x8000_001E:
                leaf = replace(leaf, eax=cpu, ebx=cpu, ecx=0)
        told.append(leaf)
    return told + _topology(cpu, cpus)


def _bits(cpus: int) -> int:
    """The bits of a local APIC's ID that tell a package's processors apart."""
    return (cpus - 1).bit_length()


def _features(leaf: Leaf, cpu: int, cpus: int, deadline_timer: bool) -> Leaf:
    ecx = leaf.ecx & ~_NOT_FOR_GUESTS & ~_TSC_DEADLINE | _HYPERVISOR
    return replace(
        leaf,
        ebx=leaf.ebx & 0xFF00 | (1 << _bits(cpus)) % 256 << 16 | cpu << 24,
        ecx=ecx | _TSC_DEADLINE if deadline_timer else ecx,
        edx=leaf.edx | _HTT if cpus > 1 else leaf.edx & ~_HTT,
    )


def _cache(leaf: Leaf, cpus: int) -> Leaf:
    """A core's first two levels are its own, the third the package's."""
    kind, level = leaf.eax & 0x1F, leaf.eax >> 5 & 7
    if not kind:
        return leaf
    sharing = (1 << _bits(cpus)) - 1
    shared = (sharing if level > 2 else 0) << 14
    cores = sharing << 26 if leaf.function == 0x4 else 0
    return replace(leaf, eax=leaf.eax & 0x3FFF | shared | cores & 0xFC00_0000)


def _brand(leaf: Leaf) -> Leaf:
    start = 16 * (leaf.function - 0x8000_0002)
    part = BRAND[start : start + 16].ljust(16, b"\0")
    eax, ebx, ecx, edx = struct.unpack("<4I", part)
    return Leaf(leaf.function, 0, eax, ebx, ecx, edx)


def _topology(cpu: int, cpus: int) -> list[Leaf]:
    """One thread a core, and the cores of the package (leaf 0xB)."""
    threads, cores, nothing = 1 << 8, 2 << 8, 0
    return [
        Leaf(0xB, 0, 0, 1, threads | 0, cpu, True),
        Leaf(0xB, 1, _bits(cpus), cpus, cores | 1, cpu, True),
        Leaf(0xB, 2, 0, 0, nothing | 2, cpu, True),
    ]
