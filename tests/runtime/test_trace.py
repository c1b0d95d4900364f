"""The tracer, and the file that Perfetto opens."""

import json
import os
import threading

import pytest

from lguestlib.runtime.trace import Call, Tracer, chrome_trace


def test_a_call_is_recorded_with_its_thread_role_result_and_times() -> None:
    tracer = Tracer()
    reader, writer = os.pipe()

    def work() -> None:
        assert tracer.traced("write", "interrupt", os.write, writer, b"12345678") == 8
        assert tracer.traced("read", "kick", os.read, reader, 8) == b"12345678"

    thread = threading.Thread(target=work, name="net0 transmit")
    thread.start()
    thread.join()
    os.close(reader)
    os.close(writer)
    first, second = tracer.calls
    assert (first.thread, first.call, first.role, first.result) == ("net0 transmit", "write", "interrupt", 8)
    assert (second.call, second.role, second.result) == ("read", "kick", 8)
    assert first.start <= first.end <= second.start <= second.end
    assert second.duration == second.end - second.start


def test_a_call_that_fails_is_recorded_with_its_errno_and_still_raises() -> None:
    tracer = Tracer()
    with pytest.raises(BlockingIOError):
        reader, writer = os.pipe2(os.O_NONBLOCK)
        try:
            tracer.traced("read", "kick", os.read, reader, 8)
        finally:
            os.close(reader)
            os.close(writer)
    assert [call.result for call in tracer.calls] == [-11]
    assert tracer.open_calls == []


def test_a_call_a_thread_is_in_is_seen() -> None:
    tracer = Tracer()
    reader, writer = os.pipe()
    seen: list[tuple[str, str]] = []

    def look() -> bytes:
        seen.extend((call.call, call.role) for call in tracer.open_calls)
        return b""

    tracer.traced("read", "kick", look)
    os.close(reader)
    os.close(writer)
    assert seen == [("read", "kick")]
    assert tracer.open_calls == []


def test_the_trace_file_has_a_named_lane_for_each_thread_and_microseconds() -> None:
    calls = [
        Call("net0 transmit", "read", "kick", 8, 1_000, 251_500),
        Call("net0 receive", "readv", "tap", 110, 2_000, 300_000),
        Call("net0 transmit", "writev", "tap", 110, 252_000, 290_000),
    ]
    trace = json.loads(chrome_trace(calls))
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    names = {
        event["tid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    assert [(names[event["tid"]], event["name"]) for event in slices] == [
        ("net0 transmit", "read(kick)"), ("net0 receive", "readv(tap)"), ("net0 transmit", "writev(tap)"),
    ]  # fmt: skip
    assert (slices[0]["ts"], slices[0]["dur"]) == (1.0, 250.5)
    assert slices[1]["args"] == {"result": 110, "role": "tap"}
