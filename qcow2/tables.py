"""L1 and L2: from guest offsets to host clusters, a run at a time.

The caller holds the image's metadata lock.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence

from ..errors import ImageError
from . import layout
from .cache import TableCache
from .geometry import Geometry
from .layout import ClusterKind
from .table_io import pack_table, unpack_table

__all__ = ["Tables", "entry_kind"]

_UNALLOCATED = ClusterKind.UNALLOCATED
_ZERO_PLAIN = ClusterKind.ZERO_PLAIN
_ZERO_ALLOCATED = ClusterKind.ZERO_ALLOCATED
_NORMAL = ClusterKind.NORMAL
_COMPRESSED = ClusterKind.COMPRESSED

_OFFSET_MASK = layout.OFFSET_MASK
_SPECIAL = layout.COMPRESSED | layout.ZERO
_NOT_OWN = layout.COPIED | layout.COMPRESSED | layout.ZERO
_unpack = layout.U64.unpack_from
_SWAP = sys.byteorder == "little"


def entry_kind(entry: int) -> ClusterKind:
    """What a standard L2 entry says of its cluster."""
    if entry & layout.COMPRESSED:
        return _COMPRESSED
    if entry & layout.ZERO:
        return _ZERO_ALLOCATED if entry & layout.OFFSET_MASK else _ZERO_PLAIN
    return _NORMAL if entry & layout.OFFSET_MASK else _UNALLOCATED


class Tables:
    """The active L1 table, in memory, and the L2 tables it refers to, through their cache."""

    def __init__(self, l1: array[int], geometry: Geometry, cache: TableCache) -> None:
        self._slices: dict[int, int] = {}
        """Positions in the slab of slices that were looked up, by number in the guest's disk. Empty
        again when the cache gives one up, or when the L1 table changes."""
        self.l1 = l1
        self.dirty_l1: set[int] = set()
        """Indices of L1 entries that the file does not have yet."""
        self.cache = cache
        self.damaged: Callable[..., ImageError] = ImageError
        """Makes the error for an entry that cannot be followed."""
        self._geometry = geometry
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._l2_bits = geometry.l2_bits
        self._l2_mask = (1 << geometry.l2_bits) - 1
        self._cluster_mask = geometry.cluster_size - 1
        self._slot_bits = cache.slot_bits
        self._entry_bits = geometry.l2_entry_bits
        self._slice_bits = cache.slot_bits - self._entry_bits
        self._slice_mask = (1 << self._slice_bits) - 1
        self._slots = cache.index
        self._referenced = cache.referenced
        self._view = cache.view
        cache.index.when_removed = self._slices.clear
        # For map_stored: everything about an entry from the guest offset.
        self._slice_shift = self._cluster_bits + self._slice_bits
        self._entry_shift = self._cluster_bits - self._entry_bits
        self._entry_mask = self._slice_mask << self._entry_bits
        self._not_stored = _SPECIAL | _OFFSET_MASK & self._cluster_mask

    @property
    def l1(self) -> array[int]:
        """Entries as in the file, in host byte order."""
        return self._l1

    @l1.setter
    def l1(self, l1: array[int]) -> None:
        self._slices.clear()
        self._l1 = l1

    def adopt(self, geometry: Geometry) -> None:
        """Go by another version from now on; the sizes are the same."""
        self._geometry = geometry

    # -- looking up ----------------------------------------------------------------------------

    def l2_offset(self, l1_index: int) -> int:
        """Host offset of the L2 table of an L1 entry, 0 if there is none."""
        entry = self.l1[l1_index] if l1_index < len(self.l1) else 0
        offset = entry & layout.OFFSET_MASK
        if offset & (self._cluster_size - 1):
            raise self.damaged(
                f"L2 table offset {offset:#x} unaligned (L1 index: {l1_index:#x})",
                field="L1 entry",
                value=entry,
            )
        return offset

    def locate(self, cluster: int) -> int:
        """Position in the cache's slab of the entry of guest cluster ``cluster``, or -1 if there
        is no L2 table for it. Raises CacheFull."""
        start = self._slices.get(cluster >> self._slice_bits)
        if start is not None:
            return start + ((cluster & self._slice_mask) << self._entry_bits)
        l1_index = cluster >> self._l2_bits
        offset = self._l1[l1_index] & _OFFSET_MASK if l1_index < len(self._l1) else 0
        if not offset:
            return -1
        if offset & self._cluster_mask:
            self.l2_offset(l1_index)
        offset += (cluster & self._l2_mask) >> self._slice_bits << self._slot_bits
        slot = self._slots.get(offset)
        if slot is None:
            slot = self.cache.get(offset)
        else:
            self._referenced[slot] = 1
        # Only so many, should many L1 entries of a bad image name one table.
        if len(self._slices) < self.cache.slots:
            self._slices[cluster >> self._slice_bits] = slot << self._slot_bits
        return (slot << self._slot_bits) + ((cluster & self._slice_mask) << self._entry_bits)

    def keep(self, cluster: int, table: bytes) -> None:
        """Have the slice with the entry of ``cluster`` in the cache, of an L2 table that was just
        written to the file. Raises CacheFull."""
        at = (cluster & self._l2_mask) >> self._slice_bits << self._slot_bits
        offset = self.l2_offset(cluster >> self._l2_bits) + at
        if offset not in self._slots:
            self.cache.put(offset, table[at : at + self.cache.slot_size])

    def entry_at(self, position: int) -> int:
        """The L2 entry at a position in the slab."""
        value: int = _unpack(self._view, position)[0]
        return value

    def entries_at(self, position: int, count: int) -> Sequence[int]:
        """``count`` L2 entries of one slice."""
        return unpack_table(self._view[position : position + 8 * count])

    def entry(self, cluster: int) -> int:
        """The L2 entry of a guest cluster, 0 where there is no table."""
        position = self.locate(cluster)
        return 0 if position < 0 else self.entry_at(position)

    def left_in_slice(self, cluster: int) -> int:
        """Entries from this one to the end of its slice."""
        return self._slice_mask + 1 - (cluster & self._slice_mask)

    def check_entry(self, entry: int, cluster: int) -> ClusterKind:
        """The kind of an entry; raises ImageError if it cannot be followed."""
        kind = entry_kind(entry)
        if kind is _NORMAL or kind is _ZERO_ALLOCATED:
            offset = entry & layout.OFFSET_MASK
            if offset & (self._cluster_size - 1):
                what = (
                    "Preallocated zero cluster" if kind is _ZERO_ALLOCATED else "Cluster allocation"
                )
                raise self.damaged(
                    f"{what} offset {offset:#x} unaligned (guest offset: "
                    f"{cluster << self._cluster_bits:#x})",
                    field="L2 entry",
                    value=entry,
                )
        if entry & layout.ZERO and self._geometry.version < 3 and kind is not _COMPRESSED:
            raise self.damaged(
                "Zero cluster entry found in pre-v3 image (guest offset: "
                f"{cluster << self._cluster_bits:#x})",
                field="L2 entry",
                value=entry,
            )
        return kind

    def map(self, offset: int, length: int) -> tuple[ClusterKind, int, int]:
        """What the run that starts at guest byte ``offset`` is, for at most ``length`` bytes.

        Returns (kind, host, run): ``run`` bytes are of that kind. ``host`` is the host byte of
        ``offset`` for NORMAL and ZERO_ALLOCATED, where the run is contiguous in the host file;
        the L2 entry for COMPRESSED, a run within one cluster; 0 otherwise.
        """
        cluster = offset >> self._cluster_bits
        position = self.locate(cluster)
        if position < 0:
            return _UNALLOCATED, 0, self._extend(_UNALLOCATED, 0, position, offset, length, 0)
        entry: int = _unpack(self._view, position)[0]
        within = offset & self._cluster_mask
        host = entry & _OFFSET_MASK
        if host and not entry & _SPECIAL and not host & self._cluster_mask:
            kind = _NORMAL
            host += within
        else:
            kind = self.check_entry(entry, cluster)
            host = host + within if kind is _ZERO_ALLOCATED else 0
        if within + length <= self._cluster_size:
            return kind, entry if kind is _COMPRESSED else host, length
        if kind is _COMPRESSED:
            return kind, entry, self._cluster_size - within
        return kind, host, self._extend(kind, entry, position, offset, length, 0)

    def map_stored(self, offset: int, length: int) -> int:
        """The host byte where guest bytes are stored as they are, in one run; -1 if they are not.

        As :meth:`map`, with one look at the cache where they lie in one cluster.
        """
        at = self._slices.get(offset >> self._slice_shift)
        if at is not None:
            at += offset >> self._entry_shift & self._entry_mask
            entry: int = _unpack(self._view, at)[0]
            within = offset & self._cluster_mask
            host = entry & _OFFSET_MASK
            if host and not entry & self._not_stored and within + length <= self._cluster_size:
                return host + within
        kind, host, run = self.map(offset, length)
        return host if kind is _NORMAL and run == length else -1

    def map_own(self, offset: int, length: int) -> tuple[int, int]:
        """Where the run that starts at guest byte ``offset`` may be written in place.

        Returns (host byte, bytes), no more than ``length`` bytes; 0 bytes where the first cluster
        is not a normal one that only this entry refers to.
        """
        cluster = offset >> self._cluster_bits
        position = self.locate(cluster)
        if position < 0:
            return 0, 0
        entry: int = _unpack(self._view, position)[0]
        host = entry & _OFFSET_MASK
        if entry & _NOT_OWN != layout.COPIED or not host:
            return 0, 0
        if host & self._cluster_mask:
            self.check_entry(entry, cluster)
        within = offset & self._cluster_mask
        if within + length > self._cluster_size:
            length = self._extend(_NORMAL, entry, position, offset, length, layout.COPIED)
        return host + within, length

    def _extend(
        self, kind: ClusterKind, entry: int, position: int, offset: int, length: int, flags: int
    ) -> int:
        """The length of the run that begins with ``entry``, at most ``length``; ``flags`` are
        those that all its entries must have."""
        first = cluster = offset >> self._cluster_bits
        end_cluster = (offset + length - 1 >> self._cluster_bits) + 1
        contiguous = kind is _NORMAL or kind is _ZERO_ALLOCATED
        host = entry & layout.OFFSET_MASK
        while True:
            if position < 0:
                # No L2 table: as long as nothing is there, whole tables at a time.
                if kind is not _UNALLOCATED:
                    break
                cluster = ((cluster >> self._l2_bits) + 1) << self._l2_bits
            else:
                count = min(self.left_in_slice(cluster), end_cluster - cluster)
                expected = host + ((cluster - first) << self._cluster_bits) if contiguous else 0
                run = self._run(kind, expected, position, count, cluster, flags)
                cluster += run
                if run < count:
                    break
            if cluster >= end_cluster:
                break
            position = self.locate(cluster)
        return min(length, (cluster << self._cluster_bits) - offset)

    def _run(
        self, kind: ClusterKind, host: int, position: int, count: int, cluster: int, flags: int
    ) -> int:
        """How many of the ``count`` entries at ``position`` continue a run of ``kind``; the first
        of them has to lie at ``host`` if the run is contiguous."""
        contiguous = kind is _NORMAL or kind is _ZERO_ALLOCATED
        step = self._cluster_size if contiguous else 0
        done = 0
        while done < count:
            entry = self.entry_at(position + 8 * done)
            if self.check_entry(entry, cluster + done) is not kind:
                break
            if contiguous and entry & layout.OFFSET_MASK != host + step * done:
                break
            if entry & flags != flags:
                break
            done += self._progression(entry, step, position + 8 * done, count - done)
        return done

    def _progression(self, entry: int, step: int, position: int, count: int) -> int:
        """How many entries from ``position`` on are entry, entry + step, entry + 2*step, …"""
        known, size = 1, 8
        while known < count:
            size = min(size, count - known)
            values = self.entries_at(position + 8 * known, size)
            start = entry + known * step
            wanted = array("Q", range(start, start + size * step, step) if step else [entry] * size)
            if values != wanted:
                pairs = zip(values, wanted, strict=True)
                return known + next(i for i, (value, want) in enumerate(pairs) if value != want)
            known += size
            size *= 2
        return known

    # -- changing ------------------------------------------------------------------------------

    def set_entries(self, position: int, entries: Sequence[int]) -> None:
        """Replace L2 entries of one slice, from ``position`` on."""
        self.cache.mark_dirty(position >> self.cache.slot_bits)
        self._view[position : position + 8 * len(entries)] = pack_table(entries)

    def set_l1(self, index: int, entry: int) -> None:
        """Replace an L1 entry; the file gets it with the next flush."""
        self._slices.clear()
        self.dirty_l1.add(index)
        self._l1[index] = entry
