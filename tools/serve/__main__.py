"""``python -m pyvirtio.tools.serve``: the program without its installed script."""

import sys

from . import main

sys.exit(main())
