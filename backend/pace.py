"""Keeping a long operation below a rate."""

from __future__ import annotations

import time
from threading import Lock

__all__ = ["Pace"]

_SLEEP = 0.2


class Pace:
    """Makes writers wait so that no more than ``rate`` bytes are written in a second; 0: all."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._lock = Lock()
        self._due = time.monotonic()

    def wait(self, length: int) -> None:
        """``length`` bytes are about to be written."""
        if not self._rate:
            return
        with self._lock:
            due = max(self._due, time.monotonic())
            self._due = due + length / self._rate
        while (left := due - time.monotonic()) > 0:
            time.sleep(min(left, _SLEEP))
