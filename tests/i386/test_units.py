"""The unit tests under a 32-bit interpreter, where a word has half the bits."""

import interpreters
import pytest

ELSEWHERE = (
    "abi/test_declarations", "abi/test_kvm", "abi/test_tun", "memory/test_boot", "memory/test_fence",
)  # fmt: skip
"""Tests that run a 32-bit interpreter themselves, or look at how 64-bit code or a 64-bit kernel does."""

LONG = (
    "virtio/test_decoding", "virtio/test_packed_decoding", "virtio/test_suppression", "virtio/test_inflight_packed",
    "virtio/test_vhost_user_backend", "virtio/test_conformance", "virtio/test_inflight", "virtio/test_tearing",
    "virtio/test_mmio", "virtio/test_pci_transport", "virtio/test_pci_function", "memory/test_compressed",
)  # fmt: skip
"""Tests that try everything, which has no other outcome for a word's bits."""

LGUEST = (
    "test_lguest_double.py", "test_lguest_guest.py", "test_lguest.py", "runtime/test_lguest_file.py",
    "runtime/test_lguest_machine.py", "runtime/test_lguest_launcher.py", "runtime/test_interrupt.py",
)  # fmt: skip


@pytest.mark.parametrize(
    "tests",
    [("abi",), ("memory",), ("virtio",), LGUEST],
    ids=["abi", "memory", "virtio", "lguest"],
)
def test_they_hold_under_a_32_bit_interpreter(tests: tuple[str, ...]) -> None:
    chosen = [f"tests/{name}" for name in tests]
    ignored = [f"--ignore=tests/{name}.py" for name in ELSEWHERE + LONG]
    told = interpreters.run_tests(interpreters.i386_or_skip(), *chosen, *ignored, "-k", "not random and not p6_s24")
    assert " passed" in told
    assert " skipped" not in told
