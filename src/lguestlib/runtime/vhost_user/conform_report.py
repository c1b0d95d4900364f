"""What conformance cases have come to, for people and for programs."""

from collections import Counter
from collections.abc import Sequence
from typing import TypedDict
from xml.etree import ElementTree

from lguestlib.runtime.vhost_user.conform import Result, Verdict
from lguestlib.virtio.conformance.case import Case

_GROUPS = {"S": "split ring", "P": "packed ring", "T": "transports", "Y": "Python"}
_NAME_WIDTH = 64


class CaseReport(TypedDict):
    """A case and what it has come to, for programs."""

    name: str
    ids: list[str]
    clause: str
    verdict: str
    notes: list[str]
    seconds: float


def line(result: Result) -> str:
    """A result in one line."""
    return f"{result.verdict.value:<11}{result.case.name:<{_NAME_WIDTH}} {result.note}".rstrip()


def listed(case: Case) -> str:
    """A case in one line: who can run it, what it is, what demands it, its other IDs."""
    others = ", ".join((case.clause, *case.ids[1:]))
    return f"{'+'.join(case.runners):<24}{case.name} ({others})"


def table(results: Sequence[Result]) -> str:
    """How many of each group have come to what, and what was not good once more."""
    verdicts = list(Verdict)
    lines = [f"{'':<14}" + "".join(f"{verdict.value:>12}" for verdict in verdicts)]
    for letter, name in _GROUPS.items():
        counts = Counter(result.verdict for result in results if result.case.ids[0].startswith(letter))
        if counts:
            lines.append(f"{name:<14}" + "".join(f"{counts[verdict]:>12}" for verdict in verdicts))
    bad = [line(result) for result in results if not result.verdict.is_good]
    return "\n".join([*lines, *([""] if bad else []), *bad])


def report(results: Sequence[Result]) -> list[CaseReport]:
    """All results, for programs."""
    return [
        {
            "name": result.case.name, "ids": list(result.case.ids), "clause": result.case.clause,
            "verdict": result.verdict.value, "notes": list(result.notes), "seconds": round(result.seconds, 4),
        }
        for result in results
    ]  # fmt: skip


def junit(results: Sequence[Result]) -> str:
    """All results as JUnit's XML, which test servers read."""
    counts = Counter(result.verdict for result in results)
    bad = sum(count for verdict, count in counts.items() if not verdict.is_good)
    suite = ElementTree.Element("testsuite", {
        "name": "conformance", "tests": str(len(results)), "failures": str(bad), "errors": "0",
        "skipped": str(counts[Verdict.SKIP]), "time": f"{sum(result.seconds for result in results):.3f}",
    })  # fmt: skip
    for result in results:
        row, _, title = result.case.name.partition(" ")
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": row, "name": title, "time": f"{result.seconds:.3f}"}
        )
        if result.verdict is Verdict.SKIP:
            ElementTree.SubElement(case, "skipped", {"message": result.note})
        elif not result.verdict.is_good:
            failure = {"type": result.verdict.value, "message": result.note}
            ElementTree.SubElement(case, "failure", failure).text = result.case.clause
        elif result.notes:
            ElementTree.SubElement(case, "system-out").text = result.note
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)
