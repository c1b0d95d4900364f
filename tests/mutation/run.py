"""Takes the device side's checks out, one at a time, and tells which test misses each.

    python tests/mutation/run.py [MODULE...] [--json] [--jobs N]

MODULE is a path under src/lguestlib/virtio without .py, such as split_device or
pci/msix; none for all of them, which takes about half an hour on two processors.
The named cases of the catalogue run first, then the module's unit tests.  A check
that nothing misses is a survivor; those known to make no difference are in
`equivalent`.  The exit status is 1 where there are others.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]

from mutation.equivalent import EQUIVALENT
from mutation.mutants import Mutant, mutants
from mutation.suites import SUITES, Suite
from mutation.trial import SECONDS_MAX, Copy

PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Verdict:
    """What came of taking a check out; *failed* is the first test to fail."""

    module: str
    line: int
    what: str
    code: str
    failed: str | None
    by: str
    """ "catalogue", "unit", "equivalent" or "survivor"."""


def examine(copy: Copy, module: str, path: str, mutant: Mutant, suite: Suite) -> Verdict:
    """Try *mutant* of the file at *path* out."""
    outcome = copy.try_out(path, mutant.source, suite.all)
    if outcome.failed is None:
        by = "equivalent" if (module, mutant.code, mutant.what) in EQUIVALENT else "survivor"
    elif outcome.hung or "::" not in outcome.failed or outcome.failed.partition("[")[0] in suite.catalogue:
        # What hangs, or cannot be imported, does so in the first of them.
        by = "catalogue" if suite.catalogue else "unit"
    else:
        by = "unit"
    return Verdict(module, mutant.line, mutant.what, mutant.code, outcome.failed, by)


def verdicts(modules: Sequence[str], jobs: int) -> Iterator[Verdict]:
    """Every one of *modules*, in order, *jobs* of them at a time.

    Raises RuntimeError where a test fails with every check in its place.
    """
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch, ThreadPoolExecutor(jobs) as pool:
        free: SimpleQueue[Copy] = SimpleQueue()
        for number in range(jobs):
            free.put(Copy(PROJECT, Path(scratch) / str(number)))

        def work(module: str, mutant: Mutant) -> Verdict:
            copy = free.get()
            try:
                return examine(copy, module, _path(module), mutant, SUITES[module])
            finally:
                free.put(copy)

        copy = free.get()
        outcome = copy.run(list(dict.fromkeys(test for module in modules for test in SUITES[module].all)), 10 * SECONDS_MAX)
        free.put(copy)
        if outcome.failed is not None:
            raise RuntimeError(f"with nothing missing this fails: {outcome.failed}")
        tasks = [(module, mutant) for module in modules for mutant in mutants((PROJECT / _path(module)).read_text())]
        yield from pool.map(work, *zip(*tasks))


def _path(module: str) -> str:
    return f"src/lguestlib/virtio/{module}.py"


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    parser.add_argument("--json", action="store_true", help="every verdict, a line each, and no table")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="at a time (default: 2)")
    given = parser.parse_args()
    modules = given.modules or list(SUITES)
    for module in modules:
        if module not in SUITES:
            parser.error(f"{module}: no such module (one of {', '.join(SUITES)})")
    found = []
    for verdict in verdicts(modules, given.jobs):
        found.append(verdict)
        if given.json:
            print(json.dumps(asdict(verdict)), flush=True)
        elif sys.stderr.isatty():
            print(f"\r{verdict.module}:{verdict.line}\x1b[K", end="", file=sys.stderr, flush=True)
    if not given.json:
        print(_table(modules, found))
    return int(any(verdict.by == "survivor" for verdict in found))


def _table(modules: Sequence[str], found: Sequence[Verdict]) -> str:
    columns = ("catalogue", "unit", "equivalent", "survivor")
    lines = ["| module | checks | by the catalogue | by a unit test | equivalent | survivors |", "|---|---|---|---|---|---|"]
    for module in (*modules, ""):
        of_it = [verdict.by for verdict in found if module in (verdict.module, "")]
        counts = (len(of_it), *map(of_it.count, columns))
        lines.append(f"| {module or 'all'} | {' | '.join(map(str, counts))} |")
    survivors = [
        f"{_path(verdict.module)}:{verdict.line}: {verdict.what}\n    {verdict.code}"
        for verdict in found if verdict.by == "survivor"
    ]  # fmt: skip
    return "\n".join(lines + survivors)


if __name__ == "__main__":
    sys.exit(main())
