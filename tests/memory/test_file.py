"""Image files, mapped."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lguestlib.memory.image.file import open_image
from lguestlib.memory.image.image import ImageError


def _descriptors() -> set[str]:
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


@contextmanager
def _nobody() -> Iterator[None]:
    """As a user whom permissions hold for."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_is_a_read_only_view_that_ends_with_the_block(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"content" * 1000)
    before = _descriptors()
    for name in (path, str(path)):
        with open_image(name) as data:
            assert data == b"content" * 1000
            assert data.readonly
            with pytest.raises(TypeError):
                data[0] = 1
        with pytest.raises(ValueError, match="released"):
            len(data)
    assert _descriptors() == before


def test_y4_a_slice_that_outlives_the_block_leaks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"content")
    before = _descriptors()
    with open_image(path) as data:
        kept = data[1:4]
    assert bytes(kept) == b"ont"
    del kept
    assert _descriptors() == before


def test_an_error_inside_the_block_is_the_one_seen(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"content")
    with pytest.raises(ZeroDivisionError), open_image(path) as data:
        kept = data[1:4]
        assert kept[0] // 0


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "No such file or directory"),
        ("below-a-file", "Not a directory"),
        ("empty", "is empty"),
        ("directory", "is a directory, not a file"),
        ("fifo", "is not a regular file"),
        ("device", "is not a regular file"),
        ("unreadable", "Permission denied"),
        ("unmappable", "cannot be mapped: "),
    ],
)
def test_what_cannot_be_an_image_is_refused_by_name(kind: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "below-a-file":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "image"
    elif kind in ("empty", "unreadable"):
        path.write_bytes(b"" if kind == "empty" else b"secret")
        path.chmod(0o600 if kind == "empty" else 0)
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/null")
    elif kind == "unmappable":
        path = Path("/sys/kernel/uevent_seqnum")
        if not path.exists():
            pytest.skip(f"no {path} (mount -t sysfs sysfs /sys)")
    before = _descriptors()
    with pytest.raises(ImageError) as caught:
        if kind == "unreadable":
            with _nobody(), open_image(path):
                pass
        else:
            with open_image(path):
                pass
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)
    assert _descriptors() == before
