"""All cases, and the list of what they are about."""

from collections.abc import Collection, Iterator

from lguestlib.virtio.conformance.case import Case
from lguestlib.virtio.conformance.conversation_cases import CONVERSATION_CASES
from lguestlib.virtio.conformance.library_cases import LIBRARY_CASES
from lguestlib.virtio.conformance.packed_cases import PACKED_CASES
from lguestlib.virtio.conformance.python_cases import PYTHON_CASES
from lguestlib.virtio.conformance.register_cases import REGISTER_CASES
from lguestlib.virtio.conformance.split_cases import SPLIT_CASES


def _order(case: Case) -> tuple[str, int]:
    """S, P, T and Y rows in this order, each by number."""
    return "SPTY"[: "SPTY".index(case.ids[0][0]) + 1], int(case.ids[0][1:])


CASES: tuple[Case, ...] = tuple(
    sorted(
        (*SPLIT_CASES, *PACKED_CASES, *CONVERSATION_CASES, *REGISTER_CASES, *LIBRARY_CASES, *PYTHON_CASES), key=_order
    )
)
"""Every case, in the order of the rows."""


def ids() -> list[str]:
    """Every row and CVE number that some case is about, in the order of `CASES`."""
    return list(dict.fromkeys(each for case in CASES for each in case.ids))


def select(only: Collection[str]) -> Iterator[Case]:
    """The cases whose row, CVE number or name is among *only*, in any case; all of them for none."""
    wanted = {each.upper() for each in only}
    for case in CASES:
        if not wanted or wanted & {*map(str.upper, case.ids), case.name.upper()}:
            yield case
