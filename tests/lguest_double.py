"""A test double of /dev/lguest: what its driver does, as far as a launcher can tell, with a guest in Python.

From drivers/lguest/lguest_user.c, core.c and hypercalls.c of Linux 3.11.  The
guest's program has a thread of its own, but runs only while the launcher is in
`pread`, as a guest does; what it does to its processor and its memory it does by
a `GuestCpu`.
"""

import ctypes
import errno
import os
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from lguestlib.abi import uio
from lguestlib.abi.eventfd import BYTES, SIGNAL, eventfd

INITIALIZE, IRQ, EVENTFD = 0, 2, 4
IRQS = 32
PAGE_SIZE = 4096
RESTART = 85
"""ERESTART."""

GuestProgram = Callable[["GuestCpu"], None]


class GuestGone(BaseException):
    """Ends the guest's program: it is dead, or nobody has its file open any more."""


class LguestDouble:
    """An open /dev/lguest whose guest is *program*.

    A program that returns has halted for good; one that raises dies of it, and
    `failure` has the error.
    """

    def __init__(self, program: GuestProgram) -> None:
        self.requests: list[tuple[int, ...]] = []
        """The words of each request that succeeded."""
        self.exits: list[int] = []
        """The addresses the guest has notified that no eventfd took."""
        self.failure: Exception | None = None
        self.memory = (0, 0, 0)
        """What INITIALIZE has told: base, pfn_limit, start."""
        self._program = program
        self._thread = threading.Thread(target=self._run, name="lguest double", daemon=True)
        self._task = 0
        self._ended = eventfd()
        self._eventfds: list[tuple[int, int]] = []
        # Held by the guest for everything it does, and by whoever changes what follows.
        self._changed = threading.Condition()
        self._running = False
        self._exited = False
        self._notified = 0
        self._dead: bytes | int | None = None
        self._closed = False
        self._pending: set[int] = set()
        self._takes_interrupts = False

    def write(self, request: bytes, /) -> int:
        if self._closed:
            raise _error(errno.EBADF)
        (kind,) = _words(request, 1)
        with self._changed:
            if kind != INITIALIZE:
                if not self._task:
                    raise _error(errno.EINVAL)
                if self._dead is not None:
                    raise _error(errno.ENOENT)
            if kind == INITIALIZE:
                words = _words(request, 4)
                if self._task:
                    raise _error(errno.EBUSY)
                self._task = threading.get_native_id()
                self.memory = (words[1], words[2], words[3])
            elif kind == IRQ:
                words = _words(request, 2)
                if words[1] >= IRQS:
                    raise _error(errno.EINVAL)
                self._pending.add(words[1])
                self._changed.notify_all()
            elif kind == EVENTFD:
                words = _words(request, 3)
                self._attach(*words[1:])
            else:
                raise _error(errno.EINVAL)
            self.requests.append(words)
        return 12 if kind == INITIALIZE else 0

    def _attach(self, address: int, fd: int) -> None:
        if not address:
            raise _error(errno.EINVAL)
        try:
            what = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            raise _error(errno.EBADF) from None
        if what != "anon_inode:[eventfd]":
            raise _error(errno.EINVAL)
        self._eventfds.append((address, os.dup(fd)))

    def pread(self, size: int, /) -> bytes:
        if self._closed:
            raise _error(errno.EBADF)
        if not self._task:
            raise _error(errno.EINVAL)
        if threading.get_native_id() != self._task:
            raise _error(errno.EPERM)
        if isinstance(self._dead, int):
            raise _error(self._dead)
        if self._dead is not None:
            return (self._dead + b"\0")[:size]
        with self._changed:
            if self._thread.ident is None:
                self._thread.start()
            self._running = True
            self._changed.notify_all()
        try:
            uio.readv(self._ended, [memoryview(bytearray(BYTES))])
        except InterruptedError:
            with self._changed:
                self._running = False
                if not self._exited:
                    raise
            os.read(self._ended, BYTES)
        self._exited = False
        if self._dead is not None:
            raise _error(self._dead if isinstance(self._dead, int) else errno.ENOENT)
        return self._notified.to_bytes(4, "little")

    def close(self) -> None:
        if self._closed:
            raise _error(errno.EBADF)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self._ended)
        for _, fd in self._eventfds:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        if not self._closed:
            self.close()

    def _run(self) -> None:
        cpu = GuestCpu(self)
        try:
            self._program(cpu)
            while True:
                cpu.halt()
        except GuestGone:
            return
        except Exception as error:
            self.failure = error
            try:
                cpu.die(f"the guest's program: {type(error).__name__}: {error}")
            except GuestGone:
                return

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The guest's thread does something here, while it is running."""
        with self._changed:
            self._wait_until_running()
            if self._pending and not self._takes_interrupts:
                self.kill(b"unhandled trap 13 at 0xc0100000 (0x0)")
            yield

    def _wait_until_running(self) -> None:
        self._changed.wait_for(lambda: self._running or self._closed)
        if self._closed:
            raise GuestGone

    def leave(self) -> None:
        """The launcher's pread returns; the guest's thread goes on in the next one."""
        self._running, self._exited = False, True
        os.write(self._ended, SIGNAL)
        self._wait_until_running()

    def notify(self, address: int) -> None:
        """LHCALL_NOTIFY; of address 0 nothing becomes."""
        for attached, fd in self._eventfds:
            if attached == address:
                room = select.poll()
                room.register(fd, select.POLLOUT)
                if room.poll(0):
                    os.write(fd, SIGNAL)
                return
        if address:
            self.exits.append(address)
            self._notified = address
            self.leave()

    def kill(self, reason: bytes | int) -> None:
        """The guest dies of *reason*, words or an error number."""
        self._dead = reason
        self.leave()
        raise GuestGone

    def take_interrupts(self) -> None:
        """The guest has set up its interrupts."""
        self._takes_interrupts = True

    def wait_for_interrupt(self, seconds: float | None) -> list[int]:
        """What is pending, or is within *seconds*; it is not any more."""
        until = None if seconds is None else time.monotonic() + seconds
        while not (self._running and self._pending):
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                self._wait_until_running()
                return [0]
            self._changed.wait(left)
            if self._closed:
                raise GuestGone
            if self._pending and not self._takes_interrupts:
                self._wait_until_running()
                self.kill(b"unhandled trap 13 at 0xc0100000 (0x0)")
        taken, self._pending = sorted(self._pending), set()
        return taken


class GuestCpu:
    """The guest's only processor, for its program: memory by guest-physical address, and hypercalls."""

    def __init__(self, driver: LguestDouble) -> None:
        self._driver = driver

    @property
    def start(self) -> int:
        """The address of the first instruction."""
        return self._driver.memory[2]

    def read(self, address: int, length: int) -> bytes:
        """A copy of guest memory; outside it the guest dies."""
        with self._driver.entered():
            return ctypes.string_at(self._at(address, length, "read"), length)

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory; outside it the guest dies."""
        with self._driver.entered():
            ctypes.memmove(self._at(address, len(data), "write"), data, len(data))

    def load16(self, address: int) -> int:
        """Sixteen bits by a single access, with a full fence before and after."""
        with self._driver.entered():
            return ctypes.c_uint16.from_address(self._at(address, 2, "read")).value

    def store16(self, address: int, value: int) -> None:
        """Sixteen bits by a single access, with a full fence before and after."""
        with self._driver.entered():
            ctypes.c_uint16.from_address(self._at(address, 2, "write")).value = value

    def _at(self, address: int, length: int, what: str) -> int:
        base, pfn_limit, _ = self._driver.memory
        if address < 0 or address + length > pfn_limit * PAGE_SIZE:
            self._driver.kill(f"bad {what} address {address:#x} len {length}".encode())
        return base + address

    def notify(self, address: int) -> None:
        """LHCALL_NOTIFY: the eventfd attached to *address*, or else the launcher, is told of it."""
        with self._driver.entered():
            self._driver.notify(address & 0xFFFF_FFFF)

    def take_interrupts(self) -> None:
        """Set up the interrupts: one that comes before kills the guest."""
        with self._driver.entered():
            self._driver.take_interrupts()

    def halt(self, seconds: float | None = None) -> list[int]:
        """Sleep until an interrupt: those that came together.  The timer's is 0, after *seconds*."""
        with self._driver.entered():
            return self._driver.wait_for_interrupt(seconds)

    def relax(self) -> None:
        """Go on after a moment, as a loop does that waits for a change in memory."""
        with self._driver.entered():
            pass
        time.sleep(0.0002)

    def crash(self, text: str) -> None:
        """LHCALL_SHUTDOWN: of a panic, or with "Power down"."""
        self.die(f"CRASH: {text[:127]}")

    def die(self, reason: str) -> None:
        """What the driver does to a guest that it cannot run any further."""
        with self._driver.entered():
            self._driver.kill(reason.encode(errors="replace"))

    def restart(self) -> None:
        """LHCALL_SHUTDOWN, to be started anew."""
        with self._driver.entered():
            self._driver.kill(RESTART)


def _words(request: bytes, count: int) -> tuple[int, ...]:
    if len(request) < 4 * count:
        raise _error(errno.EFAULT)
    words: tuple[int, ...] = struct.unpack_from(f"<{count}I", request)
    return words


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/dev/lguest")
