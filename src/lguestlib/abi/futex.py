"""futex(2), linux/futex.h: FUTEX_WAKE_OP as an atomic OR on memory that other processes change too.

The interpreter has no atomic read-modify-write of shared memory.  The kernel does
one for FUTEX_WAKE_OP before it looks for sleepers to wake; here there are none.
"""

import ctypes

from lguestlib.abi.libc import check, fitting, syscall

SYS_futex = (202, 240, 98)

FUTEX_WAKE_OP = 5
FUTEX_PRIVATE_FLAG = 128
FUTEX_OP_OR = 2
FUTEX_OP_OPARG_SHIFT = 8
FUTEX_OP_CMP_EQ = 0

_ALL_ONES = 0xFFF  # FUTEX_OP's argument has 12 bits, and the highest is its sign.


def set_bit(address: int, bit: int) -> None:
    """Set *bit*, 0 to 31, of the 32-bit word at *address* of this process, atomically.

    Raises OSError (EFAULT where nothing is mapped, EINVAL for an address that no
    word has, ENOSYS), OverflowError, ValueError for another bit.
    """
    if not 0 <= bit < 32:
        raise ValueError(f"bit {bit} of a 32-bit word")
    _or(address, FUTEX_OP_OR | FUTEX_OP_OPARG_SHIFT, bit)


def set_all_bits(address: int) -> None:
    """Set every bit of the 32-bit word at *address*, atomically.  Raises as `set_bit`."""
    _or(address, FUTEX_OP_OR, _ALL_ONES)


def _or(address: int, operation: int, argument: int) -> None:
    # FUTEX_OP, which no interpreter has as a function: op, cmp, oparg and cmparg.
    encoded = operation << 28 | FUTEX_OP_CMP_EQ << 24 | argument << 12
    fitting(address, ctypes.c_size_t, "futex address")
    # Private is only how sleepers are looked up: the word is written all the same, and sooner.
    command = FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG
    check(syscall(SYS_futex, address, command, 0, 0, address, encoded), "futex", hex(address))
