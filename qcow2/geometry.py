"""The sizes that follow from the header and never change while an image is open."""

from __future__ import annotations

from dataclasses import dataclass

from . import layout

__all__ = ["Geometry"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of an image's structures. ``*_bits`` are base-2 logarithms."""

    version: int
    cluster_bits: int
    refcount_order: int
    extended_l2: bool = False
    """L2 entries of 16 bytes, with the states of 32 subclusters each."""

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entry_bits(self) -> int:
        """log2 of the size of an L2 entry in bytes."""
        return 4 if self.extended_l2 else 3

    @property
    def l2_entry_words(self) -> int:
        """64-bit words in an L2 entry."""
        return 2 if self.extended_l2 else 1

    @property
    def l2_bits(self) -> int:
        """log2 of the entries in an L2 table, which fills one cluster."""
        return self.cluster_bits - self.l2_entry_bits

    @property
    def subcluster_bits(self) -> int:
        """log2 of the unit of allocation: a subcluster with extended L2 entries, else a cluster."""
        return self.cluster_bits - 5 if self.extended_l2 else self.cluster_bits

    @property
    def subcluster_size(self) -> int:
        """Bytes in the unit of allocation."""
        return 1 << self.subcluster_bits

    @property
    def l2_coverage(self) -> int:
        """Guest bytes that one L2 table (one L1 entry) maps."""
        return 1 << (self.cluster_bits + self.l2_bits)

    @property
    def refcount_block_bits(self) -> int:
        """log2 of the entries in a refcount block, which fills one cluster."""
        return self.cluster_bits + 3 - self.refcount_order

    @property
    def refcount_max(self) -> int:
        """The largest refcount that fits an entry."""
        return (1 << (1 << self.refcount_order)) - 1

    def clusters(self, length: int) -> int:
        """Clusters needed for ``length`` bytes."""
        return -(-length >> self.cluster_bits)

    def l1_entries(self, size: int) -> int:
        """L1 entries needed for a disk of ``size`` bytes."""
        return -(-size // self.l2_coverage)

    # Compressed cluster descriptors (spec, "Compressed Clusters Descriptor"): the host offset
    # stands in bits 0 to x-1, the number of additional sectors in bits x to 61.

    @property
    def compressed_offset_bits(self) -> int:
        """x of the specification's table."""
        return 62 - (self.cluster_bits - 8)

    def compressed_extent(self, entry: int) -> tuple[int, int]:
        """Host offset and length in bytes of the data that a compressed L2 entry refers to.

        The length is what may belong to it: up to the end of its last 512-byte sector.
        """
        bits = self.compressed_offset_bits
        offset = entry & ((1 << bits) - 1) & (layout.MAX_HOST_OFFSET - 1)
        sectors = ((entry & (layout.COMPRESSED - 1)) >> bits) + 1
        return offset, sectors * layout.SECTOR - offset % layout.SECTOR
