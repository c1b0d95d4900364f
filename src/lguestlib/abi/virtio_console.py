"""The console, linux/virtio_console.h (virtio 1.3, 5.3)."""

from lguestlib.abi.layout import PackedStructure, Structure, u16, u32

VIRTIO_CONSOLE_F_SIZE = 0
VIRTIO_CONSOLE_F_MULTIPORT = 1
VIRTIO_CONSOLE_F_EMERG_WRITE = 2

VIRTIO_CONSOLE_DEVICE_READY = 0
VIRTIO_CONSOLE_PORT_ADD = 1
VIRTIO_CONSOLE_PORT_REMOVE = 2
VIRTIO_CONSOLE_PORT_READY = 3
VIRTIO_CONSOLE_CONSOLE_PORT = 4
VIRTIO_CONSOLE_RESIZE = 5
VIRTIO_CONSOLE_PORT_OPEN = 6
VIRTIO_CONSOLE_PORT_NAME = 7


class virtio_console_config(PackedStructure):
    """linux/virtio_console.h: the configuration; the driver may write *emerg_wr* alone."""

    cols: u16
    rows: u16
    max_nr_ports: u32
    emerg_wr: u32


class virtio_console_control(Structure):
    """linux/virtio_console.h: a message on a control queue, written by whoever sends it."""

    id: u32
    event: u16
    value: u16
