"""``pyvirtio-serve``: disks for other programs, over a socket. One subcommand per protocol."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the program on the process's own arguments; returns its exit status."""
    from ..output import finish, open_streams
    from .program import run

    open_streams()
    try:
        status = run(sys.argv)
    except SystemExit as end:  # argparse's
        status = end.code if isinstance(end.code, int) else 0
    return finish(status)
