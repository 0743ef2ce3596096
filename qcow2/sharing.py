"""Walking all that an L1 table refers to: raising, lowering and inspecting its refcounts.

Snapshots share L2 tables and clusters by reference count: each L1 table that reaches a cluster
counts once. The work is done table by table on runs of clusters, not cluster by cluster.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from ..errors import BackendError, ImageError
from . import layout
from .metadata import Metadata
from .quarantine import merge_runs
from .refcounts import pack_table

__all__ = [
    "for_each_run",
    "l2_tables",
    "raise_references",
    "read_entries",
    "strip_copied",
    "update_copied",
]

_BATCH = 1 << 17
"""Cluster numbers that are collected at a time."""


def l2_tables(metadata: Metadata, l1: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(L1 index, host offset) of every L2 table that an L1 table names."""
    for index, entry in enumerate(l1):
        offset = entry & layout.OFFSET_MASK
        if offset % metadata.cluster_size:
            raise ImageError(
                f"L2 table offset {offset:#x} unaligned (L1 index: {index:#x})",
                field="L1 entry",
                value=entry,
            )
        if offset:
            yield index, offset


def read_entries(metadata: Metadata, offset: int) -> array[int]:
    """All entries of the L2 table at a host offset, as they are now (without subclusters)."""
    return _read_words(metadata, offset)[:: metadata.geometry.l2_entry_words]


def _read_words(metadata: Metadata, offset: int) -> array[int]:
    words = array("Q", metadata.read_l2_table(offset))
    if sys.byteorder == "little":
        words.byteswap()
    return words


def clusters_of(metadata: Metadata, entries: Sequence[int]) -> list[int]:
    """The host clusters that L2 entries refer to; one touched by two entries is there twice."""
    bits = metadata.cluster_bits
    mask, compressed = layout.OFFSET_MASK, layout.COMPRESSED
    special = layout.COMPRESSED
    if not any(entries):
        return []
    clusters = [(entry & mask) >> bits for entry in entries if entry & mask and not entry & special]
    for entry in entries:
        if entry & compressed:
            offset, length = metadata.geometry.compressed_extent(entry)
            clusters += range(offset >> bits, ((offset + length - 1) >> bits) + 1)
    return clusters


def for_each_run(
    metadata: Metadata, l1: Sequence[int], action: Callable[[int, int, int], object]
) -> None:
    """Call ``action(first cluster, count, times)`` for all that the L1 table reaches: its L2
    tables and what they refer to, ``times`` being how often (lock held). A cluster may come up
    again, where L2 tables far apart refer to it."""
    pending: Counter[int] = Counter()
    tables = Counter(offset for _, offset in l2_tables(metadata, l1))
    for offset, times in tables.items():
        pending[offset >> metadata.cluster_bits] += times
        clusters = clusters_of(metadata, read_entries(metadata, offset))
        if times == 1:
            pending.update(clusters)
        else:
            for cluster, repeated in Counter(clusters).items():
                pending[cluster] += repeated * times
        if len(pending) >= _BATCH:
            _apply(pending, action)
            pending.clear()
    _apply(pending, action)


def _apply(clusters: Counter[int], action: Callable[[int, int, int], object]) -> None:
    by_times: dict[int, list[int]] = {}
    for cluster, times in clusters.items():
        by_times.setdefault(times, []).append(cluster)
    for times, numbers in by_times.items():
        for first, count in merge_runs(numbers):
            action(first, count, times)


def raise_references(metadata: Metadata, l1: Sequence[int]) -> None:
    """One reference more to all that the L1 table reaches; all of it or nothing (lock held).

    Raises ImageError where a refcount has reached what its width can hold.
    """
    done = 0

    def add(first: int, count: int, times: int) -> None:
        nonlocal done
        for start, length in metadata.refcounts.slices(first, count):
            metadata.refcounts.add(start, length, times)
            done += 1

    def take_back(first: int, count: int, times: int) -> None:
        nonlocal done
        for start, length in metadata.refcounts.slices(first, count):
            if done:
                metadata.refcounts.add(start, length, -times)
                done -= 1

    try:
        for_each_run(metadata, l1, add)
    except (ImageError, BackendError):
        for_each_run(metadata, l1, take_back)
        raise


def strip_copied(metadata: Metadata) -> None:
    """Clear the COPIED flag in all of the active L1 and L2 tables (lock held).

    Changed L2 tables are written straight to the file: an entry without the flag is right at any
    moment. A compressed entry has no such flag, and the bit is clear there too.
    """
    pattern = (layout.COPIED - 1).to_bytes(8) + b"\xff" * 8 * (metadata.geometry.l2_entry_words - 1)
    mask = int.from_bytes(pattern * (metadata.cluster_size // len(pattern)))
    for index, offset in list(l2_tables(metadata, metadata.tables.l1)):
        table = int.from_bytes(metadata.read_l2_table(offset))
        stripped = table & mask
        if stripped != table:
            metadata.write_l2_table(offset, stripped.to_bytes(metadata.cluster_size))
        if metadata.tables.l1[index] != offset:
            metadata.tables.set_l1(index, offset)


def update_copied(metadata: Metadata) -> None:
    """Set or clear every COPIED flag of the active tables as the refcounts are (lock held).

    The refcounts must be on stable storage: a flag may only be set where the count is 1 for sure.
    """
    tables = metadata.tables
    copied, bits, mask = layout.COPIED, metadata.cluster_bits, layout.OFFSET_MASK
    for index, offset in list(l2_tables(metadata, tables.l1)):
        entries = read_entries(metadata, offset)
        plain = [
            (entry & mask) >> bits if entry & mask and not entry & layout.COMPRESSED else 0
            for entry in entries
        ]
        own = _single(metadata, [cluster for cluster in plain if cluster] + [offset >> bits])
        changed = array("Q", entries)
        for i, cluster in enumerate(plain):
            if cluster:
                changed[i] = entries[i] | copied if cluster in own else entries[i] & ~copied
        if changed != entries:
            words = _read_words(metadata, offset)
            words[:: metadata.geometry.l2_entry_words] = changed
            metadata.write_l2_table(offset, pack_table(words))
        table_entry = offset | (copied if offset >> bits in own else 0)
        if table_entry != tables.l1[index]:
            tables.set_l1(index, table_entry)


def _single(metadata: Metadata, clusters: list[int]) -> set[int]:
    """Those of the clusters whose refcount is 1."""
    found: set[int] = set()
    for first, count in merge_runs(set(clusters)):
        start = first
        for values in metadata.refcounts.counts(first, count):
            found.update(start + i for i, value in enumerate(values) if value == 1)
            start += len(values)
    return found
