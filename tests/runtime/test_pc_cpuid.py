"""CPUID for guests: what they are told of themselves, and what of the host they are not."""

import pytest

from lguestlib.runtime.pc.cpuid import Leaf, guest_cpuid

# As an Intel host with VMX would have them, every bit set where that matters.
ALL = 0xFFFF_FFFF
HOST = [
    Leaf(0x0, eax=0x1F, ebx=0x756E6547, ecx=0x6C65746E, edx=0x49656E69),
    Leaf(0x1, eax=0x000906EA, ebx=0x07100800, ecx=ALL & ~(1 << 31), edx=ALL),
    Leaf(0x2, eax=0x76036301),
    Leaf(0x3, ecx=0x12345678, edx=0x9ABCDEF0),
    Leaf(0x4, 0, 0x1C004121, 0x01C0003F, 0x3F, 0, True),
    Leaf(0x4, 2, 0x1C004143, 0x00C0003F, 0x3FF, 0, True),
    Leaf(0x4, 3, 0x1C03C163, 0x02C0003F, 0x2FFF, 6, True),
    Leaf(0x4, 4, 0, 0, 0, 0, True),
    Leaf(0x6, eax=0x77, ebx=2, ecx=9),
    Leaf(0x7, 0, 0, 0x029C67AF, 0, 0, True),
    Leaf(0xA, eax=0x07300404, edx=0x603),
    Leaf(0xB, 0, 1, 2, 0x100, 7, True),
    Leaf(0xD, 0, 7, 0x340, 0x340, 0, True),
    Leaf(0x15, eax=2, ebx=0xFA),
    Leaf(0x16, eax=3000, ebx=4000, ecx=100),
    Leaf(0x4000_0000, eax=0x4000_0001, ebx=0x4B4D564B, ecx=0x564B4D56, edx=0x4D),
    Leaf(0x4000_0001, eax=0x01007AFB),
    Leaf(0x8000_0000, eax=0x8000_0021),
    Leaf(0x8000_0001, ecx=0x121 | 1 << 2 | 1 << 23, edx=0x2C100800),
    Leaf(0x8000_0002, eax=0x65746E49),
    Leaf(0x8000_0003, eax=0x65746E49),
    Leaf(0x8000_0004, eax=0x65746E49),
    Leaf(0x8000_0008, eax=0x3027, ecx=0x700F),
    Leaf(0x8000_000A, eax=1, ebx=8),
    Leaf(0x8000_001D, 3, 0x0001C163, 0x03C0003F, 0x3FFF, 1, True),
    Leaf(0x8000_001E, 0, 7, 0x103, 0x100, 0, True),
]


def told(cpu: int = 0, cpus: int = 1, deadline: bool = True) -> dict[tuple[int, int], Leaf]:
    leaves = guest_cpuid(HOST, cpu, cpus, deadline)
    found = {(leaf.function, leaf.index): leaf for leaf in leaves}
    assert len(found) == len(leaves), "each once"
    return found


def test_leaves_that_say_something_of_the_host_alone_are_not_told() -> None:
    functions = {function for function, _ in told()}
    assert not functions & {0x2, 0x3, 0xA, 0x15, 0x16, 0x8000_000A}
    assert functions == {leaf.function for leaf in HOST} - {0x2, 0x3, 0xA, 0x15, 0x16, 0x8000_000A}
    assert told()[0x0, 0].eax == 0xD


def test_the_processors_make_and_what_kvm_offers_stay_as_they_are() -> None:
    for key in ((0x7, 0), (0xD, 0), (0x4000_0000, 0), (0x4000_0001, 0), (0x8000_0000, 0)):
        assert told()[key] in HOST
    assert told()[0x1, 0].eax == 0x000906EA
    assert told()[0x0, 0].ebx == 0x756E6547


@pytest.mark.parametrize(("deadline", "bit"), [(True, 1 << 24), (False, 0)])
def test_the_feature_bits_are_a_guests(deadline: bool, bit: int) -> None:
    ecx = told(deadline=deadline)[0x1, 0].ecx
    assert ecx & 1 << 31, "under a hypervisor"
    assert ecx & 1 << 24 == bit
    for absent in (2, 3, 5, 7, 8, 15):
        assert not ecx & 1 << absent, absent
    for present in (0, 9, 13, 19, 20, 21, 26, 28, 30):
        assert ecx & 1 << present, present


def test_nested_virtualisation_is_not_offered() -> None:
    assert told()[0x8000_0001, 0].ecx == 0x121


def test_the_name_of_the_processor_is_a_virtual_ones() -> None:
    words = b""
    for function in (0x8000_0002, 0x8000_0003, 0x8000_0004):
        leaf = told()[function, 0]
        words += b"".join(word.to_bytes(4, "little") for word in (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx))
    assert words.rstrip(b"\0") == b"KVM virtual processor" and len(words) == 48


def test_the_only_word_on_power_is_that_the_timer_never_stops() -> None:
    leaf = told()[0x6, 0]
    assert (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) == (4, 0, 0, 0)


def test_one_processor_is_alone() -> None:
    one = told()
    assert (one[0x1, 0].ebx, one[0x1, 0].edx & 1 << 28) == (0x0001_0800, 0)
    assert (one[0xB, 0].ebx, one[0xB, 1].eax, one[0xB, 1].ebx) == (1, 0, 1)
    assert one[0x8000_0008, 0].ecx == 0
    assert one[0x4, 3].eax == 0x0000_0163


@pytest.mark.parametrize(("cpus", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3)])
def test_each_processor_is_a_core_of_one_package(cpus: int, bits: int) -> None:
    for cpu in range(cpus):
        leaves = told(cpu, cpus)
        assert leaves[0x1, 0].ebx == cpu << 24 | 1 << bits << 16 | 0x0800
        assert leaves[0x1, 0].edx & 1 << 28
        threads, cores, end = (leaves[0xB, index] for index in range(3))
        assert (threads.eax, threads.ebx, threads.ecx, threads.edx) == (0, 1, 0x100, cpu)
        assert (cores.eax, cores.ebx, cores.ecx, cores.edx) == (bits, cpus, 0x201, cpu)
        assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
        assert all(leaf.indexed for leaf in (threads, cores, end))
        last = (1 << bits) - 1
        assert leaves[0x4, 0].eax == 0x0121 | last << 26, "a core's own"
        assert leaves[0x4, 3].eax == 0x0163 | last << 14 | last << 26, "shared by all"
        assert leaves[0x4, 4].eax == 0, "the end of the list"
        assert leaves[0x8000_001D, 3].eax == 0x0163 | last << 14
        assert leaves[0x8000_0008, 0].ecx == cpus - 1 | bits << 12
        assert (leaves[0x8000_001E, 0].eax, leaves[0x8000_001E, 0].ebx) == (cpu, cpu)
