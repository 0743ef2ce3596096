"""``pyvirtio-img``: qemu-img's subcommands, options, output and exit codes."""

from __future__ import annotations

import sys

__all__ = ["main", "program"]


def main() -> int:
    """Run the program on the process's own arguments; returns its exit status."""
    from ..output import buffer_output, open_streams
    from .program import run

    open_streams()
    buffer_output()
    return run(sys.argv)


def program() -> None:
    """Be the program: run it, and end the process."""
    import gc

    from ..output import leave

    gc.set_threshold(100_000)  # what starting makes stays: it need not be looked through
    leave(main())
