"""Servers to be killed: each line on standard input has a new one, on the socket of the first argument.

It answers with the process, which is forked off from one with a single thread.
The device is a disk, whose image is the second argument, or an echo.
"""

import os
import signal
import socket
import sys
import time

from runtime.vhost_user_rig import Echo

from lguestlib.runtime.backend.file import FileDisk
from lguestlib.runtime.vhost_user.server import Server
from lguestlib.virtio.chain import Chain
from lguestlib.virtio.device import Device
from lguestlib.virtio.devices.block import Block


def slow_echo() -> Device:
    """Echoes that take a while."""
    device = Echo()

    def slow(chain: Chain) -> int:
        time.sleep(0.0001)
        return chain.write(chain.read())

    device.serve = slow
    return device


def disk(image: str) -> Device:
    """A disk whose requests are carried out side by side."""
    opened = FileDisk.open(image)
    return Block(opened, num_queues=3, transfer_file=opened.fd)


def serve(listener: socket.socket, device: Device) -> None:
    """Serve for ever."""
    Server(device, listener, lambda line: print(line, file=sys.stderr, flush=True)).start()
    signal.pause()


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    child = 0
    for _ in sys.stdin:
        if child:
            os.waitpid(child, 0)
        child = os.fork()
        if not child:
            serve(listener, disk(sys.argv[2]) if len(sys.argv) > 2 else slow_echo())
        print(child, flush=True)
    if child:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
