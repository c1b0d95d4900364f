"""A TAP interface of the host: the guest's frames, behind their virtio header, to and from the kernel."""

import ctypes
import os

from lguestlib.abi import tun
from lguestlib.abi import virtio_net as net
from lguestlib.abi.ioctl import ioctl
from lguestlib.abi.netdevice import ifreq
from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.devices.net import HEADER_SIZE

DEVICE = "/dev/net/tun"

_GUEST_OFFLOADS = {
    net.VIRTIO_NET_F_GUEST_CSUM: tun.TUN_F_CSUM,
    net.VIRTIO_NET_F_GUEST_TSO4: tun.TUN_F_TSO4,
    net.VIRTIO_NET_F_GUEST_TSO6: tun.TUN_F_TSO6,
    net.VIRTIO_NET_F_GUEST_ECN: tun.TUN_F_TSO_ECN,
}
"""What a guest can take from us, and how the TAP device is told."""

_HOST_OFFLOADS = (
    net.VIRTIO_NET_F_CSUM,
    net.VIRTIO_NET_F_HOST_TSO4,
    net.VIRTIO_NET_F_HOST_TSO6,
    net.VIRTIO_NET_F_HOST_ECN,
)
"""What the kernel takes from a guest: nobody needs telling, the header of each frame says it."""


class Tap(PacketNetwork):
    """A new TAP interface in the calling thread's network namespace; it goes when this is closed.

    *name* may hold a ``%d`` for the kernel to number.  Raises OSError where TAP
    devices may not be had.
    """

    offloads = sum(1 << bit for bit in (*_GUEST_OFFLOADS, *_HOST_OFFLOADS))

    def __init__(self, name: str = "tap%d", tracer: Tracer | None = None) -> None:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            request = ifreq(ifr_name=name.encode())
            request.ifr_ifru.ifru_flags = tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR
            ioctl(fd, tun.TUNSETIFF, request, "TUNSETIFF", name)
            ioctl(fd, tun.TUNSETVNETHDRSZ, ctypes.c_int(HEADER_SIZE), "TUNSETVNETHDRSZ", name)
            ioctl(fd, tun.TUNSETOFFLOAD, 0, "TUNSETOFFLOAD", name)
        except BaseException:
            os.close(fd)
            raise
        super().__init__(fd, "tap", tracer)
        self.name = request.ifr_name.decode()

    def activate(self, features: int) -> None:
        """Let the kernel leave to the guest what it has agreed to do.  Raises OSError."""
        flags = sum(flag for bit, flag in _GUEST_OFFLOADS.items() if features & 1 << bit)
        ioctl(self.fd, tun.TUNSETOFFLOAD, flags, "TUNSETOFFLOAD", self.name)
