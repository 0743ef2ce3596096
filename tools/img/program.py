"""The program as a whole: global options, then a subcommand."""

from __future__ import annotations

import os

from ... import __version__

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Run the command line ``argv`` (the program's name first); returns the exit status."""
    name = os.path.basename(argv[0])
    print(f"{name} version 7.2.22 (pyvirtio {__version__})")
    return 0
