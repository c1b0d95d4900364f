"""A TAP interface of the host: the guest's frames, behind their virtio header, to and from the kernel."""

import ctypes
import errno
import os
from contextlib import suppress
from typing import Self

from lguestlib.abi import tun
from lguestlib.abi import virtio_net as net
from lguestlib.abi.ioctl import ioctl
from lguestlib.abi.libc import failure
from lguestlib.abi.netdevice import ifreq
from lguestlib.runtime.backend.packet import PacketNetwork
from lguestlib.runtime.interface import Interfaces
from lguestlib.runtime.trace import Tracer
from lguestlib.virtio.devices.net import HEADER_SIZE, header_size

DEVICE = "/dev/net/tun"

_FLAGS = tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR

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
    """A TAP interface in the calling thread's network namespace, gone when this is closed.

    *name* may hold a ``%d`` for the kernel to number.  Raises OSError where TAP
    devices may not be had; EBUSY where there is an interface of that name, unless
    it need not be *new* (and see `existing`).
    """

    offloads = sum(1 << bit for bit in (*_GUEST_OFFLOADS, *_HOST_OFFLOADS))

    def __init__(self, name: str = "tap%d", tracer: Tracer | None = None, *, new: bool = True) -> None:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            request = ifreq(ifr_name=os.fsencode(name))
            request.ifr_ifru.ifru_flags = _FLAGS | (tun.IFF_TUN_EXCL if new else 0)
            ioctl(fd, tun.TUNSETIFF, request, "TUNSETIFF", name)
            _set_header_size(fd, HEADER_SIZE, name)
            ioctl(fd, tun.TUNSETOFFLOAD, 0, "TUNSETOFFLOAD", name)
        except BaseException:
            os.close(fd)
            raise
        super().__init__(fd, "tap", tracer)
        self.name = os.fsdecode(request.ifr_name)

    @classmethod
    def existing(cls, name: str, tracer: Tracer | None = None) -> Self:
        """The TAP interface *name*, made to stay (``ip tuntap add``): it is there when this is closed, too.

        Raises OSError: ENODEV where there is none, EBUSY where another has it open,
        EPERM where it is another user's.  Raises ValueError for an interface that
        is no TAP one, or has several queues.
        """
        with Interfaces() as interfaces:
            interfaces.index(name)
        try:
            tap = cls(name, tracer, new=False)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            remedy = f"ip -details link show {name} tells; ip tuntap add NAME mode tap makes one"
            raise ValueError(f"{name}: not a TAP interface with one queue ({remedy})") from None
        if not tap._persistent():
            # It went after it was looked for, and the kernel has made a new one.
            tap.close()
            raise failure(errno.ENODEV, "TUNSETIFF", name)
        return tap

    def _persistent(self) -> bool:
        request = ifreq()
        ioctl(self.fd, tun.TUNGETIFF, request, "TUNGETIFF", self.name)
        return bool(request.ifr_ifru.ifru_flags & tun.IFF_PERSIST)

    @property
    def mtu(self) -> int:
        """The interface's MTU as it is now.  Raises OSError."""
        with Interfaces() as interfaces:
            return interfaces.mtu(self.name)

    def activate(self, features: int) -> None:
        """Let the kernel leave to the guest what it has agreed to do, behind its headers.  Raises OSError."""
        _set_header_size(self.fd, header_size(features), self.name)
        flags = sum(flag for bit, flag in _GUEST_OFFLOADS.items() if features & 1 << bit)
        ioctl(self.fd, tun.TUNSETOFFLOAD, flags, "TUNSETOFFLOAD", self.name)

    def close(self) -> None:
        """Let go of the interface.  Whoever opens one that stays finds whole frames again, checksums done."""
        with suppress(OSError):
            self.activate(0)
        super().close()


def _set_header_size(fd: int, size: int, name: str) -> None:
    ioctl(fd, tun.TUNSETVNETHDRSZ, ctypes.c_int(size), "TUNSETVNETHDRSZ", name)
