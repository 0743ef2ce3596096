"""A stored bitmap: its table and its data (spec, "Bitmap table", "Bitmap data")."""

from __future__ import annotations

import errno
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress

from ..backend.disk import Disk
from ..errors import BackendError, ImageError
from . import layout
from .bitmap_directory import DirectoryEntry, table_size
from .dirty_bits import DirtyBits
from .metadata import Metadata
from .quarantine import DiscardKind, merge_runs
from .refcounts import pack_table

__all__ = [
    "check_tables",
    "free_bitmap",
    "load_bits",
    "load_entries",
    "store_bits",
    "write_clusters",
]

_MAX_CHECKED = 32 << 20
"""Bytes of tables that are read when the image is opened. What is longer, which only an image made
for it has, is checked when it is used."""

_AT_ONCE = 64
"""Clusters of bitmap data written in one piece at most."""


def load_entries(file: Disk, entry: DirectoryEntry, cluster_size: int) -> array[int]:
    """The table of a bitmap, checked. Raises ImageError with QEMU's message."""
    message = f"Could not read bitmap_table table from image for bitmap '{entry.name}'"
    try:
        table = array("Q", file.read(entry.table_offset, 8 * entry.table_size))
    except BackendError as error:
        raise BackendError.wrap(error, message, file.filename) from error
    if sys.byteorder == "little":
        table.byteswap()
    for value in table:
        offset = value & layout.OFFSET_MASK
        if value & layout.BITMAP_TABLE_RESERVED_MASK or (
            offset and (value & layout.BITMAP_ALL_ONES or offset % cluster_size)
        ):
            raise ImageError(
                f"{message}: {os.strerror(errno.EINVAL)}", field="bitmap table entry", value=value
            )
    return table


def check_tables(metadata: Metadata, entries: Sequence[DirectoryEntry], disk_size: int) -> None:
    """Raise ImageError for a bitmap whose table is not right. Those in use are not looked at."""
    budget = _MAX_CHECKED
    for entry in entries:
        if entry.flags & layout.BitmapFlags.IN_USE:
            continue
        wanted = table_size(metadata.geometry, disk_size, entry.granularity_bits)
        budget -= 8 * entry.table_size
        if budget >= 0:
            load_entries(metadata.file, entry, metadata.cluster_size)
        if entry.table_size != wanted:
            raise ImageError(
                f"Could not read bitmap '{entry.name}' from image: {os.strerror(errno.EINVAL)}",
                field="bitmap_table_size",
                value=entry.table_size,
                limit=wanted,
            )


def load_bits(metadata: Metadata, entry: DirectoryEntry, length: int) -> DirtyBits:
    """The ``length`` bits of a stored bitmap."""
    bits = DirtyBits(length)
    size = metadata.cluster_size
    table = load_entries(metadata.file, entry, size)
    stored = sum(1 for value in table if value & layout.OFFSET_MASK)
    if stored > metadata.geometry.clusters(metadata.file.size):
        # Tiny images would fill the memory by naming one cluster again and again.
        raise ImageError(
            f"Bitmap '{entry.name}' has more clusters than the image file",
            field="bitmap table",
            value=stored,
        )
    for i, value in enumerate(table):
        offset = value & layout.OFFSET_MASK
        if offset:
            try:
                data = metadata.file.read(offset, size)
            except BackendError as error:
                message = f"Could not read bitmap '{entry.name}' from image"
                raise BackendError.wrap(error, message, metadata.file.filename) from error
            bits.load(i * size, data)
        elif value:
            bits.set(8 * i * size, 8 * size)
    return bits


# -- writing -------------------------------------------------------------------------------------
# In an exclusive operation. Nothing refers to what is written until the directory does.


def write_clusters(metadata: Metadata, contents: bytes) -> tuple[int, int]:
    """Write a table into new clusters in a row: (first cluster, how many)."""
    count = metadata.geometry.clusters(len(contents))
    with metadata.lock:
        first = metadata.refcounts.allocate_contiguous(count)
    padded = contents.ljust(count << metadata.cluster_bits, b"\0")
    try:
        metadata.file.write(first << metadata.cluster_bits, padded)
    except BaseException:
        _free(metadata, first, count)
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
            _free(metadata, start, count)
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
            _free(metadata, start, count)
    first = entry.table_offset >> metadata.cluster_bits
    _free(metadata, first, metadata.geometry.clusters(8 * entry.table_size))


def _data_runs(metadata: Metadata, table: array[int]) -> Iterator[tuple[int, int]]:
    """The clusters of a bitmap's data as runs (first, count)."""
    offsets = (value & layout.OFFSET_MASK for value in table)
    yield from merge_runs(offset >> metadata.cluster_bits for offset in offsets if offset)


def _free(metadata: Metadata, first: int, count: int) -> None:
    with metadata.lock, suppress(ImageError, BackendError):
        metadata.lower(first, count, DiscardKind.ALWAYS)
