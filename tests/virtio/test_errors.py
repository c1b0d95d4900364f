"""What is said of a driver's mistakes."""

import inspect

from lguestlib.virtio import errors


def kinds() -> list[type[errors.QueueError]]:
    found = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    return [kind for kind in found if issubclass(kind, errors.QueueError) and kind.__subclasses__() == []]


def test_every_error_says_which_queue_why_and_all_its_numbers() -> None:
    assert len(kinds()) > 12
    reasons = set()
    for kind in kinds():
        names = list(inspect.signature(kind).parameters)
        assert names[0] == "queue"
        error = kind(*range(41, 41 + len(names)))
        assert isinstance(error, errors.VirtioError) and kind.__doc__
        text = str(error)
        assert text.startswith("queue 41: ") and kind.reason in text
        for name, value in zip(names[1:], range(42, 99)):
            assert f"{name} {value}" in text or f"{name} {value:#x}" in text
        reasons.add(kind.reason)
    assert len(reasons) == len(kinds())


def test_an_error_reads_as_a_line_for_people() -> None:
    assert str(errors.BadAddress(1, 5, 0xD0000000, 16)) == (
        "queue 1: outside guest memory (head 5, address 0xd0000000, length 0x10)"
    )
    assert str(errors.QueueError(2)) == "queue 2: broken"
