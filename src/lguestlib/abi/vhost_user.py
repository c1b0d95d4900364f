"""vhost-user on the wire: QEMU's docs/interop/vhost-user.rst, and linux/vhost_types.h for its ring messages.

Numbers are in the machine's byte order, which is the same at both ends.
"""

from lguestlib.abi.layout import NativeStructure, u16, u32, u64

VHOST_USER_VERSION = 0x1
VHOST_USER_VERSION_MASK = 0x3
VHOST_USER_REPLY_MASK = 0x4
VHOST_USER_NEED_REPLY_MASK = 0x8

VHOST_USER_VRING_IDX_MASK = 0xFF
VHOST_USER_VRING_NOFD_MASK = 0x100
VHOST_VRING_F_LOG = 0

VHOST_F_LOG_ALL = 26
VHOST_USER_F_PROTOCOL_FEATURES = 30

VHOST_USER_PROTOCOL_F_MQ = 0
VHOST_USER_PROTOCOL_F_LOG_SHMFD = 1
VHOST_USER_PROTOCOL_F_RARP = 2
VHOST_USER_PROTOCOL_F_REPLY_ACK = 3
VHOST_USER_PROTOCOL_F_NET_MTU = 4
VHOST_USER_PROTOCOL_F_BACKEND_REQ = 5
VHOST_USER_PROTOCOL_F_CROSS_ENDIAN = 6
VHOST_USER_PROTOCOL_F_CRYPTO_SESSION = 7
VHOST_USER_PROTOCOL_F_PAGEFAULT = 8
VHOST_USER_PROTOCOL_F_CONFIG = 9
VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD = 10
VHOST_USER_PROTOCOL_F_HOST_NOTIFIER = 11
VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD = 12
VHOST_USER_PROTOCOL_F_RESET_DEVICE = 13
VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS = 14
VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS = 15
VHOST_USER_PROTOCOL_F_STATUS = 16

VHOST_USER_GET_FEATURES = 1
VHOST_USER_SET_FEATURES = 2
VHOST_USER_SET_OWNER = 3
VHOST_USER_RESET_OWNER = 4
VHOST_USER_SET_MEM_TABLE = 5
VHOST_USER_SET_LOG_BASE = 6
VHOST_USER_SET_LOG_FD = 7
VHOST_USER_SET_VRING_NUM = 8
VHOST_USER_SET_VRING_ADDR = 9
VHOST_USER_SET_VRING_BASE = 10
VHOST_USER_GET_VRING_BASE = 11
VHOST_USER_SET_VRING_KICK = 12
VHOST_USER_SET_VRING_CALL = 13
VHOST_USER_SET_VRING_ERR = 14
VHOST_USER_GET_PROTOCOL_FEATURES = 15
VHOST_USER_SET_PROTOCOL_FEATURES = 16
VHOST_USER_GET_QUEUE_NUM = 17
VHOST_USER_SET_VRING_ENABLE = 18
VHOST_USER_SET_BACKEND_REQ_FD = 21
VHOST_USER_GET_CONFIG = 24
VHOST_USER_SET_CONFIG = 25
VHOST_USER_GET_INFLIGHT_FD = 31
VHOST_USER_SET_INFLIGHT_FD = 32
VHOST_USER_RESET_DEVICE = 34
VHOST_USER_GET_MAX_MEM_SLOTS = 36
VHOST_USER_ADD_MEM_REG = 37
VHOST_USER_REM_MEM_REG = 38
VHOST_USER_SET_STATUS = 39
VHOST_USER_GET_STATUS = 40

VHOST_USER_BACKEND_CONFIG_CHANGE_MSG = 2

VHOST_USER_CONFIG_SIZE_MAX = 256
"""Bytes of config space that one message carries at most."""


class vhost_user_header(NativeStructure):
    """Before every payload, whose bytes are *size*."""

    request: u32
    flags: u32
    size: u32


class vhost_vring_state(NativeStructure):
    """linux/vhost_types.h: queue *index*, and a number that the request gives a meaning."""

    index: u32
    num: u32


class vhost_vring_addr(NativeStructure):
    """linux/vhost_types.h: the parts of queue *index*, at addresses of the front-end's process.

    *log_guest_addr* is the guest-physical address at which writes of the used
    ring are logged.
    """

    index: u32
    flags: u32
    desc_user_addr: u64
    used_user_addr: u64
    avail_user_addr: u64
    log_guest_addr: u64


class vhost_user_mem_region(NativeStructure):
    """Guest memory that is *memory_size* bytes at *mmap_offset* of a file, *userspace_addr* in the front-end."""

    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64
    mmap_offset: u64


class vhost_user_mem_table(NativeStructure):
    """What stands before the regions of a memory table; of a single region, eight bytes of padding."""

    nregions: u32
    padding: u32


class vhost_user_log(NativeStructure):
    """The dirty log: bytes of the file, and the offset in it."""

    mmap_size: u64
    mmap_offset: u64


class vhost_user_inflight(NativeStructure):
    """The record of requests in flight.  Without the structure's end padding it has 20 bytes; both are sent."""

    mmap_size: u64
    mmap_offset: u64
    num_queues: u16
    queue_size: u16


class vhost_user_config(NativeStructure):
    """What stands before *size* bytes of the config space at *offset*."""

    offset: u32
    size: u32
    flags: u32
