"""Runs the conformance cases as a front-end against anybody's vhost-user back-end.

A case is one connection.  What a driver that breaks the rules may be answered with is
left to the device; what counts as a failure is what no device may do: crash, hang,
write outside the buffers it was given, return what it was not given or more than there
was room for, wrong data, or a request lost.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lguestlib.runtime.vhost_user.conform_courses import ConversationCourse, PackedCourse, RingCourse
from lguestlib.runtime.vhost_user.conform_session import KINDS, Disk, Driver, Session, Skip, Wishes, Wrong
from lguestlib.runtime.vhost_user.line import Gone, Hang
from lguestlib.virtio.conformance.case import Case, ConversationCase, PackedCase, RegisterCase, RingCase, WatchedCase
from lguestlib.virtio.conformance.ring import DISK_SECTORS
from lguestlib.virtio.features import Feature
from lguestlib.virtio.vhost_user.frontend import RequestRefused
from lguestlib.virtio.vhost_user.message import ProtocolError

SECONDS = 2.0
"""How long an answer, or a request, may take."""

_GONE_SECONDS = 1.0
"""How long a back-end may take to give back what a connection has cost."""

_LOOK_SECONDS = 0.002

_THREADS_MAX = 64
"""Threads that a back-end's pool may have grown to."""

_MEMORY_MAX = 64 << 20
"""Bytes that one case may cost a back-end."""


class Verdict(Enum):
    """What a case has come to."""

    PASS = "pass"
    FAIL = "fail"
    HANG = "hang"
    DISCONNECT = "disconnect"
    SKIP = "skip"

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return self in (Verdict.PASS, Verdict.SKIP)


@dataclass(frozen=True)
class Result:
    """What *case* has come to; *notes* say what the back-end did, or what was wrong."""

    case: Case
    verdict: Verdict
    notes: tuple[str, ...]
    seconds: float

    @property
    def note(self) -> str:
        """In one line."""
        return "; ".join(self.notes)


@dataclass(frozen=True)
class Cost:
    """What a process holds: descriptors, threads, bytes of memory of its own."""

    descriptors: int
    threads: int
    memory: int

    @classmethod
    def of(cls, process: int) -> "Cost | None":
        """As it is now; None where it has ended, or that cannot be seen."""
        try:
            descriptors = len(os.listdir(f"/proc/{process}/fd"))
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            return None
        fields = {name: text for name, _, text in (line.partition(":") for line in lines)}
        if fields["State"].lstrip().startswith("Z"):
            return None
        return cls(descriptors, int(fields["Threads"]), 1024 * int(fields.get("RssAnon", "0 kB").split()[0]))


class Unsuitable(Exception):
    """There is no back-end there that cases can be run against; the text says why."""


class Examination:
    """Cases against the back-end at *path*, a device of *kind*; with *writes*, those too that write to a disk.

    Answers may take so many *seconds*.  *revive* is called where the back-end is dead
    or of no use any more after a case, and starts another; without it the cases that are left are
    skipped.  Raises Unsuitable for one that does not even serve a plain request.
    """

    def __init__(
        self,
        path: str,
        kind: str = "blk",
        writes: bool = False,
        seconds: float = SECONDS,
        revive: Callable[[], None] | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"{kind} is no kind of device ({', '.join(KINDS)})")
        self.path = path
        self.kind = kind
        self._writes = writes
        self._seconds = seconds
        self._revive = revive
        self._is_dead = False
        self._disk = Disk()
        self._capacity: int | None = None
        self._process = 0
        self._begin()

    def _begin(self) -> None:
        self._disk.sectors.clear()
        try:
            with self._session(Wishes()) as session:
                self._process = session.line.peer
                driver = self._running(session)
                self._capacity = session.capacity()
                if self._capacity is not None and self._capacity < DISK_SECTORS:
                    raise Unsuitable(f"a disk of {self._capacity} sectors, and {DISK_SECTORS} are needed (64 KiB)")
                for _ in range(DISK_SECTORS if self.kind == "blk" else 1):
                    driver.request()
        except (Gone, Hang, Wrong, Skip, ProtocolError, RequestRefused) as error:
            raise Unsuitable(f"it serves no plain request: {error} (is it a {self.kind} back-end?)") from None
        # What it holds between two connections, once it has had one.
        self._cost = self._settled_cost(None)
        self._threads = self._cost.threads if self._cost else 0

    def _session(self, wishes: Wishes) -> Session:
        return Session(self.path, self.kind, self._seconds, wishes, self._disk)

    def run(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Each case's result, as it is there."""
        for case in cases:
            started = time.monotonic()
            verdict, notes = self._run(case)
            yield Result(case, verdict, tuple(notes), time.monotonic() - started)

    def _run(self, case: Case) -> tuple[Verdict, list[str]]:
        reason = self._unfit(case)
        if reason:
            return Verdict.SKIP, [reason]
        if self._is_dead:
            return Verdict.SKIP, ["the back-end has not survived a case before"]
        assert isinstance(case, RingCase | PackedCase | ConversationCase)
        notes: list[str] = []
        verdict = Verdict.PASS
        try:
            notes = self._play(case)
        except Skip as error:
            return Verdict.SKIP, [str(error)]
        except Hang as error:
            verdict, notes = Verdict.HANG, [str(error)]
        except Gone as error:
            verdict, notes = Verdict.DISCONNECT, [str(error)]
        except (Wrong, ProtocolError, RequestRefused) as error:
            verdict, notes = Verdict.FAIL, [str(error)]
        after = self._afterwards(case, verdict)
        if after:
            return Verdict.FAIL if verdict.is_good else verdict, [*notes, after]
        return verdict, notes

    def _unfit(self, case: Case) -> str:
        match case:
            case WatchedCase():
                return "not to be seen from outside: tests of this library run it"
            case RegisterCase():
                return "registers: not over a socket"
            case RingCase() | PackedCase() | ConversationCase():
                if case.applies.device not in ("any", self.kind):
                    return f"for a {case.applies.device} device"
                if case.applies.writes and not self._writes:
                    return "writes to the disk (--write)"
        return "" if "vhost-user" in case.runners else "wants a device that takes a chain and waits"

    def _play(self, case: RingCase | PackedCase | ConversationCase) -> list[str]:
        applies = case.applies
        if isinstance(case, PackedCase):
            wishes = Wishes(case.needs | Feature.RING_PACKED, case.features, applies.feature)
            with self._session(wishes) as session:
                session.negotiate()
                return PackedCourse(case, session).play()
        if isinstance(case, RingCase):
            wishes = Wishes(case.needs, case.features, applies.feature, queues=applies.queues)
            with self._session(wishes) as session:
                session.negotiate()
                return RingCourse(case, session, self._running).play()
        wishes = Wishes(0, 0, applies.feature, case.vhost, case.needs, case.without, applies.queues)
        return ConversationCourse(case, lambda: self._session(wishes)).play()

    @staticmethod
    def _running(session: Session) -> Driver:
        """The session's ring, served, and its driver."""
        if not session.features:
            session.negotiate()
        session.share()
        driver = session.drivers[session.queue] = Driver(session, session.queue)
        driver.start()
        return driver

    def _afterwards(self, case: Case, verdict: Verdict) -> str:
        """What is wrong with the back-end after *case*: the five assertions, as far as they show from outside."""
        if isinstance(case, RingCase | PackedCase) and case.applies.writes:
            self._disk.sectors.clear()
        is_legal = isinstance(case, RingCase | PackedCase) and case.demanded
        try:
            # After what breaks no rule and came out well the next case is connection enough.
            if not (is_legal and verdict.is_good):
                with self._session(Wishes()) as session:
                    driver = self._running(session)
                    driver.request()
                    driver.request()
                    if session.capacity() != self._capacity:
                        return "the disk has another size"
                    self._process = session.line.peer
        except (Gone, Hang, Wrong, ProtocolError, RequestRefused) as error:
            dead = Cost.of(self._process) is None
            self._renew()
            return "the back-end has died" if dead else f"after it, the next connection: {error}"
        return self._excess()

    def _renew(self) -> None:
        """The back-end is of no use any more: have another."""
        self._is_dead = True
        if self._revive:
            with suppress(Unsuitable):
                self._revive()
                self._begin()
                self._is_dead = False

    def _excess(self) -> str:
        """What the back-end holds more than before."""
        before, now = self._cost, self._settled_cost(self._cost)
        self._cost = now
        if before is None or now is None:
            return ""
        if now.descriptors > before.descriptors:
            return f"{now.descriptors - before.descriptors} descriptors more than before are open"
        if now.threads > self._threads + _THREADS_MAX:
            return f"{now.threads - self._threads} threads more than at first run"
        if now.memory > before.memory + _MEMORY_MAX:
            return f"{now.memory - before.memory >> 20} MiB more than before are held"
        return ""

    def _settled_cost(self, aim: Cost | None) -> Cost | None:
        """What it holds, given the time to fall to *aim*, or to come to rest."""
        deadline = time.monotonic() + _GONE_SECONDS
        last = Cost.of(self._process)
        while last and time.monotonic() < deadline:
            if aim and last.descriptors <= aim.descriptors:
                break
            time.sleep(_LOOK_SECONDS)
            now = Cost.of(self._process)
            if aim is None and now == last:
                break
            last = now
        return last
