"""``python -m pyvirtio.tools.serve``: the program without its installed script."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
