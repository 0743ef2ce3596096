"""Walking all that an L1 table refers to: raising, lowering and inspecting its refcounts.

Snapshots share L2 tables and clusters by reference count: each L1 table that reaches a cluster
counts once. The work is done table by table in bulk (``tally.py``), not cluster by cluster.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from ..errors import BackendError, ImageError
from . import layout
from .counts import ClusterCounts
from .metadata import Metadata
from .quarantine import DiscardKind
from .refcount_codec import uniform
from .table_io import pack_table, unpack_table
from .tally import WINDOW, Tally, every_entry, host_clusters, progression

__all__ = [
    "l2_tables",
    "lower_references",
    "raise_references",
    "read_entries",
    "strip_copied",
    "strip_tables",
    "update_copied",
    "walk_references",
]

_CHUNK_BITS = 14
_CHUNK = 1 << _CHUNK_BITS
_FLAGS = bytes([0, layout.COPIED >> 56]) + bytes(254)


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
    return unpack_table(read_plain(metadata, offset))


def read_plain(metadata: Metadata, offset: int) -> bytes:
    """:func:`read_entries` as bytes: a table of standard entries."""
    table = metadata.read_l2_table(offset)
    words = metadata.geometry.l2_entry_words
    return table if words == 1 else pack_table(unpack_table(table)[::words])


def write_plain(metadata: Metadata, offset: int, table: bytes) -> None:
    """Replace what :func:`read_plain` gave; the states of subclusters stay."""
    words = metadata.geometry.l2_entry_words
    if words > 1:
        whole = unpack_table(metadata.read_l2_table(offset))
        whole[::words] = unpack_table(table)
        table = pack_table(whole)
    metadata.write_l2_table(offset, table)


def walk_references(
    metadata: Metadata, l1: Sequence[int], action: Callable[[int, Sequence[int]], None]
) -> None:
    """Call ``action(first cluster, counts)`` for all that an L1 table reaches: its L2 tables and
    what they refer to; ``counts[i]`` is how often ``first + i`` is (lock held).

    The pieces lie within one slice of the refcounts each. A cluster may come up again. What is in
    an external data file has no refcounts.
    """

    def in_slices(first: int, counts: Sequence[int]) -> None:
        for start, length in metadata.refcounts.slices(first, len(counts)):
            part = counts[start - first : start - first + length]
            if any(part):
                action(start, part)

    tally = Tally(metadata.geometry, in_slices)
    for offset, times in Counter(offset for _, offset in l2_tables(metadata, l1)).items():
        table = read_plain(metadata, offset)  # before its own cluster may be given back
        tally.add_run(offset >> metadata.cluster_bits, 1, times)
        if metadata.data_file is None:
            tally.add_table(table, times)
    tally.finish()


def raise_references(metadata: Metadata, l1: Sequence[int]) -> None:
    """One reference more to all that the L1 table reaches; all of it or nothing (lock held).

    Raises ImageError where a refcount has reached what its width can hold.
    """
    done: list[tuple[int, Sequence[int]]] = []  # about a byte for each cluster

    def add(first: int, counts: Sequence[int]) -> None:
        metadata.refcounts.add_each(first, counts)
        done.append((first, counts))

    try:
        walk_references(metadata, l1, add)
    except (ImageError, BackendError):
        for first, counts in reversed(done):
            metadata.refcounts.add_each(first, [-count for count in counts])
        raise


def lower_references(metadata: Metadata, l1: Sequence[int], kind: DiscardKind) -> None:
    """One reference less to all that the L1 table reached (lock held); that must be stable."""

    def lower(first: int, counts: Sequence[int]) -> None:
        metadata.lower_each(first, counts, kind)

    walk_references(metadata, l1, lower)


def strip_copied(metadata: Metadata) -> bool:
    """Clear the COPIED flag in all of the active L1 and L2 tables (lock held); true if there were
    any.

    Changed L2 tables are written straight to the file: an entry without the flag is right at any
    moment. A compressed entry has no such flag, and the bit is clear there too.
    """
    any_changed = strip_tables(metadata, metadata.tables.l1, active=True)
    for index, offset in list(l2_tables(metadata, metadata.tables.l1)):
        if metadata.tables.l1[index] != offset:
            metadata.tables.set_l1(index, offset)
            any_changed = True
    return any_changed


def strip_tables(metadata: Metadata, l1: Sequence[int], *, active: bool = False) -> bool:
    """Clear the COPIED flags in the L2 tables that an L1 table names, in the file (lock held); true
    if there were any."""
    pattern = (layout.COPIED - 1).to_bytes(8) + b"\xff" * 8 * (metadata.geometry.l2_entry_words - 1)
    mask = int.from_bytes(pattern * (metadata.cluster_size // len(pattern)))
    any_changed = False
    for _, offset in l2_tables(metadata, l1):
        table = int.from_bytes(metadata.read_l2_table(offset))
        stripped = table & mask
        if stripped != table:
            contents = stripped.to_bytes(metadata.cluster_size)
            metadata.write_l2_table(offset, contents, active=active)
            any_changed = True
    return any_changed


def update_copied(metadata: Metadata) -> None:
    """Set or clear every COPIED flag of the active tables as the refcounts are (lock held).

    The refcounts must be on stable storage: a flag may only be set where the count is 1 for sure.
    """
    with closing(_Singles(metadata)) as singles:
        _update_copied(metadata, singles)


def _update_copied(metadata: Metadata, singles: _Singles) -> None:
    tables, bits = metadata.tables, metadata.cluster_bits
    for index, offset in list(l2_tables(metadata, tables.l1)):
        table = read_plain(metadata, offset)
        changed = _flagged(metadata, table, singles)
        if changed != table:
            write_plain(metadata, offset, changed)
        own = singles.run(offset >> bits, 1) == b"\1"
        table_entry = offset | (layout.COPIED if own else 0)
        if table_entry != tables.l1[index]:
            tables.set_l1(index, table_entry)


def _flagged(metadata: Metadata, table: bytes, singles: _Singles) -> bytes:
    """An L2 table with the right COPIED flags."""
    copied, bits, mask = layout.COPIED, metadata.cluster_bits, layout.OFFSET_MASK
    run = progression(table, 1 << bits)
    if run is not None and not run[0] & ~(mask | copied):
        found = singles.run((run[0] & mask) >> bits, run[1])
        if found == (b"\1" if run[0] & copied else b"\0") * run[1]:
            return table
        if found == b"\1" * run[1]:
            everywhere = every_entry(copied, run[1])
            return (int.from_bytes(table) | everywhere).to_bytes(len(table))
    if not any(table):
        return table
    if int.from_bytes(table) & every_entry(layout.COMPRESSED, len(table) // 8):
        entries = unpack_table(table)
        clusters = array("Q", [0 if e & layout.COMPRESSED else (e & mask) >> bits for e in entries])
    else:
        clusters = host_clusters(table, bits)
    flags = bytearray(len(table))
    flags[::8] = singles.each(clusters).translate(_FLAGS)
    rest = int.from_bytes(table) & every_entry(copied - 1, len(table) // 8)
    return (rest | int.from_bytes(flags)).to_bytes(len(table))


class _Singles:
    """Which clusters have a refcount of exactly 1: a byte for each, looked up in chunks."""

    def __init__(self, metadata: Metadata) -> None:
        self._refcounts = metadata.refcounts
        self._counts = ClusterCounts(WINDOW)
        self._known = bytearray(WINDOW >> _CHUNK_BITS)
        """1 for each chunk of the window that has been looked up."""

    def close(self) -> None:
        """Give the memory back."""
        self._counts.close()

    def _look_up(self, number: int) -> None:
        """Have the bytes of one chunk of the window."""
        if not self._known[number]:
            start = number << _CHUNK_BITS
            self._counts.bytes[start : start + _CHUNK] = self._ask(start, _CHUNK)
            self._counts.bytes[0] = 0  # an entry with that number refers to nothing
            self._known[number] = 1

    def _ask(self, first: int, count: int) -> bytes:
        parts = []
        for values in self._refcounts.counts(first, count):
            if uniform(values):
                parts.append((b"\1" if values[0] == 1 else b"\0") * len(values))
            else:
                parts.append(bytes(map((1).__eq__, values)))
        return b"".join(parts)

    def run(self, first: int, count: int) -> bytes:
        """The bytes of a run of clusters."""
        if first + count > WINDOW:
            return self._ask(first, count)
        for number in range(first >> _CHUNK_BITS, (first + count - 1 >> _CHUNK_BITS) + 1):
            self._look_up(number)
        return self._counts.bytes[first : first + count]

    def each(self, clusters: array[int]) -> bytes:
        """A byte for each of the clusters named; 0 for number 0."""
        first, last = min(filter(None, clusters), default=0), max(clusters)
        if last < WINDOW:
            if self._known.find(0, first >> _CHUNK_BITS, (last >> _CHUNK_BITS) + 1) >= 0:
                for number in {cluster >> _CHUNK_BITS for cluster in clusters}:
                    self._look_up(number)
            return bytes(map(self._counts.bytes.__getitem__, clusters))
        return bytes(c > 0 and self._refcounts.get(c) == 1 for c in clusters)
