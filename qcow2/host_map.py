"""What each cluster of the host file is for: a byte for each, found without using the image.

Nothing is cached or locked; damaged entries are told, not followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..backend.disk import Disk
from ..errors import PyvirtioError
from . import layout
from .bitmap_directory import read_directory
from .bitmap_table import load_entries
from .header import Header, read_header
from .refcount_codec import codec_for
from .snapshot_table import read_snapshots
from .table_io import load_table, unpack_table
from .tally import progression

__all__ = ["KINDS", "HostMap", "host_map"]

KINDS = (
    "free",
    "leaked",
    "header",
    "L1 table",
    "L2 table",
    "refcount table",
    "refcount block",
    "snapshots",
    "bitmaps",
    "encryption",
    "data",
    "snapshot data",
    "compressed",
    "zero",
)
"""What a host cluster may be for. Data that only snapshots hold are told by the oldest of these."""

_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_MAX_CLUSTERS = 1 << 28
"""Clusters that are looked at: a byte each."""
_MAX_SNAPSHOTS = 64
"""Snapshots that have a kind of their own; what others hold is "snapshot data"."""
_FILLED = [bytes([number, *range(1, 256)]) for number in range(256)]
"""Translations that put a kind where there is none yet."""


@dataclass(slots=True)
class HostMap:
    """The clusters of a host file."""

    cluster_size: int
    use: bytearray
    """The number of each cluster's kind, in ``kinds``."""
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """KINDS, and one for each snapshot that holds data."""
    problems: list[str] = field(default_factory=list)

    @property
    def clusters(self) -> int:
        """Those that were looked at."""
        return len(self.use)

    def totals(self) -> dict[str, int]:
        """Clusters of each kind that there is, in the order of ``kinds``."""
        counts = self.counts(0, self.clusters)
        return {self.kinds[number]: count for number, count in counts.items()}

    def counts(self, start: int, end: int) -> dict[int, int]:
        """Clusters of each kind, by number, in a range."""
        piece = self.use[start:end]
        found = ((number, piece.count(number)) for number in range(len(self.kinds)))
        return {number: count for number, count in found if count}

    def runs(self, most: int) -> tuple[int, list[tuple[int, int]]]:
        """The map as at most ``most`` runs (kind, length), and the unit of the lengths: 1 cluster,
        or more where that would be too many runs. A unit is shown as :func:`telling` says."""
        run_of_one = re.compile(
            b"|".join(b"\\x%02x+" % number for number in range(len(self.kinds)))
        )
        unit, use = 1, self.use
        while True:
            found: list[tuple[int, int]] = []
            for run in run_of_one.finditer(use):
                found.append((run[0][0], run.end() - run.start()))
                if len(found) > most:
                    break
            else:
                return unit, found
            unit = max(2 * unit, -(-self.clusters // most))
            starts = range(0, self.clusters, unit)
            use = bytearray(telling(self.counts(start, start + unit)) for start in starts)


def telling(counts: dict[int, int]) -> int:
    """The kind that stands for several clusters: a leak, or what most of them are for."""
    if _NUMBERS["leaked"] in counts:
        return _NUMBERS["leaked"]
    return max(counts, key=lambda number: (number != 0, counts[number]), default=0)


def host_map(file: Disk) -> HostMap:
    """What every cluster of the file is for.

    Memory is a byte for each cluster of the file. Raises ImageError if there is no usable header.
    """
    return _Mapper(file, read_header(file, for_check=True)).map()


class _Mapper:
    def __init__(self, file: Disk, header: Header) -> None:
        self._file = file
        self._header = header
        self._geometry = header.geometry
        self._bits = self._geometry.cluster_bits
        clusters = self._geometry.clusters(file.size)
        self._use = bytearray(min(clusters, _MAX_CLUSTERS))
        self._result = HostMap(1 << self._bits, self._use)
        self._walked: set[int] = set()
        """L2 tables, by their offsets: nothing is new in one that is met again."""
        if clusters > _MAX_CLUSTERS:
            self._problem(f"only the first {_MAX_CLUSTERS} of {clusters} clusters are looked at")

    def map(self) -> HostMap:
        """All of it; what cannot be read is noted as a problem."""
        header = self._header
        self._mark("header", 0, 1 << self._bits)
        for name, part in (
            ("the active tables", self._active),
            ("the snapshots", self._snapshots),
            ("the bitmaps", self._bitmaps),
            ("the refcounts", self._refcounts),
        ):
            if name == "the refcounts" and header.crypto_header is not None:
                self._mark("encryption", *header.crypto_header)
            try:
                part()
            except (PyvirtioError, ValueError, MemoryError) as error:
                self._problem(f"{name} cannot be read: {error}")
        return self._result

    def _problem(self, text: str) -> None:
        if text not in self._result.problems:
            self._result.problems.append(text)

    def _mark(self, kind: str, offset: int, length: int) -> None:
        """Note what a range of the host is for, as far as it is not noted already."""
        first = offset >> self._bits
        self._mark_run(_NUMBERS[kind], first, -(-(offset + length) >> self._bits) - first)

    def _mark_run(self, kind: int, first: int, count: int) -> None:
        end = min(first + count, len(self._use))
        if first < end:
            self._use[first:end] = self._use[first:end].translate(_FILLED[kind])

    def _active(self) -> None:
        self._l1(_NUMBERS["data"], self._header.l1_table_offset, self._header.l1_size)

    def _snapshots(self) -> None:
        snapshots, length = read_snapshots(self._file, self._header)
        if length:
            self._mark("snapshots", self._header.snapshots_offset, length)
        for index, snapshot in enumerate(snapshots):
            kind = _NUMBERS["snapshot data"]
            if index < _MAX_SNAPSHOTS:
                kind = len(self._result.kinds)
                self._result.kinds.append(f"snapshot {snapshot.name or snapshot.id}")
            try:
                self._l1(kind, snapshot.l1_table_offset, snapshot.l1_size)
            except (PyvirtioError, ValueError, MemoryError) as error:
                self._problem(f"the snapshot {snapshot.name} cannot be read: {error}")

    def _l1(self, kind: int, offset: int, size: int) -> None:
        if not size:
            return
        self._mark("L1 table", offset, 8 * size)
        for entry in load_table(self._file, offset, size):
            table = entry & layout.OFFSET_MASK
            if not table or table in self._walked:
                continue
            self._walked.add(table)
            if table % (1 << self._bits) or table >= self._file.size:
                self._problem(f"L1 entry {entry:#x} refers to no cluster")
                continue
            self._mark("L2 table", table, 1 << self._bits)
            self._l2(kind, table)

    def _l2(self, kind: int, offset: int) -> None:
        geometry, bits, use = self._geometry, self._bits, self._use
        table = self._file.read(offset, 1 << bits)
        external = bool(self._header.incompatible_features & layout.Incompatible.DATA_FILE)
        if external or not any(table):
            return
        if not geometry.extended_l2:
            run = progression(table, 1 << bits)
            if run is not None and not run[0] & ~(layout.OFFSET_MASK | layout.COPIED):
                self._mark_run(kind, (run[0] & layout.OFFSET_MASK) >> bits, run[1])
                return
        zero = kind if geometry.extended_l2 else _NUMBERS["zero"]
        for entry in unpack_table(table)[:: geometry.l2_entry_words]:
            if entry & layout.COMPRESSED:
                self._mark("compressed", *geometry.compressed_extent(entry))
            elif entry & layout.OFFSET_MASK:
                cluster = (entry & layout.OFFSET_MASK) >> bits
                if cluster < len(use) and not use[cluster]:
                    use[cluster] = zero if entry & layout.ZERO else kind

    def _bitmaps(self) -> None:
        extension = self._header.bitmaps
        if extension is None:
            return
        self._mark("bitmaps", extension.directory_offset, extension.directory_size)
        for entry in read_directory(self._file, extension, self._geometry, self._header.size):
            self._mark("bitmaps", entry.table_offset, 8 * entry.table_size)
            for word in load_entries(self._file, entry, 1 << self._bits):
                if word & layout.OFFSET_MASK:
                    self._mark("bitmaps", word & layout.OFFSET_MASK, 1)

    def _refcounts(self) -> None:
        """The table and the blocks, and what they count though nothing refers to it."""
        header = self._header
        size = header.refcount_table_clusters << self._bits
        self._mark("refcount table", header.refcount_table_offset, size)
        table = load_table(self._file, header.refcount_table_offset, size // 8)
        for block in table:
            if block & layout.OFFSET_MASK:
                self._mark("refcount block", block & layout.OFFSET_MASK, 1)
        for index, block in enumerate(table):
            offset = block & layout.OFFSET_MASK
            if offset and offset < self._file.size:
                first = index << self._geometry.refcount_block_bits
                for cluster in self._counted(first, offset):
                    self._use[cluster] = _NUMBERS["leaked"]

    def _counted(self, first: int, offset: int) -> Iterator[int]:
        """The clusters that are of no use, from ``first`` on, though the block there counts some
        reference to them."""
        count = 1 << self._geometry.refcount_block_bits
        use = self._use[first : first + count]
        free = use.find(0)
        if free < 0:
            return
        contents = self._file.read(offset, 1 << self._bits)
        if not any(contents):
            return
        values = codec_for(self._geometry.refcount_order).load(memoryview(contents), 0, len(use))
        while free >= 0:
            if values[free]:
                yield first + free
            free = use.find(0, free + 1)
