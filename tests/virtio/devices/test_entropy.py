"""The entropy device: some random bytes, not more than it likes to give."""

from collections.abc import Sequence

import pytest
from virtio.devices.chains import UNTOUCHED, Request, only_its_own

from lguestlib.virtio.devices.entropy import REQUEST_MAX, Entropy


class Source:
    """Gives what it is asked for, or less."""

    def __init__(self, most: int = 1 << 40) -> None:
        self.most = most
        self.asked: list[int] = []

    def fill(self, buffers: Sequence[memoryview]) -> int:
        self.asked.append(sum(map(len, buffers)))
        done = 0
        for buffer in buffers:
            length = min(len(buffer), self.most - done)
            buffer[:length] = b"r" * length
            done += length
        return done


@pytest.mark.parametrize("room", [1, 2, 64, REQUEST_MAX - 1, REQUEST_MAX, REQUEST_MAX + 1, 3 * REQUEST_MAX])
@pytest.mark.parametrize("cuts", [(), (1,), (1, 40, 41), (REQUEST_MAX - 1, REQUEST_MAX + 1)])
def test_s19_s31_it_fills_from_the_start_up_to_its_own_limit(room: int, cuts: tuple[int, ...]) -> None:
    source = Source()
    request = Request(room=room, room_cuts=[cut for cut in cuts if cut < room])
    given = min(room, REQUEST_MAX)
    assert Entropy(source).serve_request(request.chain) == given
    assert source.asked == [given]
    assert request.writable == b"r" * given + bytes([UNTOUCHED]) * (room - given)


def test_s19_a_source_may_give_less() -> None:
    request = Request(room=100, room_cuts=(3, 9))
    assert Entropy(Source(5)).serve_request(request.chain) == 5
    assert request.writable == b"rrrrr" + bytes([UNTOUCHED]) * 95


def test_s33_without_room_the_source_is_not_asked() -> None:
    source = Source()
    assert Entropy(source).serve_request(Request(b"readable").chain) == 0
    assert source.asked == []


def test_it_has_one_queue_no_features_and_no_config() -> None:
    device = Entropy(Source())
    [queue] = device.queues()
    assert (device.name, Entropy(Source(), "dice").name) == ("entropy", "dice")
    assert queue.service == device.serve_request and not queue.from_outside
    assert (device.features, device.config()) == (0, b"") and only_its_own(device)
    device.write_config(0, b"\xff")
    device.activate(0)
    device.deactivate()
