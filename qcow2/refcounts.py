"""Reference counts: the refcount table, its blocks, and finding free clusters.

What the cache of refcount blocks holds may be written to the file at any time: counts are raised
before anything refers to the cluster, and lowered only after the dropped reference is off the disk
(see ``quarantine.py``). The caller holds the image's metadata lock.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..backend.disk import Disk
from ..errors import BackendError, ImageError
from . import layout
from .cache import TableCache
from .header import Header
from .health import Health
from .refcount_codec import codec_for

if TYPE_CHECKING:
    from .overlap import Overlap

__all__ = ["Refcounts", "load_table", "pack_table"]


def load_table(file: Disk, offset: int, entries: int) -> array[int]:
    """A table of big-endian 64-bit entries (L1, refcount table) from the file."""
    table = array("Q", file.read(offset, 8 * entries))
    if sys.byteorder == "little":
        table.byteswap()
    return table


def pack_table(entries: Sequence[int]) -> bytes:
    """The bytes of a table of 64-bit entries."""
    table = array("Q", entries)
    if sys.byteorder == "little":
        table.byteswap()
    return table.tobytes()


class Refcounts:
    """The refcount of every host cluster, by cluster number (host offset / cluster size)."""

    def __init__(self, file: Disk, header: Header, cache: TableCache, health: Health) -> None:
        geometry = header.geometry
        self._file = file
        self.damaged: Callable[..., ImageError] = ImageError
        """Makes the error for an entry that cannot be followed."""
        self.overlap: Overlap | None = None
        """Asked before new blocks and tables are written."""
        self._health = health
        self._header = header
        self._geometry = geometry
        self.cache = cache
        self._codec = codec_for(geometry.refcount_order)
        self._block_bits = geometry.refcount_block_bits
        slice_bits = cache.slot_bits + 3 - geometry.refcount_order
        self._slice_entries = 1 << slice_bits
        self.table = self._load_table()
        """The refcount table; entries are as in the file."""
        self._dirty_entries: set[int] = set()
        """Indices of refcount table entries that the file does not have yet."""
        self._hint = 0
        """Every cluster below this one is in use."""
        self.fresh = geometry.clusters(file.size)
        """Clusters from this one on were never handed out and lie past the end of the file:
        they read as zeroes."""

    def _load_table(self) -> array[int]:
        header = self._header
        entries = header.refcount_table_clusters << (self._geometry.cluster_bits - 3)
        return load_table(self._file, header.refcount_table_offset, entries)

    def reload(self) -> None:
        """Forget everything: the file was changed by somebody else, the header says where."""
        self.cache.clear()
        self.table = self._load_table()
        self._dirty_entries.clear()
        self._hint = 0
        self.fresh = self._geometry.clusters(self._file.size)

    # -- single counts -------------------------------------------------------------------------

    def get(self, cluster: int) -> int:
        """The refcount of one cluster."""
        return next(iter(self._load(cluster, 1)))[2][0]

    def _locate(self, cluster: int) -> tuple[int, int, int]:
        """Slot, index in its slice, and entries up to the slice's end; slot -1: no such block."""
        block = cluster >> self._block_bits
        index = cluster & (self._slice_entries - 1)
        left = self._slice_entries - index
        if block >= len(self.table):
            return -1, index, left
        offset = self.block_offset(block)
        if not offset:
            return -1, index, left
        first = cluster & ((1 << self._block_bits) - 1)
        place = first // self._slice_entries * self.cache.slot_size
        return self.cache.get(offset + place), index, left

    def block_offset(self, block: int) -> int:
        """Host offset of refcount block number ``block``, 0 if there is none."""
        entry = self.table[block]
        offset = entry & layout.REFCOUNT_TABLE_OFFSET_MASK
        if offset % self._geometry.cluster_size or offset >= layout.INT64_MAX:
            raise self.damaged(
                f"Refblock offset {offset:#x} unaligned (reftable index: {block:#x})",
                field="refcount table entry",
                value=entry,
            )
        return offset

    def _load(self, cluster: int, count: int) -> Iterator[tuple[int, int, Sequence[int]]]:
        """(slot, index, values) for each slice of a range; slot -1 where there is no block."""
        while count > 0:
            slot, index, left = self._locate(cluster)
            part = min(count, left)
            if slot < 0:
                yield slot, index, bytes(part)
            else:
                yield slot, index, self._codec.load(self.cache.slice(slot), index, part)
            cluster += part
            count -= part

    def counts(self, cluster: int, count: int) -> Iterator[Sequence[int]]:
        """The refcounts of a range of clusters, in pieces."""
        for _, _, values in self._load(cluster, count):
            yield values

    def slices(self, cluster: int, count: int) -> Iterator[tuple[int, int]]:
        """A range of clusters cut where the cache's slices end: (first, count) each."""
        end = cluster + count
        while cluster < end:
            part = min(end - cluster, self._slice_entries - (cluster & (self._slice_entries - 1)))
            yield cluster, part
            cluster += part

    # -- changing counts -----------------------------------------------------------------------

    def check_raise(self, cluster: int, count: int, times: int) -> None:
        """Raise ImageError unless every count in the range can be raised by ``times``."""
        for values in self.counts(cluster, count):
            if max(values) + times > self._codec.max:
                raise ImageError(
                    "Reference count limit reached: a cluster cannot be shared more often",
                    field="refcount",
                    value=self._codec.max,
                    limit=self._codec.max,
                )

    def add(self, cluster: int, count: int, delta: int) -> list[int]:
        """Add ``delta`` to each count in the range; returns the clusters that became free.

        Raises ImageError where a count would leave its range, BackendError where it cannot be had;
        what was changed before stays so, but a slice of the cache is changed whole or not at all.
        """
        freed = []
        for slot, index, values in self._load(cluster, count):
            if slot < 0 or min(values) + delta < 0 or max(values) + delta > self._codec.max:
                raise ImageError(
                    f"Refcount of a cluster in {cluster:#x} to {cluster + count - 1:#x} "
                    f"cannot be changed by {delta}",
                    field="refcount",
                    value=cluster,
                )
            changed = [value + delta for value in values]
            self.cache.mark_dirty(slot)
            self._codec.store(self.cache.slice(slot), index, changed)
            if delta < 0:
                freed += [cluster + i for i, value in enumerate(changed) if not value]
            cluster += len(values)
        if freed and freed[0] < self._hint:
            self._hint = freed[0]
        return freed

    # -- allocation ----------------------------------------------------------------------------

    def allocate(self, want: int) -> tuple[int, int, bool]:
        """Take up to ``want`` free clusters in a row, at least one; their refcount becomes 1.

        Returns the first cluster, how many, and whether all of them are fresh (past everything
        ever written, so they read as zeroes).
        """
        while True:
            first, count = self._find_free(self._hint, want)
            self._hint = first
            if self._ensure_block(first):
                return self._take(first, count)

    def allocate_contiguous(self, count: int) -> int:
        """Take exactly ``count`` clusters in a row; the first of them."""
        while True:
            first = self._find_contiguous(count)
            last = (first + count - 1) >> self._block_bits
            ready = True
            for block in range(first >> self._block_bits, last + 1):
                ready = self._ensure_block(block << self._block_bits) and ready
            if ready:
                return self._take(first, count)[0]

    def _take(self, first: int, count: int) -> tuple[int, int, bool]:
        end = first + count
        if end << self._geometry.cluster_bits > layout.MAX_HOST_OFFSET:
            raise BackendError(errno.EFBIG, "The image file would exceed the format's limit")
        self._refuse_invalid(first, count)
        self.add(first, count, 1)
        fresh = first >= self.fresh
        self.fresh = max(self.fresh, end)
        if first == self._hint:
            self._hint = end
        return first, count, fresh

    def _refuse_invalid(self, first: int, count: int) -> None:
        """Raise ImageError, and write nothing any more, if clusters about to be handed out hold
        what every image has: then the refcounts are wrong (QEMU's "Preventing invalid ...")."""
        header, bits = self._header, self._geometry.cluster_bits
        taken = (
            ("the header", 0, 1),
            ("the active L1 table", header.l1_table_offset >> bits, 8 * header.l1_size),
            (
                "the refcount table",
                header.refcount_table_offset >> bits,
                header.refcount_table_clusters << bits,
            ),
        )
        for what, start, length in taken:
            if first < start + self._geometry.clusters(length) and start < first + count:
                message = f"Preventing invalid allocation of {what} at offset {start << bits:#x}"
                self._health.poison(message)
                raise self.damaged(message, field="refcount", value=first)

    def _find_free(self, start: int, want: int) -> tuple[int, int]:
        """The first free cluster from ``start`` on, and how many up to ``want`` are free there
        in one slice."""
        cluster = start
        while True:
            slot, index, left = self._locate(cluster)
            if slot < 0:
                return cluster, min(want, left)
            view = self.cache.slice(slot)
            free = self._codec.find_zero(view, index, index + left)
            if free >= 0:
                end = min(free + want, index + left)
                return cluster + free - index, self._codec.zero_run(view, free, end)
            cluster += left

    def _find_contiguous(self, count: int) -> int:
        first, found = self._find_free(self._hint, count)
        end = first + found
        while end - first < count:
            start, found = self._find_free(end, count - (end - first))
            if start != end:
                first = start
            end = start + found
        return first

    # -- refcount blocks and the table -----------------------------------------------------------

    def _ensure_block(self, cluster: int) -> bool:
        """Make a refcount block for ``cluster`` if there is none; True if there was.

        A new block lies in the first cluster that it counts: nothing there is in use yet.
        """
        block = cluster >> self._block_bits
        if block >= len(self.table):
            self._grow_table(block + 1)
            return False
        if self.table[block]:
            return True
        first = block << self._block_bits
        self._refuse_invalid(first, 1)
        self.fresh = max(self.fresh, first + 1)
        self._write_block(first, 1)
        self._dirty_entries.add(block)
        self.table[block] = first << self._geometry.cluster_bits
        return False

    def _write_block(self, cluster: int, used: int) -> None:
        """Write a refcount block into ``cluster`` that counts its first ``used`` entries as 1."""
        contents = bytearray(self._geometry.cluster_size)
        self._codec.store(memoryview(contents), 0, [1] * used)
        offset = cluster << self._geometry.cluster_bits
        if self.overlap is not None:
            self.overlap.check(offset, len(contents))
            self.overlap.add_block(cluster)
        self._file.write(offset, contents)

    def _grow_table(self, blocks: int) -> None:
        """Move the refcount table to a place where it has at least ``blocks`` entries.

        The new table, and the blocks that count it, lie behind everything counted today. Ends
        with all of it on stable storage and the old table's clusters free.
        """
        geometry = self._geometry
        limit = layout.MAX_REFCOUNT_TABLE_SIZE >> geometry.cluster_bits
        first_block = len(self.table)
        first = first_block << self._block_bits
        per_block = 1 << self._block_bits
        clusters = self._header.refcount_table_clusters
        wanted = max(blocks, first_block + 2) * 3 // 2
        clusters = min(max(geometry.clusters(8 * wanted), clusters + 1), limit)
        new_blocks = 1
        while new_blocks * per_block < clusters + new_blocks:
            new_blocks += 1
        entries = clusters << (geometry.cluster_bits - 3)
        if entries < max(blocks, first_block + new_blocks):
            raise BackendError(errno.EFBIG, "The refcount table cannot grow beyond QEMU's limit")
        used = clusters + new_blocks
        self.fresh = max(self.fresh, first + used)
        table = array("Q", self.table)
        table.frombytes(bytes(8 * (entries - first_block)))
        for i in range(new_blocks):
            self._write_block(first + i, min(per_block, used - i * per_block))
            table[first_block + i] = (first + i) << geometry.cluster_bits
        offset = (first + new_blocks) << geometry.cluster_bits
        if self.overlap is not None:
            self.overlap.check(offset, clusters << geometry.cluster_bits)
        self._file.write(offset, pack_table(table))
        self.cache.write_dirty()
        self._file.flush()
        old = self._header.refcount_table_offset >> geometry.cluster_bits
        old_clusters = self._header.refcount_table_clusters
        with self._health.step("Moving the refcount table"):
            self._file.write(
                layout.REFCOUNT_TABLE_OFFSET_OFFSET,
                layout.REFCOUNT_TABLE_FIELDS.pack(offset, clusters),
            )
            self._file.flush()
            self._header.refcount_table_offset = offset
            self._header.refcount_table_clusters = clusters
            self.table = table
            self._dirty_entries.clear()
            if self.overlap is not None:
                self.overlap.forget()
        self.add(old, old_clusters, -1)

    # -- to the file -----------------------------------------------------------------------------

    @property
    def has_new_blocks(self) -> bool:
        """True if there are blocks that the file's table does not name."""
        return bool(self._dirty_entries)

    def take_new_blocks(self) -> set[int]:
        """The refcount table entries that the file's table lacks, for :meth:`write_entries`."""
        entries, self._dirty_entries = self._dirty_entries, set()
        return entries

    def keep_new_blocks(self, entries: set[int]) -> None:
        """Give back what was taken and could not be written."""
        self._dirty_entries |= entries

    def write_entries(self, entries: set[int]) -> None:
        """Name new blocks in the file's table. The blocks must be on stable storage already."""
        table = self._header.refcount_table_offset
        for entry in sorted(entries):
            if self.overlap is not None:
                self.overlap.check_table(table + 8 * entry, 8)
            self._file.write(table + 8 * entry, layout.U64.pack(self.table[entry]))
