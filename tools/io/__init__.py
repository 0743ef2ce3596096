"""``pyvirtio-io``: qemu-io's commands, output and exit codes."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the program on the process's own arguments; returns its exit status."""
    from ..output import buffer_output, open_streams
    from .program import run

    open_streams()
    buffer_output()
    return run(sys.argv)
