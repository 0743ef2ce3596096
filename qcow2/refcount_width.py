"""Changing the width of refcounts: all refcount structures are made anew beside the old ones.

The order: the new table and its blocks, which count themselves and the old ones, stable | the
header, by one write of its first sector | the old ones are given up, in the new counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

from ..errors import ImageError
from . import layout
from .header_update import update_header
from .metadata import Metadata
from .refcount_codec import codec_for
from .table_io import pack_table

__all__ = ["change_refcount_width"]


def change_refcount_width(
    metadata: Metadata, bits: int, progress: Callable[[int, int], None]
) -> None:
    """Have refcounts of ``bits`` bits, a power of two up to 64 (exclusively; version 3 only).

    ``progress(done, total)`` is called as it goes on: as QEMU, which cannot know how often it has
    to walk through the refcounts. Raises ImageError where a refcount does not fit; nothing has
    changed then.
    """
    order = bits.bit_length() - 1
    _check_fit(metadata, order)
    new = _NewStructure(metadata, order, progress)
    try:
        new.allocate()
        new.write()
        metadata.settle()
    except BaseException:
        new.give_up()
        raise
    old = _structures(metadata)

    def adopt() -> None:
        metadata.adopt_geometry()
        metadata.renew_refcounts()
        for start, count in old:
            for part in metadata.refcounts.slices(start, count):
                metadata.refcounts.add(*part, -1)

    update_header(
        metadata,
        adopt=adopt,
        refcount_table_offset=new.table_at << metadata.cluster_bits,
        refcount_table_clusters=new.table_clusters,
        refcount_order=order,
    )
    metadata.settle()


class _NewStructure:
    """A refcount table and its blocks with another width, beside those in use."""

    def __init__(
        self, metadata: Metadata, order: int, progress: Callable[[int, int], None]
    ) -> None:
        self._metadata = metadata
        self._order = order
        self._block_bits = metadata.cluster_bits + 3 - order
        self._progress = progress
        self._walks = 0
        self._blocks: dict[int, int] = {}
        """The cluster of each block, by number."""
        self.table_at = 0
        """The table's first cluster."""
        self.table_clusters = 0

    def allocate(self) -> None:
        """Take clusters for all that is needed. They are counted themselves, by blocks that may be
        needed for that: so until a walk finds nothing missing."""
        metadata = self._metadata
        while self._walk(max(self._walks + 2, 3), self._have_block):
            size = 8 * (max(self._blocks) + 1)
            with metadata.lock:
                _free(metadata, self.table_at, self.table_clusters)
                self.table_clusters = 0
                clusters = metadata.geometry.clusters(size)
                self.table_at = metadata.refcounts.allocate_contiguous(clusters)
                self.table_clusters = clusters

    def write(self) -> None:
        """Write the blocks and the table."""
        metadata = self._metadata
        self._walk(self._walks + 1, self._write_block)
        table = array("Q", bytes(self.table_clusters << metadata.cluster_bits))
        for block, cluster in self._blocks.items():
            table[block] = cluster << metadata.cluster_bits
        metadata.file.write(self.table_at << metadata.cluster_bits, pack_table(table))

    def give_up(self) -> None:
        """Give all clusters back."""
        with self._metadata.lock:
            for cluster in self._blocks.values():
                _free(self._metadata, cluster, 1)
            _free(self._metadata, self.table_at, self.table_clusters)

    def _walk(self, total: int, visit: Callable[[int], bool]) -> bool:
        """Visit each new block that may count something, as one of ``total`` walks; True if one
        visit says so."""
        refcounts, index, found = self._metadata.refcounts, 0, False
        old_bits = self._metadata.geometry.refcount_block_bits
        done = -1
        while index < (size := len(refcounts.table)):
            self._progress(self._walks * size + index, total * size)
            if refcounts.table[index]:
                first = index << old_bits >> self._block_bits
                last = (index + 1 << old_bits) - 1 >> self._block_bits
                for block in range(max(first, done + 1), last + 1):
                    found |= visit(block)
                done = last
            index += 1
        self._walks += 1
        self._progress(self._walks * size, total * size)
        return found

    def _counts(self, block: int) -> Iterator[Sequence[int]]:
        return self._metadata.refcounts.counts(block << self._block_bits, 1 << self._block_bits)

    def _have_block(self, block: int) -> bool:
        """Take a cluster for the block, if it counts something and has none."""
        if block in self._blocks:
            return False
        if block << 3 >= layout.MAX_REFCOUNT_TABLE_SIZE:
            raise ImageError(
                "This operation would make the refcount table grow beyond the maximum size "
                "supported by QEMU, aborting",
                field="refcount_table_clusters",
                value=block >> self._metadata.cluster_bits - 3,
                limit=layout.MAX_REFCOUNT_TABLE_SIZE >> self._metadata.cluster_bits,
            )
        with self._metadata.lock:
            if any(any(values) for values in self._counts(block)):
                self._blocks[block] = self._metadata.refcounts.allocate(1)[0]
                return True
        return False

    def _write_block(self, block: int) -> bool:
        cluster = self._blocks.get(block)
        if cluster is not None:
            codec, at = codec_for(self._order), 0
            contents = bytearray(self._metadata.cluster_size)
            with self._metadata.lock:
                for values in self._counts(block):
                    if any(values):
                        codec.store(memoryview(contents), at, values)
                    at += len(values)
            self._metadata.file.write(cluster << self._metadata.cluster_bits, contents)
        return False


def _check_fit(metadata: Metadata, order: int) -> None:
    most = codec_for(order).max
    refcounts = metadata.refcounts
    per_block = 1 << metadata.geometry.refcount_block_bits
    with metadata.lock:
        for block, entry in enumerate(refcounts.table):
            if not entry:
                continue
            cluster = block * per_block
            for values in refcounts.counts(cluster, per_block):
                if max(values) > most:
                    index = next(i for i, value in enumerate(values) if value > most)
                    raise ImageError(
                        f"Cannot decrease refcount entry width to {1 << order} bits: Cluster at "
                        f"offset {cluster + index << metadata.cluster_bits:#x} has a refcount of "
                        f"{values[index]}",
                        field="refcount",
                        value=values[index],
                        limit=most,
                    )
                cluster += len(values)


def _structures(metadata: Metadata) -> list[tuple[int, int]]:
    """Where the present refcount structures lie: (first cluster, count) each."""
    header, bits = metadata.header, metadata.cluster_bits
    refcounts = metadata.refcounts
    blocks = [block for block, entry in enumerate(refcounts.table) if entry]
    found = [(refcounts.block_offset(block) >> bits, 1) for block in blocks]
    return [*found, (header.refcount_table_offset >> bits, header.refcount_table_clusters)]


def _free(metadata: Metadata, first: int, count: int) -> None:
    for part in metadata.refcounts.slices(first, count):
        metadata.refcounts.add(*part, -1)
