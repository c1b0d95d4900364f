"""What takes checks out finds each of them, and knows one that is missed from one that is not."""

from collections import Counter
from pathlib import Path

import pytest
from mutation.equivalent import EQUIVALENT
from mutation.mutants import mutants
from mutation.suites import SUITES
from mutation.trial import Copy

TOY = '''\
def halve(number: int, limit: int) -> int:
    if number < 0 or number % 2:
        raise ValueError(number)
    return min(number, limit) // 2 & 0xFF
'''

TOY_TEST = '''\
import pytest
from toy import halve

def test_a_half():
    assert halve(4, 8) == 2
    assert halve(1024, 4096) == 0

def test_what_is_odd_is_refused():
    with pytest.raises(ValueError):
        halve(3, 8)
'''

ENDLESS = "def halve(number: int, limit: int) -> int:\n    while True:\n        pass\n"


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """A project with one module, whose tests look at some of its checks."""
    project = tmp_path / "project"
    for name, text in (("src/toy.py", TOY), ("tests/test_toy.py", TOY_TEST)):
        (project / name).parent.mkdir(parents=True)
        (project / name).write_text(text)
    (tmp_path / "copy").mkdir()
    return Copy(project, tmp_path / "copy", ("src", "tests"))


def test_every_check_is_taken_out_once() -> None:
    assert [(mutant.line, mutant.what) for mutant in mutants(TOY)] == [
        (2, "never number < 0 or number % 2"), (2, "without number % 2"), (2, "without number < 0"),
        (2, "number, not number % 2"),
        (4, "limit, not min(number, limit)"), (4, "min(number, limit) // 2, not min(number, limit) // 2 & 0xFF"),
        (4, "number, not min(number, limit)"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "whats"),
    [
        ("def f(a, b):\n    if a:\n        raise b\n    raise a\n", ["never a", "without raise a"]),
        ("if a and b:\n    c()\nelse:\n    raise d\n", ["always a and b", "without a", "without b", "without raise d"]),
        ("e = 0 <= a < b", ["0 <= a, not 0 <= a < b", "a < b, not 0 <= a < b"]),
        ("e = [a for a in b if a]", ["always a"]),
        ("e = a[b] if b < c else 0", ["always b < c"]),
        ("def f(self):\n    self._fence()\n    g()\n", ["without self._fence()"]),
        ("e = a & VRING_DESC_F_NEXT, a & self._mask, a & ~b", ["a, not a & self._mask", "a, not a & ~b"]),
        ("e = a[b:c], a[b:]", ["without the end c"]),
        ("e = 'ä' * 3, a & 1", ["a, not a & 1"]),
    ],
)
def test_what_is_a_check(source: str, whats: list[str]) -> None:
    found = list(mutants(source))
    assert [mutant.what for mutant in found] == whats
    for mutant in found:
        compile(mutant.source, "mutant", "exec")
        assert mutant.source != source


def test_a_check_that_a_test_misses_is_found_and_one_that_none_misses_survives(copy: Copy) -> None:
    assert copy.run(["tests"]).failed is None
    found = {mutant.what: mutant.source for mutant in mutants(TOY)}

    def failed(what: str) -> str | None:
        return copy.try_out("src/toy.py", found[what], ["tests"]).failed

    assert failed("without number % 2") == "tests/test_toy.py::test_what_is_odd_is_refused"
    assert failed("without number < 0") is None
    assert copy.run(["tests"]).failed is None


def test_what_does_not_end_is_found(copy: Copy) -> None:
    outcome = copy.try_out("src/toy.py", ENDLESS, ["tests"], seconds=1.5)
    assert outcome.hung and outcome.failed == "no end"


def test_tests_that_are_not_there_are_no_catch(copy: Copy) -> None:
    with pytest.raises(RuntimeError, match="no tests ran"):
        copy.run(["tests/test_other.py"])


def test_every_module_has_cases_and_is_there() -> None:
    root = Path(__file__).parents[2]
    for module, suite in SUITES.items():
        assert (root / f"src/lguestlib/virtio/{module}.py").is_file(), module
        assert all((root / test.partition("::")[0]).is_file() for test in suite.all), module


def test_each_reason_is_for_one_check_that_is_there() -> None:
    root = Path(__file__).parents[2]
    found = Counter(
        (module, mutant.code, mutant.what)
        for module in {module for module, _, _ in EQUIVALENT}
        for mutant in mutants((root / f"src/lguestlib/virtio/{module}.py").read_text())
    )
    assert {key: found[key] for key in EQUIVALENT} == dict.fromkeys(EQUIVALENT, 1)
