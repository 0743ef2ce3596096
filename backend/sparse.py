"""Which sectors of data a sparse copy stores, as ``qemu-img convert -S`` decides it."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["SECTOR", "sparse_runs"]

SECTOR = 512

_ZERO = bytes(SECTOR)
_ZEROES = re.compile(rb"\0*")


def sparse_runs(
    data: bytes, offset: int, *, smallest: int, alignment: int
) -> Iterator[tuple[int, int, bool]]:
    """``data``, which stand at byte ``offset`` of a disk, as runs (start, end, zero).

    Zeroes shorter than ``smallest`` bytes that follow data count as data; a change between the two
    is moved to a multiple of ``alignment`` bytes of the disk, data winning. Positions are in
    ``data``; ``offset`` is a multiple of 512.
    """
    if len(data) % SECTOR:
        data = data.ljust(-(-len(data) // SECTOR) * SECTOR, b"\0")
    sectors = _Sectors(data, offset // SECTOR, max(1, alignment // SECTOR))
    least = smallest // SECTOR
    at, end = 0, len(data) // SECTOR
    while at < end:
        zero, stop = sectors.stretch(at)
        if not zero:
            stop = sectors.through_short_zeroes(stop, min(least, end - at))
        yield at * SECTOR, stop * SECTOR, zero
        at = stop


class _Sectors:
    def __init__(self, data: bytes, first: int, alignment: int) -> None:
        self._data = data
        self._first = first
        """The number of the first sector on its disk."""
        self._alignment = alignment
        self._end = len(data) // SECTOR

    def stretch(self, at: int) -> tuple[bool, int]:
        """Whether sectors from ``at`` on are zero, and where that ends, as far as is of use."""
        zero, stop = self._run(at)
        tail = (self._first + stop) % self._alignment
        if stop == self._end or not tail:
            return zero, stop
        if zero and stop - at > tail:
            return True, stop - tail
        # What begins in this unit makes it be written as a whole anyhow.
        return False, min(self._end, stop + self._alignment - tail)

    def through_short_zeroes(self, stop: int, least: int) -> int:
        """The end of data that reach ``stop``, with zeroes of less than ``least`` sectors among
        them."""
        used = stop
        while stop < self._end:
            zero, after = self.stretch(stop)
            if not zero:
                used = after
            elif after - stop >= least:
                break
            stop = after
        return used

    def _run(self, at: int) -> tuple[bool, int]:
        """Sectors from ``at`` on that are all zero, or all not: which, and their end."""
        data, start = self._data, at * SECTOR
        if data.startswith(_ZERO, start):
            match = _ZEROES.match(data, start + SECTOR)
            return True, (start + SECTOR if match is None else match.end()) // SECTOR
        found = start
        while True:
            found = data.find(_ZERO, found)
            if found < 0:
                return False, self._end
            found = -(-found // SECTOR) * SECTOR
            if data.startswith(_ZERO, found):
                return False, found // SECTOR
