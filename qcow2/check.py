"""Check: are the refcounts what the references say, and the COPIED flags what the refcounts say?

Counts errors as ``qemu-img check`` does: a refcount that is too high is a leak, one that is too low
or an entry that cannot be right is a corruption.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import BackendError, ImageError
from . import layout
from .bitmap_check import bitmap_regions
from .data_file_check import check_data_file_copied, check_data_file_entries
from .data_file_tables import data_file_kind
from .layout import ClusterKind
from .metadata import Metadata
from .refcounts import load_table
from .sharing import clusters_of, read_entries
from .snapshot_table import Snapshot, check_l1
from .tables import entry_kind

__all__ = ["CheckResult", "check"]

_MAX_MESSAGES = 1000
_CHUNK_BITS = 16


@dataclass(slots=True)
class CheckResult:
    """What a check found; numbers as in ``qemu-img check --output=json``."""

    corruptions: int = 0
    leaks: int = 0
    """Clusters with a refcount that is too high."""
    check_errors: int = 0
    """Parts that could not be checked."""
    allocated_clusters: int = 0
    """Guest clusters of the active disk that are stored."""
    total_clusters: int = 0
    """Guest clusters of the disk."""
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    """Stored guest clusters that do not follow the one before them in the host file."""
    image_end_offset: int = 0
    """Host byte after the last cluster in use."""
    messages: list[str] = field(default_factory=list)
    """One line for each finding, in QEMU's words; the first thousand."""

    @property
    def clean(self) -> bool:
        """True if nothing was found."""
        return not (self.corruptions or self.leaks or self.check_errors)

    def say(self, message: str) -> None:
        """Add a line."""
        if len(self.messages) < _MAX_MESSAGES:
            self.messages.append(message)

    def corrupt(self, message: str) -> None:
        """Count a corruption."""
        self.corruptions += 1
        self.say(f"ERROR {message}")


class References:
    """How often each host cluster is referred to. Memory grows with what is referred to only."""

    def __init__(self) -> None:
        self._chunks: dict[int, array[int]] = {}
        self._empty = array("I", bytes(4 << _CHUNK_BITS))

    def add(self, clusters: Iterable[int]) -> None:
        """One reference more to each."""
        chunks, mask = self._chunks, (1 << _CHUNK_BITS) - 1
        for cluster in clusters:
            number = cluster >> _CHUNK_BITS
            chunk = chunks.get(number)
            if chunk is None:
                chunk = chunks[number] = self._empty[:]
            chunk[cluster & mask] += 1

    def counts(self, first: int, count: int) -> array[int]:
        """References to each of a range of clusters."""
        counts = array("I")
        while count > 0:
            within = first & ((1 << _CHUNK_BITS) - 1)
            part = min(count, (1 << _CHUNK_BITS) - within)
            chunk = self._chunks.get(first >> _CHUNK_BITS, self._empty)
            counts += chunk[within : within + part]
            first += part
            count -= part
        return counts

    def used(self) -> Iterator[tuple[int, array[int]]]:
        """(first cluster, counts) of every stretch that has references, in order."""
        for number in sorted(self._chunks):
            yield number << _CHUNK_BITS, self._chunks[number]

    @property
    def end(self) -> int:
        """The cluster after the last one referred to."""
        for number in sorted(self._chunks, reverse=True):
            chunk = self._chunks[number]
            for i in range(len(chunk) - 1, -1, -1):
                if chunk[i]:
                    return (number << _CHUNK_BITS) + i + 1
        return 0


def check(metadata: Metadata, snapshots: Iterable[Snapshot], snapshot_table: int) -> CheckResult:
    """Check everything (in an exclusive operation, metadata settled).

    ``snapshot_table`` is the length of the snapshot table in bytes.
    """
    return _Check(metadata).run(list(snapshots), snapshot_table)


class _Check:
    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        self.header = metadata.header
        self.bits = metadata.cluster_bits
        self.file_clusters = metadata.geometry.clusters(metadata.file.size)
        self.result = CheckResult()
        self.references = References()

    def run(self, snapshots: list[Snapshot], snapshot_table: int) -> CheckResult:
        result, header, metadata = self.result, self.header, self.metadata
        result.total_clusters = metadata.geometry.clusters(header.size)
        self.refer(0, metadata.cluster_size)
        self.refer(header.l1_table_offset, 8 * header.l1_size)
        self.check_l1(metadata.tables.l1, active=True)
        for snapshot in snapshots:
            self.check_snapshot(snapshot)
        self.refer(header.snapshots_offset, snapshot_table)
        self.refer(header.refcount_table_offset, header.refcount_table_clusters << self.bits)
        for offset, length in bitmap_regions(metadata, result.corrupt):
            self.refer(offset, length)
        if header.crypto_header is not None:
            self.refer(*header.crypto_header)
        self.check_blocks()
        self.compare()
        self.check_copied()
        result.image_end_offset = self.references.end << self.bits
        return result

    # -- references ------------------------------------------------------------------------------

    def refer(self, offset: int, length: int) -> None:
        """Count references to every cluster of a stretch of the file."""
        if length <= 0:
            return
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        if offset < 0 or last > self.file_clusters:
            self.result.corrupt(
                f"counting reference for region exceeding the end of the file by one cluster or "
                f"more: offset {offset:#x} size {length:#x}"
            )
            last = min(last, self.file_clusters)
        self.references.add(range(first, last + 1))

    def check_l1(self, l1: Sequence[int], *, active: bool) -> None:
        """All that an L1 table refers to."""
        result, metadata = self.result, self.metadata
        previous = -1
        for index, entry in enumerate(l1):
            offset = entry & layout.OFFSET_MASK
            if entry & layout.L1_RESERVED_MASK:
                result.corrupt(f"found L1 entry with reserved bits set: {entry:x}")
            if not offset:
                continue
            self.refer(offset, metadata.cluster_size)
            if offset % metadata.cluster_size:
                result.corrupt(
                    f"l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
                )
                continue
            try:
                entries = read_entries(metadata, offset)
            except BackendError as error:
                result.check_errors += 1
                result.say(f"ERROR: I/O error in check_refcounts_l2: {error}")
                continue
            self.check_entries(entries, offset)
            if active and index < metadata.geometry.l1_entries(self.header.size):
                previous = self.count_allocated(entries, previous)

    def check_entries(self, entries: Sequence[int], table: int) -> None:
        """The entries of one L2 table."""
        if self.metadata.data_file is not None:
            check_data_file_entries(self.result, entries, table, self.metadata.cluster_size)
            return
        limit = self.file_clusters
        if not any(entries):
            return
        mask = self.metadata.cluster_size - 1
        plain = []
        for entry in entries:
            if entry & layout.COMPRESSED:
                self.check_compressed(entry)
            elif entry & layout.OFFSET_MASK:
                offset = entry & layout.OFFSET_MASK
                if offset & mask:
                    self.result.corrupt(
                        f"offset={offset:x}: Cluster is not properly aligned; L2 entry corrupted."
                    )
                if entry & layout.L2_RESERVED_MASK:
                    self.reserved(entry, table)
                if offset >> self.bits > limit:
                    self.refer(offset, mask + 1)
                else:
                    plain.append(offset >> self.bits)
            elif entry & layout.L2_RESERVED_MASK:
                self.reserved(entry, table)
        self.references.add(plain)

    def reserved(self, entry: int, table: int) -> None:
        self.result.corrupt(
            f"found l2 entry with reserved bits set: {entry:x} in the L2 table at {table:#x}"
        )

    def check_compressed(self, entry: int) -> None:
        if entry & layout.COPIED:
            offset, _ = self.metadata.geometry.compressed_extent(entry)
            self.result.corrupt(
                f"coffset={offset:#x}: copied flag must never be set for compressed clusters"
            )
        offset, length = self.metadata.geometry.compressed_extent(entry)
        for cluster in clusters_of(self.metadata, [entry]):
            if cluster > self.file_clusters:
                self.refer(offset, length)
                return
        self.references.add(clusters_of(self.metadata, [entry]))

    def count_allocated(self, entries: Sequence[int], previous: int) -> int:
        """Statistics of the active disk; the host offset where the next cluster would follow."""
        result = self.result
        size = self.metadata.cluster_size
        kind_of = entry_kind if self.metadata.data_file is None else data_file_kind
        for entry in entries:
            if not entry:
                continue
            kind = kind_of(entry)
            if kind is ClusterKind.COMPRESSED:
                result.allocated_clusters += 1
                result.compressed_clusters += 1
                result.fragmented_clusters += 1
            elif kind is ClusterKind.NORMAL or kind is ClusterKind.ZERO_ALLOCATED:
                result.allocated_clusters += 1
                offset = entry & layout.OFFSET_MASK
                if previous >= 0 and offset != previous:
                    result.fragmented_clusters += 1
                previous = offset + size
        return previous

    def check_snapshot(self, snapshot: Snapshot) -> None:
        """A snapshot's L1 table and what it refers to."""
        try:
            check_l1(self.header, snapshot)
            l1 = load_table(self.metadata.file, snapshot.l1_table_offset, snapshot.l1_size)
        except ImageError as error:
            self.result.corrupt(f"snapshot {snapshot.id} ({snapshot.name}): {error}")
            return
        except BackendError as error:
            self.result.check_errors += 1
            self.result.say(f"ERROR: I/O error in check_refcounts_l1: {error}")
            return
        self.refer(snapshot.l1_table_offset, 8 * snapshot.l1_size)
        self.check_l1(l1, active=False)

    def check_blocks(self) -> None:
        """The refcount table's entries."""
        size = self.metadata.cluster_size
        for index, entry in enumerate(self.metadata.refcounts.table):
            offset = entry & layout.REFCOUNT_TABLE_OFFSET_MASK
            if entry & ~layout.REFCOUNT_TABLE_OFFSET_MASK:
                self.result.corrupt(f"refcount table entry {index} has reserved bits set")
            if not offset:
                continue
            if offset % size:
                self.result.corrupt(
                    f"refcount block {index} is not cluster aligned; refcount table entry corrupted"
                )
            elif offset >> self.bits >= self.file_clusters:
                self.result.corrupt(f"refcount block {index} is outside image")
            else:
                self.references.add([offset >> self.bits])
                if self.references.counts(offset >> self.bits, 1)[0] != 1:
                    self.result.corrupt(
                        f"refcount block {index} refcount="
                        f"{self.references.counts(offset >> self.bits, 1)[0]}"
                    )

    # -- comparing -------------------------------------------------------------------------------

    def compare(self) -> None:
        """Refcounts against references, for every cluster in the file or referred to."""
        end = max(self.file_clusters, self.references.end)
        per_block = 1 << self.metadata.geometry.refcount_block_bits
        table = self.metadata.refcounts.table
        size = self.metadata.cluster_size
        for block in range(min(len(table), -(-end // per_block))):
            offset = table[block] & layout.REFCOUNT_TABLE_OFFSET_MASK
            usable = offset and not offset % size and offset >> self.bits < self.file_clusters
            first = block * per_block
            if usable:
                self.compare_range(first, min(per_block, end - first))
            else:
                self.compare_missing(first, min(per_block, end - first))
        covered = len(table) * per_block
        if covered < end:
            self.compare_missing(covered, end - covered)

    def compare_range(self, first: int, count: int) -> None:
        try:
            for values in self.metadata.refcounts.counts(first, count):
                wanted = self.references.counts(first, len(values))
                if any(map(int.__ne__, values, wanted)):
                    for i, (value, want) in enumerate(zip(values, wanted, strict=True)):
                        self.compare_one(first + i, value, want)
                first += len(values)
        except BackendError as error:
            self.result.check_errors += 1
            self.result.say(f"ERROR: I/O error reading refcounts: {error}")

    def compare_missing(self, first: int, count: int) -> None:
        """A stretch without refcounts: nothing may refer to it."""
        for start, counts in self.references.used():
            if start + len(counts) <= first or start >= first + count:
                continue
            for i, want in enumerate(counts):
                if want and first <= start + i < first + count:
                    self.compare_one(start + i, 0, want)

    def compare_one(self, cluster: int, value: int, want: int) -> None:
        if value > want:
            self.result.leaks += 1
            self.result.say(f"Leaked cluster {cluster} refcount={value} reference={want}")
        elif value < want:
            self.result.corrupt(f"cluster {cluster} refcount={value} reference={want}")

    # -- COPIED ----------------------------------------------------------------------------------

    def check_copied(self) -> None:
        """COPIED may stand only where the refcount is exactly 1; clear there it costs a copy."""
        metadata = self.metadata
        for index, entry in enumerate(metadata.tables.l1):
            offset = entry & layout.OFFSET_MASK
            if not offset or offset % metadata.cluster_size:
                continue
            try:
                refcount = metadata.refcounts.get(offset >> self.bits)
                if (refcount == 1) != bool(entry & layout.COPIED):
                    self.result.corrupt(
                        f"OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} "
                        f"refcount={refcount}"
                    )
                self.check_copied_entries(read_entries(metadata, offset))
            except (BackendError, ImageError):
                continue  # counted before

    def check_copied_entries(self, entries: Sequence[int]) -> None:
        if self.metadata.data_file is not None:
            check_data_file_copied(self.result, entries)
            return
        mask, bits = layout.OFFSET_MASK, self.bits
        known: dict[int, int] = {}
        for entry in entries:
            if entry & layout.COMPRESSED or not entry & mask:
                continue
            cluster = (entry & mask) >> bits
            refcount = known.get(cluster)
            if refcount is None:
                known = self.around(cluster)
                refcount = known[cluster]
            if (refcount == 1) != bool(entry & layout.COPIED):
                self.result.corrupt(
                    f"OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}"
                )

    def around(self, cluster: int) -> dict[int, int]:
        """The refcounts of ``cluster`` and of the clusters after it."""
        first = cluster & ~63
        values: list[int] = []
        for part in self.metadata.refcounts.counts(first, 64):
            values += part
        return dict(zip(range(first, first + 64), values, strict=True))
