"""Runs the conformance cases as a front-end against anybody's vhost-user back-end.

A case is one connection.  What a driver that breaks the rules may be answered with is
left to the device; what counts as a failure is what no device may do: crash, hang,
write outside the buffers it was given, return what it was not given or more than there
was room for, wrong data, or a request lost.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from lguestlib.memory.guest import AddressError
from lguestlib.runtime.vhost_user.conform_session import (
    KINDS,
    Disk,
    Driver,
    Session,
    Skip,
    Wishes,
    Wrong,
    flood,
    readable,
)
from lguestlib.runtime.vhost_user.line import Gone, Hang
from lguestlib.virtio.conformance.case import (
    Begin,
    Case,
    ConversationCase,
    ConversationStep,
    Descriptor,
    Do,
    Fault,
    Flicker,
    Interrupts,
    Kick,
    Load,
    PackedCase,
    Publish,
    Raw,
    RegisterCase,
    Restart,
    Rewrite,
    RingCase,
    RingStep,
    Say,
    Sectors,
    Served,
    Take,
    WatchedCase,
    Told,
)
from lguestlib.virtio.conformance.place import Place
from lguestlib.virtio.conformance.ring import DISK_SECTORS, wrong_content
from lguestlib.virtio.vhost_user.frontend import RequestRefused
from lguestlib.virtio.vhost_user.message import ProtocolError

SECONDS = 2.0
"""How long an answer, or a request, may take."""

_SETTLE_SECONDS = 0.25
"""How long a driver that has broken a rule waits for what comes of it."""

_GONE_SECONDS = 1.0
"""How long a back-end may take to give back what a connection has cost."""

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
        """As it is now; None where that cannot be seen."""
        try:
            descriptors = len(os.listdir(f"/proc/{process}/fd"))
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            return None
        fields = {name: text for name, _, text in (line.partition(":") for line in lines)}
        return cls(descriptors, int(fields["Threads"]), 1024 * int(fields.get("RssAnon", "0 kB").split()[0]))


class Unsuitable(Exception):
    """There is no back-end there that cases can be run against; the text says why."""


@dataclass
class _Course:
    """One case while it is run."""

    case: Case
    session: Session
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Something the back-end did."""
        if text not in self.notes:
            self.notes.append(text)


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
        assert isinstance(case, RingCase | ConversationCase)
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
        after = self._afterwards(case)
        if after:
            return Verdict.FAIL if verdict.is_good else verdict, [*notes, after]
        return verdict, notes

    def _unfit(self, case: Case) -> str:
        match case:
            case WatchedCase():
                return "not to be seen from outside: tests of this library run it"
            case RegisterCase():
                return "registers: not over a socket"
            case PackedCase():
                return "packed rings are run without a socket"
            case RingCase() | ConversationCase():
                if case.applies.device not in ("any", self.kind):
                    return f"for a {case.applies.device} device"
                if case.applies.writes and not self._writes:
                    return "writes to the disk (--write)"
        if isinstance(case, RingCase) and any(isinstance(step, Take) for step in case.steps):
            return "wants a device that takes a chain and waits"
        return ""

    def _play(self, case: RingCase | ConversationCase) -> list[str]:
        applies = case.applies
        if isinstance(case, RingCase):
            wishes = Wishes(case.features, applies.feature, queues=applies.queues)
            with self._session(wishes) as session:
                session.negotiate()
                return _RingCourse(case, session, self._running).play()
        wishes = Wishes(0, applies.feature, case.vhost, case.needs, case.without, applies.queues)
        return _Conversation(case, lambda: self._session(wishes)).play()

    @staticmethod
    def _running(session: Session) -> Driver:
        """The session's ring, served, and its driver."""
        if not session.features:
            session.negotiate()
        session.share()
        driver = session.drivers[session.queue] = Driver(session, session.queue)
        driver.start()
        return driver

    def _afterwards(self, case: Case) -> str:
        """What is wrong with the back-end after *case*: the five assertions, as far as they show from outside."""
        if isinstance(case, RingCase) and case.applies.writes:
            self._disk.sectors.clear()
        is_legal = isinstance(case, RingCase) and case.demanded
        try:
            if not is_legal:
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
            time.sleep(0.01)
            now = Cost.of(self._process)
            if aim is None and now == last:
                break
            last = now
        return last


class _RingCourse:
    """A ring case in one session."""

    def __init__(self, case: RingCase, session: Session, running: Callable[[Session], Driver]) -> None:
        self._case = case
        self._session = session
        self._running = running
        self._notes: list[str] = []
        self._returned: list[Served] = []
        # Heads that are out, each with the room its chain has.
        self._out: Counter[int] = Counter()
        self._rooms: dict[int, int] = {}
        self._ended = ""

    def play(self) -> list[str]:
        """Play it; what the back-end did.  Raises what `Examination` makes verdicts of."""
        case, session = self._case, self._session
        if any(isinstance(step, Load) for step in case.steps):
            driver = self._running(session)
            for step in case.steps:
                assert isinstance(step, Load)
                driver.load(step.requests, step.depth)
            return self._notes
        index = session.queue
        self._place = place = Place(session.memory, index, case.size, case.base)
        place.lay_out(case)
        place.misplace(case.misplaced)
        self._most = sum(each.length for each in self._writable())
        self._seen = self._used_index(0)
        try:
            session.share()
            session.set_up(place.layout, case.base)
            session.enable(index)
        except RequestRefused:
            return self._refused("refused")
        except Gone:
            return self._refused("disconnected")
        session.take(session.descriptors(index).call)
        place.remember()
        for step in case.steps:
            if self._ended:
                break
            self._step(step)
        self._judge()
        self._take_leave()
        return self._notes

    def _refused(self, how: str) -> list[str]:
        if self._case.demanded:
            raise Gone("the ring is refused") if how == "disconnected" else Wrong("the ring is refused")
        return [how]

    def _writable(self) -> list[Descriptor]:
        tables = [*self._case.indirect.values(), tuple(self._case.table.values())]
        return [each for table in tables for each in table if each.flags & 2]

    def _look(self, rings: bool = False) -> None:
        touched = self._place.touched(rings)
        if touched:
            raise Wrong(str(touched))

    def _step(self, step: RingStep) -> None:
        place, session, index = self._place, self._session, self._session.queue
        match step:
            case Publish(heads):
                self._look()
                for head in heads:
                    self._out[head] += 1
                    room = place.room(head, session.features) if head < place.layout.size else None
                    self._rooms[head] = self._most if room is None else room
                place.publish(step)
                place.remember()
            case Kick():
                session.kick(index)
                self._settle()
            case Rewrite(entry, descriptor):
                self._look()
                place.describe(entry, descriptor)
                place.remember()
            case Flicker():
                self._flicker(step)
            case Interrupts():
                self._look()
                place.ask(step)
                place.remember()
            case Told(expected):
                self._told(expected)
            case Restart(base):
                self._restart(base)
            case Take() | Load():
                raise AssertionError(step)

    def _settle(self, seconds: float | None = None) -> None:
        """Wait until all that is out is back, or nothing more comes."""
        session, index = self._session, self._session.queue
        if seconds is None:
            seconds = session.seconds if self._is_plain else _SETTLE_SECONDS
        # With nothing out that could come back, what is waited for is a failure.
        waits = bool(self._out.total())
        session.until(lambda: self._collect() and waits and not self._out.total(), seconds, index)
        if session.line.has_ended:
            self._ended = "disconnected"
        elif session.failed(index):
            self._ended = "ring failed"
        elif self._out.total() and self._is_plain:
            raise Hang(f"{self._out.total()} requests are not served")

    @property
    def _is_plain(self) -> bool:
        """Whether all that is asked for has to be served."""
        return self._case.demanded

    def _used_index(self, nowhere: int) -> int:
        """used.idx; *nowhere* where the case has put it past the end of memory."""
        try:
            return self._place.used_index
        except AddressError:
            return nowhere

    def _collect(self) -> bool:
        place, seen = self._place, self._seen
        count = self._used_index(seen) - seen & 0xFFFF
        if count > self._out.total():
            if self._case.demanded or not self._is_disturbed:
                raise Wrong(f"used.idx goes on by {count}, and {self._out.total()} chains are out")
            return True
        for position in range(seen, seen + count):
            head, written = place.used(position)
            if not self._out[head]:
                raise Wrong(f"a used element for head {head}, which is not out")
            if written > self._rooms[head]:
                raise Wrong(f"a used length of {written} for head {head}, which has room for {self._rooms[head]}")
            self._out[head] -= 1
            self._returned.append(Served(head, written))
        self._seen = seen + count
        return True

    @property
    def _is_disturbed(self) -> bool:
        """Whether the case lets the device write over its own ring."""
        return any(each.address.anchor.name in ("DESCRIPTORS", "AVAILABLE", "USED") for each in self._writable())

    def _told(self, expected: bool | None) -> None:
        session = self._session
        call = session.descriptors(session.queue).call
        if expected:
            session.until(lambda: readable(call), session.seconds, session.queue)
        else:
            time.sleep(0.01)
        told = session.take(call)
        if expected and not told:
            raise Wrong("an interrupt that was asked for has not come")
        if told and expected is False:
            self._notes.append("interrupted though nobody asked")

    def _restart(self, base: int | None) -> None:
        session, index = self._session, self._session.queue
        at = session.stop(index)
        if base is not None and at != base:
            raise Wrong(f"stopped at {at}, not {base}")
        session.set_up(self._place.layout, at)
        session.enable(index)

    def _flicker(self, step: Flicker) -> None:
        place, session = self._place, self._session
        entries = self._case.table[step.index], step.other
        place.allow(entries)
        self._rooms[0] = max(self._most, sum(each.length for each in self._case.table.values()) + step.other.length)
        for number in range(step.rounds):
            self._out[0] += 1
            place.publish(Publish((0,)))
            session.kick(session.queue)
            for turn in range(20):
                place.describe(step.index, entries[turn & 1])
                if self._collect() and not self._out.total():
                    break
            if self._out.total():
                self._settle(_SETTLE_SECONDS)
            if self._ended or self._out.total():
                self._notes.append(f"after {number} of {step.rounds}")
                break
        self._look(rings=True)

    def _judge(self) -> None:
        case, place = self._case, self._place
        self._look(rings=any(isinstance(step, Flicker) for step in case.steps))
        expected = [event for event in case.events if isinstance(event, Served)]
        if case.demanded:
            if self._ended:
                raise (Gone if self._ended == "disconnected" else Wrong)(f"{self._ended} over what breaks no rule")
            if Counter(each.head for each in self._returned) != Counter(each.head for each in expected):
                raise Wrong(f"{self._returned}, not {expected}")
            wrong = wrong_content(place, case.after, self._session.disk.sector)
            if wrong:
                raise Wrong(wrong[0])
            exact = {each.head: each.written for each in expected}
            for each in self._returned:
                if exact[each.head] not in (None, each.written):
                    self._notes.append(f"used length {each.written}, where {exact[each.head]} were written")
                    break
            return
        if self._ended:
            self._notes.append(self._ended)
        elif self._out.total():
            self._notes.append("not served")
        elif not any(isinstance(event, Fault) for event in case.events):
            self._judge_leniently()
        else:
            self._notes.append("served anyway" if self._returned else "nothing happens")

    def _judge_leniently(self) -> None:
        """What is all served, and might have been refused."""
        case, place = self._case, self._place
        if self._session.kind != "blk":
            self._notes.append("served")
            return
        wrong = wrong_content(place, case.after, self._session.disk.sector)
        if not wrong:
            self._notes.append("served")
            return
        statuses = [at for at, content in case.after.items() if isinstance(content, bytes) and len(content) == 1]
        found = [place.content(at, 1)[0] for at in statuses]
        if any(isinstance(content, Sectors) for content in case.after.values()) and found == [0] * len(found):
            raise Wrong(wrong[0])
        self._notes.append(f"served with status {found[0]}" if found else "served")

    def _take_leave(self) -> None:
        """Whether the connection is of use after it: the ring is stopped, and another one started."""
        session, index = self._session, self._session.queue
        if self._case.demanded or session.line.has_ended:
            return
        try:
            session.stop(index)
        except Gone:
            self._notes.append("disconnected when stopped")
            return
        except (RequestRefused, ProtocolError) as error:
            self._notes.append(str(error))
            return
        with suppress(RequestRefused, ProtocolError):
            try:
                driver = session.drivers[index] = Driver(session, index)
                session.take(session.descriptors(index).error)
                driver.start()
                driver.request()
            except Gone:
                self._notes.append("disconnected when started again")
            except (Hang, Wrong):
                self._notes.append("serves a new connection only")


class _Conversation:
    """A conversation case; *connect* begins a session."""

    def __init__(self, case: ConversationCase, connect: Callable[[], Session]) -> None:
        self._case = case
        self._connect = connect
        self._notes: list[str] = []
        self._in_step = True

    def play(self) -> list[str]:
        """Play it; what the back-end did.  Raises what `Examination` makes verdicts of."""
        self._session = self._connect()
        try:
            self._arrive()
            try:
                for step in self._case.steps:
                    self._step(step)
                if self._in_step:
                    self._session.settled()
            except (RequestRefused, Gone, Wrong, ProtocolError) as error:
                self._answered_with(error)
            except Hang as error:
                # Only what a ring does that nobody can demand anything of any more.
                if self._case.served or not str(error).endswith("is not served"):
                    raise
                self._note("not served")
                self._session.settled()
        finally:
            self._session.close()
        return self._notes

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _answered_with(self, error: Exception) -> None:
        if self._case.served:
            raise error
        match error:
            case RequestRefused():
                self._note("refused")
                with suppress(Gone, ProtocolError):
                    self._session.settled()
            case Gone():
                self._note("disconnected")
            case _:
                self._note(str(error))

    def _arrive(self) -> None:
        session, begin = self._session, self._case.begin
        if begin is Begin.CONNECTED:
            session.offered = session.line.ask(session.requests.get_features())
            return
        session.negotiate()
        if begin is Begin.NEGOTIATED:
            return
        session.share()
        for index in range(session.queue, session.queue + self._case.applies.queues):
            session.drivers[index] = Driver(session, index)
            if begin is Begin.RUNNING:
                session.drivers[index].start()

    @property
    def _driver(self) -> Driver:
        return self._session.drivers[self._session.queue]

    def _step(self, step: ConversationStep) -> None:
        session = self._session
        match step:
            case Say():
                fds = [session.descriptor(kind) for kind in step.fds]
                reply = session.say(step.request, step.payload, fds, step.flags, step.size)
                if step.size is not None and step.size > len(step.payload):
                    self._in_step = False
                elif reply is not None and not self._case.served:
                    self._note("answered")
            case Raw(data):
                session.line.put(data)
                self._in_step = self._case.served
            case Load(requests, depth):
                self._driver.load(requests, depth)
            case Do():
                self._do(step)

    def _do(self, step: Do) -> None:
        session, index = self._session, self._session.queue
        match step:
            case Do.REQUEST:
                self._driver.request()
            case Do.UNKICKED:
                self._driver.begin()
            case Do.KICK:
                if index in session.drivers:
                    self._driver.notify()
                else:
                    session.kick(index)
            case Do.ANSWERED:
                self._driver.finish(what="what was available")
            case Do.STOP:
                self._stop()
            case Do.START:
                self._driver.start(self._driver.used_index)
            case Do.SET_UP:
                session.set_up(self._driver.layout)
            case Do.ENABLE:
                session.enable(index)
            case Do.DISABLE:
                session.enable(index, False)
            case Do.NEW_KICK:
                session.new_kick(index)
            case Do.NEW_CALL:
                session.new_call(index)
            case Do.NO_CALL:
                session.no_call(index)
            case Do.FULL_CALL:
                session.fill(session.descriptors(index).call)
                session.looks = True
            case Do.FULL_KICK:
                session.fill(session.descriptors(index).kick)
            case Do.MEMORY_AGAIN:
                session.share()
            case Do.LEAVE:
                session.close()
                self._in_step = False
            case Do.COME:
                self._session = self._connect()
                self._arrive()
                self._in_step = True
            case Do.ONE_REPLY:
                self._one_reply()
            case Do.LOGGED:
                unmarked = session.unmarked(self._driver.written)
                if unmarked:
                    raise Wrong(unmarked)
            case Do.AGAIN:
                session.agree()
                session.share()
                session.drivers.pop(index).release()
                session.drivers[index] = Driver(session, index)
                self._driver.start()
            case Do.RESUME:
                session.resume(self._driver)
            case Do.FLOOD:
                flood(session, self._driver, session.drivers[index + 1])

    def _one_reply(self) -> None:
        before = self._session.settled()
        if before:
            message = f"{before} replies more than there should be"
            if self._case.served:
                raise Wrong(message)
            self._note(message)

    def _stop(self) -> None:
        """GET_VRING_BASE: where it would go on from, and then nothing of the ring is touched (T9)."""
        session, driver = self._session, self._driver
        base = session.stop(driver.layout.index)
        if not driver.returned <= base <= driver.added:
            raise Wrong(f"stopped at {base}, with {driver.added} made available and {driver.returned} returned")
        late = driver.used_index != base
        if not session.until(lambda: driver.used_index == base, session.seconds, driver.layout.index):
            raise Wrong(f"stopped at {base}, with {driver.used_index} returned")
        if late:
            self._note("answers GET_VRING_BASE before it has finished")
        driver.reap()
