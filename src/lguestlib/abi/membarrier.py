"""membarrier(2), linux/membarrier.h: a full memory barrier by system call."""

from lguestlib.abi.libc import check, syscall

SYS_membarrier = (324, 375, 283)

MEMBARRIER_CMD_QUERY = 0
MEMBARRIER_CMD_GLOBAL_EXPEDITED = 1 << 1
MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED = 1 << 2
MEMBARRIER_CMD_PRIVATE_EXPEDITED = 1 << 3
MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED = 1 << 4


def membarrier(command: int) -> int:
    """Issue *command*: the supported ones as a mask for QUERY, else 0.

    PRIVATE_EXPEDITED orders every memory access of the caller, and of its
    process's running threads, before it against every one after it; the process
    must have registered once.  GLOBAL_EXPEDITED does so for the caller and every
    process that has registered for it; the caller need not have.  Raises OSError
    (ENOSYS, EINVAL, EPERM when not registered).
    """
    return check(syscall(SYS_membarrier, command, 0, 0), "membarrier", hex(command))
