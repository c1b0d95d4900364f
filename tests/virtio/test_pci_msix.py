"""The MSI-X table and its pending bits (PCI Local Bus 3.0, 6.8.2)."""

from random import Random

import pytest

from lguestlib.memory.address import GuestAddress
from lguestlib.virtio.pci.effects import Message, VectorChanged
from lguestlib.virtio.pci.msix import MsixTable

ENABLE, MASK_ALL = 0x8000, 0x4000


def set_message(table: MsixTable, vector: int, address: int, data: int) -> list[VectorChanged]:
    at = 16 * vector
    changes = []
    for offset, value in ((0, address & 0xFFFF_FFFF), (4, address >> 32), (8, data)):
        changes += table.write(at + offset, value.to_bytes(4, "little"))
    return changes


def mask(table: MsixTable, vector: int, masked: bool) -> list[VectorChanged]:
    return table.write(16 * vector + 12, bytes([masked, 0, 0, 0]))


def test_every_vector_is_masked_at_first_with_an_empty_message() -> None:
    table = MsixTable(3)
    assert table.read(0, 8) + table.read(8, 8) == bytes(12) + b"\x01\0\0\0"
    assert (table.table_size, table.pending_size, table.enabled) == (48, 8, False)
    assert table.control(ENABLE) == []
    assert [table.message(vector) for vector in range(3)] == [None] * 3


def test_a_vector_sends_its_message_when_it_is_unmasked_and_msix_enabled() -> None:
    table = MsixTable(2)
    assert set_message(table, 1, 0xFEE0_1000, 0x31) == []
    assert mask(table, 1, False) == []
    message = Message(GuestAddress(0xFEE0_1000), 0x31)
    assert table.control(ENABLE) == [VectorChanged(1, message)]
    assert table.message(1) == message
    assert mask(table, 1, True) == [VectorChanged(1, None)]
    assert mask(table, 1, True) == []
    assert mask(table, 1, False) == [VectorChanged(1, message)]


def test_the_function_mask_masks_all_and_leaves_the_vectors_own() -> None:
    table = MsixTable(3)
    for vector in (0, 2):
        set_message(table, vector, 0xFEE0_0000, vector + 1)
        mask(table, vector, False)
    table.control(ENABLE)
    assert table.control(ENABLE | MASK_ALL) == [VectorChanged(0, None), VectorChanged(2, None)]
    assert [change.vector for change in table.control(ENABLE)] == [0, 2]
    assert [change.message for change in table.control(0)] == [None, None]


def test_a_message_that_moves_under_load_is_told_of() -> None:
    table = MsixTable(1)
    set_message(table, 0, 0xFEE0_0000, 1)
    mask(table, 0, False)
    table.control(ENABLE)
    [change] = table.write(8, b"\x55\0\0\0")
    assert change.message is not None and change.message.data == 0x55
    [change] = table.write(0, (0xFEE0_2000).to_bytes(8, "little"))
    assert change.message == (0xFEE0_2000, 0x55)


def test_only_the_mask_bit_of_the_control_can_be_set() -> None:
    table = MsixTable(1)
    table.write(8, b"\xff" * 8)
    assert table.read(8, 8) == b"\xff\xff\xff\xff\x01\0\0\0"


def test_masked_interrupts_pend_and_show() -> None:
    table = MsixTable(70)
    table.pending = {0, 3, 65}.__contains__
    for vector in (3,):
        set_message(table, vector, 0xFEE0_0000, 1)
        mask(table, vector, False)
    assert table.read_pending(0, 8) == b"\x09" + bytes(7), "not enabled is as good as masked"
    table.control(ENABLE)
    assert table.read_pending(0, 8) == b"\x01" + bytes(7)
    assert table.read_pending(0, 4) + table.read_pending(4, 4) == b"\x01" + bytes(7)
    assert table.read_pending(8, 4) == b"\x02\0\0\0"
    table.control(ENABLE | MASK_ALL)
    assert table.read_pending(0, 4) == b"\x09\0\0\0"


@pytest.mark.parametrize("count", [0, -1, 2049])
def test_a_table_has_1_to_2048_vectors(count: int) -> None:
    with pytest.raises(ValueError, match="vectors"):
        MsixTable(count)
    assert MsixTable(2048).table_size == 32768


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (2, 4), (4, 8), (32, 4), (28, 8), (1 << 20, 4), (0, 16)])
def test_t5_an_access_that_is_not_aligned_or_not_inside_does_nothing(offset: int, size: int) -> None:
    table = MsixTable(2)
    before = table.read(0, 8) + table.read(8, 8)
    assert table.write(offset, b"\xff" * size) == []
    assert table.read(offset, size) == bytes(size)
    assert table.refused == 2
    assert table.read(0, 8) + table.read(8, 8) == before
    assert table.read_pending(offset if offset % 8 else 8, size) == bytes(size)
    assert table.refused == 3


def test_t5_what_is_told_is_what_has_changed_whatever_is_written() -> None:
    random = Random(8)
    table = MsixTable(4)
    known: dict[int, Message | None] = dict.fromkeys(range(4))
    told = 0
    for _ in range(20_000):
        if random.random() < 0.1:
            changes = table.control(random.choice((0, ENABLE, ENABLE | MASK_ALL, MASK_ALL, 0xFFFF)))
        else:
            size = random.choice((4, 4, 8, 2))
            changes = table.write(random.randrange(0, 72, 2), random.choice((bytes(size), random.randbytes(size))))
        for change in changes:
            assert known[change.vector] != change.message
            known[change.vector] = change.message
            told += 1
        assert known == {vector: table.message(vector) for vector in range(4)}
    assert told > 1000
