"""The unit tests of `abi` under a 32-bit interpreter, where a word has half the bits."""

import interpreters

OWN_CHILDREN = ("test_declarations", "test_kvm", "test_tun")
"""Tests that run a 32-bit interpreter themselves."""


def test_the_unit_tests_of_abi_hold_under_a_32_bit_interpreter() -> None:
    ignored = [f"--ignore=tests/abi/{name}.py" for name in OWN_CHILDREN]
    told = interpreters.run_tests(interpreters.i386_or_skip(), "tests/abi", *ignored)
    assert " passed" in told
    assert " skipped" not in told
