"""A program: make a TAP interface and a bridge, and say as JSON what came of it.

It does so in a network namespace of its own, and is run as a child process: the
host's network is never touched.
"""

import ctypes
import json
import os
import socket

from lguestlib.abi import bridge, netdevice, sched, tun
from lguestlib.abi.ioctl import ioctl
from lguestlib.abi.netdevice import ifreq, sockaddr_in

HEADER = 12
ADDRESS, MASK = "192.0.2.1", "255.255.255.0"
MAC = bytes([0x02, 0, 0, 0, 0, 0x17])


def _enter_namespace() -> None:
    try:
        sched.unshare(sched.CLONE_NEWNET)
    except PermissionError:
        sched.unshare(sched.CLONE_NEWUSER | sched.CLONE_NEWNET)


def _request(name: str) -> ifreq:
    return ifreq(ifr_name=name.encode())


def _in(address: str) -> sockaddr_in:
    inside = sockaddr_in(sin_family=socket.AF_INET)
    inside.sin_addr.s_addr[:] = list(socket.inet_aton(address))
    return inside


def _tap(fd: int) -> dict[str, object]:
    wanted = _request("lg%d")
    wanted.ifr_ifru.ifru_flags = tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR
    ioctl(fd, tun.TUNSETIFF, wanted, "TUNSETIFF", "lg%d")
    name = wanted.ifr_name.decode()
    given = ifreq()
    ioctl(fd, tun.TUNGETIFF, given, "TUNGETIFF", name)
    ioctl(fd, tun.TUNSETVNETHDRSZ, ctypes.c_int(HEADER), "TUNSETVNETHDRSZ", name)
    size, features = ctypes.c_int(), ctypes.c_uint()
    ioctl(fd, tun.TUNGETVNETHDRSZ, size, "TUNGETVNETHDRSZ", name)
    ioctl(fd, tun.TUNGETFEATURES, features, "TUNGETFEATURES", name)
    offloads = tun.TUN_F_CSUM | tun.TUN_F_TSO4 | tun.TUN_F_TSO6 | tun.TUN_F_TSO_ECN
    ioctl(fd, tun.TUNSETOFFLOAD, offloads, "TUNSETOFFLOAD", name)
    return {
        "name": name,
        "given": given.ifr_name.decode(),
        "flags": given.ifr_ifru.ifru_flags,
        "header": size.value,
        "features": features.value,
    }


def _interface(fd: int, name: str) -> dict[str, object]:
    hardware = _request(name)
    hardware.ifr_ifru.ifru_hwaddr.sa_family = netdevice.ARPHRD_ETHER
    hardware.ifr_ifru.ifru_hwaddr.sa_data[: len(MAC)] = list(MAC)
    ioctl(fd, netdevice.SIOCSIFHWADDR, hardware, "SIOCSIFHWADDR", name)
    mtu = _request(name)
    mtu.ifr_ifru.ifru_mtu = 1400
    ioctl(fd, netdevice.SIOCSIFMTU, mtu, "SIOCSIFMTU", name)
    address, mask = _request(name), _request(name)
    address.ifr_ifru.ifru_in, mask.ifr_ifru.ifru_in = _in(ADDRESS), _in(MASK)
    ioctl(fd, netdevice.SIOCSIFADDR, address, "SIOCSIFADDR", name)
    ioctl(fd, netdevice.SIOCSIFNETMASK, mask, "SIOCSIFNETMASK", name)
    up = _request(name)
    ioctl(fd, netdevice.SIOCGIFFLAGS, up, "SIOCGIFFLAGS", name)
    up.ifr_ifru.ifru_flags |= netdevice.IFF_UP
    ioctl(fd, netdevice.SIOCSIFFLAGS, up, "SIOCSIFFLAGS", name)

    got = {request: _request(name) for request in ("HWADDR", "MTU", "ADDR", "NETMASK", "FLAGS", "INDEX")}
    for request, answer in got.items():
        ioctl(fd, getattr(netdevice, f"SIOCGIF{request}"), answer, request, name)
    return {
        "mac": bytes(got["HWADDR"].ifr_ifru.ifru_hwaddr.sa_data[: len(MAC)]).hex(),
        "mtu": got["MTU"].ifr_ifru.ifru_mtu,
        "address": socket.inet_ntoa(bytes(got["ADDR"].ifr_ifru.ifru_in.sin_addr.s_addr)),
        "mask": socket.inet_ntoa(bytes(got["NETMASK"].ifr_ifru.ifru_in.sin_addr.s_addr)),
        "up": bool(got["FLAGS"].ifr_ifru.ifru_flags & netdevice.IFF_UP),
        "index": got["INDEX"].ifr_ifru.ifru_ivalue == socket.if_nametoindex(name),
    }


def _bridge(fd: int, port: str) -> dict[str, object]:
    name = "lgbridge"
    try:
        ioctl(fd, bridge.SIOCBRADDBR, ctypes.create_string_buffer(name.encode()), "SIOCBRADDBR", name)
    except OSError as error:
        return {"bridge": str(error)}
    member = _request(name)
    member.ifr_ifru.ifru_ivalue = socket.if_nametoindex(port)
    ioctl(fd, bridge.SIOCBRADDIF, member, "SIOCBRADDIF", name)
    try:
        ioctl(fd, bridge.SIOCBRADDIF, member, "SIOCBRADDIF", name)
    except OSError as error:
        twice = str(error)
    ioctl(fd, bridge.SIOCBRDELIF, member, "SIOCBRDELIF", name)
    ioctl(fd, bridge.SIOCBRDELBR, ctypes.create_string_buffer(name.encode()), "SIOCBRDELBR", name)
    return {"bridge": name, "twice": twice, "left": [left for _, left in socket.if_nameindex()]}


def main() -> dict[str, object]:
    try:
        _enter_namespace()
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return {"refused": str(error)}
    unknown = _request("lg0")
    try:
        ioctl(fd, tun.TUNSETIFF, unknown, "TUNSETIFF", "lg0")
    except OSError as error:
        refusal = str(error)
    made = _tap(fd)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        name = str(made["name"])
        made |= _interface(control.fileno(), name) | _bridge(control.fileno(), name)
    return made | {"refusal": refusal}


if __name__ == "__main__":
    print(json.dumps(main()))
