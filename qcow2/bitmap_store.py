"""Writing bitmaps: beside what is there, then switched to by one write of the header.

All in an exclusive operation. Data and table are stable before the directory names them, and the
directory before the header does. What they replace is freed last.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress

from ..errors import BackendError, ImageError
from . import layout
from .bitmap_directory import BitmapsExtension, DirectoryEntry, pack_directory
from .bitmap_table import load_entries
from .dirty_bits import DirtyBits
from .header_update import update_header
from .layout import Autoclear
from .metadata import Metadata
from .quarantine import DiscardKind, merge_runs
from .table_io import pack_table

__all__ = ["free_bitmap", "store_bits", "switch_directory"]

_AT_ONCE = 64
"""Clusters of bitmap data written in one piece at most."""


def switch_directory(metadata: Metadata, entries: Sequence[DirectoryEntry]) -> None:
    """Make these the directory, on stable storage; the old one's clusters are free then."""
    header = metadata.header
    old = header.bitmaps
    bitmaps, autoclear = None, header.autoclear_features & ~Autoclear.BITMAPS
    first = count = 0
    if entries:
        directory = pack_directory(entries)
        first, count = write_clusters(metadata, directory)
        offset = first << metadata.cluster_bits
        bitmaps = BitmapsExtension(len(entries), len(directory), offset)
        autoclear |= Autoclear.BITMAPS
    try:
        metadata.flush_alone()
        update_header(metadata, bitmaps=bitmaps, autoclear_features=autoclear)
    except BaseException:
        if count and metadata.health.reason is None:
            free_clusters(metadata, first, count)
        raise
    if old is not None:
        first = old.directory_offset >> metadata.cluster_bits
        free_clusters(metadata, first, metadata.geometry.clusters(old.directory_size))


def write_clusters(metadata: Metadata, contents: bytes) -> tuple[int, int]:
    """Write a table into new clusters in a row: (first cluster, how many)."""
    count = metadata.geometry.clusters(len(contents))
    with metadata.lock:
        first = metadata.refcounts.allocate_contiguous(count)
    try:
        metadata.file.write(first << metadata.cluster_bits, contents)
    except BaseException:
        free_clusters(metadata, first, count)
        raise
    return first, count


def store_bits(metadata: Metadata, bits: DirtyBits, entries: int) -> int:
    """Write a bitmap, with a table of ``entries`` entries, beside what is there: the table's host
    offset. What fails leaves nothing behind."""
    table = array("Q", bytes(8 * entries))
    full = b"\xff" * metadata.cluster_size
    pending: list[tuple[int, bytes]] = []
    try:
        for number, piece in bits.pieces(metadata.cluster_size):
            if piece == full:
                table[number] = layout.BITMAP_ALL_ONES
                continue
            pending.append((number, piece))
            if len(pending) >= _AT_ONCE:
                _store_pieces(metadata, table, pending)
        while pending:
            _store_pieces(metadata, table, pending)
        first, _ = write_clusters(metadata, pack_table(table))
    except BaseException:
        for start, count in _data_runs(metadata, table):
            free_clusters(metadata, start, count)
        raise
    return first << metadata.cluster_bits


def _store_pieces(metadata: Metadata, table: array[int], pending: list[tuple[int, bytes]]) -> None:
    """Write as many pending pieces as find place in one row, and note them in the table."""
    with metadata.lock:
        first, count, _ = metadata.refcounts.allocate(len(pending))
    for i, (number, _) in enumerate(pending[:count]):
        table[number] = (first + i) << metadata.cluster_bits
    metadata.file.writev(first << metadata.cluster_bits, [piece for _, piece in pending[:count]])
    del pending[:count]


def free_bitmap(metadata: Metadata, entry: DirectoryEntry) -> None:
    """Free what a bitmap that is in no directory any more had. What cannot be freed leaks."""
    with suppress(ImageError, BackendError):
        table = load_entries(metadata.file, entry, metadata.cluster_size)
        for start, count in _data_runs(metadata, table):
            free_clusters(metadata, start, count)
    first = entry.table_offset >> metadata.cluster_bits
    free_clusters(metadata, first, metadata.geometry.clusters(8 * entry.table_size))


def _data_runs(metadata: Metadata, table: array[int]) -> Iterator[tuple[int, int]]:
    """The clusters of a bitmap's data as runs (first, count)."""
    offsets = (value & layout.OFFSET_MASK for value in table)
    yield from merge_runs(offset >> metadata.cluster_bits for offset in offsets if offset)


def free_clusters(metadata: Metadata, first: int, count: int) -> None:
    """Free clusters that nothing refers to any more; what cannot be freed leaks."""
    with metadata.lock, suppress(ImageError, BackendError):
        metadata.lower(first, count, DiscardKind.ALWAYS)
