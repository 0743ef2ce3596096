"""Writing: in place where the cluster is ours alone, else into new clusters.

A write to new clusters takes them, fills them outside every lock (the old contents around the
written part and the data itself in one host write where possible), and only then maps them.
Other requests for the same guest clusters that cannot be done in place wait for that moment
(the reference driver's dependent requests).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..backend.buffers import split
from ..errors import PyvirtioError, UnsupportedError
from . import layout
from .cache import CacheFull
from .layout import ClusterKind
from .metadata import Metadata
from .quarantine import DiscardKind
from .reading import Reader
from .requests import Allocation
from .subclusters import allocated_mask, subcluster_runs, zero_mask
from .tables import entry_kind

__all__ = ["MAX_DROPPED", "Writer"]

_MAX_CLUSTERS = 4096
"""Most clusters taken at once, so that one request does not hold everything."""

MAX_DROPPED = 1 << 12
"""Runs of dropped references that may wait for a flush before a write makes one itself."""

MAX_UNUSED = 8 << 20
"""Bytes that were discarded and wait for a flush before the next write makes one itself, so that
it finds place there and the file does not grow."""


@dataclass(slots=True)
class _NewClusters:
    """Host clusters that are being filled for a run of guest clusters."""

    position: int
    """Of the first L2 entry, pinned."""
    host: int
    """Byte offset of the first host cluster."""
    old: Sequence[int]
    """The L2 entries that are being replaced."""
    start: int
    """Guest bytes from here on are filled, …"""
    end: int
    """… up to here."""
    fresh: bool
    """The host clusters read as zeroes."""
    reused: bool
    """The host clusters are no new ones: those of preallocated zero clusters, or the place in the
    data file."""
    allocation: Allocation


class Writer:
    """Serves writes to one image."""

    def __init__(self, metadata: Metadata, reader: Reader) -> None:
        self._metadata = metadata
        self._reader = reader
        self._file = metadata.data
        self._event = metadata.event
        self._gate = metadata.gate
        self._lock = metadata.lock
        self._health = metadata.health
        self._map_own = metadata.tables.map_own
        self._encryption = metadata.encryption
        self._check_overlap = metadata.check_data_write

    def write_in_place(self, offset: int, views: list[memoryview], length: int) -> bool:
        """Write where guest bytes are stored, if they are one run that is ours alone; False if not,
        with nothing done."""
        if self._encryption is not None:
            return False
        gate, lock = self._gate, self._lock
        try:
            with lock:
                self._health.check()
                gate.enter()
                host, run = self._map_own(offset, length)
            if run == length:
                self._check_overlap(host, length)
                if self._event is not None:
                    self._event("write_aio")
                self._file.writev(host, views)
                return True
        except CacheFull:
            pass
        finally:
            gate.leave()

        return False

    def write(self, offset: int, views: list[memoryview], length: int) -> None:
        """Write ``views`` to guest bytes from ``offset`` on."""
        metadata = self._metadata
        if metadata.dropped.requested << metadata.cluster_bits >= MAX_UNUSED:
            metadata.flush()
        if self._encryption is not None:
            self._write_encrypted(offset, views, length)
            return
        try:
            with self._lock:
                self._health.check()
                self._gate.enter()
            self._write_runs(offset, views, length)
        finally:
            self._gate.leave()

    def _write_runs(self, offset: int, views: list[memoryview], length: int) -> None:
        """Write what may be several runs, one after the other (inside)."""
        follow = 0
        while length:
            done, follow = self._write_run(offset, views, length, follow)
            views = split(views, done, length - done)
            offset += done
            length -= done
        if len(self._metadata.dropped.runs) > MAX_DROPPED:
            self._metadata.flush_inside()

    def _write_run(
        self, offset: int, views: list[memoryview], length: int, follow: int
    ) -> tuple[int, int]:
        """Write as much as goes in one piece: how much that was, and the host byte behind it.

        New clusters are taken from host byte ``follow`` on, where the piece before has ended, if
        there are free ones (QEMU): 0 for the first piece.
        """
        while True:
            try:
                with self._lock:
                    plan = self._plan(offset, length, follow)
                break
            except CacheFull:
                self._metadata.flush_inside()
        if isinstance(plan, _NewClusters):
            end = plan.host + (plan.allocation.count << self._metadata.cluster_bits)
            return self._write_new(plan, offset, views, length), end
        host, run = plan
        self._store(host, offset, split(views, 0, run), run)
        return run, host + run

    def _store(self, host: int, guest: int, views: list[memoryview], length: int) -> None:
        """Write guest bytes from ``guest`` on to their place in the file."""
        self._check_overlap(host, length)
        self._file.debug_event("write_aio")
        if self._encryption is not None:
            self._encryption.writev(self._file, host, guest, views, length)
        else:
            self._file.writev(host, views)

    # -- whole sectors of encrypted images ---------------------------------------------------------

    def _write_encrypted(self, offset: int, views: list[memoryview], length: int) -> None:
        """Write any bytes of an encrypted image; sectors written in part are read before."""
        before, after = offset % layout.SECTOR, -(offset + length) % layout.SECTOR
        start, end = offset - before, offset + length + after
        try:
            with self._lock:
                self._health.check()
                self._gate.enter()
                self._gate.claim(start, end, alone=bool(before or after))
            if before or after:
                head, tail = bytearray(before), bytearray(after)
                if before:
                    self._reader.read_inside(start, [memoryview(head)], before)
                if after:
                    self._reader.read_inside(end - after, [memoryview(tail)], after)
                views = [memoryview(head), *views, memoryview(tail)]
            self._write_runs(start, views, end - start)
        finally:
            self._gate.end_claim()
            self._gate.leave()

    # -- planning (lock held) --------------------------------------------------------------------

    def _plan(self, offset: int, length: int, follow: int) -> tuple[int, int] | _NewClusters:
        """Where the data goes: (host offset, bytes) in place, or new clusters."""
        metadata = self._metadata
        tables, gate = metadata.tables, metadata.gate
        cluster = offset >> metadata.cluster_bits
        while True:
            host, run = tables.map_own(offset, length)
            if run and not (run < length and self._goes_on_reused(offset + run, host + run)):
                return host, run
            if not gate.wait_for_allocations(cluster, 1):
                break
        count = ((offset + length - 1) >> metadata.cluster_bits) + 1 - cluster
        count = min(count, tables.left_in_slice(cluster), _MAX_CLUSTERS)
        for allocation in gate.allocations:
            if allocation.first > cluster:
                count = min(count, allocation.first - cluster)
        position = metadata.prepare(cluster)
        try:
            return self._take_clusters(cluster, count, position, offset, length, follow)
        except BaseException:
            metadata.unpin(position)
            raise

    def _goes_on_reused(self, offset: int, host: int) -> bool:
        """True if the run that ends before guest byte ``offset`` goes on, at ``host``, with
        preallocated zero clusters: one request writes them all (QEMU), so that an error leaves all
        as it was mapped."""
        metadata = self._metadata
        within = metadata.geometry.extended_l2 or offset & (metadata.cluster_size - 1)
        cluster = offset >> metadata.cluster_bits
        if within or metadata.tables.left_in_slice(cluster - 1) == 1:
            return False
        return metadata.tables.entry(cluster) == host | layout.COPIED | layout.ZERO

    def _take_clusters(
        self, cluster: int, count: int, position: int, offset: int, length: int, follow: int
    ) -> _NewClusters:
        metadata = self._metadata
        old = metadata.tables.entries_at(position, count)
        for i, entry in enumerate(old):
            metadata.tables.check_entry(entry, cluster + i)
        reusable = self._reusable_run(old)
        if reusable:
            host = old[0] & layout.OFFSET_MASK
            fresh, count = False, reusable
        else:
            count = next((i for i, entry in enumerate(old) if self._is_own(entry)), count)
            host, fresh = cluster << metadata.cluster_bits, False
            if metadata.data_file is None:
                first, count, fresh = metadata.refcounts.allocate(
                    count, follow=follow >> metadata.cluster_bits
                )
                host = first << metadata.cluster_bits
                fresh = fresh and self._encryption is None  # zeroes are encrypted, too
        start, end = cluster << metadata.cluster_bits, (cluster + count) << metadata.cluster_bits
        start, end = self._filled(old[0], old[count - 1], start, end, offset, length, reusable > 0)
        return _NewClusters(
            position=position,
            host=host,
            old=old[:count],
            start=start,
            end=end,
            fresh=fresh,
            reused=bool(reusable) or metadata.data_file is not None,
            allocation=metadata.gate.begin_allocation(cluster, count),
        )

    # -- filling and mapping -----------------------------------------------------------------------

    def _write_new(
        self, new: _NewClusters, offset: int, views: list[memoryview], length: int
    ) -> int:
        """Fill new clusters and map them; how many bytes of the request that did."""
        metadata = self._metadata
        try:
            clusters_start = new.allocation.first << metadata.cluster_bits
            clusters_end = clusters_start + (new.allocation.count << metadata.cluster_bits)
            done = min(length, clusters_end - offset)
            if metadata.data_file is not None:  # not made longer than the disk
                new.end = max(offset + done, min(new.end, metadata.header.size))
            parts = views if done == length else split(views, 0, done)
            head = self._surroundings(new, new.old[0], new.start, offset - new.start)
            tail = self._surroundings(new, new.old[-1], offset + done, new.end - offset - done)
            place = new.host + (offset - clusters_start)
            if head is not None:
                place -= len(head)
                parts = [memoryview(head), *parts]
            if tail is not None:
                parts = [*parts, memoryview(tail)]
            size = len(head or b"") + done + len(tail or b"")
            if size < new.end - new.start:
                self._reserve(new.host + new.start - clusters_start, new.end - new.start)
            self._store(place, offset - len(head or b""), parts, size)
        except BaseException:
            with metadata.lock:
                self._give_up(new)
            raise
        with metadata.lock, metadata.health.step("Mapping new clusters"):
            self._map(new)
        return done

    def _reserve(self, place: int, length: int) -> None:
        """Take the host's space for clusters of which a part is written: the rest is zeroes, but
        none that may be missing later (QEMU's handle_alloc_space)."""
        self._check_overlap(place, length)
        self._file.debug_event("cluster_alloc_space")
        with suppress(UnsupportedError):  # the rest stays a hole, then
            self._file.write_zeroes(place, length, fallback=False)

    def _surroundings(
        self, new: _NewClusters, entry: int, offset: int, length: int
    ) -> bytearray | None:
        """The old contents of a part of a cluster that is being replaced, to be written along;
        None if nothing has to be."""
        if not length:
            return None
        pieces = self._pieces(entry, offset, length)
        if new.fresh and all(self._reader.is_zero(kind, at, size) for kind, at, size in pieces):
            return None
        data = bytearray(length)
        self._metadata.file.debug_event("cow_read")
        for kind, at, size in pieces:
            host = entry & layout.OFFSET_MASK
            if kind is ClusterKind.NORMAL:
                host += at & (self._metadata.cluster_size - 1)
            elif kind is ClusterKind.COMPRESSED:
                host = entry
            view = memoryview(data)[at - offset : at - offset + size]
            self._reader.read_run(kind, host, at, [view], size)
        return data

    def _map(self, new: _NewClusters) -> None:
        metadata = self._metadata
        size = metadata.cluster_size
        first = new.host | layout.COPIED
        count = new.allocation.count
        entries: Sequence[int] = range(first, first + count * size, size)
        if metadata.geometry.extended_l2:
            entries = self._with_states(new, entries)
        metadata.tables.set_entries(new.position, entries)
        if not new.reused:
            for entry in new.old:
                if entry:
                    metadata.drop_entry(entry, DiscardKind.OTHER)
        metadata.unpin(new.position)
        metadata.gate.end_allocation(new.allocation)

    def _give_up(self, new: _NewClusters) -> None:
        metadata = self._metadata
        metadata.unpin(new.position)
        metadata.gate.end_allocation(new.allocation)
        if not new.reused:
            # Nothing ever referred to them. Should this fail too, they leak.
            with suppress(PyvirtioError):
                first = new.host >> metadata.cluster_bits
                metadata.refcounts.add(first, new.allocation.count, -1)

    # -- clusters and subclusters ------------------------------------------------------------------

    def _is_own(self, entry: int) -> bool:
        """True for a host cluster that only this entry refers to: it is kept."""
        if entry & layout.COMPRESSED or not entry & layout.COPIED:
            return False
        return bool(entry & layout.OFFSET_MASK) or self._metadata.data_file is not None

    def _reusable_run(self, entries: Sequence[int]) -> int:
        """How many entries from the first on have host clusters in a row that are ours alone, some
        (partly) unused: preallocated zero clusters, or subclusters not allocated yet."""
        if not self._is_own(entries[0]):
            return 0
        if self._metadata.geometry.extended_l2:
            return 1
        first = entries[0] & ~layout.ZERO
        for i, entry in enumerate(entries):
            if entry & ~layout.ZERO != first + i * self._metadata.cluster_size:
                return i
        return len(entries)

    def _filled(
        self, first: int, last: int, start: int, end: int, offset: int, length: int, reused: bool
    ) -> tuple[int, int]:
        """The guest bytes that are filled when ``offset`` to ``offset + length`` is written into
        the clusters from ``start`` to ``end``; ``first`` and ``last`` are their old entries.

        Whole clusters, but nothing around the data in a stored one that is kept; with subclusters
        those touched, and in a cluster that is copied all that lie between them and stored ones.
        """
        geometry = self._metadata.geometry
        if not geometry.extended_l2:
            if reused and entry_kind(first) is ClusterKind.NORMAL:
                start = offset
            if reused and entry_kind(last) is ClusterKind.NORMAL:
                end = min(end, offset + length)
            return start, end
        size = geometry.subcluster_size
        filled_start = max(start, offset // size * size)
        filled_end = min(end, -(-(offset + length) // size) * size)
        if reused:
            return self._skip_stored(first, filled_start, filled_end, offset, length)
        for entry, base in ((first, start), (last, end - geometry.cluster_size)):
            stored = (entry >> 64) & layout.ALL_ALLOCATED
            if entry & layout.COMPRESSED:
                stored = layout.ALL_ALLOCATED
            if stored:
                filled_start = min(
                    filled_start, base + ((stored & -stored).bit_length() - 1) * size
                )
                filled_end = max(filled_end, base + stored.bit_length() * size)
        return filled_start, filled_end

    def _skip_stored(
        self, entry: int, start: int, end: int, offset: int, length: int
    ) -> tuple[int, int]:
        """In a cluster that is kept, nothing around the data is needed in stored subclusters."""
        bits = self._metadata.geometry.subcluster_bits
        stored = entry >> 64
        if stored >> (start >> bits) % layout.SUBCLUSTERS & 1:
            start = max(start, offset)
        if stored >> ((end - 1) >> bits) % layout.SUBCLUSTERS & 1:
            end = min(end, offset + length)
        return start, end

    def _pieces(self, entry: int, offset: int, length: int) -> list[tuple[ClusterKind, int, int]]:
        """A part of one cluster as runs (kind, guest offset, bytes)."""
        geometry = self._metadata.geometry
        if not geometry.extended_l2:
            return [(entry_kind(entry), offset, length)]
        bits = geometry.subcluster_bits
        base = offset >> geometry.cluster_bits << geometry.cluster_bits
        first, end = (offset - base) >> bits, ((offset + length - base - 1) >> bits) + 1
        pieces = []
        for kind, run_first, run_end in subcluster_runs(entry, first, end):
            at = max(offset, base + (run_first << bits))
            stop = min(offset + length, base + (run_end << bits))
            pieces.append((kind, at, stop - at))
        return pieces

    def _with_states(self, new: _NewClusters, entries: Sequence[int]) -> list[int]:
        """New entries with the states of their subclusters: what was filled is allocated, what was
        not is as before."""
        geometry = self._metadata.geometry
        base = new.allocation.first << geometry.cluster_bits
        result = []
        for old, entry in zip(new.old, entries, strict=True):
            bits = geometry.subcluster_bits
            first = max(0, new.start - base) >> bits
            end = min(-(-(new.end - base) >> bits), layout.SUBCLUSTERS)
            states = 0 if old & layout.COMPRESSED else old >> 64 << 64
            states = states & ~zero_mask(first, end) | allocated_mask(first, end)
            result.append(states | entry)
            base += geometry.cluster_size
        return result
