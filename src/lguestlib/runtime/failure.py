"""What to tell people of an error that has stopped a device."""

from lguestlib.memory.mapping import MappingLost
from lguestlib.virtio.errors import VirtioError


def describe(error: Exception) -> str:
    """One line; the type too where the text alone would not tell."""
    return str(error) if isinstance(error, (VirtioError, OSError, MappingLost)) else f"{type(error).__name__}: {error}"


def without_frames(error: Exception) -> Exception:
    """*error* without the frames it came through: they keep views of guest memory alive (Y4)."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__context__
    return error
