"""What a command line says when something is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress

from ..errors import PyvirtioError

__all__ = [
    "Failure",
    "errno_text",
    "program_name",
    "report",
    "say_findings",
    "say_more",
    "text_of",
    "warn",
]


class Failure(Exception):
    """Ends a command: the message has been or will be told, and ``status`` is the exit status.

    A message of several lines has the program's name before the first only; ``hint`` follows it
    as it stands.
    """

    def __init__(self, message: str = "", status: int = 1, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.hint = hint


def program_name() -> str:
    """The name the program was started by: a link named ``qemu-img`` speaks as ``qemu-img``."""
    return os.path.basename(sys.argv[0])


def report(message: str) -> None:
    """Tell the user of an error, with the program's name before it."""
    say_more(f"{program_name()}: {message}\n")


def warn(message: str) -> None:
    """Tell the user of something odd."""
    report(f"warning: {message}")


def say_more(text: str) -> None:
    """Write to standard error as it is; names that are no UTF-8 come out as they came in."""
    with suppress(OSError, ValueError):
        sys.stderr.flush()
        sys.stderr.buffer.write(text.encode(errors="surrogateescape"))
        sys.stderr.buffer.flush()


def say_findings(messages: Iterable[str]) -> None:
    """What a check or repair of an image has found."""
    for message in messages:
        # Those that are reports stand under the program's name.
        say_more(message + "\n") if type(message) is str else report(message)


def text_of(error: BaseException) -> str:
    """An exception in the words for the user."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, MemoryError):
        return "Cannot allocate memory"
    return str(error) or type(error).__name__


def errno_text(error: BaseException) -> str:
    """What the C library says of the error's number, as QEMU prints it where it has only that."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, PyvirtioError):
        return os.strerror(5)  # EIO
    return text_of(error)
