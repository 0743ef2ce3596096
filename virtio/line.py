"""An interrupt line: the bits that raise it, and an emulator that is told of its level."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, get_ident

__all__ = ["InterruptLine"]


class InterruptLine:
    """High while there is a cause and it is not masked. ``callback(level)`` hears of changes.

    Any thread may raise and lower it. One at a time calls the callback, under no lock, and looks
    again afterwards, so the last call is always the right one. The callback may come back here: a
    guest that is served inside it, and lowers the line, has that told from within.
    """

    def __init__(self, callback: Callable[[bool], object] | None) -> None:
        self.callback = callback
        self.causes = 0
        """Bits; to be set to others by a load only, with :meth:`update` after it."""
        self.masked = False
        """To be followed by :meth:`update`."""
        self._lock = Lock()
        self._told = False
        self._teller = 0
        """The thread inside the callback; 0 is none."""

    @property
    def level(self) -> bool:
        """What it is now."""
        return self.causes != 0 and not self.masked

    def add(self, cause: int) -> None:
        """There is something to be told; one bit."""
        if not self.causes & cause:
            self._change(cause, 0)

    def note(self, cause: int) -> None:
        """The same, and :meth:`update` is called by who says so, when nothing is locked."""
        with self._lock:
            self.causes |= cause

    def remove(self, causes: int) -> int:
        """These bits are dealt with; all that there were before."""
        return self._change(0, causes)

    def _change(self, add: int, remove: int) -> int:
        with self._lock:
            before = self.causes
            self.causes = before & ~remove | add
            if self.callback is None or self.level == self._told:
                return before
        self.update()
        return before

    def update(self) -> None:
        """Tell the level if it is not what was told last."""
        if self.callback is None:
            return
        me = get_ident()
        while True:
            with self._lock:
                level, teller = self.level, self._teller
                if level == self._told or teller not in (0, me):
                    return
                self._told = level
                self._teller = me
            try:
                self.callback(level)
            finally:
                self._teller = teller
