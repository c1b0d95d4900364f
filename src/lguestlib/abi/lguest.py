"""/dev/lguest and its device page, linux/lguest_launcher.h (Linux 2.6.30 to 3.19)."""

from lguestlib.abi.layout import PackedStructure, u8, u16, u32

LHREQ_INITIALIZE = 0
LHREQ_IRQ = 2
LHREQ_EVENTFD = 4

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
