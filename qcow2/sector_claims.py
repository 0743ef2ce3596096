"""Whole sectors for writers of bytes: who changes which sectors of an encrypted image now.

A part of an encrypted sector is written by reading the sector, and writing all of it back. No other
change of that sector may come in between, and none of its neighbours' bytes may be lost: such a
write has its sectors alone (QEMU's serialising requests). Writes of whole sectors share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition

__all__ = ["SectorClaims"]


@dataclass(slots=True, eq=False)
class _Claim:
    start: int
    end: int
    alone: bool


class SectorClaims:
    """Ranges of guest bytes being changed, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._claims: list[_Claim] = []
        self._waiting = 0

    @contextmanager
    def claim(self, start: int, end: int, *, alone: bool = False) -> Iterator[None]:
        """Change the bytes from ``start`` to ``end``; waits for earlier changes that overlap, if
        one of the two has to be ``alone``. Not to be nested."""
        mine = _Claim(start, end, alone)
        with self._changed:
            self._claims.append(mine)
            try:
                while self._is_blocked(mine):
                    self._waiting += 1
                    try:
                        self._changed.wait()
                    finally:
                        self._waiting -= 1
            except BaseException:
                self._give_up(mine)
                raise
        try:
            yield
        finally:
            with self._changed:
                self._give_up(mine)

    def _is_blocked(self, mine: _Claim) -> bool:
        for other in self._claims:
            if other is mine:
                return False
            if other.start < mine.end and mine.start < other.end and (mine.alone or other.alone):
                return True
        return False

    def _give_up(self, mine: _Claim) -> None:
        self._claims.remove(mine)
        if self._waiting:
            self._changed.notify_all()
