"""Randomness from the kernel: getrandom(2), or /dev/urandom where that is all there is (before Linux 3.17)."""

import os
from collections.abc import Sequence


class KernelRandom:
    """An entropy source that never runs dry."""

    def fill(self, buffers: Sequence[memoryview]) -> int:
        """Fill all of *buffers*; return their length in bytes."""
        filled = 0
        for buffer in buffers:
            # It comes as a copy, so work in pieces that are small whatever the guest asked for.
            for start in range(0, len(buffer), 4096):
                piece = buffer[start : start + 4096]
                piece[:] = os.urandom(len(piece))
            filled += len(buffer)
        return filled
