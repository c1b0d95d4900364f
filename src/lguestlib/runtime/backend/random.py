"""Randomness from the kernel, getrandom(2)."""

import os
from collections.abc import Sequence


class KernelRandom:
    """An entropy source that never runs dry."""

    def fill(self, buffers: Sequence[memoryview]) -> int:
        """Fill all of *buffers*; return their length in bytes."""
        filled = 0
        for buffer in buffers:
            # getrandom gives a copy, so work in pieces that are small whatever the guest asked for.
            for start in range(0, len(buffer), 4096):
                piece = buffer[start : start + 4096]
                piece[:] = os.getrandom(len(piece))
            filled += len(buffer)
        return filled
