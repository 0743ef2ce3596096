"""Changing the size of the disk."""

from __future__ import annotations

from array import array

from ..errors import UnsupportedError
from . import layout
from .metadata import Metadata
from .quarantine import DiscardKind
from .refcounts import pack_table

__all__ = ["make_room", "set_size"]


def make_room(metadata: Metadata, size: int) -> None:
    """Have an L1 table that can map ``size`` bytes (in an exclusive operation).

    A larger table is made beside the old one; one header write switches to it.
    """
    header, geometry = metadata.header, metadata.geometry
    if size % layout.SECTOR:
        raise ValueError("The new size must be a multiple of 512")
    if header.nb_snapshots and header.version < 3:
        raise UnsupportedError(
            "Can't resize a v2 image which has snapshots", feature="resize with snapshots"
        )
    needed = geometry.l1_entries(size)
    if 8 * needed > layout.MAX_L1_SIZE:
        raise ValueError(
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
        )
    if needed <= header.l1_size:
        return
    l1 = array("Q", metadata.tables.l1)
    l1.frombytes(bytes(8 * (needed - len(l1))))
    clusters = geometry.clusters(8 * needed)
    with metadata.lock:
        first = metadata.refcounts.allocate_contiguous(clusters)
        metadata.overlap.check(first << metadata.cluster_bits, clusters << metadata.cluster_bits)
        contents = pack_table(l1).ljust(clusters << metadata.cluster_bits, b"\0")
        metadata.file.write(first << metadata.cluster_bits, contents)
    metadata.flush_alone()
    old_offset, old_size = header.l1_table_offset, header.l1_size
    with metadata.lock, metadata.health.step("Growing the L1 table"):
        metadata.switch_l1(l1, first << metadata.cluster_bits, header.size)
        old_clusters = geometry.clusters(8 * old_size)
        if old_clusters:
            metadata.lower(old_offset >> metadata.cluster_bits, old_clusters, DiscardKind.OTHER)


def set_size(metadata: Metadata, size: int) -> None:
    """Make ``size`` bytes, which the L1 table can map, the disk's size (exclusively)."""
    header = metadata.header
    with metadata.lock, metadata.health.step("Changing the size"):
        metadata.switch_l1(metadata.tables.l1, header.l1_table_offset, size)
