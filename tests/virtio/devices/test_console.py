"""The console device: bytes in, bytes out, and a size."""

import errno
from collections.abc import Sequence

import pytest
from virtio.devices.chains import UNTOUCHED, Request, only_its_own

from lguestlib.abi import virtio_console as abi
from lguestlib.virtio.chain import part
from lguestlib.virtio.device import Device, SourceEnded
from lguestlib.virtio.devices.console import Console, Output


class Line:
    """Has some input, keeps the output."""

    def __init__(self, typed: bytes = b"") -> None:
        self.typed = typed
        self.output: list[Sequence[memoryview]] = []
        self.columns_and_rows = (80, 25)
        self.error: Exception | None = None
        self.reads = 0
        self.room = 1 << 20

    def read(self, buffers: Sequence[memoryview]) -> int:
        self.reads += 1
        if self.error:
            raise self.error
        done = 0
        for buffer in buffers:
            piece, self.typed = self.typed[: len(buffer)], self.typed[len(buffer) :]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def write(self, buffers: Sequence[memoryview]) -> int:
        if self.error:
            raise self.error
        taken = part(tuple(buffers), 0, self.room)
        self.output.append(taken)
        return sum(map(len, taken))

    def size(self) -> tuple[int, int]:
        return self.columns_and_rows


def test_the_config_space_is_the_kernels_structure_and_always_of_now() -> None:
    line = Line()
    device = Console(line)
    assert device.features == 1 << abi.VIRTIO_CONSOLE_F_SIZE and only_its_own(device)
    for size in ((80, 25), (0, 0), (0xFFFF, 1)):
        line.columns_and_rows = size
        config = abi.virtio_console_config.from_buffer_copy(device.config())
        assert (config.cols, config.rows, config.max_nr_ports, config.emerg_wr) == (*size, 1, 0)


def test_a_resize_is_told_to_whoever_owns_the_transport() -> None:
    device = Console(Line())
    device.resized()
    told: list[Device] = []
    device.on_config_change = told.append
    device.resized()
    assert told == [device]


def test_the_receive_queue_comes_first_and_waits_for_the_outside() -> None:
    device = Console(Line())
    assert (device.name, Console(Line(), "tty").name) == ("console", "tty")
    receive, transmit = device.queues()
    assert (receive.service, receive.from_outside) == (device.serve_input, True)
    assert (transmit.service, transmit.from_outside) == (device.serve_output, False)


@pytest.mark.parametrize("cuts", [(), (1,), (2, 3, 7), tuple(range(1, 10))])
def test_s19_input_fills_from_the_start_and_its_length_is_what_came(cuts: tuple[int, ...]) -> None:
    device = Console(Line(b"typed fast"))
    request = Request(room=7, room_cuts=[cut for cut in cuts if cut < 7])
    assert device.serve_input(request.chain) == 7
    assert request.writable == b"typed f"
    request = Request(room=10, room_cuts=cuts)
    assert device.serve_input(request.chain) == 3
    assert request.writable == b"ast" + bytes([UNTOUCHED]) * 7


def test_the_end_of_input_is_no_empty_buffer() -> None:
    request = Request(room=10)
    with pytest.raises(SourceEnded):
        Console(Line()).serve_input(request.chain)
    assert set(request.writable) == {UNTOUCHED}


def test_s33_a_buffer_without_room_takes_no_input() -> None:
    line = Line(b"kept")
    assert Console(line).serve_input(Request(b"readable").chain) == 0
    assert (line.typed, line.reads) == (b"kept", 0)


@pytest.mark.parametrize("cuts", [(), (1,), (2, 3, 7)])
def test_output_goes_out_from_where_it_lies(cuts: tuple[int, ...]) -> None:
    line = Line()
    request = Request(b"a line of text\n", 4, cuts)
    assert Console(line).serve_output(request.chain) == 0
    assert line.output == [request.chain.readable]
    assert set(request.writable) == {UNTOUCHED}


def test_s14_output_of_nothing_is_no_write() -> None:
    line = Line()
    assert Console(line).serve_output(Request(room=3).chain) == 0
    assert line.output == []


def test_errors_of_the_line_are_its_owners() -> None:
    for error in (InterruptedError(errno.EINTR, ""), OSError(errno.EIO, "")):
        line = Line(b"typed")
        line.error = error
        for call, request in (
            (Console(line).serve_input, Request(room=5)), (Console(line).serve_output, Request(b"text")),
        ):  # fmt: skip
            with pytest.raises(type(error)):
                call(request.chain)


@pytest.mark.parametrize("room", [1, 2, 3, 5, 1 << 20])
def test_what_is_available_goes_out_together_in_order_and_once(room: int) -> None:
    line = Line()
    line.room = room
    output = Console(line).output
    requests = [Request(data, 2, (1,)) for data in (b"one", b"", b"three", b"-", b"last")]
    chains = [request.chain for request in requests]
    while chains:
        taken = output.serve(chains)
        assert taken >= 1 and all(chain.written == 0 for chain in chains[:taken])
        chains = chains[taken:]
    assert b"".join(b"".join(write) for write in line.output) == b"onethree-last"
    if room == 1 << 20:
        assert len(line.output) == 1


def test_a_chain_that_was_begun_goes_on_where_it_was_and_a_reset_forgets_it() -> None:
    line = Line()
    line.room = 3
    console = Console(line)
    chains = [Request(b"abcdef").chain, Request(b"gh").chain]
    shown = line.write

    def interrupted_after_one(buffers: Sequence[memoryview]) -> int:
        if len(line.output) == 1:
            raise InterruptedError
        return shown(buffers)

    output = Output(interrupted_after_one)
    with pytest.raises(InterruptedError):
        output.serve(chains)
    line.output.append(())
    assert output.serve(chains) == 1 and output.serve(chains[1:]) == 1
    assert b"".join(b"".join(write) for write in line.output) == b"abcdefgh"

    line.output.clear()
    with pytest.raises(InterruptedError):
        Output(interrupted_after_one).serve(chains)
    line.output.clear()
    line.room = 100
    console.deactivate()
    assert console.output.serve(chains) == 2
    assert b"".join(line.output[0]) == b"abcdefgh"
