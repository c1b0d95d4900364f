"""Conformance cases in one connection each: rings by hand, split and packed, and conversations."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from lguestlib.memory.guest import AddressError
from lguestlib.runtime.vhost_user.conform_session import Driver, Session, Wrong, flood, readable
from lguestlib.runtime.vhost_user.line import Gone, Hang
from lguestlib.virtio.conformance.case import (
    WRITE,
    Begin,
    ConversationCase,
    ConversationStep,
    Descriptor,
    Do,
    DriverEvent,
    Fault,
    Fill,
    Flicker,
    Interrupts,
    Kick,
    Load,
    PackedCase,
    PackedStep,
    Publish,
    Raw,
    Restart,
    Rewrite,
    RingCase,
    RingStep,
    Say,
    Sectors,
    Served,
    Take,
    Told,
)
from lguestlib.virtio.conformance.place import Place
from lguestlib.virtio.conformance.ring import wrong_content
from lguestlib.virtio.vhost_user.frontend import RequestRefused
from lguestlib.virtio.vhost_user.message import ProtocolError

_SETTLE_SECONDS = 0.25
"""How long a driver that has broken a rule waits for what comes of it."""

_POSITION = 0x7FFF
_NEW_PACKED = 0x8000_8000


class _Course:
    """What cases of split and packed rings have in common in a session: chains that are out, and come back."""

    _place: Place

    def __init__(self, case: RingCase | PackedCase, session: Session) -> None:
        self._expects = case
        self._session = session
        self._notes: list[str] = []
        self._returned: list[Served] = []
        # Heads, or buffer IDs, that are out, each with the room its chain has.
        self._out: Counter[int] = Counter()
        self._rooms: dict[int, int] = {}
        self._ended = ""

    def _begin(self, base: int) -> bool:
        """Hand over memory and ring; False where that is refused, and may be."""
        session, place = self._session, self._place
        try:
            session.share()
            session.set_up(place.layout, base)
            session.enable(session.queue)
        except (RequestRefused, Gone) as error:
            how = "refused" if isinstance(error, RequestRefused) else "disconnected"
            if self._is_plain:
                raise type(error)(f"the ring is {how}") from None
            self._notes.append(how)
            return False
        session.take(session.descriptors(session.queue).call)
        place.remember()
        return True

    def _collect(self) -> bool:
        """Take what has come back.  Raises Wrong."""
        raise NotImplementedError

    def _look(self, rings: bool = False) -> None:
        touched = self._place.touched(rings)
        if touched:
            raise Wrong(str(touched))

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
        return self._expects.demanded

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

    def _judge(self) -> None:
        case, place = self._expects, self._place
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
        case, place = self._expects, self._place
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


class RingCourse(_Course):
    """A ring case in one session."""

    def __init__(self, case: RingCase, session: Session, running: Callable[[Session], Driver]) -> None:
        super().__init__(case, session)
        self._case = case
        self._running = running

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
        if not self._begin(case.base):
            return self._notes
        for step in case.steps:
            if self._ended:
                break
            self._step(step)
        self._judge()
        self._take_leave()
        return self._notes

    def _writable(self) -> list[Descriptor]:
        tables = [*self._case.indirect.values(), tuple(self._case.table.values())]
        return [each for table in tables for each in table if each.flags & WRITE]

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


class PackedCourse(_Course):
    """A packed ring's case in one session."""

    def __init__(self, case: PackedCase, session: Session) -> None:
        super().__init__(case, session)
        self._case = case
        # Descriptors that the chain of each buffer ID has.
        self._slots: dict[int, int] = {}
        self._next = 0 if case.base is None else case.base >> 16 & _POSITION
        self._wrap = case.base is None or bool(case.base >> 31)

    def play(self) -> list[str]:
        """Play it; what the back-end did.  Raises what `Examination` makes verdicts of."""
        case, session = self._case, self._session
        self._place = place = Place(session.memory, session.queue, case.size, packed=True)
        place.lay_out_packed(case)
        if not self._begin(_NEW_PACKED if case.base is None else case.base):
            return self._notes
        for step in case.steps:
            if self._ended:
                break
            self._step(step)
        self._judge()
        if not case.demanded and not session.line.has_ended:
            with suppress(Gone, RequestRefused, ProtocolError):
                session.stop(session.queue)
        return self._notes

    def _step(self, step: PackedStep) -> None:
        place, session = self._place, self._session
        match step:
            case Fill():
                self._look()
                place.fill(step)
                place.remember()
                if step.available:
                    self._went_out(step)
            case Kick():
                session.kick(session.queue)
                self._settle(None if self._out.total() else _SETTLE_SECONDS / 5)
            case DriverEvent():
                self._look()
                place.ask_by_event(step)
                place.remember()
            case Told(expected):
                self._told(expected)
            case Restart(base):
                at = session.stop(session.queue)
                if base is not None and at != base:
                    raise Wrong(f"stopped at {at:#x}, not {base:#x}")
                session.set_up(place.layout, at)
                session.enable(session.queue)
            case Take():
                raise AssertionError(step)

    def _went_out(self, step: Fill) -> None:
        buffer = step.descriptors[-1].id
        tables = [step.descriptors, *self._case.indirect.values()]
        self._out[buffer] += 1
        self._slots[buffer] = len(step.descriptors)
        self._rooms[buffer] = sum(each.length for table in tables for each in table if each.flags & WRITE)

    def _collect(self) -> bool:
        place = self._place
        # With nothing out, what is there may look like a used element, and is the driver's own.
        while self._out.total() and (found := place.packed_used(self._next, self._wrap)):
            buffer, written = found
            if not self._out[buffer]:
                raise Wrong(f"a used element for buffer {buffer}, which is not out")
            if written > self._rooms[buffer]:
                raise Wrong(f"a used length of {written} for buffer {buffer}, which has room for {self._rooms[buffer]}")
            self._out[buffer] -= 1
            self._returned.append(Served(buffer, written))
            laps, self._next = divmod(self._next + self._slots[buffer], place.layout.size)
            self._wrap ^= bool(laps)
        return True


class ConversationCourse:
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
            case Do.SHRINK:
                session.shrink()
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
