"""Reference counts: the refcount table, its blocks, and finding free clusters.

What the cache of refcount blocks holds may be written to the file at any time: counts are raised
before anything refers to the cluster, and lowered only after the dropped reference is off the disk
(see ``quarantine.py``). The caller holds the image's metadata lock.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..backend.disk import Disk
from ..errors import BackendError, ImageError
from . import layout
from .cache import TableCache
from .geometry import Geometry
from .header import Header
from .health import Health
from .refcount_codec import codec_for, uniform
from .table_io import load_table, pack_table, switch_fields

if TYPE_CHECKING:
    from .overlap import Overlap

__all__ = ["Refcounts", "structure_size"]


def structure_size(geometry: Geometry, others: int) -> tuple[int, int]:
    """Refcount blocks and refcount table clusters needed to count themselves and ``others``."""
    blocks = table_clusters = 1
    while True:
        used = others + blocks + table_clusters
        need_blocks = -(-used >> geometry.refcount_block_bits)
        need_table = geometry.clusters(8 * need_blocks)
        if need_blocks <= blocks and need_table <= table_clusters:
            return blocks, table_clusters
        blocks, table_clusters = max(blocks, need_blocks), max(table_clusters, need_table)


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
        self.slice_bits = cache.slot_bits + 3 - geometry.refcount_order
        """log2 of the refcounts in a slice of the cache."""
        self._slice_entries = 1 << self.slice_bits
        entries = header.refcount_table_clusters << (geometry.cluster_bits - 3)
        self.table = load_table(file, header.refcount_table_offset, entries)
        """The refcount table; entries are as in the file."""
        self._dirty_entries: set[int] = set()
        """Indices of refcount table entries that the file does not have yet."""
        self._hint = 0
        """Every cluster below this one is in use."""
        self.fresh = geometry.clusters(file.size)
        """Clusters from this one on were never handed out and lie past the end of the file:
        they read as zeroes."""

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

    def add_each(self, cluster: int, deltas: Sequence[int]) -> list[int]:
        """Add ``deltas[i]`` to the count of ``cluster + i``; returns the clusters that became free.

        As :meth:`add` does, slice by slice.
        """
        freed: list[int] = []
        at = 0
        for slot, index, values in self._load(cluster, len(deltas)):
            part = deltas[at : at + len(values)]
            if uniform(part):
                if part[0]:
                    freed += self.add(cluster + at, len(part), part[0])
            elif any(part):
                changed = list(map(int.__add__, values, part))
                if slot < 0 or min(changed) < 0 or max(changed) > self._codec.max:
                    raise self._out_of_range(cluster + at, len(values), max(changed))
                self.cache.mark_dirty(slot)
                self._codec.store(self.cache.slice(slot), index, changed)
                if not min(changed):
                    pairs = zip(changed, values, strict=True)
                    start = cluster + at
                    freed += [start + i for i, (new, old) in enumerate(pairs) if old and not new]
            at += len(part)
        if freed and freed[0] < self._hint:
            self._hint = freed[0]
        return freed

    def add(self, cluster: int, count: int, delta: int) -> list[int]:
        """Add ``delta`` to each count in the range; returns the clusters that became free.

        Raises ImageError where a count would leave its range, BackendError where it cannot be had;
        what was changed before stays so, but a slice of the cache is changed whole or not at all.
        """
        freed: list[int] = []
        for slot, index, values in self._load(cluster, count):
            part, value = len(values), values[0]
            changed: Sequence[int]
            if slot < 0:
                raise self._out_of_range(cluster, part, 0)
            if uniform(values):  # compared and filled as arrays
                if not 0 <= value + delta <= self._codec.max:
                    raise self._out_of_range(cluster, part, value + delta)
                changed = array("Q", [value + delta]) * part
                if delta < 0 and value + delta == 0:
                    freed += range(cluster, cluster + part)
            else:
                changed = [value + delta for value in values]
                lowest = min(changed)
                if lowest < 0 or max(changed) > self._codec.max:
                    raise self._out_of_range(cluster, part, max(changed))
                if delta < 0 and not lowest:
                    freed += [cluster + i for i, value in enumerate(changed) if not value]
            # Where QEMU looks for the block that it is about to change.
            self._file.debug_event("refblock_alloc")
            self._file.debug_event("refblock_load")
            self.cache.mark_dirty(slot)
            self._codec.store(self.cache.slice(slot), index, changed)
            cluster += part
        if freed and freed[0] < self._hint:
            self._hint = freed[0]
        return freed

    def pack(self, counts: Sequence[int]) -> bytes:
        """A slice's counts as bytes, for :meth:`add_slice`. Raises ImageError if one is too large.

        They are an array of the refcounts' own width; of bytes, if that is less.
        """
        if self._codec.order < 3 and max(counts) > self._codec.max:
            raise self._out_of_range(0, len(counts), max(counts))
        packed = bytearray(self.cache.slot_size)
        self._codec.store(memoryview(packed), 0, counts)
        return bytes(packed)

    def add_slice(self, number: int, deltas: bytes, sign: int) -> None:
        """Add packed counts to (``sign`` -1: take them off) slice ``number``: the whole slice, or
        with an error nothing. None may become free that way."""
        first = number << self.slice_bits
        slot, _, _ = self._locate(first)
        if slot < 0:
            raise self._out_of_range(first, self._slice_entries, 0)
        view = self.cache.slice(slot)
        changed = self._codec.add_packed(view, deltas, sign)
        if changed is None:
            raise self._out_of_range(first, self._slice_entries, self._codec.max + 1)
        self.cache.mark_dirty(slot)
        view[:] = changed

    def _out_of_range(self, cluster: int, count: int, highest: int) -> ImageError:
        message = (
            f"A refcount in clusters {cluster:#x} to {cluster + count - 1:#x} would fall below 0"
        )
        if highest > self._codec.max:
            message = "Reference count limit reached: a cluster cannot be shared more often"
        return ImageError(message, field="refcount", value=cluster, limit=self._codec.max)

    # -- allocation ----------------------------------------------------------------------------

    def allocate(
        self, want: int, what: str | None = None, *, follow: int = 0
    ) -> tuple[int, int, bool]:
        """Take up to ``want`` free clusters in a row, at least one; their refcount becomes 1.

        Returns the first cluster, how many, and whether all of them are fresh (past everything
        ever written, so they read as zeroes). Gaps that are too small are passed by, until
        something before them becomes free (QEMU), but what is free from cluster ``follow`` on is
        taken in any case. ``what`` they are for, in QEMU's words.
        """
        want = min(want, max(1, 1 << self._block_bits - 1))
        while follow:
            count = self._free_run(follow, want)
            if not count:
                break
            if self._ensure_blocks(follow, count):
                hint = self._hint
                taken = self._take(follow, count, what)
                if hint < follow:
                    self._hint = hint
                return taken
        self._file.debug_event("cluster_alloc")
        while True:
            first = self._hint = self._find_contiguous(want)
            if self._ensure_blocks(first, want):
                return self._take(first, want, what)

    def allocate_contiguous(self, count: int) -> int:
        """Take exactly ``count`` clusters in a row; the first of them."""
        self._file.debug_event("cluster_alloc")
        if count >= 1 << self._block_bits - 1:
            # The refcount blocks that come to lie in between would never leave so much room.
            first = self._find_contiguous(count)
            last = (first + count - 1) >> self._block_bits
            blocks = range(first >> self._block_bits, last + 1)
            if last >= len(self.table) or not all(self.table[block] for block in blocks):
                return self.allocate_area(count)
            return self._take(first, count)[0]
        while True:
            first = self._find_contiguous(count)
            if self._ensure_blocks(first, count):
                return self._take(first, count)[0]

    def allocate_area(self, count: int, extend: Callable[[int], None] | None = None) -> int:
        """Take ``count`` fresh clusters in a row, any number, behind everything ever used.

        They read as zeroes once the file is that long; ``extend`` is called with the length that it
        needs before anything changes. The refcount blocks that they need are made behind them,
        counted already. Returns the first cluster.
        """
        bits = self._block_bits
        while True:
            first = self._find_contiguous(count, self.fresh)
            missing: list[int] = []
            while True:
                end = first + count + len(missing)
                blocks = range(first >> bits, (end - 1 >> bits) + 1)
                needed = [b for b in blocks if b >= len(self.table) or not self.table[b]]
                if len(needed) == len(missing):
                    break
                missing = needed
            self._check_end(end)
            if blocks[-1] < len(self.table):
                break
            self._grow_table(len(self.table), {}, blocks[-1] + 1)
        self._refuse_invalid(first, end - first)
        if extend is not None:
            extend(end << self._geometry.cluster_bits)
        if missing:
            self.fresh = max(self.fresh, end)  # should it fail, what is written now is there
        for i, block in enumerate(missing):
            start, stop = max(first, block << bits), min(end, block + 1 << bits)
            self._write_block(first + count + i, stop - start, start - (block << bits))
        raised: list[tuple[int, int]] = []
        try:
            for block in blocks:
                if self.table[block]:
                    start, stop = max(first, block << bits), min(end, block + 1 << bits)
                    for part in self.slices(start, stop - start):
                        self.add(*part, 1)
                        raised.append(part)
        except BaseException:
            for part in raised:
                self.add(*part, -1)
            raise
        for i, block in enumerate(missing):
            self.table[block] = (first + count + i) << self._geometry.cluster_bits
            self._dirty_entries.add(block)
        self.fresh = max(self.fresh, end)
        return first

    def _take(self, first: int, count: int, what: str | None = None) -> tuple[int, int, bool]:
        end = first + count
        self._check_end(end)
        self._refuse_invalid(first, count, what)
        self.add(first, count, 1)
        fresh = first >= self.fresh
        self.fresh = max(self.fresh, end)
        self._hint = end
        return first, count, fresh

    def _check_end(self, end: int) -> None:
        if end << self._geometry.cluster_bits > layout.MAX_HOST_OFFSET:
            raise BackendError(errno.EFBIG, "The image file would exceed the format's limit")

    def _refuse_invalid(self, first: int, count: int, what: str | None = None) -> None:
        """Raise ImageError, and write nothing any more, if clusters about to be handed out hold
        what every image has: then the refcounts are wrong. ``what`` they are for, where QEMU looks
        for that itself; else it finds out when it writes there, and so says the message."""
        header, bits = self._header, self._geometry.cluster_bits
        taken: tuple[tuple[str, int, int], ...] = (
            ("qcow2_header", 0, 1),
            ("active L1 table", header.l1_table_offset >> bits, 8 * header.l1_size),
            (
                "refcount table",
                header.refcount_table_offset >> bits,
                header.refcount_table_clusters << bits,
            ),
        )
        if header.crypto_header is not None:
            offset, length = header.crypto_header
            taken += (("encryption header", offset >> bits, length),)
        for structure, start, length in taken:
            if first < start + self._geometry.clusters(length) and start < first + count:
                message = f"Preventing invalid write on metadata (overlaps with {structure})"
                if what is not None and not first:
                    message = f"Preventing invalid allocation of {what} at offset 0"
                self._health.poison(message)
                raise self.damaged(message, field="refcount", value=first)

    def _find_free(self, start: int, want: int) -> tuple[int, int]:
        """The first free cluster from ``start`` on, and how many up to ``want`` are free there
        in one slice. Raises BackendError (EFBIG) if there is none that an entry can name."""
        cluster = start
        while True:
            self._check_end(cluster)
            slot, index, left = self._locate(cluster)
            if slot < 0:
                return cluster, min(want, left)
            view = self.cache.slice(slot)
            free = self._codec.find_zero(view, index, index + left)
            if free >= 0:
                end = min(free + want, index + left)
                return cluster + free - index, self._codec.zero_run(view, free, end)
            cluster += left

    def _free_run(self, first: int, want: int) -> int:
        """How many clusters from ``first`` on, up to ``want``, are free."""
        run = 0
        while run < want and not self.get(first + run):
            run += self._find_free(first + run, want - run)[1]
        return run

    def _find_contiguous(self, count: int, start: int = 0) -> int:
        first, found = self._find_free(max(self._hint, start), count)
        end = first + found
        while end - first < count:
            start, found = self._find_free(end, count - (end - first))
            if start != end:
                first = start
            end = start + found
        return first

    # -- refcount blocks and the table -----------------------------------------------------------

    def _ensure_blocks(self, first: int, count: int) -> bool:
        """Have refcount blocks for clusters about to be taken; True if all were there, else look
        for clusters again."""
        end = first + count
        for block in range(first >> self._block_bits, (end - 1 >> self._block_bits) + 1):
            if block >= len(self.table) or not self.table[block]:
                self._make_block(block, end)
                return False
        return True

    def _make_block(self, block: int, start: int) -> None:
        """Make a missing refcount block, in the first free cluster from ``start`` on (QEMU: behind
        the clusters that it is needed for), or another one that this needs.

        Nothing names the block before the counts, its own too, are on stable storage.
        """
        place, _ = self._find_free(start, 1)
        home = place >> self._block_bits
        if home != block and (home >= len(self.table) or not self.table[home]):
            self._make_block(home, place)
            return
        self._file.debug_event("refblock_alloc")
        self._refuse_invalid(place, 1, "refcount block")
        self.fresh = max(self.fresh, place + 1)
        if home == block:
            self._write_block(place, 1, place & (1 << self._block_bits) - 1)
        else:
            self._write_block(place, 0)
            self.add(place, 1, 1)
        if block < len(self.table):
            self._dirty_entries.add(block)
            self.table[block] = place << self._geometry.cluster_bits
            return
        try:
            self._grow_table(max(block, home) + 1, {block: place})
        except BaseException:
            if home != block:
                self.add(place, 1, -1)
            raise

    def _write_block(self, cluster: int, used: int, start: int = 0) -> None:
        """Write a refcount block into ``cluster`` that counts ``used`` entries from ``start`` on
        as 1, the others as 0."""
        contents = bytearray(self._geometry.cluster_size)
        self._codec.store(memoryview(contents), start, [1] * used)
        offset = cluster << self._geometry.cluster_bits
        if self.overlap is not None:
            self.overlap.check(offset, len(contents))
            self.overlap.add_block(cluster)
        self._file.debug_event("refblock_alloc_write")
        self._file.write(offset, contents)

    def _grow_table(self, at: int, named: Mapping[int, int], least: int = 0) -> None:
        """Move the refcount table to a place where it has room for blocks ``named`` (by number the
        cluster), and at least ``least`` entries.

        The new table, and the blocks that count it, lie where block number ``at`` begins, behind
        everything counted today; it grows as QEMU's. Ends with all of it on stable storage and the
        old table's clusters free.
        """
        self._file.debug_event("reftable_grow")
        geometry = self._geometry
        limit = layout.MAX_REFCOUNT_TABLE_SIZE >> geometry.cluster_bits
        per_block = 1 << self._block_bits
        first = at << self._block_bits
        _, half = structure_size(geometry, first)
        blocks, _ = structure_size(geometry, first + -(-half // 2))
        clusters = geometry.clusters(8 * max(blocks + -(-blocks // 2), least))
        clusters = min(clusters, limit)
        while (blocks - at) * per_block < clusters + blocks - at:
            blocks += 1
        new_blocks = blocks - at
        entries = clusters << (geometry.cluster_bits - 3)
        if entries < max(blocks, least):
            raise BackendError(errno.EFBIG, "The refcount table cannot grow beyond QEMU's limit")
        used = clusters + new_blocks
        self.fresh = max(self.fresh, first + used)
        table = array("Q", self.table)
        table.frombytes(bytes(8 * (entries - len(table))))
        for block, cluster in named.items():
            table[block] = cluster << geometry.cluster_bits
        self._file.debug_event("refblock_alloc_write_blocks")
        for i in range(new_blocks):
            self._write_block(first + i, max(0, min(per_block, used - i * per_block)))
            table[at + i] = (first + i) << geometry.cluster_bits
        offset = (first + new_blocks) << geometry.cluster_bits
        if self.overlap is not None:
            self.overlap.check(offset, clusters << geometry.cluster_bits)
        self._file.debug_event("refblock_alloc_write_table")
        self._file.write(offset, pack_table(table))
        self.cache.write_dirty()
        self._file.flush()
        old = self._header.refcount_table_offset >> geometry.cluster_bits
        old_clusters = self._header.refcount_table_clusters
        with self._health.step("Moving the refcount table"):
            self._file.debug_event("refblock_alloc_switch_table")
            failed = switch_fields(
                self._file,
                layout.REFCOUNT_TABLE_OFFSET_OFFSET,
                layout.REFCOUNT_TABLE_FIELDS.pack(offset, clusters),
                layout.REFCOUNT_TABLE_FIELDS.pack(old << geometry.cluster_bits, old_clusters),
            )
            if failed is None:
                self._header.refcount_table_offset = offset
                self._header.refcount_table_clusters = clusters
                self.table = table
                self._dirty_entries.clear()
                if self.overlap is not None:
                    self.overlap.forget()
        if failed is not None:
            raise failed
        self.add(old, old_clusters, -1)

    def drop_empty_blocks(self) -> None:
        """Give up the refcount blocks that count nothing but, at most, themselves.

        The counts must be on stable storage (``qcow2_shrink_reftable``).
        """
        cluster_bits = self._geometry.cluster_bits
        empty = [block for block, entry in enumerate(self.table) if entry and self._is_empty(block)]
        if not empty:
            return
        for block in empty:
            self._file.write(self._header.refcount_table_offset + 8 * block, bytes(8))
        self._file.flush()
        for block in empty:
            offset = self.block_offset(block)
            self.table[block] = 0
            self._dirty_entries.discard(block)
            self.cache.forget(offset, self._geometry.cluster_size)
            if offset >> cluster_bits >> self._block_bits != block:
                self.add(offset >> cluster_bits, 1, -1)
            else:
                self._hint = min(self._hint, offset >> cluster_bits)

    def _is_empty(self, block: int) -> bool:
        own = self.block_offset(block) >> self._geometry.cluster_bits
        cluster = block << self._block_bits
        for values in self.counts(cluster, 1 << self._block_bits):
            for i, value in enumerate(values) if any(values) else ():
                if value and cluster + i != own:
                    return False
            cluster += len(values)
        return True

    def end_of_use(self) -> int:
        """The cluster after the last one in use."""
        for block in range(len(self.table) - 1, -1, -1):
            if not self.table[block]:
                continue
            first = block << self._block_bits
            pieces = list(self.slices(first, 1 << self._block_bits))
            for start, count in reversed(pieces):
                values = next(iter(self.counts(start, count)))
                for i in range(count - 1, -1, -1) if any(values) else ():
                    if values[i]:
                        return start + i + 1
        return 0

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
            self._file.debug_event("refblock_alloc_hookup")
            self._file.write(table + 8 * entry, layout.U64.pack(self.table[entry]))
