"""A network namespace of the process's own: interfaces and addresses no one else sees."""

import os

from lguestlib.abi.sched import CLONE_NEWNET, CLONE_NEWUSER, unshare
from lguestlib.runtime.backend.tap import Tap
from lguestlib.runtime.interface import InterfaceAddress, Interfaces
from lguestlib.runtime.trace import Tracer


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


def private_tap(
    address: InterfaceAddress, tracer: Tracer | None = None, queues: int = 1
) -> tuple[Tap, bool]:
    """A TAP interface with *address*, up, in a new namespace; and what `enter_network_namespace` says.

    Raises OSError where anything is in its way: then the interface is gone.
    """
    in_user_namespace = enter_network_namespace()
    tap = Tap("tap0", tracer, queues=queues)
    try:
        without_ipv6(tap.name)
        with Interfaces() as interfaces:
            interfaces.set_address(tap.name, address)
            interfaces.set_up(tap.name)
    except BaseException:
        tap.close()
        raise
    return tap, in_user_namespace


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
