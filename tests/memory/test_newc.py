"""Archives in the newc format, as cpio(1) and the format's definition have them."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from lguestlib.memory.image.newc import NewcArchive


def cpio(archive: bytes, *words: str, directory: Path) -> str:
    """What cpio(1) says to *archive*, run in *directory*; it has to be content with it."""
    if not shutil.which("cpio"):
        pytest.skip("cpio is not installed: apt-get install cpio")
    command = ["cpio", "--quiet", *words]
    done = subprocess.run(command, input=archive, cwd=directory, capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.decode()


def everything() -> NewcArchive:
    archive = NewcArchive()
    archive.file("init", b"#!/bin/sh\n", 0o755)
    archive.directory("tmp", 0o1777)
    archive.file("a/b/empty", b"")
    archive.file("a/b/large", bytes(range(256)) * 300 + b"odd", 0o600)
    archive.symlink("bin/sh", "busybox")
    archive.character_device("dev/console", 5, 1)
    archive.block_device("dev/vda", 254, 256, 0o660)
    return archive


# An entry: magic, 13 fields of 8 hexadecimal digits, the name with its NUL and as many more as
# make the sum a multiple of 4, then the data, filled up likewise.
SMALL = (
    b"070701" b"00000001" b"000041ed" b"00000000" b"00000000" b"00000002" b"00000000" b"00000000"
    b"00000000" b"00000000" b"00000000" b"00000000" b"00000002" b"00000000" b"d\0"
    b"070701" b"00000002" b"000081a4" b"00000000" b"00000000" b"00000001" b"00000000" b"00000005"
    b"00000000" b"00000000" b"00000000" b"00000000" b"00000004" b"00000000" b"d/f\0\0\0" b"hello\0\0\0"
    b"070701" b"00000003" b"00002180" b"00000000" b"00000000" b"00000001" b"00000000" b"00000000"
    b"00000000" b"00000000" b"00000005" b"00000001" b"00000002" b"00000000" b"c\0"
    b"070701" b"00000000" b"00000000" b"00000000" b"00000000" b"00000001" b"00000000" b"00000000"
    b"00000000" b"00000000" b"00000000" b"00000000" b"0000000b" b"00000000" b"TRAILER!!!\0\0\0\0"
)  # fmt: skip


def test_a_small_one_is_these_bytes() -> None:
    archive = NewcArchive()
    archive.file("d/f", b"hello")
    archive.character_device("c", 5, 1)
    assert archive.pack() == SMALL


def test_cpio_lists_what_was_added_in_order_with_parents_before_children(tmp_path: Path) -> None:
    names = cpio(everything().pack(), "-t", directory=tmp_path).split()
    assert names == [
        "init", "tmp", "a", "a/b", "a/b/empty", "a/b/large", "bin", "bin/sh", "dev", "dev/console", "dev/vda",
    ]  # fmt: skip


def test_cpio_lists_kinds_modes_owners_sizes_devices_and_the_time(tmp_path: Path) -> None:
    lines = cpio(everything().pack(), "-tvn", directory=tmp_path).splitlines()
    shown = {line.split()[-1]: line for line in lines}
    assert shown["init"].split()[:5] == ["-rwxr-xr-x", "1", "0", "0", "10"]
    assert shown["tmp"].split()[:2] == ["drwxrwxrwt", "2"]
    assert shown["a/b/large"].split()[4] == "76803"
    assert shown["busybox"].startswith("lrwxrwxrwx")
    assert shown["dev/console"].startswith("crw-------") and " 5,   1 " in shown["dev/console"]
    assert shown["dev/vda"].startswith("brw-rw----") and " 254, 256 " in shown["dev/vda"]
    assert all("1970" in line for line in lines)


def test_cpio_unpacks_every_byte(tmp_path: Path) -> None:
    # Devices are for root to make.
    cpio(everything().pack(), "-i", "--no-preserve-owner", "-f", "dev/*", directory=tmp_path)
    assert (tmp_path / "a/b/empty").read_bytes() == b""
    assert (tmp_path / "a/b/large").read_bytes() == bytes(range(256)) * 300 + b"odd"
    assert stat.S_IMODE((tmp_path / "a/b/large").stat().st_mode) == 0o600
    assert os.readlink(tmp_path / "bin/sh") == "busybox"
    assert os.access(tmp_path / "init", os.X_OK)


@pytest.mark.parametrize("length", range(9))
def test_what_follows_a_name_or_a_content_of_any_length_is_aligned(length: int, tmp_path: Path) -> None:
    archive = NewcArchive()
    for number in range(3):
        archive.file("n" * (length + 1) + str(number), bytes(length))
    archive.file("last", b"end")
    packed = archive.pack()
    assert len(packed) % 4 == 0
    cpio(packed, "-i", directory=tmp_path)
    assert (tmp_path / "last").read_bytes() == b"end" and len(list(tmp_path.iterdir())) == 4


def test_the_same_content_gives_the_same_bytes_and_more_can_follow() -> None:
    archive = everything()
    before = archive.pack()
    assert archive.pack() == everything().pack() == before
    archive.file("more", b"")
    assert archive.pack()[: len(before) - 124] == before[:-124]


@pytest.mark.parametrize(
    "path", ["", "/bin", "bin/", "a//b", ".", "..", "a/../b", "./a", "TRAILER!!!", "a\0b", "n" * 4096]
)
def test_a_path_that_is_none_inside_the_archive_is_refused(path: str) -> None:
    with pytest.raises(ValueError):
        NewcArchive().file(path, b"")


def test_what_is_there_already_is_refused_and_so_is_a_file_as_a_parent() -> None:
    archive = everything()
    before = archive.pack()
    for path in ("init", "a", "a/b"):
        with pytest.raises(ValueError, match="already"):
            archive.directory(path)
    for path in ("init/x", "bin/sh/x/y", "dev/console/x"):
        with pytest.raises(ValueError, match="is no directory"):
            archive.file(path, b"")
    with pytest.raises(ValueError, match="32 bits"):
        archive.block_device("dev/vdb", 1 << 32, 0)
    with pytest.raises(ValueError, match="target"):
        archive.symlink("link", "")
    assert archive.pack() == before


def test_bytes_that_are_no_text_can_be_names() -> None:
    archive = NewcArchive()
    archive.file(os.fsdecode(b"\xff\xfe"), b"")
    assert b"\xff\xfe\0" in archive.pack()
