"""membarrier(2)."""

import errno
import sys

import interpreters
import pytest

from lguestlib.abi.membarrier import (
    MEMBARRIER_CMD_GLOBAL_EXPEDITED,
    MEMBARRIER_CMD_PRIVATE_EXPEDITED,
    MEMBARRIER_CMD_QUERY,
    MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED,
    membarrier,
)


def _needed(command: int) -> None:
    """Skip the running test where the kernel does not support *command*."""
    try:
        supported = membarrier(MEMBARRIER_CMD_QUERY)
    except OSError as error:
        pytest.skip(f"{error} (a kernel with CONFIG_MEMBARRIER has it)")
    if not supported & command:
        pytest.skip(f"no membarrier {command:#x} (Linux 4.16 and later have it)")


def test_a_registered_process_gets_its_barrier() -> None:
    _needed(MEMBARRIER_CMD_PRIVATE_EXPEDITED)
    assert membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) == 0
    assert membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED) == 0


def test_the_global_barrier_needs_no_registration() -> None:
    _needed(MEMBARRIER_CMD_GLOBAL_EXPEDITED)
    assert membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED) == 0


def test_a_process_that_has_not_registered_is_refused() -> None:
    _needed(MEMBARRIER_CMD_PRIVATE_EXPEDITED)
    program = """
from lguestlib.abi.membarrier import MEMBARRIER_CMD_PRIVATE_EXPEDITED, membarrier
try:
    membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED)
except PermissionError as error:
    print(error)
"""
    told = interpreters.run([sys.executable], "-c", program)
    assert told == f"[Errno {errno.EPERM}] membarrier: Operation not permitted: '0x8'\n"


def test_an_unknown_command_is_einval() -> None:
    _needed(MEMBARRIER_CMD_PRIVATE_EXPEDITED)
    with pytest.raises(OSError, match="membarrier") as caught:
        membarrier(1 << 30)
    assert caught.value.errno == errno.EINVAL
