"""What a host offers: found where it is, and with a remedy where it is not."""

import json
import os
import sys
from pathlib import Path

import interpreters
import pytest
import sessions

from lguestlib.runtime import probe as module
from lguestlib.runtime.vm import KvmUnusable

PROGRAM = (
    "import json; from lguestlib.runtime.probe import probe\n"
    "print(json.dumps({found.name: [found.usable, found.detail, found.remedy] for found in probe()}))"
)


def findings(*prefix: str) -> dict[str, list[object]]:
    """What `probe` finds in a process of its own: it forks."""
    found: dict[str, list[object]] = json.loads(
        interpreters.run([*prefix, sys.executable, "-X", "dev", "-W", "error"], "-c", PROGRAM)
    )
    return found


def test_programs_are_found_on_the_path(tmp_path: Path) -> None:
    programs = {"user-mode-linux": "linux", "qemu-storage-daemon": "qemu-storage-daemon"}
    missing = findings("env", f"PATH={tmp_path}")
    for name, program in programs.items():
        usable, detail, remedy = missing[name]
        assert (usable, detail) == (False, f"{program}: not found")
        assert str(remedy).startswith("apt-get install ")
        (tmp_path / program).touch(0o755)
    there = findings("env", f"PATH={tmp_path}")
    for name, program in programs.items():
        assert there[name] == [True, str(tmp_path / program), ""]


def test_nothing_on_the_host_is_changed() -> None:
    before = Path("/proc/net/dev").read_text().count(":"), os.listdir("/proc/self/task")
    findings()
    assert (Path("/proc/net/dev").read_text().count(":"), os.listdir("/proc/self/task")) == before


def test_a_private_network_that_is_refused_has_the_reason_and_a_remedy() -> None:
    sessions.user_namespaces_or_skip()
    script = 'echo 0 >/proc/sys/user/max_net_namespaces; exec "$@"'
    usable, detail, remedy = findings("unshare", "-U", "-r", "sh", "-ec", script, "sh")["private network"]
    assert usable is False and str(detail).startswith("unshare: ")
    assert "user.max_net_namespaces" in str(remedy)


def test_kvm_that_cannot_be_used_has_another_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise KvmUnusable("/dev/kvm: gone fishing")

    monkeypatch.setattr(module, "open_kvm", refuse)
    remedy = "run --hypervisor inprocess works without"
    assert module._kvm() == ("kvm", False, "/dev/kvm: gone fishing", remedy)


def test_lguest_is_found_by_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LGUEST_DEVICE", str(tmp_path / "lguest"))
    assert module._lguest().usable is False and module._lguest().remedy
    (tmp_path / "lguest").touch()
    assert module._lguest().usable is True and not module._lguest().remedy
