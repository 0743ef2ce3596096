"""L1 and L2 of an image whose guest data is in an external data file (spec, "incompatible bit 2").

A guest cluster lies in the data file where it lies on the disk, so an L2 entry only says whether it
is there. Offset 0 is a place as good as any other: with bit 63 set it is allocated.
"""

from __future__ import annotations

from ..errors import ImageError
from . import layout
from .layout import ClusterKind
from .tables import Tables, entry_kind

__all__ = ["DataFileTables", "data_file_kind"]

_FLAGS = layout.COPIED | layout.COMPRESSED | layout.ZERO


def data_file_kind(entry: int) -> ClusterKind:
    """What an L2 entry says of its cluster, where there is a data file."""
    if entry & (_FLAGS | layout.OFFSET_MASK) == layout.COPIED:
        return ClusterKind.NORMAL
    return entry_kind(entry)


class DataFileTables(Tables):
    """The tables, with the data file's rules for an entry."""

    def check_entry(self, entry: int, cluster: int) -> ClusterKind:
        """The kind of an entry; raises ImageError if it is not one that belongs here."""
        kind = data_file_kind(entry)
        index = cluster & self._l2_mask
        if kind is ClusterKind.COMPRESSED:
            raise ImageError(
                "Compressed cluster entry found in image with external data file "
                f"(L2 offset: {self.l2_offset(cluster >> self._l2_bits):#x}, L2 index: {index:#x})",
                field="L2 entry",
                value=entry,
            )
        place = cluster << self._cluster_bits
        if kind in (ClusterKind.NORMAL, ClusterKind.ZERO_ALLOCATED):
            host = entry & layout.OFFSET_MASK
            if host != place:
                raise ImageError(
                    f"External data file host cluster offset {host:#x} does not match guest "
                    f"cluster offset: {place:#x}, L2 index: {index:#x})",
                    field="L2 entry",
                    value=entry,
                    limit=place,
                )
        return kind

    def map(self, offset: int, length: int) -> tuple[ClusterKind, int, int]:
        """See :meth:`Tables.map`; the host byte is one of the data file."""
        cluster = offset >> self._cluster_bits
        entry = self.entry(cluster)
        kind = self.check_entry(entry, cluster)
        run = length
        if (offset & self._cluster_mask) + length > self._cluster_size:
            run = self._extend(kind, entry, self.locate(cluster), offset, length, 0)
        stored = kind is ClusterKind.NORMAL or kind is ClusterKind.ZERO_ALLOCATED
        return kind, offset if stored else 0, run

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
