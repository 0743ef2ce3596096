"""The image's metadata as one whole: tables, refcounts, and the order in which they reach the file.

Going up, data is stable before the L2 entry that maps it, a refcount before the entry that
relies on it, a refcount block before its table entry, an L2 table before the L1 entry that names
it. Going down, a dropped reference is stable before the refcount falls (``quarantine.py``).
:meth:`Metadata.flush` is where that order is made:

    refcounts, new L2 tables, data  | sync |  refcount table entries  | sync |  L2 entries  | sync |
    L1 entries  | sync |  dropped references lower their refcounts, in memory

so a cut at any moment leaves leaks at worst.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock
from typing import TYPE_CHECKING

from ..backend.disk import Disk
from ..errors import BackendError, ImageError
from . import layout
from .cache import TableCache
from .compression import DecompressedClusters
from .corruption import Corruption
from .data_file_tables import make_tables
from .header import Header
from .health import Health
from .layout import ClusterKind
from .options import CacheSizes
from .overlap import TEMPLATES, Overlap, Section
from .quarantine import DiscardKind, DroppedReferences, merge_runs
from .refcount_codec import uniform
from .refcounts import Refcounts
from .requests import RequestGate
from .state import mark_clean, mark_dirty
from .table_io import load_table, pack_table, switch_fields
from .tables import entry_kind

if TYPE_CHECKING:
    from .encryption import Encryption

__all__ = ["CacheSizes", "Metadata"]

_SLICE_SIZE = 4096
"""Bytes of a refcount block that are read and written at once."""


class Metadata:
    """Everything of an open image that is neither data nor policy."""

    def __init__(
        self,
        file: Disk,
        header: Header,
        sizes: CacheSizes,
        *,
        read_only: bool,
        data_file: Disk | None = None,
        overlap_check: Section = TEMPLATES["cached"],
    ) -> None:
        self.file = file
        self.data_file = data_file
        """The external data file, if the image has one."""
        self.data = file if data_file is None else data_file
        """Where guest clusters that are not compressed lie."""
        self.event = None if type(file).debug_event is Disk.debug_event else file.debug_event
        """Where the named points of the driver are announced, if anybody listens."""
        self.header = header
        self.geometry = header.geometry
        self.cluster_bits = self.geometry.cluster_bits
        self.cluster_size = self.geometry.cluster_size
        self.read_only = read_only
        self.encryption: Encryption | None = None
        """How guest data is encrypted, if it is."""
        self.health = Health()
        self.gate = RequestGate()
        self.lock = self.gate.lock
        self.corruption = Corruption(file, header, self.health, self.gate, writable=not read_only)
        self.repair_only = False
        """The image may be damaged: nothing but a repair changes it."""
        self.lazy = False
        """Refcounts need not be right in the file: it is marked dirty instead."""
        slot = min(self.cluster_size, sizes.l2_entry)
        l2_cache = TableCache(file, slot, max(8, sizes.l2 // slot), write_back=False)
        l1 = load_table(file, header.l1_table_offset, header.l1_size)
        self.tables = make_tables(l1, self.geometry, l2_cache, data_file=data_file is not None)
        slot = min(self.cluster_size, _SLICE_SIZE)
        refcount_cache = TableCache(file, slot, max(8, sizes.refcount // slot), write_back=True)
        self.refcounts = self._make_refcounts(refcount_cache)
        self.overlap = Overlap(self, overlap_check)
        self.check_data_write = self.overlap.check if data_file is None else _nothing_in_the_way
        """Raises CorruptionError for a write of guest data to (host offset, length) that would hit
        metadata."""
        l2_cache.guard = self.overlap.check_l2_slice
        refcount_cache.guard = self.overlap.check_block
        self.refcounts.overlap = self.overlap
        self.tables.damaged = self.corruption.found
        self.dropped = DroppedReferences()
        """References dropped since the last flush began."""
        self.discards = {
            DiscardKind.NEVER: False,
            DiscardKind.REQUEST: True,
            DiscardKind.SNAPSHOT: True,
            DiscardKind.OTHER: False,
            DiscardKind.ALWAYS: True,
        }
        """Whether clusters freed for that reason are discarded in the file below."""
        self.decompressed = DecompressedClusters(self.geometry)
        self._before_freeing: list[Callable[[int, int, int], None]] = [self.decompressed.forget]
        self.vm_state_end: int | None = None
        """Bytes of VM state past the disk's end, as far as is known."""
        self._flushing = Lock()

    def close(self) -> None:
        """Give the caches' memory back. Nothing is written."""
        self.tables.cache.close()
        self.refcounts.cache.close()

    def _make_refcounts(self, cache: TableCache) -> Refcounts:
        refcounts = Refcounts(self.file, self.header, cache, self.health)
        refcounts.damaged = self.corruption.found
        return refcounts

    def renew_refcounts(self) -> None:
        """Load the refcounts the header names; nothing cached is kept (lock held)."""
        cache = self.refcounts.cache
        cache.clear()
        self.refcounts = self._make_refcounts(cache)
        self.refcounts.overlap = self.overlap
        self.overlap.forget()

    def reload(self) -> None:
        """Forget all that is in memory, and load the tables that the header names (exclusively)."""
        with self.lock:
            self.tables.cache.clear()
            self.tables.dirty_l1.clear()
            self.tables.l1 = load_table(self.file, self.header.l1_table_offset, self.header.l1_size)
            self.forget_contents()
            self.renew_refcounts()
            self.dropped = DroppedReferences()
            self.overlap.forget()

    # -- L2 tables to write to -------------------------------------------------------------------

    def prepare(self, cluster: int) -> int:
        """Have an L2 table of our own for guest cluster ``cluster``, its slice pinned.

        Returns the position of the entry in the slab; :meth:`Tables.set_entries` on this slice
        then cannot fail. Unpin with :meth:`unpin`. Raises CacheFull, or BackendError (EIO) if the
        disk has become so small, since the request was let through, that nothing maps the cluster.
        """
        l1_index = cluster >> self.geometry.l2_bits
        if l1_index >= len(self.tables.l1):
            raise BackendError(errno.EIO, "The request is not inside the disk any more")
        if self.tables.l1[l1_index] & layout.COPIED == 0 or not self.tables.l2_offset(l1_index):
            self.tables.keep(cluster, self._own_l2_table(l1_index))
        position = self.tables.locate(cluster)
        self.tables.cache.pin(position >> self.tables.cache.slot_bits)
        return position

    def unpin(self, position: int) -> None:
        """Release the slice that :meth:`prepare` pinned."""
        self.tables.cache.unpin(position >> self.tables.cache.slot_bits)

    def _own_l2_table(self, l1_index: int) -> bytes:
        """Make an empty L2 table, or a copy of one that is shared, and name it in the L1 table;
        its contents."""
        old = self.tables.l2_offset(l1_index)
        if old:
            self.file.debug_event("l2_alloc_cow_read")
        contents = self.read_l2_table(old) if old else bytes(self.cluster_size)
        new, _, _ = self.refcounts.allocate(1, "L2 table")
        try:
            self.overlap.check(new << self.cluster_bits, self.cluster_size)
            self.overlap.add(new, Section.ACTIVE_L2)
            self.file.debug_event("l2_alloc_write")
            self.file.write(new << self.cluster_bits, contents)
            if self.lazy:
                self.refcounts.cache.write_dirty()  # tables are counted even so, as in QEMU
        except BaseException:
            self.refcounts.add(new, 1, -1)
            raise
        self.replace_l2_table(l1_index, new)
        return contents

    def replace_l2_table(self, l1_index: int, cluster: int) -> None:
        """Name another L2 table, our own, written to a host cluster already, in the L1 table."""
        old = self.tables.l2_offset(l1_index)
        self.tables.set_l1(l1_index, cluster << self.cluster_bits | layout.COPIED)
        if old:
            self.forget_l2_table(old)
            self.dropped.add(old >> self.cluster_bits, 1, DiscardKind.OTHER)

    def read_l2_table(self, offset: int) -> bytes:
        """A whole L2 table as it is now: from the cache where it is there, else from the file."""
        cache = self.tables.cache
        table = bytearray(self.file.read(offset, self.cluster_size))
        for start in range(0, self.cluster_size, cache.slot_size):
            slot = cache.index.get(offset + start)
            if slot is not None:
                table[start : start + cache.slot_size] = cache.slice(slot)
        return bytes(table)

    def write_l1_flags(self) -> None:
        """Bring changed L1 entries to the file at once (lock held): for changes that are right at
        any moment, in an exclusive operation."""
        l1 = self.tables.l1
        for first, entries in _runs([(i, l1[i]) for i in sorted(self.tables.dirty_l1)]):
            self._write_l1(first, entries)
        self.tables.dirty_l1.clear()

    def _write_l1(self, first: int, entries: list[int]) -> None:
        place = self.header.l1_table_offset + 8 * first
        self.overlap.check_l1(place, 8 * len(entries))
        self.file.debug_event("l1_update")
        self.file.write(place, pack_table(entries))

    def write_l2_table(self, offset: int, contents: bytes, *, active: bool | None = True) -> None:
        """Replace a whole L2 table at once, in the file and in the cache.

        For changes that are right at any moment, in an exclusive operation. ``active`` is for
        :meth:`Overlap.check_l2`.
        """
        cache = self.tables.cache
        self.overlap.check_l2(offset, self.cluster_size, active=active)
        self.file.write(offset, contents)
        for start in range(0, self.cluster_size, cache.slot_size):
            slot = cache.index.get(offset + start)
            if slot is not None:
                cache.slice(slot)[:] = contents[start : start + cache.slot_size]

    def forget_l2_table(self, offset: int) -> None:
        """Drop the cached slices of an L2 table that is no longer ours."""
        self.tables.cache.forget(offset, self.cluster_size)

    # -- giving up references ----------------------------------------------------------------------

    def drop_entry(self, entry: int, kind: DiscardKind) -> None:
        """The L2 entry ``entry`` is gone: what it referred to has one reference less."""
        if self.data_file is not None:
            return  # no references are counted there
        what = entry_kind(entry)
        if what is ClusterKind.COMPRESSED:
            offset, length = self.geometry.compressed_extent(entry)
            first = offset >> self.cluster_bits
            last = (offset + length - 1) >> self.cluster_bits
            self.dropped.add(first, last - first + 1, kind)
        elif entry & layout.OFFSET_MASK:
            self.dropped.add((entry & layout.OFFSET_MASK) >> self.cluster_bits, 1, kind)

    def release(self, dropped: DroppedReferences) -> None:
        """Lower the refcounts of references whose drop is stable and unobserved (lock held)."""
        while dropped.runs:
            first, count, kind = dropped.runs.pop()
            for start, length in self.refcounts.slices(first, count):
                try:
                    self.lower(start, length, kind)
                except BackendError:
                    # The refcounts cannot be had now: the rest stays in quarantine.
                    dropped.runs.append((start, first + count - start, kind))
                    self.dropped.extend(dropped)
                    return
                except ImageError as error:
                    self.health.poison(str(error))
                    return

    def before_freeing(self, listener: Callable[[int, int, int], None]) -> None:
        """Have ``listener(first cluster, count, times)`` called (lock held) before refcounts of
        clusters that were referred to fall by ``times``, and others may get them."""
        self._before_freeing.append(listener)

    def lower(self, first: int, count: int, kind: DiscardKind, times: int = 1) -> None:
        """Lower refcounts by ``times`` now (lock held); what becomes free is discarded if the
        policy says so.

        The dropped references must be off the disk.
        """
        self.file.debug_event("cluster_free")
        self._announce(first, count, times)
        self._freed(self.refcounts.add(first, count, -times), kind)

    def lower_each(self, first: int, times: Sequence[int], kind: DiscardKind) -> None:
        """:meth:`lower` the refcount of ``first + i`` by ``times[i]``."""
        if uniform(times):
            self.lower(first, len(times), kind, times[0])
        else:
            self._announce(first, len(times), max(times))
            self._freed(self.refcounts.add_each(first, [-value for value in times]), kind)

    def forget_contents(self) -> None:
        """Whatever the host clusters hold may be something else now (lock held)."""
        self._announce(0, layout.MAX_HOST_OFFSET >> self.cluster_bits, self.geometry.refcount_max)

    def _announce(self, first: int, count: int, times: int) -> None:
        for listener in self._before_freeing:
            listener(first, count, times)

    def _freed(self, clusters: list[int], kind: DiscardKind) -> None:
        freed = merge_runs(clusters)
        for start, length in freed:
            self.tables.cache.forget(start << self.cluster_bits, length << self.cluster_bits)
        if self.discards[kind]:
            self.discard_in_file(freed)

    def discard_in_file(self, runs: list[tuple[int, int]]) -> None:
        """Tell the file below that runs of clusters hold nothing."""
        for first, count in runs:
            offset = first << self.cluster_bits
            end = min(offset + (count << self.cluster_bits), self.file.size)
            if offset < end:
                with suppress(BackendError):  # a hint, and nothing depends on it
                    self.file.discard(offset, end - offset)

    # -- the header --------------------------------------------------------------------------------

    def check_writable(self, *, repair: bool = False) -> None:
        """Raise BackendError if the image is open read-only, or for a ``repair`` only and this is
        none, or must not be written any more; ValueError if it is closed."""
        self.gate.check_open()
        if self.repair_only and not repair:
            raise BackendError(errno.EPERM, "the image is open for a check", self.file.filename)
        if self.read_only:
            raise BackendError(errno.EPERM, "the image is open read-only", self.file.filename)
        self.health.check()

    def adopt_geometry(self) -> None:
        """The header has another version or refcount width: go by it from now on."""
        self.geometry = self.header.geometry
        self.tables.adopt(self.geometry)

    def switch_l1(self, l1: array[int], offset: int, size: int) -> BackendError | None:
        """Make another L1 table, stable at host byte ``offset``, the active one (lock held).

        ``size`` is the disk's size with it. One write into the header's first sector. Returns the
        error where that failed and nothing has changed; raises BackendError where that is not
        certain.
        """
        header, overlap, pack = self.header, self.overlap, layout.SIZE_AND_L1.pack
        failed = switch_fields(
            self.file,
            layout.SIZE_OFFSET,
            pack(size, header.crypt_method, len(l1), offset),
            pack(header.size, header.crypt_method, header.l1_size, header.l1_table_offset),
        )
        if failed is not None:
            return failed
        overlap.drop(Section.ACTIVE_L1, header.l1_table_offset, 8 * header.l1_size)
        header.size, header.l1_size, header.l1_table_offset = size, len(l1), offset
        self.tables.l1 = l1
        overlap.put(Section.ACTIVE_L1, offset, 8 * len(l1))
        for entry in filter(None, l1):
            overlap.add((entry & layout.OFFSET_MASK) >> self.cluster_bits, Section.ACTIVE_L2)
        return None

    def make_accurate(self) -> None:
        """Bring postponed refcounts to the file, which is clean then (in an exclusive
        operation)."""
        if self.lazy:
            self.lazy = False
            try:
                self.settle()
                mark_clean(self.file, self.header)
            finally:
                self.lazy = True

    # -- to stable storage -------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """True if metadata differs from the file, or dropped references wait for a flush."""
        return bool(
            self.tables.cache.dirty
            or self.tables.dirty_l1
            or self.refcounts.cache.dirty
            or self.refcounts.has_new_blocks
            or self.dropped
        )

    def flush(self) -> None:
        """Bring everything to stable storage that was written before the call."""
        try:
            with self.lock:
                self.gate.enter()
            self.flush_inside()
        finally:
            self.gate.leave()

    def flush_inside(self) -> None:
        """:meth:`flush` for a request that is inside the gate already."""
        with self._flushing:
            self.flush_alone()

    def flush_alone(self) -> None:
        """:meth:`flush` where no other flush can run: in an exclusive operation."""
        self.health.check()
        self.file.debug_event("flush_to_os")
        staged = None
        try:
            with self.lock:
                if self.dirty:
                    if self.lazy:
                        # In the file before anything that the counts there do not know of.
                        mark_dirty(self.file, self.header)
                    else:
                        self.refcounts.cache.write_dirty()
                    with self.health.step("Gathering what to flush"):
                        staged = _Staged(self)
            if staged is not None:
                staged.write(self)
        except BaseException:
            # Wherever that came from: what is not in the file is dirty again.
            if staged is not None:
                with self.lock, self.health.step("Giving back what was to be flushed"):
                    staged.give_back(self)
            raise
        if staged is None:
            if self.data_file is not None:
                self.data_file.flush()
            self.file.debug_event("flush_to_disk")
            self.file.flush()
            return
        with self.lock:
            staged.slices.done(written=True)
            dropped = staged.dropped
            if dropped:
                self.gate.when_left(lambda: self.release(dropped))

    def settle(self) -> None:
        """Flush until nothing is left to be done (in an exclusive operation)."""
        self.flush_alone()
        with self.lock:
            again = self.dirty
        if again:
            self.flush_alone()

    @contextmanager
    def exclusive(self, *, settled: bool = True, told: bool = False) -> Iterator[None]:
        """Be alone with an image whose metadata is settled, and leave it so.

        With ``settled`` False refcounts that differ from the file may stay so, as between any two
        flushes, and what was written may not be stable yet. ``told``: the overlap check hears of
        each structure that comes or goes (those that snapshots refer to excepted).
        """
        done = False
        try:
            with self.gate.exclusive():
                if settled:
                    self.settle()
                elif self.tables.cache.dirty or self.tables.dirty_l1 or self.dropped:
                    self.flush_alone()
                else:
                    self.health.check()
                yield
                if settled:
                    self.settle()
            done = True
        finally:
            if not (told and done) or self.overlap.sections & Section.INACTIVE_L2:
                self.overlap.forget()
            self.corruption.deliver()


def _nothing_in_the_way(offset: int, length: int) -> None:
    """No metadata lie in an external data file."""


class _Staged:
    """What one flush takes to the file: the state of the metadata at one moment."""

    __slots__ = ("blocks", "dropped", "l1", "slices")

    def __init__(self, metadata: Metadata) -> None:
        tables = metadata.tables
        self.blocks = set() if metadata.lazy else metadata.refcounts.take_new_blocks()
        self.slices = tables.cache.take_dirty()
        self.l1 = [(index, tables.l1[index]) for index in sorted(tables.dirty_l1)]
        tables.dirty_l1.clear()
        self.dropped = metadata.dropped
        metadata.dropped = DroppedReferences()

    def write(self, metadata: Metadata) -> None:
        """Write each kind, with a sync before whatever relies on it."""
        file = metadata.file
        if metadata.data_file is not None:
            metadata.data_file.flush()
        file.flush()
        if self.blocks:
            with metadata.lock:
                metadata.refcounts.write_entries(self.blocks)
            file.flush()
        if self.slices:
            self.slices.write(file)
            file.flush()
        if self.l1:
            for first, entries in _runs(self.l1):
                metadata._write_l1(first, entries)
            file.flush()

    def give_back(self, metadata: Metadata) -> None:
        """The flush failed: everything is dirty again."""
        metadata.refcounts.keep_new_blocks(self.blocks)
        self.slices.done(written=False)
        metadata.tables.dirty_l1.update(index for index, _ in self.l1)
        self.dropped.extend(metadata.dropped)
        metadata.dropped = self.dropped


def _runs(entries: list[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    """Entries (index, value) in order as runs (first index, values)."""
    start = 0
    for i in range(1, len(entries) + 1):
        if i == len(entries) or entries[i][0] != entries[i - 1][0] + 1:
            yield entries[start][0], [value for _, value in entries[start:i]]
            start = i
