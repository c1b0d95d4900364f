"""unshare(2)."""

import errno
import sys

import interpreters
import pytest

from lguestlib.abi.sched import CLONE_NEWUSER, unshare


def test_flags_the_kernel_does_not_know_are_einval_and_named() -> None:
    with pytest.raises(OSError, match=r"unshare: Invalid argument: '0x1'$") as caught:
        unshare(1)
    assert caught.value.errno == errno.EINVAL


def test_a_process_with_threads_gets_no_user_namespace() -> None:
    program = f"""
import threading
from lguestlib.abi.sched import unshare
go = threading.Event()
thread = threading.Thread(target=go.wait)
thread.start()
try:
    unshare({CLONE_NEWUSER})
except OSError as error:
    print(error.errno, "unshare" in str(error))
go.set()
"""
    number, named = interpreters.run([sys.executable], "-c", program).split()
    # EINVAL, or one of the others on a host that allows no user namespaces at all
    assert int(number) in (errno.EINVAL, errno.EPERM, errno.ENOSPC)
    assert named == "True"


def test_unshare_that_is_not_allowed_is_eperm() -> None:
    program = """
import os
from lguestlib.abi.sched import CLONE_NEWNET, unshare
if os.geteuid() == 0:
    os.setuid(65534)
try:
    unshare(CLONE_NEWNET)
except PermissionError as error:
    print(error)
"""
    told = interpreters.run([sys.executable], "-c", program)
    assert told == f"[Errno {errno.EPERM}] unshare: Operation not permitted: '0x40000000'\n"
