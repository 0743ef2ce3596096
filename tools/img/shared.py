"""What several subcommands have in common: options, output formats, failures, progress."""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import monotonic
from typing import Self, TextIO

from ..getopt import Option, UsageError
from ..messages import Failure

__all__ = [
    "FORCE_SHARE",
    "FORMAT",
    "HELP",
    "IMAGE_OPTS",
    "OBJECT",
    "OUTPUT",
    "PROGRESS",
    "QUIET",
    "Meter",
    "is_json",
    "one_operand",
]

HELP = Option(("--help", "-h"), None, "Show the help text.")
OBJECT = Option(("--object",), "objectdef", "Make an object, mostly a secret with a passphrase.")
IMAGE_OPTS = Option(
    ("--image-opts",), None, "File names are lists of options: driver=qcow2,file.filename=x."
)
FORCE_SHARE = Option(("-U", "--force-share"), None, "Open the image even if it is in use.")
FORMAT = Option(("-f", "--format"), "fmt", "The format of the image; guessed if not given.")
OUTPUT = Option(("--output",), "ofmt", "How to print: human or json.")
QUIET = Option(("-q",), None, "Print errors only.")
PROGRESS = Option(("-p",), None, "Show how far it is.")


def is_json(output: str | None) -> bool:
    """What ``--output`` says. Raises Failure if it is neither json nor human."""
    if output not in (None, "json", "human"):
        raise Failure("--output must be used with human or json as argument.")
    return output == "json"


def one_operand(operands: list[str]) -> str:
    """The one file name. Raises UsageError if there is none, or another word."""
    if len(operands) != 1:
        raise UsageError("Expecting one image file name")
    return operands[0]


class Meter:
    """Shows how far a long operation is, if ``shown``; to be ``with``.

    On a terminal with the rate and the time left, into a pipe as QEMU does.
    """

    def __init__(
        self,
        shown: bool,
        step: float = 1.0,
        *,
        begin: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self._shown = shown
        self._stream = stream or sys.stdout
        self._step = step
        self._begin = begin
        self._last = 0.0
        self._started = monotonic()
        self._terminal = shown and self._stream.isatty()
        self._width = 0

    def __enter__(self) -> Self:
        if self._begin:
            self.percent(0.0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print(file=self._stream, flush=True)

    def __call__(self, done: int, total: int) -> None:
        """So many bytes are done."""
        percent = 100.0 * done / total if total else 100.0
        self.percent(percent, done, total)

    def beyond_zero(self, done: int, total: int) -> None:
        """So many bytes are done, if any are: where the beginning has been told already."""
        if done:
            self(done, total)

    def percent(self, percent: float, done: int = 0, total: int = 0) -> None:
        """So much is done; shown if it is more than a step from what is shown."""
        if not self._shown:
            return
        percent = min(percent, 100.0)
        if 0 < percent < 100 and abs(percent - self._last) <= self._step:
            return
        self._last = percent
        line = f"    ({percent:3.2f}/100%)"
        if self._terminal:
            line += self._pace(done, total)
            line, self._width = line.ljust(self._width), len(line)
        print(line, end="\r", file=self._stream, flush=True)

    def clear(self) -> None:
        """Make room on the terminal for a line of something else."""
        if self._terminal and self._width:
            print(" " * self._width, end="\r", file=self._stream, flush=True)

    def _pace(self, done: int, total: int) -> str:
        elapsed = monotonic() - self._started
        if not done or elapsed < 0.5:
            return ""
        rate = done / elapsed
        left = int((total - done) / rate)
        return f"  {rate / (1 << 20):.1f} MiB/s, {left // 60}:{left % 60:02} left"

    def part(self, start: float, length: float) -> Callable[[int, int], None]:
        """A meter for a part of the whole, in percent."""

        def progress(done: int, total: int) -> None:
            self.percent(start + length * (done / total if total else 1.0), done, total)

        return progress
