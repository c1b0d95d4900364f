"""A ping drawn as the seed's analysis: a lane for each thread, a row for each call."""

from collections import Counter
from collections.abc import Iterable, Sequence

from lguestlib.runtime.ping import RECEIVE_THREAD, TRANSMIT_THREAD, Ping
from lguestlib.runtime.trace import Call, OpenCall

SEED_CALLS = {"read(kick)": 1, "writev(tap)": 1, "readv(tap)": 1, "write(interrupt)": 2}
"""One Guest→Host ping after Linux commit 659a0e6633, by kind."""

LANES = (TRANSMIT_THREAD, RECEIVE_THREAD)
_LANE_WIDTH = 40


def kind(call: Call) -> str:
    """How calls are counted: the system call and what its descriptor is."""
    return f"{call.call}({call.role})"


def calls_by_kind(pings: Iterable[Ping]) -> Counter[str]:
    """How many calls of each kind *pings* took in all."""
    return Counter(kind(call) for ping in pings for call in ping.calls)


def draw(ping: Ping, asleep: Sequence[OpenCall]) -> str:
    """*ping* as a sequence diagram in text; *asleep* is what its threads slept in after it.

    Times are microseconds since the transmit thread woke.  A call that began
    before that time was a sleep: what is drawn is its return.
    """
    if not ping.calls:
        return "no calls were recorded\n"
    start = ping.calls[0].end if ping.calls[0].call == "read" else ping.calls[0].start
    lines = [f"{'us':>9}  " + "".join(lane.ljust(_LANE_WIDTH) for lane in LANES).rstrip()]
    lines.append(f"{'-' * 9}  " + "".join(("-" * (_LANE_WIDTH - 2)).ljust(_LANE_WIDTH) for _ in LANES).rstrip())
    for call in ping.calls:
        slept = call.start < start
        text = f"{kind(call)} = {call.result}   " + ("<- wakes" if slept else f"{call.duration / 1000:.1f} us")
        lines.append(_row(f"{(call.end - start) / 1000:.1f}", call.thread, text))
    for sleep in asleep:
        lines.append(_row("", sleep.thread, f"{sleep.call}({sleep.role}) ...   -> sleeps"))
    return "\n".join(lines) + "\n"


def _row(when: str, thread: str, text: str) -> str:
    position = LANES.index(thread)
    return f"{when:>9}  " + " " * (position * _LANE_WIDTH) + text


def compare(ping: Ping) -> str:
    """The calls of *ping* by kind beside the seed's."""
    # The network may be another than a TAP device here; the calls are the same.
    here = Counter(kind(call).replace("(responder)", "(tap)") for call in ping.calls)
    lines = [f"  {'calls':<20}{'here':>6}{'seed':>6}"]
    for name in dict.fromkeys([*SEED_CALLS, *sorted(here)]):
        lines.append(f"  {name:<20}{here[name]:>6}{SEED_CALLS.get(name, 0):>6}")
    lines.append(f"  {'total':<20}{sum(here.values()):>6}{sum(SEED_CALLS.values()):>6}")
    return "\n".join(lines) + "\n"

