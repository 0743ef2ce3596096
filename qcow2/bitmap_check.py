"""What a check counts of the bitmaps: the directory, the tables and the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..errors import BackendError, ImageError
from . import layout
from .bitmap_directory import read_directory
from .bitmap_table import load_entries
from .metadata import Metadata

__all__ = ["bitmap_regions"]


def bitmap_regions(
    metadata: Metadata, corrupt: Callable[[str], object]
) -> Iterator[tuple[int, int]]:
    """(host offset, length) of all that the bitmaps in the file refer to, one region each.

    ``corrupt`` is told what is wrong with a directory or a table, which is then left out.
    """
    extension = metadata.header.bitmaps
    if extension is None:
        return
    yield extension.directory_offset, extension.directory_size
    size = metadata.header.size // layout.SECTOR * layout.SECTOR
    try:
        entries = read_directory(metadata.file, extension, metadata.geometry, size)
    except (ImageError, BackendError) as error:
        corrupt(str(error))
        return
    for entry in entries:
        yield entry.table_offset, 8 * entry.table_size
        try:
            table = load_entries(metadata.file, entry, metadata.cluster_size)
        except (ImageError, BackendError) as error:
            corrupt(str(error))
            continue
        for value in table:
            offset = value & layout.OFFSET_MASK
            if offset:
                yield offset, metadata.cluster_size
