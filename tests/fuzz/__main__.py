"""Random cases for as long as one likes: cd tests && PYTHONPATH=../src:. python3 -m fuzz --forever"""

import argparse
import itertools
import sys
import time
import traceback

from fuzz.runs import TARGETS, run


def main() -> int:
    parser = argparse.ArgumentParser("python3 -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--seed", type=int, help="the first one (default: by the clock)")
    parser.add_argument("--count", type=int, default=100, help="seeds for each target (default: 100)")
    parser.add_argument("--forever", action="store_true", help="until ^C, or something is found")
    given = parser.parse_args()
    targets = given.targets or list(TARGETS)
    for target in targets:
        if target not in TARGETS:
            parser.error(f"{target}: no such target (one of {', '.join(TARGETS)})")
    first = time.time_ns() if given.seed is None else given.seed
    tried = dict.fromkeys(targets, 0)
    try:
        for turn in itertools.count() if given.forever else range(given.count):
            for target in targets:
                tried[target] += run(target, first + turn)
            if sys.stderr.isatty():
                print("\r" + _told(tried), end="", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        pass
    except AssertionError:
        traceback.print_exc()
        return 1
    print(_told(tried))
    return 0


def _told(tried: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {target}" for target, count in tried.items())


if __name__ == "__main__":
    sys.exit(main())
