"""lguest's device page, byte for byte as its C launcher filled it in (Linux 3.11)."""

import ctypes
import errno

import pytest

from lguestlib.abi import lguest, virtio_ids
from lguestlib.abi.layout import offset_of
from lguestlib.abi.lguest import lguest_device_desc, lguest_vqconfig


def test_the_structures_have_no_padding() -> None:
    names = ["type", "num_vq", "feature_len", "config_len", "status"]
    assert [offset_of(lguest_device_desc, name) for name in names] == [0, 1, 2, 3, 4]
    assert [offset_of(lguest_vqconfig, name) for name in ("num", "irq", "pfn")] == [0, 2, 4]
    assert (ctypes.sizeof(lguest_device_desc), ctypes.sizeof(lguest_vqconfig)) == (5, 8)


def test_the_requests_are_those_of_the_kernel_without_the_two_it_refuses() -> None:
    assert (lguest.LHREQ_INITIALIZE, lguest.LHREQ_IRQ, lguest.LHREQ_EVENTFD) == (0, 2, 4)
    assert (lguest.LGUEST_IRQS, lguest.LGUEST_VRING_ALIGN) == (32, 4096)


@pytest.mark.parametrize(
    ("type_", "queues", "features", "config", "length"),
    [
        (virtio_ids.VIRTIO_ID_NET, 2, 4, 10, 39),
        (virtio_ids.VIRTIO_ID_BLOCK, 1, 2, 16, 33),
        (virtio_ids.VIRTIO_ID_RNG, 1, 0, 0, 13),
        (virtio_ids.VIRTIO_ID_CONSOLE, 2, 0, 0, 21),
    ],
)
def test_a_descriptor_with_what_follows_it_is_as_long_as_the_c_launchers(
    type_: int, queues: int, features: int, config: int, length: int
) -> None:
    descriptor = lguest_device_desc(type=type_, num_vq=queues, feature_len=features, config_len=config)
    assert bytes(descriptor) == bytes([type_, queues, features, config, 0])
    fixed = ctypes.sizeof(descriptor) + queues * ctypes.sizeof(lguest_vqconfig)
    assert fixed + 2 * features + config == length


def test_a_queue_is_told_little_endian() -> None:
    assert bytes(lguest_vqconfig(num=256, irq=1, pfn=0x4001)) == bytes([0, 1, 1, 0, 1, 0x40, 0, 0])


def test_requests_are_32_bit_words_whatever_this_interpreters_are() -> None:
    assert lguest.initialize_request(0xB700_0000, 0x4101, 0x0100_0000) == bytes(
        [0, 0, 0, 0, 0, 0, 0, 0xB7, 1, 0x41, 0, 0, 0, 0, 0, 1]
    )
    assert lguest.irq_request(2) == bytes([2, 0, 0, 0, 2, 0, 0, 0])
    assert lguest.eventfd_request(0x0400_1000, 7) == bytes([4, 0, 0, 0, 0, 0x10, 0, 4, 7, 0, 0, 0])


def test_what_a_word_does_not_hold_is_refused() -> None:
    with pytest.raises(OverflowError, match="32 bits"):
        lguest.initialize_request(1 << 32, 1, 0)
    with pytest.raises(OverflowError, match="32 bits"):
        lguest.irq_request(-1)
    with pytest.raises(OverflowError, match="32 bits"):
        lguest.eventfd_request(1 << 32, 3)


def test_a_restart_is_the_kernels_errno() -> None:
    assert errno.errorcode[lguest.ERESTART] == "ERESTART"
