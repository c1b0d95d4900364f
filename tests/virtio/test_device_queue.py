"""One way to make either kind of queue, and its record."""

import pytest
from virtio.packed_rings import PACKED
from virtio.rings import PLAIN, memory_of, raised

from lguestlib.memory.address import GuestAddress
from lguestlib.virtio import errors
from lguestlib.virtio.device_queue import inflight_area_size, inflight_record, new_device_queue
from lguestlib.virtio.inflight import InflightRecord
from lguestlib.virtio.inflight_packed import PackedInflightRecord
from lguestlib.virtio.layout import QueueLayout
from lguestlib.virtio.packed_device import PackedDeviceQueue
from lguestlib.virtio.queue_state import QueueState
from lguestlib.virtio.split_device import SplitDeviceQueue

LAYOUT = QueueLayout.contiguous(1, 4, GuestAddress(0))


@pytest.mark.parametrize(
    ("features", "kind", "record_kind"),
    [(PLAIN, SplitDeviceQueue, InflightRecord), (PACKED, PackedDeviceQueue, PackedInflightRecord)],
    ids=["split", "packed"],
)
def test_the_features_say_which_kind_of_queue_and_of_record(
    features: int, kind: type, record_kind: type
) -> None:
    area = memoryview(bytearray(inflight_area_size(2, 4, features)))
    with memory_of((0, 4096)) as memory:
        for number in (0, 1):
            record = inflight_record(number, area, 4, features)
            assert type(record) is record_kind
            queue = new_device_queue(LAYOUT, memory, features, inflight=record)
            assert type(queue) is kind and not queue.has_available()
            assert queue.state == QueueState.start(features)
            queue.release()
        for number, size in ((2, 4), (1, 8), (-1, 4), (0, 0)):
            with pytest.raises(ValueError, match="inflight record"):
                inflight_record(number, area, size, features)


def test_a_split_ring_has_no_state_of_its_used_half() -> None:
    with memory_of((0, 4096)) as memory:
        error = raised(lambda: new_device_queue(LAYOUT, memory, PLAIN, QueueState(0, 1)))
        assert isinstance(error, errors.QueueStateError)
