"""``python -m goslet`` is the command ``goslet``."""

import sys

from .entry import main

if __name__ == "__main__":
    sys.exit(main())
