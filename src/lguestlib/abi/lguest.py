"""/dev/lguest and its device page, linux/lguest_launcher.h (Linux 2.6.30 to 3.19).

Whatever the interpreter's word size, a word is one of the only host there was, 32-bit x86.
"""

import ctypes

from lguestlib.abi.layout import PackedStructure, u8, u16, u32
from lguestlib.abi.libc import fitting

LHREQ_INITIALIZE = 0
LHREQ_IRQ = 2
LHREQ_EVENTFD = 4
"""Requests, the first word of what is written to /dev/lguest; LHREQ_GETDMA and LHREQ_BREAK are refused."""

WORD = 4
"""Bytes of a request's words, and of the address that a read answers with."""

ERESTART = 85
"""What a read says when the guest has asked to be started anew (asm-generic/errno.h)."""

LGUEST_IRQS = 32
"""Interrupts of a guest: 0 is its timer, devices have the others (asm/lguest_hcall.h)."""

LGUEST_VRING_ALIGN = 4096
"""Bytes each ring starts at a multiple of, in the legacy layout."""


class lguest_device_desc(PackedStructure):
    """linux/lguest_launcher.h: a device in the page behind the guest's memory; its driver writes *status*.

    *num_vq* lguest_vqconfig follow, *feature_len* bytes of features offered and
    as many accepted (written by the driver), and *config_len* bytes of
    configuration.  The next descriptor comes at once, whatever its alignment;
    *type* 0 ends the page.
    """

    type: u8
    num_vq: u8
    feature_len: u8
    config_len: u8
    status: u8


class lguest_vqconfig(PackedStructure):
    """linux/lguest_launcher.h: a queue's entries, interrupt and ring's page; written by the launcher."""

    num: u16
    irq: u16
    pfn: u32


def initialize_request(base: int, pfn_limit: int, start: int) -> bytes:
    """LHREQ_INITIALIZE: this process has guest-physical 0 at *base*, and memory up to page *pfn_limit*.

    *start* is the first instruction's guest-physical address.  Raises
    OverflowError for what 32 bits do not hold.
    """
    return _words(LHREQ_INITIALIZE, base, pfn_limit, start)


def irq_request(irq: int) -> bytes:
    """LHREQ_IRQ: interrupt *irq* of the guest is pending.  Raises OverflowError."""
    return _words(LHREQ_IRQ, irq)


def eventfd_request(address: int, fd: int) -> bytes:
    """LHREQ_EVENTFD: a notification of guest-physical *address* is told to eventfd *fd*.  Raises OverflowError."""
    return _words(LHREQ_EVENTFD, address, fd)


def _words(*words: int) -> bytes:
    return b"".join(
        fitting(word, ctypes.c_uint32, "/dev/lguest request").to_bytes(WORD, "little") for word in words
    )
