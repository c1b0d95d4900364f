"""A front-end whose disk is busy until a line comes on standard input; it prints how many requests came back.

Arguments: the socket.
"""

import sys

from runtime.test_vhost_user_conversation import DiskLoad
from runtime.vhost_user_rig import FrontEnd


def main() -> None:
    with FrontEnd(sys.argv[1]) as front:
        front.negotiate()
        load = DiskLoad(front.start(), 8)
        load.reach(8)
        print("busy", flush=True)
        sys.stdin.readline()
        load.reach(8)
        print(load.finish(), flush=True)


if __name__ == "__main__":
    main()
