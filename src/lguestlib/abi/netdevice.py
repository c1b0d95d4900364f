"""Network interfaces, linux/if.h, linux/in.h, linux/if_arp.h and linux/sockios.h."""

import ctypes
from typing import Annotated

from lguestlib.abi.layout import NativeStructure, Union, i32, pointer, u8, u16, ulong

IFNAMSIZ = 16
"""Bytes of an interface's name, its NUL included."""

ARPHRD_ETHER = 1
"""The family of an Ethernet address in a sockaddr."""

IFF_UP = 1 << 0
IFF_BROADCAST = 1 << 1
IFF_LOOPBACK = 1 << 3
IFF_RUNNING = 1 << 6
IFF_NOARP = 1 << 7
IFF_PROMISC = 1 << 8
IFF_ALLMULTI = 1 << 9
IFF_MULTICAST = 1 << 12

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCGIFADDR = 0x8915
SIOCSIFADDR = 0x8916
SIOCGIFBRDADDR = 0x8919
SIOCSIFBRDADDR = 0x891A
SIOCGIFNETMASK = 0x891B
SIOCSIFNETMASK = 0x891C
SIOCGIFMTU = 0x8921
SIOCSIFMTU = 0x8922
SIOCSIFNAME = 0x8923
SIOCSIFHWADDR = 0x8924
SIOCGIFHWADDR = 0x8927
SIOCGIFINDEX = 0x8933


class sockaddr(NativeStructure):
    """sys/socket.h: any address; a hardware address is the first bytes of *sa_data*."""

    sa_family: u16
    sa_data: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 14]


class in_addr(NativeStructure):
    """linux/in.h: an IPv4 address in network order, as `socket.inet_aton` returns it."""

    s_addr: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 4]


class sockaddr_in(NativeStructure):
    """linux/in.h: an IPv4 address; *sin_port* in network order."""

    sin_family: u16
    sin_port: u16
    sin_addr: in_addr
    sin_zero: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 8]


class ifmap(NativeStructure):
    """linux/if.h: a device's mapping, the largest member of ifreq."""

    mem_start: ulong
    mem_end: ulong
    base_addr: u16
    irq: u8
    dma: u8
    port: u8


class ifreq_ifru(Union):
    """linux/if.h, ifreq.ifr_ifru: the request tells which member counts.

    *ifru_flags* is a ``short`` there, *ifru_in* its addresses seen as IPv4 ones.
    """

    ifru_addr: sockaddr
    ifru_in: sockaddr_in
    ifru_netmask: sockaddr
    ifru_hwaddr: sockaddr
    ifru_flags: u16
    ifru_ivalue: i32
    ifru_mtu: i32
    ifru_map: ifmap
    ifru_newname: Annotated[bytes, ctypes.c_char * IFNAMSIZ]
    ifru_data: pointer


class ifreq(NativeStructure):
    """linux/if.h: the argument of requests on the interface *ifr_name*."""

    ifr_name: Annotated[bytes, ctypes.c_char * IFNAMSIZ]
    ifr_ifru: ifreq_ifru
