"""The last look before every write: does it hit metadata that it must not?

Refcounts that are wrong would let a write destroy tables. So each write asks first, of its host
clusters, whether a structure of the image lies there, whatever the refcounts say (QEMU's
``overlap-check``). What is asked is a set of L2 tables' and refcount blocks' cluster numbers, and
the few other structures as sorted intervals. Both are collected when the first write needs them,
kept as structures come and go, and collected again after whatever changed more. They may lag behind
with tables that went: a hit is looked up in the tables themselves before it counts.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from enum import IntFlag
from typing import TYPE_CHECKING

from ..errors import BackendError
from . import layout
from .snapshot_table import Snapshot
from .table_io import load_table

if TYPE_CHECKING:
    from .metadata import Metadata

__all__ = ["TEMPLATES", "Overlap", "Section"]


class Section(IntFlag):
    """The structures that are protected (``QCOW2_OL_*``)."""

    NONE = 0
    MAIN_HEADER = 1 << 0
    ACTIVE_L1 = 1 << 1
    ACTIVE_L2 = 1 << 2
    REFCOUNT_BLOCK = 1 << 3
    REFCOUNT_TABLE = 1 << 4
    SNAPSHOT_TABLE = 1 << 5
    INACTIVE_L1 = 1 << 6
    INACTIVE_L2 = 1 << 7
    BITMAP_DIRECTORY = 1 << 8


_CONSTANT = (
    Section.MAIN_HEADER
    | Section.ACTIVE_L1
    | Section.REFCOUNT_TABLE
    | Section.SNAPSHOT_TABLE
    | Section.BITMAP_DIRECTORY
)
_CACHED = _CONSTANT | Section.ACTIVE_L2 | Section.REFCOUNT_BLOCK | Section.INACTIVE_L1

TEMPLATES = {
    "none": Section.NONE,
    "constant": _CONSTANT,
    "cached": _CACHED,
    "all": _CACHED | Section.INACTIVE_L2,
}
"""What ``overlap-check`` can be: structures that are asked without further reads of the file, and
(``all``) those that need them."""

_NAMES = {
    Section.MAIN_HEADER: "qcow2_header",
    Section.ACTIVE_L1: "active L1 table",
    Section.ACTIVE_L2: "active L2 table",
    Section.REFCOUNT_TABLE: "refcount table",
    Section.SNAPSHOT_TABLE: "snapshot table",
    Section.INACTIVE_L1: "inactive L1 table",
    Section.BITMAP_DIRECTORY: "bitmap directory",
    Section.REFCOUNT_BLOCK: "refcount block",
    Section.INACTIVE_L2: "inactive L2 table",
}
"""In the order in which QEMU asks."""

_SINGLE = Section.ACTIVE_L2 | Section.REFCOUNT_BLOCK | Section.INACTIVE_L2


class Overlap:
    """Answers for one image."""

    def __init__(self, metadata: Metadata, sections: Section) -> None:
        self.sections = sections
        """Those that are asked."""
        self.snapshots: Callable[[], tuple[Iterable[Snapshot], int]] = lambda: ((), 0)
        """The snapshots, and the length of their table in bytes."""
        self._metadata = metadata
        self._bits = metadata.cluster_bits
        self._known = False
        self._tables: dict[int, int] = {}
        """Clusters that are, or were, tables of one cluster, and which kinds (bits of Section)."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        """Intervals of clusters that other structures take, sorted, none in another."""
        self._kinds: list[Section] = []
        """What stands in each of them."""
        self._apart = True
        """Each is one structure."""
        self._inactive_l2: set[int] = set()

    def forget(self) -> None:
        """Much has changed: collect again before the next write."""
        self._known = False

    def add(self, cluster: int, section: Section) -> None:
        """There is a new L2 table or refcount block."""
        if section & self.sections:
            self._tables[cluster] = self._tables.get(cluster, 0) | section.value

    def add_block(self, cluster: int) -> None:
        """There is a new refcount block."""
        self.add(cluster, Section.REFCOUNT_BLOCK)

    def put(self, section: Section, offset: int, length: int) -> None:
        """There is a new structure, of another kind, at these host bytes."""
        if self._known and length and section & self.sections:
            first, last = offset >> self._bits, (offset + length - 1) >> self._bits
            at = bisect_left(self._ends, first)
            if bisect_right(self._starts, last) > at:
                self.forget()  # it lies in another one
            else:
                self._starts.insert(at, first)
                self._ends.insert(at, last)
                self._kinds.insert(at, section)

    def drop(self, section: Section, offset: int, length: int) -> None:
        """The structure that was there is none any more."""
        if self._known and length and section & self.sections:
            first, last = offset >> self._bits, (offset + length - 1) >> self._bits
            at = bisect_left(self._starts, first)
            if self._apart and (self._starts[at:][:1], self._ends[at:][:1]) == ([first], [last]):
                del self._starts[at], self._ends[at], self._kinds[at]
            else:
                self.forget()

    # -- asking ------------------------------------------------------------------------------------

    def check(self, offset: int, length: int, ignore: Section = Section.NONE) -> None:
        """Raise CorruptionError if a write to these host bytes hits a structure that is not one of
        those to ``ignore``. No lock is needed."""
        first = offset >> self._bits
        last = (offset + length - 1) >> self._bits
        if self._known:
            at = bisect_right(self._starts, last)
            if not at or self._ends[at - 1] < first:
                if first == last:
                    kinds = self._tables.get(first)
                    if kinds is None or not kinds & ~ignore.value:
                        return
                elif self._tables.keys().isdisjoint(range(first, last + 1)):
                    return
        self._look(offset, length, first, last, ignore)

    def check_l1(self, offset: int, length: int) -> None:
        """:meth:`check` before a write to the active L1 table."""
        self.check(offset, length, Section.ACTIVE_L1)

    def check_l2(self, offset: int, length: int, *, active: bool | None = True) -> None:
        """:meth:`check` before a write to an L2 table; ``active`` None: to one of either kind."""
        ignored = Section.ACTIVE_L2 if active else Section.INACTIVE_L2
        if active is None:
            ignored |= Section.ACTIVE_L2
        self.check(offset, length, ignored)

    def check_l2_slice(self, offset: int, length: int) -> None:
        """:meth:`check` before the cache writes a slice of an active L2 table."""
        self.check(offset, length, Section.ACTIVE_L2)

    def check_block(self, offset: int, length: int) -> None:
        """:meth:`check` before the cache writes (a slice of) a refcount block."""
        self.check(offset, length, Section.REFCOUNT_BLOCK)

    def check_table(self, offset: int, length: int) -> None:
        """:meth:`check` before a write to the refcount table."""
        self.check(offset, length, Section.REFCOUNT_TABLE)

    def _look(self, offset: int, length: int, first: int, last: int, ignore: Section) -> None:
        if not self._known:
            self._collect()
            self.check(offset, length, ignore)
            return
        wanted = self.sections & ~ignore
        if not wanted:
            return
        singles = wanted & _SINGLE
        touched: set[int] = set()
        if singles:
            clusters = self._tables
            if last - first < len(clusters):
                touched = {c for c in range(first, last + 1) if c in clusters}
            else:
                touched = {c for c in clusters if first <= c <= last}
        others = range(bisect_left(self._ends, first), bisect_right(self._starts, last))
        standing = Section.NONE
        for at in others:
            standing |= self._kinds[at]
        for section, name in _NAMES.items():
            if not section & wanted:
                continue
            if section & _SINGLE:
                hit = bool(touched) and not touched.isdisjoint(self._present(section, touched))
            else:
                hit = bool(section & standing) and any(
                    a <= last and first <= b for a, b in self._intervals(section)
                )
            if hit:
                raise self._metadata.corruption.found(
                    f"Preventing invalid write on metadata (overlaps with {name})",
                    field=name,
                    value=offset,
                )
        # What is no table any more is not asked for again.
        if touched and wanted & _SINGLE == self.sections & _SINGLE:
            for cluster in touched:
                self._tables.pop(cluster, None)

    # -- where things are --------------------------------------------------------------------------

    def _collect(self) -> None:
        inactive = set(self._inactive_tables()) if self.sections & Section.INACTIVE_L2 else set()
        # Known first: a table that comes while this looks is added, and not lost.
        self._known = True
        self._inactive_l2 = inactive
        tables = self._tables
        for section in (Section.ACTIVE_L2, Section.REFCOUNT_BLOCK, Section.INACTIVE_L2):
            if section & self.sections:
                bit = section.value
                for cluster in self._present(section):
                    tables[cluster] = tables.get(cluster, 0) | bit
        intervals = sorted(
            (*interval, section)
            for section in _NAMES
            if section & self.sections and not section & _SINGLE
            for interval in self._intervals(section)
        )
        starts: list[int] = []
        ends: list[int] = []
        kinds: list[Section] = []
        self._apart = True
        for first, last, kind in intervals:
            if ends and first <= ends[-1]:
                ends[-1] = max(ends[-1], last)
                kinds[-1] |= kind
                self._apart = False
            else:
                starts.append(first)
                ends.append(last)
                kinds.append(kind)
        self._starts, self._ends, self._kinds = starts, ends, kinds

    def _present(self, section: Section, only: set[int] | None = None) -> Iterable[int]:
        """Clusters of the tables of that kind; with ``only`` those of them."""
        bits = self._bits
        entries: Iterable[int]
        if section is Section.ACTIVE_L2:
            entries, mask = self._metadata.tables.l1, layout.OFFSET_MASK
        elif section is Section.REFCOUNT_BLOCK:
            entries, mask = self._metadata.refcounts.table, layout.REFCOUNT_TABLE_OFFSET_MASK
        else:
            return self._inactive_l2 if only is None else self._inactive_l2 & only
        if only is None:
            return ((entry & mask) >> bits for entry in entries if entry)
        return (cluster for entry in entries if (cluster := (entry & mask) >> bits) in only)

    def _intervals(self, section: Section) -> Iterator[tuple[int, int]]:
        """(first, last) cluster of each structure of that kind."""
        header = self._metadata.header
        if section is Section.MAIN_HEADER:
            yield 0, 0
        elif section is Section.ACTIVE_L1:
            yield from self._clusters(header.l1_table_offset, 8 * header.l1_size)
        elif section is Section.REFCOUNT_TABLE:
            length = header.refcount_table_clusters << self._bits
            yield from self._clusters(header.refcount_table_offset, length)
        elif section is Section.SNAPSHOT_TABLE:
            yield from self._clusters(header.snapshots_offset, self.snapshots()[1])
        elif section is Section.INACTIVE_L1:
            for snapshot in self.snapshots()[0]:
                yield from self._clusters(snapshot.l1_table_offset, 8 * snapshot.l1_size)
        elif section is Section.BITMAP_DIRECTORY and header.bitmaps is not None:
            directory = header.bitmaps
            yield from self._clusters(directory.directory_offset, directory.directory_size)

    def _clusters(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        if length > 0:
            yield offset >> self._bits, (offset + length - 1) >> self._bits

    def _inactive_tables(self) -> Iterator[int]:
        """Clusters of the L2 tables that snapshots name; each L1 table is read for it.

        Raises BackendError where one cannot be: what lies there is not known (QEMU).
        """
        places = {(s.l1_table_offset, s.l1_size) for s in self.snapshots()[0]}
        for offset, size in places:
            if 8 * size > layout.MAX_L1_SIZE:
                raise BackendError(errno.EFBIG, "Snapshot L1 table too large")
            if offset % self._metadata.cluster_size:
                raise BackendError(errno.EINVAL, "Snapshot L1 table offset invalid")
            for entry in load_table(self._metadata.file, offset, size):
                if entry & layout.OFFSET_MASK:
                    yield (entry & layout.OFFSET_MASK) >> self._bits
