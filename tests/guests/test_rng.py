"""Randomness served to a real kernel: Debian's in QEMU, since User-mode Linux has no driver for it."""

from pathlib import Path

from guests.serving import MIB, Held, bind_anew, compressible, holds_again, serving, sparse
from linux import Qemu, SocketDevice

ROUNDS = 100
MORE = 1 << 16


def test_what_a_guest_draws_is_random_and_goes_on_after_its_driver_was_bound_anew(tmp_path: Path) -> None:
    """1 MiB from /dev/hwrng before and some more after; it comes to the host on a disk."""
    image = sparse(tmp_path / "disk.img", MIB + MORE)
    disk, rng = tmp_path / "disk.sock", tmp_path / "rng.sock"
    words = ["rng", "--socket-path", str(rng), "blk", "--socket-path", str(disk), "--blk-file", str(image)]
    draw = "dd if=/dev/hwrng of=/dev/vda bs=4k iflag=fullblock conv=fsync"
    with serving(*words, sockets=2) as back_end:
        with Qemu([SocketDevice("rng", rng), SocketDevice("blk", disk, "num-queues=1")], tmp_path) as guest:
            assert guest.call("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
            guest.call(f"{draw} count={MIB // 4096}")
            held = Held.by(back_end.pid)
            guest.call(bind_anew("virtio_rng", ROUNDS))
            guest.call(f"{draw} seek={MIB // 4096} count={MORE // 4096}")
            holds_again(back_end.pid, held)
            assert guest.end() == 0
    drawn = image.read_bytes()
    assert not compressible(drawn[:MIB]) and not compressible(drawn[MIB:])
