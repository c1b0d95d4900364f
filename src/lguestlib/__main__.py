"""``python -m lguestlib``, and the command ``lguestlib``."""

import signal
import sys


def run() -> int:
    """Run this process's command line; ^C is quiet even while the interpreter starts and ends."""
    try:
        from lguestlib.cli import main

        return main()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(run())
