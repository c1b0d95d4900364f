"""Guest memory as a whole: look-up, buffers that cross regions, ordered release."""

import gc
import os
import threading
from bisect import bisect_right
from random import Random

import pytest

from lguestlib.abi.mmap import address_of
from lguestlib.memory.address import GuestAddress
from lguestlib.memory.guest import AddressError, GuestMemory
from lguestlib.memory.region import Region

PAGE = 4096


def memory_of(*ranges: tuple[int, int]) -> GuestMemory:
    return GuestMemory(Region.anonymous(GuestAddress(base), size) for base, size in ranges)


class Oracle:
    """What is memory, address by address, in a space small enough to write down."""

    def __init__(self, memory: GuestMemory, size: int) -> None:
        self.owner: list[int | None] = [None] * (size + 1)
        self.ends = set()
        for index, region in enumerate(memory.regions):
            for address in range(region.base, region.end):
                self.owner[address] = index
            self.ends.add(int(region.end))

    def holds(self, address: int, length: int) -> bool:
        if address < 0 or length < 0:
            return False
        if not length:
            return self.at(address) is not None or address in self.ends
        return all(self.at(byte) is not None for byte in range(address, address + length))

    def at(self, address: int) -> int | None:
        return self.owner[address] if 0 <= address < len(self.owner) else None

    def pieces(self, address: int, length: int) -> list[int]:
        """The lengths of the runs that stay in one region."""
        runs: list[tuple[int | None, int]] = []
        for byte in range(address, address + length):
            owner = self.at(byte)
            if runs and runs[-1][0] == owner:
                runs[-1] = (owner, runs[-1][1] + 1)
            else:
                runs.append((owner, 1))
        return [count for _, count in runs]


def random_memory(random: Random, regions: int, space: int) -> GuestMemory:
    """Some regions in an address space, about half of them with a neighbour."""
    edges = sorted(random.sample(range(space), 2 * regions))
    ranges = []
    for low, high in zip(edges[::2], edges[1::2]):
        middle = random.randrange(low, high)
        ranges += [(low, middle - low), (middle, high - middle)] if middle > low else [(low, high - low)]
    random.shuffle(ranges)
    return memory_of(*ranges)


@pytest.mark.parametrize("regions", [1, 2, 5, 40])
def test_s14_s16_s17_look_up_agrees_with_writing_every_address_down(regions: int) -> None:
    random = Random(regions)
    space = 400
    for _ in range(12):
        memory = random_memory(random, regions, space)
        oracle = Oracle(memory, space)
        content = [random.randrange(256) for _ in range(space + 1)]
        with memory, memory.views() as views:
            for region, root in zip(memory.regions, views.roots):
                root[:] = bytes(content[region.base : region.end])
            for _ in range(400):
                address, length = random.randrange(-3, space + 3), random.randrange(-1, 60)
                at = GuestAddress(address)
                assert memory.contains(at, length) is oracle.holds(address, length), (address, length)
                if not oracle.holds(address, length):
                    for call in (views.slice, views.slices, memory.read):
                        with pytest.raises(AddressError):
                            call(at, length)
                    continue
                expected, pieces = bytes(content[address : address + length]), oracle.pieces(address, length)
                assert memory.read(at, length) == expected
                assert [len(piece) for piece in views.slices(at, length)] == pieces
                if len(pieces) == 1:
                    assert bytes(views.slice(at, length)) == expected
                    assert memory.host_address(at, length) == address_of(views.slice(at, length))
                elif length:
                    with pytest.raises(AddressError):
                        views.slice(at, length)
                    with pytest.raises(AddressError):
                        memory.host_address(at, length)


def test_look_up_finds_the_right_one_of_a_thousand() -> None:
    random = Random(3)
    bases = sorted({random.randrange(1, 1 << 40) for _ in range(1000)})
    sizes = [
        min(after - base, random.randrange(1, 1 << 14)) for base, after in zip(bases, [*bases[1:], 1 << 41])
    ]
    memory = memory_of(*zip(bases, sizes))
    with memory, memory.views() as views:
        for _ in range(3000):
            address = random.choice(bases) + random.randrange(-3, 1 << 14)
            index = bisect_right(bases, address) - 1
            inside = index >= 0 and address < bases[index] + sizes[index]
            assert memory.contains(GuestAddress(address), 1) is inside
            if inside:
                with views.slice(GuestAddress(address), 1) as piece:
                    assert address_of(piece) == memory.regions[index].host_address + address - bases[index]


@pytest.mark.parametrize("base", [0, 0x1000, (1 << 64) - PAGE])
def test_s16_the_exact_end_is_legal_and_one_more_is_not(base: int) -> None:
    with GuestMemory.anonymous(PAGE, GuestAddress(base)) as memory, memory.views() as views:
        at = GuestAddress
        for length in (0, 1, 100, PAGE):
            start = at(base + PAGE - length)
            assert memory.contains(start, length)
            assert len(views.slice(start, length)) == length
            assert sum(map(len, views.slices(start, length))) == length
            assert not memory.contains(start, length + 1)
            for call in (views.slice, views.slices, memory.read, memory.host_address, memory.zero):
                with pytest.raises(AddressError):
                    call(start, length + 1)


@pytest.mark.parametrize(
    ("address", "length"),
    [
        ((1 << 64) - 1, 2), ((1 << 64) - PAGE, 1 << 64), ((1 << 64) - 1, (1 << 64) - 1), (1 << 64, 0),
        (1 << 64, PAGE), ((1 << 64) + 16, 16), (16, 1 << 64), (16, (1 << 64) - 16), (16, (1 << 128) + 1),
        (-1, 1), (-(1 << 64), 16), (16, -1), (0, -PAGE),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ranges", [((0, PAGE),), ((0, PAGE), (PAGE, PAGE), (1 << 32, PAGE))])
def test_s16_nothing_wraps_and_nothing_over_64_bits_is_cut(
    address: int, length: int, ranges: tuple[tuple[int, int], ...]
) -> None:
    with memory_of(*ranges) as memory, memory.views() as views:
        assert not memory.contains(GuestAddress(address), length)
        for call in (views.slice, views.slices, memory.read, memory.host_address, memory.zero):
            with pytest.raises(AddressError) as caught:
                call(GuestAddress(address), length)
            assert (caught.value.address, caught.value.length) == (address, length)


def test_s14_a_zero_length_is_no_view_but_no_licence_for_its_address() -> None:
    with memory_of((PAGE, PAGE), (2 * PAGE, PAGE), (8 * PAGE, PAGE)) as memory, memory.views() as views:
        for address in (PAGE, PAGE + 5, 2 * PAGE, 3 * PAGE, 8 * PAGE, 9 * PAGE):
            assert views.slices(GuestAddress(address), 0) == []
            assert memory.contains(GuestAddress(address), 0)
        for address in (0, PAGE - 1, 3 * PAGE + 1, 8 * PAGE - 1, 9 * PAGE + 1, 1 << 64):
            assert not memory.contains(GuestAddress(address), 0)
            for call in (views.slice, views.slices, memory.read):
                with pytest.raises(AddressError):
                    call(GuestAddress(address), 0)


def test_s17_a_write_crosses_regions_or_leaves_memory_alone() -> None:
    with memory_of((0, PAGE), (PAGE, 16), (PAGE + 16, PAGE), (4 * PAGE, PAGE)) as memory:
        data = bytes(range(256)) * 4
        memory.write(GuestAddress(PAGE - 100), data)
        assert memory.read(GuestAddress(PAGE - 100), len(data)) == data
        before = memory.read(GuestAddress(0), 2 * PAGE + 16)
        with pytest.raises(AddressError):
            memory.write(GuestAddress(2 * PAGE), bytes([1]) * 100)
        with pytest.raises(AddressError):
            memory.zero(GuestAddress(PAGE - 100), 2 * PAGE)
        assert memory.read(GuestAddress(0), 2 * PAGE + 16) == before
        memory.zero(GuestAddress(PAGE - 50), 100)
        expected = bytearray(before)
        expected[PAGE - 50 : PAGE + 50] = bytes(100)
        assert memory.read(GuestAddress(0), 2 * PAGE + 16) == expected


def test_zeroing_reaches_every_byte_and_no_other() -> None:
    size = 3 * 65536
    with GuestMemory.anonymous(size) as memory:
        for start, length in ((1, size - 2), (0, 65536), (5, 65536), (65535, 65537), (7, 0)):
            memory.write(GuestAddress(0), b"\xff" * size)
            memory.zero(GuestAddress(start), length)
            expected = b"\xff" * start + bytes(length) + b"\xff" * (size - start - length)
            assert memory.read(GuestAddress(0), size) == expected


def test_a_write_takes_the_bytes_of_any_buffer() -> None:
    with GuestMemory.anonymous(PAGE) as memory:
        words = memoryview(bytearray(b"abcdefgh")).cast("I")
        for data in (b"abcdefgh", bytearray(b"abcdefgh"), words):
            memory.zero(GuestAddress(0), 16)
            memory.write(GuestAddress(3), data)
            assert memory.read(GuestAddress(0), 12) == b"\0\0\0abcdefgh\0"


def test_views_are_the_memory_itself() -> None:
    with GuestMemory.anonymous(PAGE) as memory, memory.views() as one, memory.views() as other:
        one.slice(GuestAddress(8), 8).cast("Q")[0] = 0x1122334455667788
        assert bytes(other.slice(GuestAddress(8), 8)) == bytes.fromhex("8877665544332211")


def test_a_host_address_is_one_of_a_byte_at_least_unless_asked() -> None:
    with GuestMemory.anonymous(PAGE) as memory:
        first = memory.host_address(GuestAddress(0))
        assert memory.host_address(GuestAddress(PAGE - 1)) == first + PAGE - 1
        assert memory.host_address(GuestAddress(PAGE), 0) == first + PAGE
        with pytest.raises(AddressError):
            memory.host_address(GuestAddress(PAGE))


def test_a_view_tells_its_guest_address_whichever_region_it_is_in() -> None:
    bases = (0, PAGE, 0x10_0000, (1 << 64) - PAGE)
    with GuestMemory(Region.anonymous(GuestAddress(base), PAGE) for base in bases) as memory:
        with memory.views() as views:
            for base in bases:
                for offset, length in ((0, 1), (0, PAGE), (7, 9), (PAGE - 1, 1)):
                    with views.slice(GuestAddress(base + offset), length) as view:
                        assert views.guest_address(view) == base + offset
            with pytest.raises(ValueError, match="no guest memory is mapped"):
                views.guest_address(memoryview(bytearray(8)))


def test_the_largest_region_is_named() -> None:
    with memory_of((0, 16), (64, 128), (1024, 64)) as memory, memory.views() as views:
        assert views.largest == 1


@pytest.mark.parametrize(
    "ranges",
    [((0, PAGE), (PAGE - 1, PAGE)), ((0, PAGE), (0, PAGE)), ((0, 4 * PAGE), (PAGE, PAGE)), ((8, 8), (0, 9))],
)
def test_t13_overlapping_regions_are_refused_and_stay_the_callers(
    ranges: tuple[tuple[int, int], ...],
) -> None:
    regions = [Region.anonymous(GuestAddress(base), size) for base, size in ranges]
    with pytest.raises(ValueError, match="overlap"):
        GuestMemory(regions)
    for region in regions:
        region.view().release()
        region.close()


def test_no_region_is_no_memory() -> None:
    with pytest.raises(ValueError, match="no region"):
        GuestMemory([])


def test_y4_close_unmaps_what_it_can_and_the_rest_later() -> None:
    memory = memory_of((0, PAGE), (PAGE, PAGE), (2 * PAGE, PAGE))
    views = memory.views()
    piece = views.slice(GuestAddress(PAGE), 4)
    views.release()
    with pytest.raises(BufferError, match="0x1000"):
        memory.close()
    piece[:] = b"used"
    for index, region in enumerate(memory.regions):
        if index != 1:
            with pytest.raises(ValueError, match="closed"):
                region.view()
    piece.release()
    memory.close()
    memory.close()


def test_y4_leaving_the_block_reports_a_view_that_lives() -> None:
    memory = GuestMemory.anonymous(PAGE)
    with pytest.raises(BufferError), memory:
        piece = memory.views().slice(GuestAddress(0), 4)
    piece.release()
    gc.collect()
    memory.close()


def test_y4_leaving_the_block_by_an_error_shows_that_error() -> None:
    with pytest.raises(ZeroDivisionError), GuestMemory.anonymous(PAGE) as memory:
        piece = memory.views().slice(GuestAddress(0), 4)
        piece[0] = 1 // 0


def test_y4_a_recorded_error_keeps_no_view_alive() -> None:
    memory = memory_of((0, PAGE), (PAGE, PAGE), (4 * PAGE, PAGE))
    recorded: list[AddressError] = []
    with memory.views() as views:
        for address, length in ((0, 3 * PAGE), (PAGE - 5, PAGE + 6), (3 * PAGE, 1), (4 * PAGE, PAGE + 1)):
            with pytest.raises(AddressError) as caught:
                views.slices(GuestAddress(address), length)
            recorded.append(caught.value)
    memory.close()
    assert [str(error) for error in recorded][0] == "no guest memory at 0x0, 0x3000 bytes"


def test_released_views_give_nothing_more() -> None:
    with GuestMemory.anonymous(PAGE) as memory:
        views = memory.views()
        views.release()
        with pytest.raises(ValueError, match="released"):
            views.slice(GuestAddress(0), 4)


def test_no_descriptor_is_left() -> None:
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        region = Region.memfd(GuestAddress(0), PAGE)
        received = Region.from_fd(GuestAddress(PAGE), PAGE, region.fd)
        with GuestMemory([region, received]) as memory:
            memory.write(GuestAddress(PAGE), b"shared")
            assert memory.read(GuestAddress(0), 6) == b"shared"
    assert set(os.listdir("/proc/self/fd")) == before


def test_y6_threads_with_views_of_their_own_slice_at_the_same_time() -> None:
    threads, rounds = 4, 3000
    with GuestMemory.anonymous(threads * 64) as memory:

        def count(index: int) -> None:
            with memory.views() as views:
                for _ in range(rounds):
                    with views.slice(GuestAddress(64 * index), 8) as piece, piece.cast("Q") as word:
                        word[0] += 1

        workers = [threading.Thread(target=count, args=(index,)) for index in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        words = [memory.read(GuestAddress(64 * index), 8) for index in range(threads)]
    assert [int.from_bytes(word, "little") for word in words] == [rounds] * threads
