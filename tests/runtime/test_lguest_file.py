"""/dev/lguest as a file, seen on other files: no host of today has the real one."""

import errno
import os
from pathlib import Path

import pytest

from lguestlib.runtime.lguest.file import DevLguest, LguestUnusable


def test_requests_are_written_and_answers_read_at_offset_0(tmp_path: Path) -> None:
    path = tmp_path / "lguest"
    path.write_bytes(b"\1\2\3\4\5")
    device = DevLguest(str(path))
    assert device.pread(4) == b"\1\2\3\4"
    assert device.pread(64) == b"\1\2\3\4\5", "only what there is"
    assert device.write(b"abc") == 3
    assert device.pread(4) == b"abc\4"
    device.close()


def test_closing_twice_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "lguest"
    path.touch()
    device = DevLguest(str(path))
    device.close()
    with pytest.raises(OSError) as failed:
        device.close()
    assert failed.value.errno == errno.EBADF


@pytest.mark.parametrize(
    ("machine", "remedy"),
    [
        ("i686", "modprobe lg, on a 32-bit x86 Linux 2.6.30 to 3.19"),
        ("x86_64", "this host's kernel is for x86_64"),
    ],
)
def test_where_it_is_absent_the_remedy_is_the_hosts(
    machine: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uname = os.uname_result((*os.uname()[:4], machine))
    monkeypatch.setattr(os, "uname", lambda: uname)
    path = tmp_path / "none"
    with pytest.raises(LguestUnusable) as failed:
        DevLguest(str(path))
    assert str(failed.value).startswith(f"{path}: No such file or directory ({remedy}")


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EACCES, "run as root"), (errno.EBUSY, "end whoever has it first")]
)
def test_another_reason_has_another_remedy(
    number: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(LguestUnusable) as failed:
        DevLguest()
    assert str(failed.value).startswith(f"/dev/lguest: {os.strerror(number)} ({remedy}")
