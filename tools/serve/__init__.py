"""``pyvirtio-serve``: disks for other programs, over a socket. One subcommand per protocol."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the program on the process's own arguments; returns its exit status."""
    from .program import run

    return run(sys.argv)
