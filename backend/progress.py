"""Telling a caller how far a long operation is."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[int, int], None]
"""``progress(done, total)``, in bytes of the guest's disk, from the caller's own thread. An
exception that it raises stops the operation and comes out of it."""


def silent(done: int, total: int) -> None:
    """Tell nobody."""
