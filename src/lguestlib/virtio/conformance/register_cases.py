"""virtio-mmio as a driver meets it, register by register: rows T1 and T5 to T7 (virtio 1.3, 4.2.2)."""

from lguestlib.abi import virtio_mmio as mmio
from lguestlib.virtio.conformance.case import Access, Case, RegisterCase, WatchedCase
from lguestlib.virtio.features import Feature
from lguestlib.virtio.status import Status

A, D, F, OK = Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK

QUEUE_SIZES = (8, 256, 1)
"""The queues of the device that these are about."""

DEVICE_FEATURE = 1
"""And a feature bit of its own that it offers."""

UNOFFERED = 1 << 3


def _put(offset: int, value: int, size: int = 4) -> Access:
    return Access(offset, write=value, size=size)


def _get(offset: int, expect: int, size: int = 4) -> Access:
    return Access(offset, expect=expect, size=size)


def _accepted(features: int) -> tuple[Access, ...]:
    return (
        _put(mmio.VIRTIO_MMIO_STATUS, A), _put(mmio.VIRTIO_MMIO_STATUS, A | D),
        _put(mmio.VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0), _put(mmio.VIRTIO_MMIO_DRIVER_FEATURES, features & 0xFFFF_FFFF),
        _put(mmio.VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1), _put(mmio.VIRTIO_MMIO_DRIVER_FEATURES, features >> 32),
        _put(mmio.VIRTIO_MMIO_STATUS, A | D | F),
    )  # fmt: skip


def _notify(value: int, queue: int) -> Access:
    return Access(mmio.VIRTIO_MMIO_QUEUE_NOTIFY, write=value, notifies=queue)


_AGREED = _accepted(int(Feature.VERSION_1))

REGISTER_CASES: tuple[Case, ...] = (
    RegisterCase(("T1",), "acceptable features stay agreed", "3.1.1", (
        *_AGREED, _get(mmio.VIRTIO_MMIO_STATUS, A | D | F),
    )),
    RegisterCase(("T1",), "FEATURES_OK does not stay on what was not offered", "3.1.1", (
        *_accepted(int(Feature.VERSION_1) | UNOFFERED), _get(mmio.VIRTIO_MMIO_STATUS, A | D),
    )),
    RegisterCase(("T1", "T2"), "FEATURES_OK does not stay without VERSION_1", "2.2.3", (
        *_accepted(DEVICE_FEATURE), _get(mmio.VIRTIO_MMIO_STATUS, A | D),
    )),
    RegisterCase(("T1",), "DRIVER_OK does not come before FEATURES_OK", "2.1", (
        _put(mmio.VIRTIO_MMIO_STATUS, A | D | OK), _get(mmio.VIRTIO_MMIO_STATUS, A | D),
    )),
    RegisterCase(("T1",), "bits are not taken back", "2.1.1", (
        *_AGREED, _put(mmio.VIRTIO_MMIO_STATUS, A), _get(mmio.VIRTIO_MMIO_STATUS, A | D | F),
    )),
    RegisterCase(("T5",), "an access of another width reads 0 and writes nothing", "4.2.2", (
        _get(mmio.VIRTIO_MMIO_MAGIC_VALUE, 0, 1), _get(mmio.VIRTIO_MMIO_MAGIC_VALUE, 0, 2),
        _get(mmio.VIRTIO_MMIO_MAGIC_VALUE, 0, 8), _put(mmio.VIRTIO_MMIO_STATUS, A, 1),
        _put(mmio.VIRTIO_MMIO_STATUS, A, 8), _get(mmio.VIRTIO_MMIO_STATUS, 0),
    )),
    RegisterCase(("T5",), "an access between two registers reads 0 and writes nothing", "4.2.2", (
        _get(mmio.VIRTIO_MMIO_MAGIC_VALUE + 1, 0), _put(mmio.VIRTIO_MMIO_STATUS + 2, A),
        _get(mmio.VIRTIO_MMIO_STATUS, 0), _get(0x0F8, 0), _put(mmio.VIRTIO_MMIO_MAGIC_VALUE, 0),
        _get(mmio.VIRTIO_MMIO_MAGIC_VALUE, 0x7472_6976),
    )),
    RegisterCase(("T5",), "what is not pending is acknowledged", "4.2.2", (
        _put(mmio.VIRTIO_MMIO_INTERRUPT_ACK, 0xFFFF_FFFF), _get(mmio.VIRTIO_MMIO_INTERRUPT_STATUS, 0),
    )),
    RegisterCase(("T6", "CVE-2011-2512"), "a queue that does not exist", "4.2.2", (
        *_AGREED, _put(mmio.VIRTIO_MMIO_QUEUE_SEL, 3), _get(mmio.VIRTIO_MMIO_QUEUE_NUM_MAX, 0),
        _put(mmio.VIRTIO_MMIO_QUEUE_NUM, 8), _put(mmio.VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000),
        _put(mmio.VIRTIO_MMIO_QUEUE_READY, 1), _get(mmio.VIRTIO_MMIO_QUEUE_READY, 0),
        _put(mmio.VIRTIO_MMIO_QUEUE_RESET, 1), _get(mmio.VIRTIO_MMIO_QUEUE_RESET, 0),
        _put(mmio.VIRTIO_MMIO_QUEUE_NOTIFY, 3), _put(mmio.VIRTIO_MMIO_QUEUE_NOTIFY, 0xFFFF_FFFF),
    )),
    RegisterCase(("T6", "CVE-2013-4150", "CVE-2014-0150"), "a queue numbered -1", "4.2.2", (
        *_AGREED, _put(mmio.VIRTIO_MMIO_QUEUE_SEL, 0xFFFF_FFFF), _get(mmio.VIRTIO_MMIO_QUEUE_NUM_MAX, 0),
        _put(mmio.VIRTIO_MMIO_QUEUE_READY, 1), _get(mmio.VIRTIO_MMIO_QUEUE_READY, 0),
    )),
    RegisterCase(("T6",), "a page of features that does not exist", "4.2.2", (
        _put(mmio.VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2), _get(mmio.VIRTIO_MMIO_DEVICE_FEATURES, 0),
        _put(mmio.VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0xFFFF_FFFF), _get(mmio.VIRTIO_MMIO_DEVICE_FEATURES, 0),
    )),
    RegisterCase(("T6",), "a notification with data is for the queue in its low half alone", "4.2.3.3", (
        *_accepted(int(Feature.VERSION_1 | Feature.NOTIFICATION_DATA)),
        _notify(1, 1), _notify(0x8005_0001, 1), _notify(0xFFFF_0000, 0), _notify(0x0001_0002, 2),
        _notify(0x0000_0003, -1), _notify(0x8000_FFFF, -1), _notify(0xFFFF_FFFF, -1),
    )),
    RegisterCase(("T6",), "a notification is a queue's number where data were not agreed on", "4.2.3.3", (
        *_AGREED, _notify(2, 2), _notify(0x1_0000, -1), _notify(0x8001_0001, -1),
    )),
    RegisterCase(("T6",), "a queue is not ready before features are agreed", "4.2.3.2", (
        _put(mmio.VIRTIO_MMIO_QUEUE_SEL, 0), _put(mmio.VIRTIO_MMIO_QUEUE_NUM, 8),
        _put(mmio.VIRTIO_MMIO_QUEUE_READY, 1), _get(mmio.VIRTIO_MMIO_QUEUE_READY, 0),
    )),
    RegisterCase(("T6",), "what is neither 0 nor 1 makes no queue ready", "4.2.2", (
        *_AGREED, _put(mmio.VIRTIO_MMIO_QUEUE_SEL, 0), _put(mmio.VIRTIO_MMIO_QUEUE_READY, 2),
        _get(mmio.VIRTIO_MMIO_QUEUE_READY, 0),
    )),
    RegisterCase(("T7", "T4"), "a queue reads ready until it has stopped", "4.2.2.2", (
        *_AGREED, _put(mmio.VIRTIO_MMIO_QUEUE_SEL, 0), _put(mmio.VIRTIO_MMIO_QUEUE_READY, 1),
        _get(mmio.VIRTIO_MMIO_QUEUE_READY, 1), _put(mmio.VIRTIO_MMIO_QUEUE_READY, 0),
        _get(mmio.VIRTIO_MMIO_QUEUE_READY, 1),
    )),
    RegisterCase(("T3",), "the status reads as before until the reset is over", "2.4.1", (
        *_AGREED, _put(mmio.VIRTIO_MMIO_STATUS, 0), _get(mmio.VIRTIO_MMIO_STATUS, A | D | F),
        _put(mmio.VIRTIO_MMIO_STATUS, A | D | F | OK), _get(mmio.VIRTIO_MMIO_STATUS, A | D | F),
    )),
    WatchedCase(("T3", "CVE-2026-45782"), "a completion after the reset touches nothing", "2.4.1", (
        "tests/virtio/test_split_device.py"
        "::test_t3_cve_2026_45782_a_completion_that_comes_after_the_queues_end_touches_nothing",
    )),
    WatchedCase(("T1", "T5", "T6"), "any sequence of accesses whatever", "4.2.2", (
        "tests/virtio/test_mmio.py::test_t1_t5_t6_any_sequence_of_accesses_leaves_a_state_the_specification_knows",
    )),
)  # fmt: skip
"""What of the T rows shows in registers."""
