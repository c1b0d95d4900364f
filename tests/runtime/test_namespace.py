"""A network namespace of the process's own, with and without the right to one."""

import sys
from pathlib import Path

import interpreters
import pytest
import sessions

from lguestlib.abi.sched import CLONE_NEWNET, CLONE_NEWUSER
from lguestlib.runtime import namespace
from lguestlib.runtime.namespace import enter_network_namespace, without_ipv6

PROGRAM = """
import os
from lguestlib.runtime.namespace import enter_network_namespace
def namespaces(): return [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "user")]
before, ids = namespaces(), (os.geteuid(), os.getegid())
taken = enter_network_namespace()
net, user = (one != other for one, other in zip(before, namespaces()))
print(taken, net, user, ids == (os.geteuid(), os.getegid()))
with open("/proc/net/dev") as interfaces, open("/proc/sys/net/ipv4/ping_group_range") as groups:
    print(interfaces.read().count("eth"), groups.read().split())
"""


def test_root_enters_one_with_its_rights_as_they_were() -> None:
    sessions.root_or_skip()
    shown = interpreters.run([sys.executable, "-X", "dev", "-W", "error"], "-c", PROGRAM)
    assert shown == "False True False True\n0 ['0', '0']\n"


def test_an_ordinary_user_enters_one_inside_a_user_namespace_and_stays_who_it_is(tmp_path: Path) -> None:
    sessions.user_namespaces_or_skip()
    prefix, command = sessions.ordinary_user(tmp_path, {})
    python = command[: command.index("-m")]
    result = sessions.run("-c", PROGRAM, prefix=prefix, command=python)
    assert result == (0, "True True True True\n0 ['65534', '65534']\n", "")


def test_what_the_host_refuses_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(flags: int) -> None:
        asked.append(flags)
        raise PermissionError(1, "unshare")

    monkeypatch.setattr(namespace, "unshare", refuse)
    with pytest.raises(PermissionError):
        enter_network_namespace()
    assert asked == [CLONE_NEWNET, CLONE_NEWNET | CLONE_NEWUSER]


def test_ipv6_that_cannot_be_turned_off_is_no_error() -> None:
    without_ipv6("no-such-interface")
