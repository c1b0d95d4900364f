"""Servers to be killed: each line on standard input has a new one on the listening socket that is the argument.

It answers with the process, which is forked off from one with a single thread.
"""

import os
import signal
import socket
import sys
import time

from runtime.vhost_user_rig import Echo

from lguestlib.runtime.vhost_user.server import Server
from lguestlib.virtio.chain import Chain


def serve(listener: socket.socket) -> None:
    """Serve echoes that take a while, for ever."""
    device = Echo()

    def slow(chain: Chain) -> int:
        time.sleep(0.0001)
        return chain.write(chain.read())

    device.serve = slow
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
            serve(listener)
        print(child, flush=True)
    if child:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
