"""A copy of the project in which one check at a time is missing, and what its tests say of it."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS_MAX = 120
"""More is a hang, which is found as well as any failure."""

# Random rings take long, and find what the exhaustive tests beside them find.
_OPTIONS = ("-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", "-k", "not test_random_rings")
_MEMORY_MAX = 6 << 30
"""Bytes of addresses: a loop that nothing ends takes memory, as a rule."""

_FOUND = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """The test that failed first, None where none did; *seconds* it took was over the limit where *hung*."""

    failed: str | None
    hung: bool = False


class Copy:
    """A copy of *project*'s *parts* at *place*, to change and to run tests in."""

    def __init__(self, project: Path, place: Path, parts: Sequence[str] = ("src", "tests", "pyproject.toml")) -> None:
        self._place = place
        for part in parts:
            if (project / part).is_dir():
                # What is compiled already comes too, and is as old as its source.
                shutil.copytree(project / part, place / part)
            else:
                shutil.copy(project / part, place / part)

    def run(self, tests: Sequence[str], seconds: float = SECONDS_MAX) -> Outcome:
        """Run *tests* in their order up to the first that fails.  Raises RuntimeError where they cannot be run."""
        command = [sys.executable, "-m", "pytest", *_OPTIONS, *tests]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join((str(self._place / "src"), str(self._place / "tests"))),
            # Two mutants of one second and one size could not be told apart.
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        process = subprocess.Popen(
            command, cwd=self._place, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            _limit(process.pid, int(seconds / 3) + 1)
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome("no end", True)
        finally:
            _end(process)
        if process.returncode == 0:
            return Outcome(None)
        found = _FOUND.search(output)
        if found:
            return Outcome(found[1])
        if -process.returncode in (signal.SIGKILL, signal.SIGXCPU):
            # Of processor time, the limit may come first.
            return Outcome("no end", True)
        if process.returncode < 0:
            return Outcome(f"ended by signal {-process.returncode}", True)
        if process.returncode in (4, 5) or "Traceback" not in output:
            raise RuntimeError(f"{' '.join(command)}\n{output}")
        return Outcome("nothing can be imported")

    def try_out(self, path: str, source: str, tests: Sequence[str], seconds: float = SECONDS_MAX) -> Outcome:
        """`run` *tests* while the file at *path* has this *source*."""
        file = self._place / path
        before = file.read_text()
        file.write_text(source)
        try:
            return self.run(tests, seconds)
        finally:
            file.write_text(before)


def _limit(pid: int, seconds: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_AS, (_MEMORY_MAX, _MEMORY_MAX))
    # For those, too, that leave the session.
    resource.prlimit(pid, resource.RLIMIT_CPU, (seconds, seconds))


def _end(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    if process.stdout:
        process.stdout.close()
