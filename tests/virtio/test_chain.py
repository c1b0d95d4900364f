"""A chain's buffers: parts of them, copies out of them and into them."""

from itertools import product

import pytest
from virtio.rings import Descriptor, memory_of, refusal

from lguestlib.abi.layout import offset_of
from lguestlib.abi.virtio_ring import vring_desc
from lguestlib.memory.address import GuestAddress
from lguestlib.virtio import errors
from lguestlib.virtio.chain import DESCRIPTOR, Chain, part, walk
from lguestlib.virtio.layout import DescriptorIndex

CUTS = [lengths for count in range(5) for lengths in product((1, 2, 5), repeat=count)]
"""Lengths of up to four buffers."""


def buffers_of(lengths: tuple[int, ...]) -> tuple[tuple[memoryview, ...], bytearray]:
    """Views of those lengths, and the bytes behind them all."""
    data = bytearray(range(sum(lengths)))
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    return tuple(memoryview(data)[end - length : end] for end, length in zip(ends, lengths)), data


def readable(lengths: tuple[int, ...]) -> tuple[Chain, bytearray]:
    chain = Chain(DescriptorIndex(0))
    chain.readable, data = buffers_of(lengths)
    chain.readable_length = len(data)
    return chain, data


def test_a_part_is_what_slicing_the_whole_would_give() -> None:
    for lengths in CUTS:
        buffers, data = buffers_of(lengths)
        for start, length in product(range(len(data) + 3), range(len(data) + 3)):
            pieces = part(buffers, start, length)
            assert b"".join(pieces) == data[start : start + length], (lengths, start, length)
            assert all(pieces)


def test_a_part_is_a_view_and_no_copy() -> None:
    buffers, data = buffers_of((3, 4, 2))
    for piece in part(buffers, 2, 6):
        piece[:] = bytes(len(piece))
    assert data == bytes([0, 1, 0, 0, 0, 0, 0, 0, 8])


def test_read_copies_from_the_start_up_to_its_limit() -> None:
    for lengths in CUTS:
        chain, data = readable(lengths)
        assert chain.read() == data
        for limit in range(len(data) + 2):
            assert chain.read(limit) == data[:limit]


def test_s31_read_has_a_limit_of_its_own() -> None:
    for lengths in ((100_000,), (1000, 99_000)):
        chain = Chain(DescriptorIndex(0))
        chain.readable = tuple(memoryview(bytearray(length)) for length in lengths)
        chain.readable_length = 100_000
        assert len(chain.read()) == 65536


def test_write_fills_from_the_start_and_tells_how_much_fitted() -> None:
    for lengths in CUTS:
        for count in range(sum(lengths) + 3):
            chain = Chain(DescriptorIndex(0))
            chain.writable, data = buffers_of(lengths)
            chain.writable_length = len(data)
            before, new = bytes(data), bytes(range(100, 100 + count))
            assert chain.write(new) == min(count, len(data))
            assert data == new[: len(data)] + before[count:]


def test_a_descriptor_is_the_kernels() -> None:
    offsets = [offset_of(vring_desc, name) for name in ("addr", "len", "flags", "next")]
    values = (0x1122334455667788, 0x99AABBCC, 0xDDEE, 0xFF01)
    packed = DESCRIPTOR.pack(*values)
    assert packed == bytes(vring_desc(*values)) and offsets == [0, 8, 12, 14]


@pytest.mark.parametrize("head", [1, 2, 0xFFFF])
def test_s3_walk_judges_the_head_too(head: int) -> None:
    with memory_of((0, 4096)) as memory, memory.views() as views:
        table = Descriptor(0, 16).packed()
        with pytest.raises(errors.HeadOutOfRange) as caught:
            walk(2, DescriptorIndex(head), table, 1, views, True)
        assert refusal(caught.value) == ("HeadOutOfRange", {"queue": 2, "head": head, "size": 1})


def test_walk_takes_a_copy_of_a_table_as_well_as_the_table_itself() -> None:
    with memory_of((0, 4096)) as memory, memory.views() as views:
        table = Descriptor(64, 16, 1, 1).packed() + Descriptor(128, 32, 2).packed()
        memory.write(GuestAddress(0), table)
        live = walk(0, DescriptorIndex(0), views.slice(GuestAddress(0), 32), 2, views, False)
        copied = walk(0, DescriptorIndex(0), table, 2, views, False)
        assert [len(view) for view in (*live[0], *live[1])] == [16, 32] and live[2:] == copied[2:] == (16, 32)
        for view in (*live[0], *live[1], *copied[0], *copied[1]):
            view.release()
