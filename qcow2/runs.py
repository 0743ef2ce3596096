"""A range's state, run by run, in bulk: a slice of an L2 table at a time, with no object per entry.

What :meth:`Disk.block_status` says of one run, this says of all of them, many times as fast.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from ..backend.disk import Run
from . import layout
from .cache import CacheFull
from .layout import ClusterKind
from .metadata import Metadata
from .reading import Reader

__all__ = ["own_runs", "runs"]

_NORMAL = ClusterKind.NORMAL
_UNALLOCATED = ClusterKind.UNALLOCATED
_SPECIAL = layout.COMPRESSED | layout.ZERO


def runs(reader: Reader, offset: int, length: int, depth: int = 0) -> Iterator[Run]:
    """The runs of guest bytes from ``offset`` on, in this layer and those below; not always as long
    as they could be. For standard L2 entries."""
    file = reader.file
    holes = reader.holes
    for kind, host, start, size in own_runs(reader.metadata, offset, offset + length):
        if kind is _NORMAL:
            while size:
                zero, part = holes.look(host, size)
                yield part, True, zero, True, False, depth, host, file
                host += part
                size -= part
        elif kind is _UNALLOCATED:
            yield from _runs_below(reader, start, size, depth)
        elif kind is ClusterKind.COMPRESSED:
            yield size, True, False, True, True, depth, None, None
        elif kind is ClusterKind.ZERO_ALLOCATED:
            yield size, False, True, True, False, depth, host, file
        else:
            yield size, False, True, True, False, depth, None, None


def _runs_below(reader: Reader, offset: int, length: int, depth: int) -> Iterator[Run]:
    backing = reader.backing
    there = 0
    if backing is not None and offset < backing.size:
        there = min(length, backing.size - offset)
        for run in backing.runs(offset, there):
            size, data, zero, allocated, compressed, below, host, file = run
            yield size, data, zero, allocated, compressed, depth + 1 + below, host, file
    if there < length:
        known = reader.backing_known
        yield length - there, False, known, False, False, depth, None, None


def own_runs(
    metadata: Metadata, offset: int, end: int
) -> Iterator[tuple[ClusterKind, int, int, int]]:
    """(kind, host, guest offset, length) of the runs in this layer; ``host`` as Tables.map says."""
    bits, size, mask = metadata.cluster_bits, metadata.cluster_size, layout.OFFSET_MASK
    check_entry = metadata.tables.check_entry
    within = size - 1
    cluster, last = offset >> bits, ((end - 1) >> bits) + 1
    kind, host, start = _UNALLOCATED, 0, offset
    expected, step = 0, 0
    while cluster < last:
        entries, count = _entries(metadata, cluster, last - cluster)
        if _continues(entries, expected, step, count):
            expected += step * count
            cluster += count
            continue
        for index, entry in enumerate(entries or (0,), cluster):
            if entry == expected:
                expected += step
                continue
            at = index << bits
            if at > start:
                yield kind, host, start, at - start
                start = at
            host = entry & mask
            if host and not entry & _SPECIAL and not host & within:
                kind, expected, step = _NORMAL, entry + size, size
            elif not entry:
                kind, expected, step = _UNALLOCATED, 0, 0
            else:
                kind = check_entry(entry, index)
                expected, step = entry, 0
                if kind is ClusterKind.COMPRESSED:
                    host, expected = entry, -1
                elif host:
                    expected, step = entry + size, size
            if at < start and kind in (_NORMAL, ClusterKind.ZERO_ALLOCATED):
                host += start - at
        cluster += count
    if end > start:
        yield kind, host, start, end - start


def _continues(entries: Sequence[int], expected: int, step: int, count: int) -> bool:
    """True if all entries go on as expected; looked at as a whole."""
    if not entries:
        return not expected  # no L2 table: nothing is there
    if entries[0] != expected or entries[-1] != expected + step * (count - 1):
        return False
    if step:
        return entries == array("Q", range(expected, expected + step * count, step))
    return entries.count(expected) == count


def _entries(metadata: Metadata, cluster: int, count: int) -> tuple[Sequence[int], int]:
    """The L2 entries from ``cluster`` on that are in one slice, and how many clusters that is; none
    of them where there is no L2 table."""
    gate, lock, tables = metadata.gate, metadata.lock, metadata.tables
    try:
        with lock:
            gate.enter()
        while True:
            try:
                with lock:
                    position = tables.locate(cluster)
                    if position >= 0:
                        count = min(count, tables.left_in_slice(cluster))
                        return tables.entries_at(position, count), count
                    table_end = ((cluster >> metadata.geometry.l2_bits) + 1) << (
                        metadata.geometry.l2_bits
                    )
                    return (), min(count, table_end - cluster)
            except CacheFull:
                metadata.flush_inside()
    finally:
        gate.leave()
