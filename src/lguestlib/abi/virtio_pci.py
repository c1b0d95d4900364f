"""The PCI transport's capabilities and registers, linux/virtio_pci.h (virtio 1.3, 4.1.4)."""

import ctypes
from typing import Annotated

from lguestlib.abi.layout import Structure, u8, u16, u32

VIRTIO_PCI_CAP_COMMON_CFG = 1
VIRTIO_PCI_CAP_NOTIFY_CFG = 2
VIRTIO_PCI_CAP_ISR_CFG = 3
VIRTIO_PCI_CAP_DEVICE_CFG = 4
VIRTIO_PCI_CAP_PCI_CFG = 5
VIRTIO_PCI_CAP_SHARED_MEMORY_CFG = 8

VIRTIO_PCI_ISR_CONFIG = 0x2
VIRTIO_MSI_NO_VECTOR = 0xFFFF

VIRTIO_PCI_COMMON_Q_NDATA = 56
VIRTIO_PCI_COMMON_Q_RESET = 58
"""Offsets in bytes of the 16-bit registers behind virtio_pci_common_cfg."""


class virtio_pci_cap(Structure):
    """linux/virtio_pci.h: where in a BAR a structure is, in bytes; written by the device."""

    cap_vndr: u8
    cap_next: u8
    cap_len: u8
    cfg_type: u8
    bar: u8
    id: u8
    padding: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 2]
    offset: u32
    length: u32


class virtio_pci_cap64(Structure):
    """linux/virtio_pci.h: a capability whose offset and length have 64 bits; by the device."""

    cap: virtio_pci_cap
    offset_hi: u32
    length_hi: u32


class virtio_pci_notify_cap(Structure):
    """linux/virtio_pci.h: where notifications go, *notify_off_multiplier* bytes apart; by the device."""

    cap: virtio_pci_cap
    notify_off_multiplier: u32


class virtio_pci_cfg_cap(Structure):
    """linux/virtio_pci.h: access to a BAR through configuration space, where the driver says."""

    cap: virtio_pci_cap
    pci_cfg_data: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 4]


class virtio_pci_common_cfg(Structure):
    """linux/virtio_pci.h: the registers; the driver may write all but four.

    Those are *device_feature*, *num_queues*, *config_generation* and *queue_notify_off*.
    """

    device_feature_select: u32
    device_feature: u32
    guest_feature_select: u32
    guest_feature: u32
    msix_config: u16
    num_queues: u16
    device_status: u8
    config_generation: u8
    queue_select: u16
    queue_size: u16
    queue_msix_vector: u16
    queue_enable: u16
    queue_notify_off: u16
    queue_desc_lo: u32
    queue_desc_hi: u32
    queue_avail_lo: u32
    queue_avail_hi: u32
    queue_used_lo: u32
    queue_used_hi: u32
