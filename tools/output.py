"""Standard output as C programs have it: a terminal sees each line, a file or a pipe whole blocks.

So the order of messages and output in a log is that of the programs whose language ours speak,
whatever Python was told about its own streams.
"""

from __future__ import annotations

import io
import os
import sys

TYPE_CHECKING = False  # as type checkers know it; importing typing takes time at every start
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["buffer_output", "finish", "leave", "open_streams"]

_BLOCK = 4096


def open_streams() -> None:
    """Give the process the standard streams that it was started without, or what it opens next
    would be taken for them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def finish(status: int, text: str = "") -> int:
    """Write ``text`` and what was printed; a reader that has gone, or a full disk, is no error, as
    for C programs. Returns ``status``."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except (OSError, ValueError):
        # What is left would be tried again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return status


def buffer_output() -> None:
    """Buffer the process's standard output where it does not go to a terminal."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper) or not stream.write_through or stream.isatty():
        return
    raw = io.FileIO(stream.fileno(), "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw, _BLOCK),
        encoding=stream.encoding,
        errors=stream.errors,
        write_through=True,
    )


def leave(status: int) -> NoReturn:
    """End the process. What Python does then, taking all its modules apart, takes longer than many
    a command; nothing here waits for it."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
