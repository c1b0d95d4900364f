"""A network namespace of the process's own: interfaces and addresses no one else sees."""

import os

from lguestlib.abi.sched import CLONE_NEWNET, CLONE_NEWUSER, unshare
from lguestlib.runtime.interface import Interfaces


def enter_network_namespace() -> bool:
    """Move the process into a new network namespace; True if it took a new user namespace around it.

    To be called while the process has one thread; threads started later follow.
    The files it can open stay the same: user and group map to themselves.
    Raises OSError where the host does not allow it.
    """
    user, group = os.geteuid(), os.getegid()
    try:
        unshare(CLONE_NEWNET)
        privileged = True
    except PermissionError:
        unshare(CLONE_NEWUSER | CLONE_NEWNET)
        privileged = False
        # setgroups must be given up before a group can be mapped (user_namespaces(7)).
        _set("/proc/self/setgroups", "deny")
        _set("/proc/self/uid_map", f"{user} {user} 1")
        _set("/proc/self/gid_map", f"{group} {group} 1")
    with Interfaces() as interfaces:
        interfaces.set_up("lo")
    # Who follows by nsenter(1) may ping: ping's own privilege does not count in a user namespace.
    _set_if_possible("/proc/sys/net/ipv4/ping_group_range", f"{group} {group}")
    return not privileged


def without_ipv6(name: str) -> None:
    """Keep the kernel from chattering on interface *name* by itself; no matter if it cannot be."""
    _set_if_possible(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "1")


def _set(file: str, text: str) -> None:
    with open(file, "w") as setting:
        setting.write(text)


def _set_if_possible(file: str, text: str) -> None:
    try:
        _set(file, text)
    except OSError:
        return
