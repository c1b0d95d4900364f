"""``python -m lguestlib``."""

import sys

if __name__ == "__main__":
    try:
        from lguestlib.cli import main

        sys.exit(main())
    except KeyboardInterrupt:
        # ^C before there was anything to interrupt.
        sys.exit(130)
