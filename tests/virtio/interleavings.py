"""All interleavings of a ring's two sides, access by access, on a processor with store buffers.

Each side is a program that runs the queue's own code.  It is stopped at each
access and told what came of it, by running it again from the start with the
answers it has had: so a side is its answers, and two runs that have had the same
ones are the same.  As on x86, what a side stores is seen by itself at once and by
the other later, in order; a fence waits until it has all been seen.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from virtio.accesses import Place

Program = Callable[["Side"], None]


class Stopped(BaseException):
    """The program has come to an access that has no answer yet."""


class Action(NamedTuple):
    """What a program is about to do; of a wait, *value* is what it has done so far."""

    kind: str
    place: Place = ("", 0)
    value: int = 0


T = TypeVar("T")

Answers = tuple[int, ...]


class Side:
    """A program's way to memory and to the other side: signals that wake it, as eventfds do."""

    def __init__(self, answers: Answers) -> None:
        self._answers = iter(answers)
        self.action = Action("end")

    def _do(self, action: Action) -> int:
        for answer in self._answers:
            return answer
        self.action = action
        raise Stopped

    def load(self, place: Place) -> int:
        return self._do(Action("load", place))

    def store(self, place: Place, value: int) -> None:
        self._do(Action("store", place, value))

    def fence(self) -> None:
        self._do(Action("fence"))

    def order(self) -> None:
        """x86 keeps it."""

    def signal(self) -> None:
        """Wake the other side, or let its next wait return at once."""
        self._do(Action("signal"))

    def wait(self, done: int) -> None:
        """Sleep until signalled, having done so much."""
        self._do(Action("wait", value=done))


Memory = tuple[tuple[Place, int], ...]


class State(NamedTuple):
    """Both sides' answers, memory, what each has stored that the other has not seen, pending signals."""

    answers: tuple[Answers, Answers]
    memory: Memory
    buffers: tuple[Memory, Memory]
    signals: tuple[bool, bool]


class End(NamedTuple):
    """Nothing can happen any more: how each side stands, and the signals each has sent."""

    actions: tuple[Action, Action]
    sent: tuple[int, int]


def _replaced(pair: tuple[T, T], side: int, value: T) -> tuple[T, T]:
    return (value, pair[1]) if side == 0 else (pair[0], value)


class Exploration:
    """Runs *programs* against each other in every order; without *buffered*, stores are seen at once."""

    def __init__(self, programs: tuple[Program, Program], buffered: bool = True) -> None:
        self._programs = programs
        self._buffered = buffered
        self._actions: tuple[dict[Answers, Action], dict[Answers, Action]] = ({}, {})
        self.states = 0

    def action(self, side: int, answers: Answers) -> Action:
        known = self._actions[side]
        if answers not in known:
            port = Side(answers)
            try:
                self._programs[side](port)
            except Stopped:
                pass
            known[answers] = port.action
        return known[answers]

    def run(self) -> set[End]:
        """Every end there is."""
        ends = set()
        start = State(((), ()), (), ((), ()), (False, False))
        seen, waiting = {start}, [start]
        while waiting:
            state = waiting.pop()
            following = [after for side in (0, 1) for after in self._steps(state, side)]
            if not following:
                ends.add(self._end(state))
            for after in following:
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)
        self.states = len(seen)
        return ends

    def _end(self, state: State) -> End:
        one, other = state.answers
        return End((self.action(0, one), self.action(1, other)), (self._sent(0, one), self._sent(1, other)))

    def _sent(self, side: int, answers: Answers) -> int:
        return sum(self.action(side, answers[:count]).kind == "signal" for count in range(len(answers)))

    def _steps(self, state: State, side: int) -> list[State]:
        steps = []
        buffer = state.buffers[side]
        if buffer:
            memory = dict(state.memory) | dict(buffer[:1])
            drained = _replaced(state.buffers, side, buffer[1:])
            steps.append(state._replace(memory=tuple(sorted(memory.items())), buffers=drained))
        action = self.action(side, state.answers[side])
        answer = 0
        signals = state.signals
        if action.kind == "end" or (action.kind == "fence" and buffer):
            return steps
        if action.kind == "wait":
            if not signals[side]:
                return steps
            signals = _replaced(signals, side, False)
        elif action.kind == "signal":
            signals = _replaced(signals, 1 - side, True)
        elif action.kind == "load":
            answer = (dict(state.memory) | dict(buffer)).get(action.place, 0)
        after = state._replace(
            answers=_replaced(state.answers, side, (*state.answers[side], answer)), signals=signals
        )
        if action.kind == "store":
            stored = ((action.place, action.value),)
            if self._buffered:
                after = after._replace(buffers=_replaced(state.buffers, side, buffer + stored))
            else:
                memory = dict(state.memory) | dict(stored)
                after = after._replace(memory=tuple(sorted(memory.items())))
        return [*steps, after]
