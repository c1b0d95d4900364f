"""The system calls of the queue threads, recorded, and as a trace file.

Who makes calls holds a `Tracer` or None, and asks for nothing else when it is
None.  `chrome_trace` gives what chrome://tracing and Perfetto open.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")


class Call(NamedTuple):
    """One system call as a thread made it; times in nanoseconds of the monotonic clock."""

    thread: str
    """The thread's name: device and queue."""
    call: str
    """The system call: "read", "writev"."""
    role: str
    """What the file descriptor is to its thread: "kick", "tap", "interrupt"."""
    result: int
    """What the system call returned; a negative errno where it failed."""
    start: int
    end: int

    @property
    def duration(self) -> int:
        """Nanoseconds in the call, asleep or not."""
        return self.end - self.start


class OpenCall(NamedTuple):
    """A system call that a thread is in."""

    thread: str
    call: str
    role: str
    start: int


class Tracer:
    """Collects calls from any number of threads."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._open: dict[str, OpenCall] = {}

    @property
    def calls(self) -> list[Call]:
        """What has been recorded, in the order the calls returned."""
        return list(self._calls)

    @property
    def open_calls(self) -> list[OpenCall]:
        """What the threads are in now: what they sleep in, most of the time."""
        return list(self._open.values())

    def traced(self, call: str, role: str, function: Callable[..., Result], *arguments: object) -> Result:
        """Make the call *function(arguments)* and record it under these names."""
        thread = threading.current_thread().name
        start = time.monotonic_ns()
        self._open[thread] = OpenCall(thread, call, role, start)
        value = 0
        try:
            result = function(*arguments)
            value = result if isinstance(result, int) else len(result) if isinstance(result, bytes) else 0
            return result
        except OSError as error:
            value = -(error.errno or 0)
            raise
        finally:
            self._calls.append(Call(thread, call, role, value, start, time.monotonic_ns()))
            self._open.pop(thread, None)


def chrome_trace(calls: Iterable[Call]) -> str:
    """*calls* as Chrome trace JSON: a lane per thread, a slice per call, microseconds."""
    lanes: dict[str, int] = {}
    events: list[dict[str, object]] = []
    for call in calls:
        lane = lanes.setdefault(call.thread, len(lanes) + 1)
        events.append({
            "name": f"{call.call}({call.role})", "cat": "syscall", "ph": "X", "pid": 1, "tid": lane,
            "ts": call.start / 1000, "dur": call.duration / 1000,
            "args": {"result": call.result, "role": call.role},
        })  # fmt: skip
    names: list[dict[str, object]] = [
        {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "lguestlib"}}
    ]
    for thread, lane in lanes.items():
        names.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": lane, "args": {"name": thread}})
    return json.dumps({"traceEvents": names + events, "displayTimeUnit": "ns"})
