"""What tests need that use an io_uring."""

import pytest

from lguestlib.runtime.backend.uring import IO_URING_REMEDY, Uring


def uring_or_skip() -> None:
    """Skip the running test where this process may have no io_uring."""
    try:
        Uring(1).close()
    except OSError as error:
        pytest.skip(f"{error} ({IO_URING_REMEDY})")
