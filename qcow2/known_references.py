"""The references of an L1 table that is counted again and again, as that of a running disk.

The tables are kept as they were the last time, as long as that takes little memory: what is the
same is not counted again.
"""

from __future__ import annotations

from collections.abc import Sequence

from .metadata import Metadata
from .reference_vector import ReferenceVector
from .sharing import l2_tables, read_plain
from .table_io import unpack_table

__all__ = ["KnownReferences"]

_MAX_KEPT = 16 << 20
"""Bytes of L2 tables that are kept: those of a disk of 128 GiB in clusters of 64 KiB."""
_PIECE = 512
"""Bytes of a table that are compared at a time."""


class KnownReferences:
    """What the L1 table reached when it was counted last."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._tables: dict[int, tuple[int, bytes]] = {}
        """By L1 index: host offset, contents."""
        self._references: ReferenceVector | None = None

    def count(self, l1: Sequence[int]) -> ReferenceVector:
        """All that ``l1`` reaches (lock held). Raises VectorTooLong; the vector is not to be
        changed."""
        metadata, bits = self._metadata, self._metadata.cluster_bits
        references = self._references
        if references is None or references.refcounts is not metadata.refcounts:
            references, self._tables = ReferenceVector(metadata), {}
        self._references = None  # until it is whole
        tables, length = self._tables, 0
        named = dict(l2_tables(metadata, l1))
        for index in [index for index in tables if index not in named]:
            offset, table = tables.pop(index)
            references.remove_clusters([offset >> bits])
            references.remove_entries(unpack_table(table))
        for index, offset in named.items():
            table = read_plain(metadata, offset)
            known = tables.get(index)
            if known is None:
                references.add_clusters([offset >> bits])
                references.add_table(table)
            elif known != (offset, table):
                references.remove_clusters([known[0] >> bits])
                references.add_clusters([offset >> bits])
                _exchange(references, known[1], table)
            length += len(table)
            tables[index] = (offset, table) if length <= _MAX_KEPT else (offset, b"")
        if length <= _MAX_KEPT:
            self._references = references
        else:
            self._tables = {}
        return references


def _exchange(references: ReferenceVector, old: bytes, new: bytes) -> None:
    """Count the entries of one table in place of another's."""
    for at in range(0, len(old), _PIECE):
        one, two = old[at : at + _PIECE], new[at : at + _PIECE]
        if one != two:
            references.add_entries(unpack_table(two))
            references.remove_entries(unpack_table(one))
