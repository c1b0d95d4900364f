"""What sessions need."""

from pathlib import Path

import pytest
import sessions


@pytest.fixture(params=["inprocess", "kvm"])
def hypervisor(request: pytest.FixtureRequest) -> str:
    """Each hypervisor's name, where it can be used."""
    name = str(request.param)
    if name == "kvm":
        sessions.kvm_or_skip()
    return name


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty disk of 64 KiB."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(65536))
    return path
