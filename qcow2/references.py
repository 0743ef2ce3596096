"""Counting what refers to each host cluster: the truth that refcounts are compared with.

L2 tables are read once, however many L1 tables name them, and taken apart 512 entries at a time:
one large integer holds them all, a lane of 64 bits each, so that flags are tested and offsets
turned into cluster numbers without a look at the single entry. Only entries with something special
about them (compressed, unaligned, reserved bits) are looked at one by one.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from errno import EFBIG, EIO

from ..backend.disk import Disk
from ..errors import BackendError
from . import layout
from .counts import MANY, ClusterCounts
from .header import Header
from .layout import Incompatible
from .result import CheckResult
from .table_io import unpack_table

__all__ = ["MAX_CLUSTERS", "CheckFailed", "References", "lanes", "read_padded"]

MAX_CLUSTERS = 0x7FFF_FFFF
"""Host clusters in a file that can be checked (QEMU's limit)."""

_PIECE = 4096
"""Bytes of an L2 table taken apart at once."""

_SWAP = sys.byteorder == "little"


class CheckFailed(Exception):
    """The check cannot go on; the result says why (``check_errors``). ``errno`` is QEMU's."""

    def __init__(self, errno: int | None) -> None:
        super().__init__(errno)
        self.errno = errno or EIO


def read_padded(file: Disk, offset: int, length: int) -> bytes:
    """Bytes of the file, and zeroes for those past its end."""
    there = min(max(file.size - offset, 0), length)
    data = file.read(offset, there) if there else b""
    return data if there == length else data.ljust(length, b"\0")


def lanes(count: int, value: int) -> int:
    """``value`` in each of ``count`` lanes of 64 bits."""
    return int.from_bytes(value.to_bytes(8) * count)


class _Masks:
    """What is compared with ``count`` entries at once."""

    def __init__(self, count: int, cluster_size: int) -> None:
        special = layout.COMPRESSED | layout.L2_RESERVED_MASK
        special |= layout.OFFSET_MASK & (cluster_size - 1)
        self.special = lanes(count, special)
        self.offset = lanes(count, layout.OFFSET_MASK)
        self.copied = lanes(count, layout.COPIED)
        self.ones = lanes(count, 1)
        self.rising = int.from_bytes(b"".join(i.to_bytes(8) for i in range(count)))
        """0, 1, 2, …"""


class References:
    """References to the clusters of one image, counted in ``counts``."""

    def __init__(
        self,
        file: Disk,
        header: Header,
        result: CheckResult,
        repair_entry: Callable[[int, bool], None] | None,
    ) -> None:
        """``repair_entry(host offset, active)`` makes the L2 entry there a zero cluster; without it
        nothing is changed."""
        self.file = file
        self.result = result
        self.size = file.size
        self.bits = header.cluster_bits
        self.cluster_size = 1 << self.bits
        clusters = -(-self.size >> self.bits)
        if clusters > MAX_CLUSTERS:
            result.unreadable(f"The file is too long to be checked: {self.size} bytes")
            raise CheckFailed(EFBIG)
        self.counts = ClusterCounts(clusters)
        self.unflagged: set[int] = set()
        """Host offsets of L2 tables with entries that lack the COPIED flag, or may be wrong."""
        self._header = header
        self._extended = bool(header.incompatible_features & Incompatible.EXTENDED_L2)
        self._external = bool(header.incompatible_features & Incompatible.DATA_FILE)
        self._repair_entry = repair_entry
        self._masks: dict[int, _Masks] = {}
        self._zeroes = bytes(self.cluster_size)
        self._table = 0
        """Host offset of the L2 table being looked at."""

    # -- stretches of the file -------------------------------------------------------------------

    def refer(self, offset: int, length: int, times: int = 1) -> None:
        """Count ``times`` references to every cluster of a stretch of the file.

        The last cluster of the file may end early, by less than a cluster.
        """
        if length <= 0:
            return
        if offset + length - self.size >= self.cluster_size:
            self.result.corrupt(
                f"counting reference for region exceeding the end of the file by one cluster or "
                f"more: offset {offset:#x} size {length:#x}",
                times,
                mark="ERROR: ",
            )
            return
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        if first == last and first < self.counts.size:
            value = self.counts.bytes[first] + times
            if value < MANY:
                self.counts.bytes[first] = value
                return
        self.counts.add_run(first, last + 1 - first, times)

    def clip(self, limit: int) -> None:
        """A refcount cannot be larger than ``limit``: more references are corruptions."""
        for cluster, excess in self.counts.clip(limit):
            self.overflow(cluster, excess)

    def overflow(self, cluster: int, times: int = 1) -> None:
        """Count references to a cluster that its refcount cannot count."""
        for _ in range(times):
            self.result.corrupt(
                f"overflow cluster offset={cluster << self.bits:#x}\n"
                "Use qemu-img amend to increase the refcount entry width or qemu-img convert to "
                "create a clean copy if the image cannot be opened for writing",
                mark="ERROR: ",
            )

    # -- L1 and L2 tables ------------------------------------------------------------------------

    def l1_table(self, offset: int, size: int, times: dict[int, int]) -> array[int]:
        """Look at an L1 table of ``size`` entries; in ``times`` is counted how often each L2 table
        is named by its host offset."""
        self.refer(offset, 8 * size)
        try:
            l1 = unpack_table(read_padded(self.file, offset, 8 * size))
        except BackendError as error:
            self.result.unreadable(f"I/O error in check_refcounts_l1: {error.strerror}")
            raise CheckFailed(error.errno) from error
        for entry in filter(None, l1):
            if entry & layout.L1_RESERVED_MASK:
                self.result.corrupt(f"found L1 entry with reserved bits set: {entry:x}")
            table = entry & layout.OFFSET_MASK
            self.refer(table, self.cluster_size)
            if table & (self.cluster_size - 1):
                self.result.corrupt(
                    f"l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted"
                )
            times[table] = times.get(table, 0) + 1
        return l1

    def l2_table(self, offset: int, times: int, active: int) -> None:
        """Count what an L2 table refers to: ``times`` L1 entries name it, ``active`` of them in
        the active L1 table."""
        try:
            data = read_padded(self.file, offset, self.cluster_size)
        except BackendError as error:
            self.result.unreadable(f"I/O error in check_refcounts_l2: {error.strerror}")
            raise CheckFailed(error.errno) from error
        if data == self._zeroes:
            return
        self._table, follows = offset, 0
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            if self._extended:
                follows = self._extended_piece(piece, offset + at, times, active, follows)
            else:
                follows = self._piece(piece, offset + at, times, active, follows)

    def _piece(self, data: bytes, offset: int, times: int, active: int, follows: int) -> int:
        """The standard entries at host byte ``offset``; ``follows`` is where the last one
        stored before them ends (0: there is none). Returns that for the next piece."""
        count = len(data) >> 3
        masks = self._masks.get(count)
        if masks is None:
            masks = self._masks[count] = _Masks(count, self.cluster_size)
        value = int.from_bytes(data)
        if not value:
            return follows
        if value & masks.special or self._external:
            return self._one_by_one(unpack_table(data), None, offset, times, active, follows)
        numbers = (value & masks.offset) >> self.bits
        clusters = unpack_table(numbers.to_bytes(len(data)))
        first = clusters[0]
        unflagged = value & masks.copied != masks.copied
        if first and numbers == first * masks.ones + masks.rising:
            if first + count <= self.counts.size:
                self.counts.add_run(first, count, times)
            else:
                self._each(clusters, times)
            self.result.allocated_clusters += active * count
            self.result.fragmented_clusters += active * (follows not in (0, first << self.bits))
            follows = (first + count) << self.bits
        else:
            if 0 in clusters:
                entries = [e for e in unpack_table(data) if e & layout.OFFSET_MASK]
                unflagged = any(not e & layout.COPIED for e in entries)
                clusters = array("Q", filter(None, clusters))
            self._each(clusters, times)
            if active and clusters:
                self.result.allocated_clusters += active * len(clusters)
                jumps = _jumps(clusters) + (follows not in (0, clusters[0] << self.bits))
                self.result.fragmented_clusters += active * jumps
                follows = (clusters[-1] + 1) << self.bits
        if unflagged and active:
            self.unflagged.add(self._table)
        return follows

    def _each(self, clusters: Sequence[int], times: int) -> None:
        for cluster in self.counts.add_each(clusters, times):
            self.unflagged.add(self._table)
            self.refer(cluster << self.bits, self.cluster_size, times)

    def _extended_piece(
        self, data: bytes, offset: int, times: int, active: int, follows: int
    ) -> int:
        """Entries of 128 bits: the second half says what the subclusters are."""
        values = unpack_table(data)
        bitmaps = values[1::2]
        return self._one_by_one(values[::2], bitmaps, offset, times, active, follows)

    # -- single entries ----------------------------------------------------------------------------

    def _one_by_one(
        self,
        entries: Sequence[int],
        bitmaps: Sequence[int] | None,
        offset: int,
        times: int,
        active: int,
        follows: int,
    ) -> int:
        """Any entries; see :meth:`_piece`."""
        result = self.result
        step = 8 if bitmaps is None else 16
        offset_mask, size_mask = layout.OFFSET_MASK, self.cluster_size - 1
        if active:
            self.unflagged.add(self._table)
        for i, entry in enumerate(entries):
            bitmap = 0 if bitmaps is None else bitmaps[i]
            if entry & layout.COMPRESSED:
                self._compressed(entry, bitmap, i, times, active)
                continue
            if entry & layout.L2_RESERVED_MASK:
                result.corrupt(f"found l2 entry with reserved bits set: {entry:x}", times)
            host = entry & offset_mask
            if not host and not (self._external and entry & layout.COPIED):
                if bitmap & 0xFFFF_FFFF:
                    result.corrupt(
                        "Unallocated cluster has non-zero subcluster allocation map", times
                    )
                continue
            if bitmap >> 32 & bitmap:
                result.corrupt(
                    f"offset={host:x}: Allocated cluster has corrupted subcluster allocation "
                    "bitmap",
                    times,
                )
            if host & size_mask:
                data = bitmap & 0xFFFF_FFFF if bitmaps is not None else not entry & layout.ZERO
                if self._unaligned(host, bool(data), offset + step * i, times, active):
                    continue
            result.allocated_clusters += active
            result.fragmented_clusters += active * (follows not in (0, host))
            follows = host + self.cluster_size
            if not self._external:
                self.refer(host, self.cluster_size, times)
        return follows

    def _unaligned(self, host: int, data: bool, place: int, times: int, active: int) -> bool:
        """An entry whose cluster lies where none can; True if it is a zero cluster now."""
        if data:
            self.result.corrupt(
                f"offset={host:x}: Data cluster is not properly aligned; L2 entry corrupted.",
                times,
            )
            return False
        message = f"offset={host:x}: Preallocated cluster is not properly aligned; L2 entry "
        message += "corrupted."
        if self._repair_entry is None:
            self.result.corrupt(message, times)
            return False
        self._repair_entry(place, active > 0)
        self.result.fixed(message)
        return True

    def _compressed(self, entry: int, bitmap: int, index: int, times: int, active: int) -> None:
        offset, length = self._header.geometry.compressed_extent(entry)
        if entry & layout.COPIED:
            self.result.corrupt(
                f"coffset={offset:#x}: copied flag must never be set for compressed clusters",
                times,
            )
        if self._external:
            self.result.corrupt(
                f"compressed cluster {index} with data file, entry={entry:#x}", times
            )
            return
        if bitmap:
            self.result.corrupt(
                f"compressed cluster {index} with non-zero subcluster allocation bitmap, "
                f"entry={entry:#x}",
                times,
            )
            return
        self.refer(offset, length, times)
        self.result.allocated_clusters += active
        self.result.compressed_clusters += active
        self.result.fragmented_clusters += active


def _jumps(clusters: array[int]) -> int:
    """How many do not follow the one before them."""
    count = len(clusters) - 1
    if count < 1:
        return 0
    value = int.from_bytes(clusters.tobytes(), sys.byteorder)
    if _SWAP:
        after, before = value >> 64, value & ((1 << (64 * count)) - 1)
    else:
        after, before = value & ((1 << (64 * count)) - 1), value >> 64
    steps = (after ^ (before + lanes(count, 1))).to_bytes(8 * count)
    return count - array("Q", steps).count(0)
