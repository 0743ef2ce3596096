"""What the demos have in common: steps that are told, and results that are checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["DemoError", "Steps", "file_hash"]


class DemoError(Exception):
    """Something came out wrong."""


class Steps:
    """``quiet`` leaves out everything that is printed."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._line = b""

    def title(self, text: str) -> None:
        """The next step."""
        if not self._quiet:
            print(f"\n== {text}", flush=True)

    def tell(self, text: str) -> None:
        """What came of it."""
        if not self._quiet:
            print(f"   {text}", flush=True)

    def echo(self, data: bytes) -> None:
        """The guest writes: its lines stand apart."""
        *lines, self._line = (self._line + data.replace(b"\r", b"")).split(b"\n")
        for line in lines:
            shown = self.shown(line.decode(errors="replace"))
            if shown.strip():
                self.tell(f"   | {shown}")

    def shown(self, line: str) -> str:
        """What of a line of the guest's is worth showing."""
        return line

    def check(self, good: bool, text: str) -> None:
        """Tell that something is so; raise DemoError if it is not."""
        if not good:
            raise DemoError(f"wrong: {text}")
        self.tell(f"ok: {text}")


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
