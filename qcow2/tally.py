"""Counting references in bulk: how often each host cluster is referred to, a table at a time.

A tally holds a byte for each host cluster in memory that is mapped where it is touched, so a
million references cost a megabyte and no Python object each. Entries of a table are taken apart as
one large integer, all at once; tables whose clusters follow each other in the file (the usual case)
are counted as one run.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain

from . import layout
from .counts import MANY, ClusterCounts
from .geometry import Geometry
from .quarantine import merge_runs
from .table_io import pack_table, unpack_table

__all__ = ["WINDOW", "Tally", "every_entry", "host_clusters", "progression"]

WINDOW = 1 << 26
"""Host clusters from the start of the file that have a byte each: 64 MiB if all are touched."""
_PIECE = 1 << 14
"""Clusters handed on at once."""
_MAX_OUTSIDE = 1 << 16
"""Clusters behind the window, or with many references, that are held at a time."""
_SWAP = sys.byteorder == "little"


@lru_cache(maxsize=8)
def _ramp(count: int, step: int) -> tuple[int, int]:
    """As big-endian integers of ``count`` entries: all of them 1; and 0, step, 2 * step, …"""
    ones = int.from_bytes((1).to_bytes(8) * count)
    ramp = array("Q", range(0, count * step, step))
    if _SWAP:
        ramp.byteswap()
    return ones, int.from_bytes(ramp.tobytes())


def progression(table: bytes, step: int) -> tuple[int, int] | None:
    """(first entry, entries) if each entry of a table is the one before it plus ``step`` bytes.

    A table is compared as one large integer: that costs a few of its own lengths in memory traffic.
    """
    count = len(table) // 8
    (first,), (last,) = layout.U64.unpack_from(table), layout.U64.unpack_from(table, len(table) - 8)
    if not first or last != first + (count - 1) * step:
        return None
    ones, ramp = _ramp(count, step)
    return (first, count) if int.from_bytes(table) == first * ones + ramp else None


@lru_cache(maxsize=16)
def every_entry(mask: int, count: int) -> int:
    """``mask`` in each of ``count`` entries of a table taken as one large integer."""
    return int.from_bytes(mask.to_bytes(8) * count)


def host_clusters(table: bytes, bits: int) -> array[int]:
    """The number of the host cluster that each standard L2 entry names, 0 for none.

    Compressed entries (``every_entry(layout.COMPRESSED, …)``) must not be among them.
    """
    mask = every_entry(layout.OFFSET_MASK & -(1 << bits), len(table) // 8)
    return unpack_table(((int.from_bytes(table) & mask) >> bits).to_bytes(len(table)))


class Tally:
    """References to host clusters, handed on when they are many, and at the end.

    ``action(first, counts)`` gets ``counts[i]`` references to cluster ``first + i``. A cluster may
    come up more than once.
    """

    def __init__(self, geometry: Geometry, action: Callable[[int, Sequence[int]], None]) -> None:
        self._geometry = geometry
        self._action = action
        self._start()

    def _start(self) -> None:
        self._counts = ClusterCounts(WINDOW)
        self._end = 0
        """No cluster of the window from this one on has a count."""

    def finish(self) -> None:
        """Hand on what has been counted, in order of the file."""
        counts, end = self._counts, min(self._end, WINDOW)
        self._start()
        for start in range(0, end, _PIECE):
            data = counts.piece(start, min(start + _PIECE, end)).rstrip(b"\0")
            piece = data.lstrip(b"\0")
            first = start + len(data) - len(piece)
            if MANY in piece:
                self._action(first, [counts[first + i] for i in range(len(piece))])
            elif piece:
                self._action(first, piece)
        for first, length in merge_runs(c for c in counts.many if c >= WINDOW):
            self._action(first, [counts[first + i] for i in range(length)])
        counts.close()

    def add_run(self, first: int, count: int, times: int = 1) -> None:
        """``times`` references more to each of ``count`` clusters."""
        self._counts.add_run(first, count, times)
        self._end = max(self._end, first + count)
        if len(self._counts.many) > _MAX_OUTSIDE:
            self.finish()

    def add_table(self, table: bytes, times: int = 1) -> None:
        """``times`` references more to all that the standard L2 entries of a table refer to."""
        bits = self._geometry.cluster_bits
        run = progression(table, 1 << bits)
        if run is not None and not run[0] & ~(layout.OFFSET_MASK | layout.COPIED):
            first = (run[0] & layout.OFFSET_MASK) >> bits
            if first and (first + run[1]) << bits <= layout.MAX_HOST_OFFSET:
                self.add_run(first, run[1], times)
                return
        if not any(table):
            return
        compressed = layout.COMPRESSED
        if int.from_bytes(table) & every_entry(compressed, len(table) // 8):
            entries = unpack_table(table)
            self._add_compressed([e for e in entries if e & compressed], times)
            table = pack_table([0 if e & compressed else e for e in entries])
        self.add_clusters([*filter(None, host_clusters(table, bits))], times)

    def _add_compressed(self, entries: Sequence[int], times: int) -> None:
        """``times`` references more to the clusters in which compressed data lie."""
        geometry, bits = self._geometry, self._geometry.cluster_bits
        extents = list(map(geometry.compressed_extent, entries))
        first = [offset >> bits for offset, _ in extents]
        last = [offset + length - 1 >> bits for offset, length in extents]
        self.add_clusters(first, times)
        more = [range(a + 1, b + 1) for a, b in zip(first, last, strict=True) if a != b]
        self.add_clusters([*chain.from_iterable(more)], times)

    def add_clusters(self, clusters: Sequence[int], times: int = 1) -> None:
        """``times`` references more to each cluster named, as often as it is."""
        counts = self._counts
        for cluster in counts.add_each(clusters, times):
            counts[cluster] += times
        self._end = max(self._end, max(clusters, default=-1) + 1)
        if len(counts.many) > _MAX_OUTSIDE:
            self.finish()
