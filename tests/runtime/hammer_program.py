"""Writes over descriptors without end: the table's file, its offset, entries, and addresses to name, as arguments."""

import mmap
import random
import sys

LENGTHS = (64, 64, 64, 0, 16, 0xFFFF_FFFF)
FLAGS = (0, 0, 1, 2, 2, 3, 4, 6)


def main() -> None:
    fd, at, entries, *addresses = map(int, sys.argv[1:])
    rng = random.Random(at)
    with mmap.mmap(fd, 0) as mapping, memoryview(mapping)[at : at + 16 * entries].cast("Q") as words:
        # Made before, to be written as fast as may be.
        firsts = [rng.choice(addresses) for _ in range(509)]
        seconds = [
            rng.choice(LENGTHS) | rng.choice(FLAGS) << 32 | rng.randrange(entries + 2) << 48 for _ in range(997)
        ]
        print("hammering", flush=True)
        step = 0
        while True:
            step += 1
            place = 2 * (step % entries)
            words[place] = firsts[step % 509]
            words[place + 1] = seconds[step % 997]


if __name__ == "__main__":
    main()
