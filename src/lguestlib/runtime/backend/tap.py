"""A TAP interface of the host: the guest's frames, behind their virtio header, to and from the kernel."""

import ctypes
import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
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



class _FurtherQueue(PacketNetwork):
    """A queue of the TAP interface *name*, attached."""

    def __init__(self, fd: int, name: str, tracer: Tracer | None) -> None:
        super().__init__(fd, "tap", tracer)
        self._name = name
        self._attached = True

    def attach(self, attached: bool) -> None:
        """From now on the kernel puts frames for the guest into it, or does not.  Raises OSError."""
        if attached == self._attached:
            return
        request = ifreq()
        request.ifr_ifru.ifru_flags = tun.IFF_ATTACH_QUEUE if attached else tun.IFF_DETACH_QUEUE
        ioctl(self.fd, tun.TUNSETQUEUE, request, "TUNSETQUEUE", self._name)
        self._attached = attached


class Tap(PacketNetwork):
    """A TAP interface in the calling thread's network namespace, gone when this is closed.

    *name* may hold a ``%d`` for the kernel to number.  This is the first of its so
    many *queues*.  Raises OSError where TAP
    devices may not be had; EBUSY where there is an interface of that name, unless
    it need not be *new* (and see `existing`).
    """

    offloads = sum(1 << bit for bit in (*_GUEST_OFFLOADS, *_HOST_OFFLOADS))

    def __init__(
        self, name: str = "tap%d", tracer: Tracer | None = None, *, new: bool = True, queues: int = 1
    ) -> None:
        flags = _FLAGS | (tun.IFF_MULTI_QUEUE if queues > 1 else 0)
        with ExitStack() as opened:
            fd, self.name = _open_queue(name, flags | (tun.IFF_TUN_EXCL if new else 0))
            opened.callback(os.close, fd)
            _set_header_size(fd, HEADER_SIZE, name)
            ioctl(fd, tun.TUNSETOFFLOAD, 0, "TUNSETOFFLOAD", name)
            super().__init__(fd, "tap", tracer)
            others = []
            for _ in range(1, queues):
                other = _FurtherQueue(_open_queue(self.name, flags)[0], self.name, tracer)
                opened.callback(other.close)
                others.append(other)
            opened.pop_all()
        self._others = others

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
        """Whether the interface stays.  Raises OSError: EBADFD where somebody has removed it."""
        request = ifreq()
        ioctl(self.fd, tun.TUNGETIFF, request, "TUNGETIFF", self.name)
        return bool(request.ifr_ifru.ifru_flags & tun.IFF_PERSIST)

    def _check_there(self) -> None:
        # A read that sleeps while the interface is removed ends in EFAULT, too.
        self._persistent()

    @property
    def pairs(self) -> Sequence[PacketNetwork]:
        """Its queues, this one first."""
        return (self, *self._others)

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

    def use_pairs(self, count: int) -> None:
        """Give frames for the guest to the first *count* queues alone; all are, to begin with.  Raises OSError."""
        for number, queue in enumerate(self._others, 1):
            queue.attach(number < count)

    def close(self) -> None:
        """Let go of the interface.  Whoever opens one that stays finds whole frames again, checksums done."""
        with suppress(OSError):
            self.activate(0)
        for queue in self._others:
            queue.close()
        super().close()


def _open_queue(name: str, flags: int) -> tuple[int, str]:
    """The descriptor of a queue of the interface *name*, and that name as the kernel has it."""
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        request = ifreq(ifr_name=os.fsencode(name))
        request.ifr_ifru.ifru_flags = flags
        ioctl(fd, tun.TUNSETIFF, request, "TUNSETIFF", name)
    except BaseException:
        os.close(fd)
        raise
    return fd, os.fsdecode(request.ifr_name)


def _set_header_size(fd: int, size: int, name: str) -> None:
    ioctl(fd, tun.TUNSETVNETHDRSZ, ctypes.c_int(size), "TUNSETVNETHDRSZ", name)
