"""``python -m lguestlib``."""

import sys

from lguestlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
