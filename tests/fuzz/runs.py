"""What there is to try at random, and one way to run it: a seed is a case, and makes the same one again."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fuzz import images, lguest, packed_rings, pci, registers, requests, rings, transcripts

TARGETS: dict[str, Callable[[int], int]] = {
    "rings": rings.one,
    "packed": packed_rings.one,
    "registers": registers.one,
    "pci": pci.one,
    "lguest": lguest.one,
    "requests": requests.one,
    "transcripts": transcripts.one,
    "images": images.one,
}
"""By name: tries what a seed makes, tells how many things that were, and raises what is wrong."""

CASE_SECONDS = 30
"""More for one seed is a hang."""


class Hang(Exception):
    """A case that does not end."""


def replay(target: str, seed: int) -> str:
    """The command that makes a case again."""
    return f"cd tests && PYTHONPATH=../src:. python3 -m fuzz {target} --seed {seed} --count 1"


def run(target: str, seed: int) -> int:
    """One case.  Raises AssertionError with the command that makes it again."""
    try:
        with _deadline():
            return TARGETS[target](seed)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{replay(target, seed)}") from error


@contextmanager
def _deadline() -> Iterator[None]:
    def hang(number: int, frame: FrameType | None) -> None:
        raise Hang(f"no end after {CASE_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(CASE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
