"""membarrier(2), linux/membarrier.h: a full memory barrier by system call."""

from lguestlib.abi.libc import check, syscall

SYS_membarrier = (324, 375, 283)

MEMBARRIER_CMD_QUERY = 0
MEMBARRIER_CMD_PRIVATE_EXPEDITED = 1 << 3
MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED = 1 << 4


def membarrier(command: int) -> int:
    """Issue *command*: the supported ones as a mask for QUERY, else 0.

    PRIVATE_EXPEDITED orders every memory access of the caller before it against
    every one after it; the process must have registered once.  Raises OSError
    (ENOSYS, EINVAL, EPERM when not registered).
    """
    return check(syscall(SYS_membarrier, command, 0, 0), "membarrier", hex(command))
