"""Names for people who look at threads."""

from contextlib import suppress

from lguestlib.abi.prctl import name_thread


def name_this_thread(name: str) -> None:
    """Name the calling thread as `name_thread` does, where that may be done: it works without a name, too."""
    with suppress(OSError):
        name_thread(name)
