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
from ..errors import PyvirtioError
from . import layout
from .cache import CacheFull
from .layout import ClusterKind
from .metadata import Metadata
from .quarantine import DiscardKind
from .reading import Reader
from .requests import Allocation
from .tables import entry_kind

__all__ = ["Writer"]

_MAX_CLUSTERS = 4096
"""Most clusters taken at once, so that one request does not hold everything."""

_MAX_DROPPED = 1 << 12
"""Runs of dropped references that may wait for a flush before a write makes one itself."""


@dataclass(slots=True)
class _NewClusters:
    """Host clusters that are being filled for a run of guest clusters."""

    position: int
    """Of the first L2 entry, pinned."""
    host: int
    """Byte offset of the first host cluster."""
    old: Sequence[int]
    """The L2 entries that are being replaced."""
    fresh: bool
    """The host clusters read as zeroes."""
    reused: bool
    """The host clusters are those of preallocated zero clusters, not new ones."""
    allocation: Allocation


class Writer:
    """Serves writes to one image."""

    def __init__(self, metadata: Metadata, reader: Reader) -> None:
        self._metadata = metadata
        self._reader = reader
        self._file = metadata.file
        self._gate = metadata.gate
        self._lock = metadata.lock
        self._health = metadata.health
        self._map_own = metadata.tables.map_own
        self._check_overlap = metadata.overlap.check

    def write(self, offset: int, views: list[memoryview], length: int) -> None:
        """Write ``views`` to guest bytes from ``offset`` on."""
        gate, lock = self._gate, self._lock
        with lock:
            self._health.check()
            epoch = gate.enter()
            try:
                host, run = self._map_own(offset, length)
            except CacheFull:
                run = 0
            except BaseException:
                gate.leave(epoch)
                raise
        try:
            if run == length:
                self._check_overlap(host, run)
                self._file.debug_event("write_aio")
                self._file.writev(host, views)
            else:
                self._write_runs(offset, views, length)
        finally:
            with lock:
                gate.leave(epoch)

    def _write_runs(self, offset: int, views: list[memoryview], length: int) -> None:
        """Write what is more than one run, or is not all in place."""
        while length:
            done = self._write_run(offset, views, length)
            views = split(views, done, length - done)
            offset += done
            length -= done
        if len(self._metadata.dropped.runs) > _MAX_DROPPED:
            self._metadata.flush_inside()

    def _write_run(self, offset: int, views: list[memoryview], length: int) -> int:
        """Write as much as goes in one piece; how much that was."""
        while True:
            try:
                with self._lock:
                    plan = self._plan(offset, length)
                break
            except CacheFull:
                self._metadata.flush_inside()
        if isinstance(plan, _NewClusters):
            return self._write_new(plan, offset, views, length)
        host, run = plan
        self._check_overlap(host, run)
        self._file.debug_event("write_aio")
        self._file.writev(host, split(views, 0, run))
        return run

    # -- planning (lock held) --------------------------------------------------------------------

    def _plan(self, offset: int, length: int) -> tuple[int, int] | _NewClusters:
        """Where the data goes: (host offset, bytes) in place, or new clusters."""
        metadata = self._metadata
        tables, gate = metadata.tables, metadata.gate
        cluster = offset >> metadata.cluster_bits
        while True:
            host, run = tables.map_own(offset, length)
            if run:
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
            return self._take_clusters(cluster, count, position)
        except BaseException:
            metadata.unpin(position)
            raise

    def _take_clusters(self, cluster: int, count: int, position: int) -> _NewClusters:
        metadata = self._metadata
        old = metadata.tables.entries_at(position, count)
        for i, entry in enumerate(old):
            metadata.tables.check_entry(entry, cluster + i)
        reusable = _reusable_run(old, metadata.cluster_size)
        if reusable:
            host = old[0] & layout.OFFSET_MASK
            fresh, count = False, reusable
        else:
            count = next((i for i, entry in enumerate(old) if _is_own(entry)), count)
            first, count, fresh = metadata.refcounts.allocate(count)
            host = first << metadata.cluster_bits
        return _NewClusters(
            position=position,
            host=host,
            old=old[:count],
            fresh=fresh,
            reused=bool(reusable),
            allocation=metadata.gate.begin_allocation(cluster, count),
        )

    # -- filling and mapping -----------------------------------------------------------------------

    def _write_new(
        self, new: _NewClusters, offset: int, views: list[memoryview], length: int
    ) -> int:
        """Fill new clusters and map them; how many bytes of the request that did."""
        metadata = self._metadata
        try:
            start = new.allocation.first << metadata.cluster_bits
            end = start + (new.allocation.count << metadata.cluster_bits)
            done = min(length, end - offset)
            parts = views if done == length else split(views, 0, done)
            head = self._surroundings(new, new.old[0], start, offset - start)
            tail = self._surroundings(new, new.old[-1], offset + done, end - offset - done)
            place = new.host + (offset - start)
            if head is not None:
                place = new.host
                parts = [memoryview(head), *parts]
            if tail is not None:
                parts = [*parts, memoryview(tail)]
            self._check_overlap(new.host, new.allocation.count << metadata.cluster_bits)
            metadata.file.debug_event("write_aio")
            metadata.file.writev(place, parts)
        except BaseException:
            with metadata.lock:
                self._give_up(new)
            raise
        with metadata.lock, metadata.health.step("Mapping new clusters"):
            self._map(new)
        return done

    def _surroundings(
        self, new: _NewClusters, entry: int, offset: int, length: int
    ) -> bytearray | None:
        """The old contents of a part of a cluster that is being replaced, to be written along;
        None if nothing has to be."""
        if not length:
            return None
        kind = entry_kind(entry)
        if new.fresh and self._reader.is_zero(kind, offset, length):
            return None
        data = bytearray(length)
        host = entry
        if kind is ClusterKind.NORMAL:
            within = offset & (self._metadata.cluster_size - 1)
            host = (entry & layout.OFFSET_MASK) + within
        self._metadata.file.debug_event("cow_read")
        self._reader.read_run(kind, host, offset, [memoryview(data)], length)
        return data

    def _map(self, new: _NewClusters) -> None:
        metadata = self._metadata
        size = metadata.cluster_size
        first = new.host | layout.COPIED
        count = new.allocation.count
        metadata.tables.set_entries(new.position, range(first, first + count * size, size))
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


def _is_own(entry: int) -> bool:
    """True for a host cluster that only this entry refers to: it is kept."""
    kind = entry_kind(entry)
    own = kind is ClusterKind.NORMAL or kind is ClusterKind.ZERO_ALLOCATED
    return own and bool(entry & layout.COPIED)


def _reusable_run(entries: Sequence[int], cluster_size: int) -> int:
    """How many entries from the first on are our own preallocated zero clusters in a row."""
    first = entries[0]
    if not _is_own(first) or entry_kind(first) is not ClusterKind.ZERO_ALLOCATED:
        return 0
    for i, entry in enumerate(entries):
        if entry != first + i * cluster_size:
            return i
    return len(entries)
