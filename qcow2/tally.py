"""Counting references in bulk: how often each host cluster is referred to, a table at a time.

A tally holds one number per host cluster in chunks, so that a million references cost a few
megabytes and no Python object each. Tables whose clusters follow each other in the file (the usual
case) are counted as one run.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache

from . import layout
from .geometry import Geometry

__all__ = ["CHUNK_BITS", "Tally", "decode", "progression"]

CHUNK_BITS = 14
_CHUNK = 1 << CHUNK_BITS
_MASK = _CHUNK - 1
_MAX_CHUNKS = 512
"""Held at a time: 64 MiB."""
_SWAP = sys.byteorder == "little"


def decode(table: bytes) -> array[int]:
    """The 64-bit entries of a table as it is in the file."""
    entries = array("Q", table)
    if _SWAP:
        entries.byteswap()
    return entries


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


class Tally:
    """References to host clusters, handed on when they are many, and at the end.

    ``action(first, counts)`` gets ``counts[i]`` references to cluster ``first + i``. A cluster may
    come up more than once. The same references always come in the same pieces.
    """

    def __init__(self, geometry: Geometry, action: Callable[[int, Sequence[int]], None]) -> None:
        self._geometry = geometry
        self._action = action
        self._chunks: dict[int, array[int]] = {}
        self._zeroes = array("Q", bytes(8 * _CHUNK))

    def finish(self) -> None:
        """Hand on what has been counted, in order of the file."""
        for number in sorted(self._chunks):
            counts = self._chunks[number]
            data = counts.tobytes()
            end = len(data.rstrip(b"\0")) + 7 >> 3
            start = len(data) - len(data.lstrip(b"\0")) >> 3
            if start < end:
                self._action((number << CHUNK_BITS) + start, counts[start:end])
        self._chunks.clear()

    def _chunk(self, number: int) -> array[int]:
        chunk = self._chunks.get(number)
        if chunk is None:
            if len(self._chunks) >= _MAX_CHUNKS:
                self.finish()
            chunk = self._chunks[number] = self._zeroes[:]
        return chunk

    def add_run(self, first: int, count: int, times: int = 1) -> None:
        """``times`` references more to each of ``count`` clusters."""
        while count > 0:
            start = first & _MASK
            part = min(count, _CHUNK - start)
            chunk = self._chunk(first >> CHUNK_BITS)
            old = chunk[start : start + part]
            if old == self._zeroes[:part]:
                chunk[start : start + part] = array("Q", [times]) * part
            else:
                chunk[start : start + part] = array("Q", [value + times for value in old])
            first += part
            count -= part

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
        mask, compressed = layout.OFFSET_MASK, layout.COMPRESSED
        entries = decode(table)
        clusters = [(e & mask) >> bits for e in entries if e & mask and not e & compressed]
        for entry in entries:
            if entry & compressed:
                offset, length = self._geometry.compressed_extent(entry)
                clusters += range(offset >> bits, (offset + length - 1 >> bits) + 1)
        self.add_clusters(clusters, times)

    def add_clusters(self, clusters: Sequence[int], times: int = 1) -> None:
        """``times`` references more to each cluster named, as often as it is."""
        get = self._chunks.get
        for cluster in clusters:
            chunk = get(cluster >> CHUNK_BITS)
            if chunk is None:
                chunk = self._chunk(cluster >> CHUNK_BITS)
            chunk[cluster & _MASK] += times
