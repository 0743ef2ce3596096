"""L1 and L2 of an image whose guest data is in an external data file (spec, "incompatible bit 2").

A guest cluster lies in the data file where it lies on the disk, so an L2 entry only says whether it
is there. Offset 0 is a place as good as any other: with bit 63 set it is allocated.
"""

from __future__ import annotations

from array import array
from typing import NoReturn

from ..errors import ImageError
from . import layout
from .cache import TableCache
from .geometry import Geometry
from .layout import ClusterKind
from .subclusters import SubclusterTables
from .tables import Tables, entry_kind

__all__ = ["data_file_kind", "make_tables"]

_FLAGS = layout.COPIED | layout.COMPRESSED | layout.ZERO


def data_file_kind(entry: int) -> ClusterKind:
    """What an L2 entry says of its cluster, where there is a data file."""
    if entry & (_FLAGS | layout.OFFSET_MASK) == layout.COPIED:
        return ClusterKind.NORMAL
    return entry_kind(entry)


def _refuse_compressed(tables: Tables, geometry: Geometry, entry: int, cluster: int) -> NoReturn:
    l2_bits = geometry.l2_bits
    raise ImageError(
        "Compressed cluster entry found in image with external data file "
        f"(L2 offset: {tables.l2_offset(cluster >> l2_bits):#x}, "
        f"L2 index: {cluster & (1 << l2_bits) - 1:#x})",
        field="L2 entry",
        value=entry,
    )


def _check_place(geometry: Geometry, entry: int, cluster: int) -> None:
    """Raise ImageError if a stored cluster is not where it has to be."""
    host, place = entry & layout.OFFSET_MASK, cluster << geometry.cluster_bits
    if host != place:
        raise ImageError(
            f"External data file host cluster offset {host:#x} does not match guest "
            f"cluster offset: {place:#x}, L2 index: {cluster & (1 << geometry.l2_bits) - 1:#x})",
            field="L2 entry",
            value=entry,
            limit=place,
        )


class DataFileTables(Tables):
    """The tables, with the data file's rules for an entry."""

    def check_entry(self, entry: int, cluster: int) -> ClusterKind:
        """The kind of an entry; raises ImageError if it is not one that belongs here."""
        kind = data_file_kind(entry)
        if kind is ClusterKind.COMPRESSED:
            _refuse_compressed(self, self._geometry, entry, cluster)
        if kind is ClusterKind.NORMAL or kind is ClusterKind.ZERO_ALLOCATED:
            _check_place(self._geometry, entry, cluster)
        return kind

    def map(self, offset: int, length: int) -> tuple[ClusterKind, int, int]:
        """See :meth:`Tables.map`; the host byte is one of the data file."""
        cluster = offset >> self._cluster_bits
        position = self.locate(cluster)
        entry = 0 if position < 0 else self.entry_at(position)
        kind = self.check_entry(entry, cluster)
        if (offset & self._cluster_mask) + length > self._cluster_size:
            length = self._extend(kind, entry, position, offset, length, 0)
        stored = kind is ClusterKind.NORMAL or kind is ClusterKind.ZERO_ALLOCATED
        return kind, offset if stored else 0, length

    def map_stored(self, offset: int, length: int) -> int:
        """See :meth:`Tables.map_stored`."""
        kind, host, run = self.map(offset, length)
        return host if kind is ClusterKind.NORMAL and run == length else -1

    def map_own(self, offset: int, length: int) -> tuple[int, int]:
        """See :meth:`Tables.map_own`."""
        cluster = offset >> self._cluster_bits
        position = self.locate(cluster)
        if position < 0:
            return 0, 0
        entry = self.entry_at(position)
        if entry & _FLAGS != layout.COPIED:
            return 0, 0
        kind = self.check_entry(entry, cluster)
        if (offset & self._cluster_mask) + length > self._cluster_size:
            length = self._extend(kind, entry, position, offset, length, layout.COPIED)
        return offset, length


class DataFileSubclusterTables(SubclusterTables):
    """The tables with extended entries, with the data file's rules for an entry."""

    def check_entry(self, entry: int, cluster: int) -> ClusterKind:
        """See :meth:`DataFileTables.check_entry`."""
        if entry & layout.COMPRESSED:
            _refuse_compressed(self, self._geometry, entry, cluster)
        if entry & (layout.OFFSET_MASK | layout.COPIED):
            _check_place(self._geometry, entry, cluster)
            if not cluster:  # any other place: offset 0 looks like none
                entry |= self._cluster_size
        return super().check_entry(entry, cluster)


def make_tables(
    l1: array[int], geometry: Geometry, cache: TableCache, *, data_file: bool
) -> Tables:
    """The tables of an image, of the kind that it needs."""
    if data_file:
        kind: type[Tables] = DataFileSubclusterTables if geometry.extended_l2 else DataFileTables
    else:
        kind = SubclusterTables if geometry.extended_l2 else Tables
    return kind(l1, geometry, cache)
