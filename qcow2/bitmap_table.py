"""Reading a stored bitmap: its table and its data (spec, "Bitmap table", "Bitmap data")."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Sequence

from ..backend.disk import Disk
from ..errors import BackendError, ImageError
from . import layout
from .bitmap_directory import DirectoryEntry, table_size
from .dirty_bits import DirtyBits
from .metadata import Metadata
from .table_io import load_table

__all__ = ["check_tables", "load_bits", "load_entries"]

_MAX_CHECKED = 32 << 20
"""Bytes of tables that are read when the image is opened. What is longer, which only an image made
for it has, is checked when it is used."""


def load_entries(file: Disk, entry: DirectoryEntry, cluster_size: int) -> array[int]:
    """The table of a bitmap, checked. Raises ImageError with QEMU's message."""
    message = f"Could not read bitmap_table table from image for bitmap '{entry.name}'"
    try:
        table = load_table(file, entry.table_offset, entry.table_size)
    except BackendError as error:
        raise BackendError.wrap(error, message, file.filename) from error
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
