"""A network namespace of the process's own: interfaces and addresses no one else sees."""

import os

from lguestlib.abi.sched import CLONE_NEWNET, CLONE_NEWUSER, unshare
from lguestlib.runtime.interface import Interfaces


def enter_network_namespace() -> None:
    """Move the process into a new network namespace, inside a new user namespace where not root.

    To be called while the process has one thread; threads started later follow.
    The files it can open stay the same: user and group map to themselves.
    Raises OSError where the host does not allow it.
    """
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        unshare(CLONE_NEWNET)
    else:
        unshare(CLONE_NEWUSER | CLONE_NEWNET)
        # setgroups must be given up before a group can be mapped (user_namespaces(7)).
        for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{file}", "w") as mapping:
                mapping.write(text)
    with Interfaces() as interfaces:
        interfaces.set_up("lo")


def without_ipv6(name: str) -> None:
    """Keep the kernel from chattering on interface *name* by itself; no matter if it cannot be."""
    try:
        with open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as setting:
            setting.write("1")
    except OSError:
        return
