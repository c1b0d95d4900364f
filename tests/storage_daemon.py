"""qemu-storage-daemon as a vhost-user-blk back-end: somebody else's, with NBD, iSCSI and Ceph behind it."""

import subprocess
import time
from pathlib import Path
from typing import Self

import sessions

PATIENCE = 20.0


class StorageDaemon:
    """Serves *image* on the socket *path*, with *export* as further words of the export's options.

    With *rate*, no more than so many requests a second.  Skips the running test
    where the program is not installed.
    """

    def __init__(self, image: Path, path: Path, export: str = "writable=on", rate: int = 0) -> None:
        sessions.programs_or_skip(**{"qemu-storage-daemon": "qemu-system-common"})
        path.unlink(missing_ok=True)
        node = ["--blockdev", f"driver=file,node-name=file,filename={image}"]
        if rate:
            node += ["--object", f"throttle-group,id=limit,x-iops-total={rate}"]
            node += ["--blockdev", "driver=throttle,throttle-group=limit,node-name=slow,file=file"]
        served = "slow" if rate else "file"
        self.process = subprocess.Popen([
            "qemu-storage-daemon", *node, "--export",
            f"type=vhost-user-blk,id=disk,node-name={served},addr.type=unix,addr.path={path},{export}",
        ])  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while not path.is_socket():
            assert self.process.poll() is None and time.monotonic() < deadline, "it does not serve"
            time.sleep(0.005)
        # From bind(2) to listen(2).
        time.sleep(0.02)

    def kill(self) -> None:
        """Kill it, as the kernel does when memory runs out."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.kill()
