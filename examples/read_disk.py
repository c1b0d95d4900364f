"""Write the bytes of a disk to standard output, read through any vhost-user-blk back-end.

    qemu-storage-daemon --blockdev driver=file,node-name=disk,filename=disk.img \\
        --export type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=disk.sock &
    python examples/read_disk.py disk.sock 0 512 | hexdump -C
"""

import argparse
import signal
import sys

from lguestlib.abi.virtio_blk import VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, virtio_blk_outhdr
from lguestlib.runtime.vhost_user.driver import VhostUserDevice
from lguestlib.virtio.errors import VirtioError

SECTOR, PIECE = 512, 1 << 16


def copy(path: str, offset: int, length: int | None) -> None:
    with VhostUserDevice.connect(path) as disk:
        capacity = SECTOR * int.from_bytes(disk.config(0, 8), "little")
        end = capacity if length is None else min(offset + length, capacity)
        header, data, status = disk.buffer(16), disk.buffer(PIECE + SECTOR), disk.buffer(1)
        while 0 <= offset < end:
            sector, skip = divmod(offset, SECTOR)
            size = min(PIECE, end - offset)
            sectors = data._replace(length=-(-(skip + size) // SECTOR) * SECTOR)
            disk.memory.write(header.address, bytes(virtio_blk_outhdr(VIRTIO_BLK_T_IN, 0, sector)))
            disk.queues[0].request([header], [sectors, status])
            if disk.read(status)[0] != VIRTIO_BLK_S_OK:
                sys.exit(f"{path}: sector {sector} or one behind it cannot be read")
            sys.stdout.buffer.write(disk.read(data)[skip : skip + size])
            offset += size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Read a disk through a vhost-user-blk back-end.")
    parser.add_argument("socket")
    parser.add_argument("offset", type=int, nargs="?", default=0, help="in bytes")
    parser.add_argument("length", type=int, nargs="?", help="in bytes; to the disk's end unless given")
    given = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as with cat: who reads no more ends it
    try:
        copy(given.socket, given.offset, given.length)
    except VirtioError as error:
        sys.exit(str(error))
