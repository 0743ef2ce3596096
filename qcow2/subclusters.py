"""Extended L2 entries: 32 subclusters, each with a state of its own (spec, "Extended L2 Entries").

An extended entry is handled as one integer: the standard entry in its low 64 bits, the states of
the subclusters above them, so that all that looks at flags and offsets works on both kinds.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from struct import Struct

from . import layout
from .layout import ClusterKind
from .table_io import pack_table, unpack_table
from .tables import Tables

__all__ = ["SubclusterTables", "allocated_mask", "subcluster_runs", "zero_mask"]

_SWAP = sys.byteorder == "little"
_PAIR = Struct(">QQ")
_ALL = (1 << layout.SUBCLUSTERS) - 1
_NORMAL = ClusterKind.NORMAL
_UNALLOCATED = ClusterKind.UNALLOCATED
_CONTIGUOUS = (ClusterKind.NORMAL, ClusterKind.ZERO_ALLOCATED)


def allocated_mask(first: int, end: int) -> int:
    """The allocation bits of subclusters [first, end), in an entry."""
    return ((1 << (end - first)) - 1) << (64 + first)


def zero_mask(first: int, end: int) -> int:
    """The zero bits of subclusters [first, end), in an entry."""
    return ((1 << (end - first)) - 1) << (96 + first)


def first_run(entry: int, index: int) -> tuple[ClusterKind, int]:
    """The kind of subcluster ``index`` and the index after the last one like it in a row."""
    if entry & layout.COMPRESSED:
        return ClusterKind.COMPRESSED, layout.SUBCLUSTERS
    allocated, zero = entry >> 64 & _ALL, entry >> 96
    if zero >> index & 1:
        kind, alike = ClusterKind.ZERO_PLAIN, zero
        if entry & layout.OFFSET_MASK:
            kind = ClusterKind.ZERO_ALLOCATED
    elif allocated >> index & 1:
        kind, alike = ClusterKind.NORMAL, allocated
    else:
        kind, alike = ClusterKind.UNALLOCATED, ~(allocated | zero)
    unlike = ~alike >> index & (_ALL >> index)
    return kind, index + (unlike & -unlike).bit_length() - 1 if unlike else layout.SUBCLUSTERS


def subcluster_runs(entry: int, first: int, end: int) -> Iterator[tuple[ClusterKind, int, int]]:
    """(kind, first, end) of every run of subclusters alike in [first, end)."""
    while first < end:
        kind, stop = first_run(entry, first)
        stop = min(stop, end)
        yield kind, first, stop
        first = stop


class SubclusterTables(Tables):
    """L1 and L2 with extended entries."""

    def entry_at(self, position: int) -> int:
        entry, states = _PAIR.unpack_from(self._view, position)
        combined: int = states << 64 | entry
        return combined

    def entries_at(self, position: int, count: int) -> Sequence[int]:
        words = self._words(position, count)
        return [states << 64 | entry for entry, states in zip(words[::2], words[1::2], strict=True)]

    def _words(self, position: int, count: int) -> array[int]:
        return unpack_table(self._view[position : position + 16 * count])

    def set_entries(self, position: int, entries: Sequence[int]) -> None:
        self.cache.mark_dirty(position >> self.cache.slot_bits)
        low, states = (1 << 64) - 1, array("Q", [entry >> 64 for entry in entries])
        words = array("Q", bytes(16 * len(states)))
        words[::2] = array("Q", [entry & low for entry in entries])
        words[1::2] = states
        self._view[position : position + 16 * len(states)] = pack_table(words)

    def check_entry(self, entry: int, cluster: int) -> ClusterKind:
        allocated, zero = entry >> 64 & _ALL, entry >> 96
        offset = entry & layout.OFFSET_MASK
        valid = not allocated & zero and (offset or not allocated)
        if entry & layout.COMPRESSED:
            return ClusterKind.COMPRESSED
        if not valid or entry & layout.ZERO or offset & self._cluster_mask:
            raise self.damaged(
                f"Invalid L2 entry {entry & (1 << 64) - 1:#x} with subclusters {entry >> 64:#x} "
                f"(guest offset: {cluster << self._cluster_bits:#x})",
                field="L2 entry",
                value=entry,
            )
        if not offset:
            return ClusterKind.ZERO_PLAIN if zero == _ALL else ClusterKind.UNALLOCATED
        return ClusterKind.ZERO_ALLOCATED if zero == _ALL else ClusterKind.NORMAL

    def map(self, offset: int, length: int) -> tuple[ClusterKind, int, int]:
        return self._map(offset, length, 0)

    def map_stored(self, offset: int, length: int) -> int:
        kind, host, run = self._map(offset, length, 0)
        return host if kind is _NORMAL and run == length else -1

    def map_own(self, offset: int, length: int) -> tuple[int, int]:
        cluster = offset >> self._cluster_bits
        position = self.locate(cluster)
        if position < 0 or not self.entry_at(position) & layout.COPIED:
            return 0, 0
        kind, host, run = self._map(offset, length, layout.COPIED)
        return (host, run) if kind is _NORMAL else (0, 0)

    def _map(self, offset: int, length: int, flags: int) -> tuple[ClusterKind, int, int]:
        """As :meth:`map`; all entries of the run have ``flags``."""
        bits = self._geometry.subcluster_bits
        at, end = offset, offset + length
        first_kind, first_host = _UNALLOCATED, 0
        while at < end:
            cluster = at >> self._cluster_bits
            within = at & self._cluster_mask
            position = self.locate(cluster)
            entry = 0 if position < 0 else self.entry_at(position)
            self.check_entry(entry, cluster)
            kind, stop = first_run(entry, within >> bits)
            place = entry & layout.OFFSET_MASK
            host = place + within if kind in _CONTIGUOUS or (kind is _UNALLOCATED and place) else 0
            if at == offset:
                first_kind, first_host = kind, host
                if kind is ClusterKind.COMPRESSED:
                    inside = min(length, self._cluster_size - within)
                    return kind, entry & (1 << 64) - 1, inside
            elif (
                kind is not first_kind
                or entry & flags != flags
                or (host and host != first_host + at - offset)
                or (first_host and not host)
            ):
                break
            at = (cluster << self._cluster_bits) + (stop << bits)
            if stop < layout.SUBCLUSTERS:
                break
            if position < 0:
                at = ((cluster >> self._l2_bits) + 1) << (self._l2_bits + self._cluster_bits)
            elif not within and (entry >> 64) in (0, layout.ALL_ALLOCATED, layout.ALL_ZEROES):
                count = min(
                    self.left_in_slice(cluster), ((end - 1) >> self._cluster_bits) + 1 - cluster
                )
                step = self._cluster_size if entry & layout.OFFSET_MASK else 0
                run = self._progression(entry, step, position, count)
                at = (cluster + run) << self._cluster_bits
        return first_kind, first_host, min(at, end) - offset

    def _progression(self, entry: int, step: int, position: int, count: int) -> int:
        low, states = entry & (1 << 64) - 1, entry >> 64
        words = self._words(position, count)
        if any(map(states.__ne__, words[1::2])):
            count = next(i for i, other in enumerate(words[1::2]) if other != states)
        for i, other in enumerate(words[: 2 * count : 2]):
            if other != low + i * step:
                return i
        return count
