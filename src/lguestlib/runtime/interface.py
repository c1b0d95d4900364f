"""Network interfaces of the host: addresses, bridges, up and down, by ioctl.

What netlink does better is not needed here.  Interfaces are those of the
calling thread's network namespace.
"""

import errno
import os
import socket
from typing import NamedTuple, Self

from lguestlib.abi import bridge, netdevice
from lguestlib.abi.ioctl import ioctl
from lguestlib.abi.libc import failure


class InterfaceAddress(NamedTuple):
    """An IPv4 address (4 bytes) and its network's prefix length."""

    address: bytes
    prefix: int


class Interfaces:
    """A socket that takes requests about interfaces by name; each raises OSError that names it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def _request(self, number: int, request: netdevice.ifreq, call: str, about: str) -> None:
        ioctl(self._socket.fileno(), number, request, call, about)

    @staticmethod
    def _named(name: str) -> netdevice.ifreq:
        encoded = os.fsencode(name)
        if len(encoded) >= netdevice.IFNAMSIZ:
            # The kernel would cut it, and find another.
            raise failure(errno.ENODEV, "interface", name)
        return netdevice.ifreq(ifr_name=encoded)

    def index(self, name: str) -> int:
        """The interface's index."""
        request = self._named(name)
        self._request(netdevice.SIOCGIFINDEX, request, "SIOCGIFINDEX", name)
        return request.ifr_ifru.ifru_ivalue

    def mtu(self, name: str) -> int:
        """Bytes in a frame behind its Ethernet header, at most."""
        request = self._named(name)
        self._request(netdevice.SIOCGIFMTU, request, "SIOCGIFMTU", name)
        return request.ifr_ifru.ifru_mtu

    def set_mtu(self, name: str, mtu: int) -> None:
        """Let the interface's frames be so long."""
        request = self._named(name)
        request.ifr_ifru.ifru_mtu = mtu
        self._request(netdevice.SIOCSIFMTU, request, "SIOCSIFMTU", name)

    def set_address(self, name: str, address: InterfaceAddress) -> None:
        """Give the interface this IPv4 address and netmask."""
        for number, call, value in (
            (netdevice.SIOCSIFADDR, "SIOCSIFADDR", address.address),
            (netdevice.SIOCSIFNETMASK, "SIOCSIFNETMASK", netmask(address.prefix)),
        ):
            request = self._named(name)
            request.ifr_ifru.ifru_in.sin_family = socket.AF_INET
            request.ifr_ifru.ifru_in.sin_addr.s_addr[:] = list(value)
            self._request(number, request, call, name)

    def set_up(self, name: str) -> None:
        """Bring the interface up."""
        request = self._named(name)
        self._request(netdevice.SIOCGIFFLAGS, request, "SIOCGIFFLAGS", name)
        request.ifr_ifru.ifru_flags |= netdevice.IFF_UP
        self._request(netdevice.SIOCSIFFLAGS, request, "SIOCSIFFLAGS", name)

    def add_to_bridge(self, name: str, bridge_name: str) -> None:
        """Make the interface a port of the bridge."""
        request = self._named(bridge_name)
        request.ifr_ifru.ifru_ivalue = self.index(name)
        self._request(bridge.SIOCBRADDIF, request, "SIOCBRADDIF", bridge_name)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def netmask(prefix: int) -> bytes:
    """The 4-byte netmask of a network with *prefix* leading ones."""
    return (0xFFFF_FFFF << (32 - prefix) & 0xFFFF_FFFF).to_bytes(4, "big")
