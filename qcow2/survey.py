"""One look at a whole image: its references, its refcounts, and where the two differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..errors import BackendError, ImageError
from . import layout
from .bitmap_check import bitmap_regions
from .counts import ClusterCounts, decode_block
from .layout import Incompatible
from .references import MAX_CLUSTERS, References, read_padded
from .result import CheckResult
from .snapshot_check import SnapshotTable

if TYPE_CHECKING:
    from .metadata import Metadata

__all__ = ["Survey"]


class Survey:
    """The references and the refcounts of every host cluster, side by side.

    Each step takes what the one before it left; they stand here in QEMU's order, since some
    findings depend on it.
    """

    def __init__(self, metadata: Metadata, result: CheckResult, *, repair: bool) -> None:
        """``repair``: what can be put right while looking is put right."""
        self.metadata = metadata
        self.result = result
        self.repair = repair
        self.bits = metadata.cluster_bits
        self.per_block = 1 << metadata.geometry.refcount_block_bits
        self.references = References(
            metadata.file, metadata.header, result, self._repair_entry if repair else None
        )
        self.stored = ClusterCounts(0)
        """The refcounts as they stand in the file."""
        self.unreadable: set[int] = set()
        """Numbers of the refcount blocks that cannot be had."""
        self.rebuild = False
        """The refcount structure itself is broken: only a new one helps."""
        self.structure: list[tuple[int, int]] = []
        """Runs (first, count) of the clusters that hold the refcount table and its blocks."""
        self.entry_corruptions = 0
        """Corruptions that have nothing to do with refcounts."""

    def close(self) -> None:
        """Give the memory back."""
        self.references.counts.close()
        self.stored.close()

    # -- references --------------------------------------------------------------------------------

    def count_references(self, table: SnapshotTable) -> None:
        """Everything that refers to something but the refcount table. Raises CheckFailed."""
        header, references, result = self.metadata.header, self.references, self.result
        references.refer(0, self.metadata.cluster_size)
        active: dict[int, int] = {}
        times: dict[int, int] = {}
        if header.l1_size:
            references.l1_table(header.l1_table_offset, header.l1_size, active)
        if table.snapshots and header.incompatible_features & Incompatible.DATA_FILE:
            result.corrupt(f"{len(table.snapshots)} snapshots in image with data file")
        for snapshot in table.snapshots:
            what = f"snapshot {snapshot.id} ({snapshot.name})"
            if snapshot.l1_table_offset % self.metadata.cluster_size:
                result.corrupt(
                    f"{what} l1_offset={snapshot.l1_table_offset:#x}: L1 table is not cluster "
                    "aligned; snapshot table entry corrupted"
                )
            elif 8 * snapshot.l1_size > layout.MAX_L1_SIZE:
                result.corrupt(
                    f"{what} l1_size={snapshot.l1_size:#x}: L1 table is too large; snapshot table "
                    "entry corrupted"
                )
            elif snapshot.l1_size:
                references.l1_table(snapshot.l1_table_offset, snapshot.l1_size, times)
        for offset, number in active.items():
            references.l2_table(offset, number + times.pop(offset, 0), number)
        for offset, number in times.items():
            references.l2_table(offset, number, 0)
        references.refer(header.snapshots_offset, table.length)
        for offset, length in _other_regions(self.metadata, result.corrupt):
            references.refer(offset, length)
        references.clip(self.metadata.geometry.refcount_max)
        self.entry_corruptions = result.corruptions

    def _repair_entry(self, place: int, active: bool) -> None:
        metadata = self.metadata
        if metadata.header.incompatible_features & Incompatible.EXTENDED_L2:
            bitmap = int.from_bytes(read_padded(metadata.file, place + 8, 8))
            zeroes = (bitmap | bitmap << 32) & 0xFFFF_FFFF_0000_0000
            entry = layout.U64.pack(0) + layout.U64.pack(zeroes)
        else:
            entry = layout.U64.pack(layout.ZERO)
        metadata.overlap.check_l2(place, len(entry), active=active)
        metadata.file.write(place, entry)

    # -- the refcount structure --------------------------------------------------------------------

    def check_structure(self) -> None:
        """The refcount table and its entries; counts the references that they are."""
        header, references = self.metadata.header, self.references
        length = header.refcount_table_clusters << self.bits
        before = self.result.corruptions
        references.refer(header.refcount_table_offset, length)
        references.clip(self.metadata.geometry.refcount_max)
        if length and self.result.corruptions == before:
            first = header.refcount_table_offset >> self.bits
            self.structure.append((first, header.refcount_table_clusters))
        for index, entry in enumerate(self.metadata.refcounts.table):
            if entry:
                self._check_block(index, entry)

    def _check_block(self, index: int, entry: int) -> None:
        result = self.result
        offset = entry & layout.REFCOUNT_TABLE_OFFSET_MASK
        cluster = offset >> self.bits
        if entry & ~layout.REFCOUNT_TABLE_OFFSET_MASK:
            result.corrupt(f"refcount table entry {index} has reserved bits set")
            self.rebuild = True
        elif offset % self.metadata.cluster_size:
            result.corrupt(
                f"refcount block {index} is not cluster aligned; refcount table entry corrupted"
            )
            self.rebuild = True
        elif cluster >= self.references.counts.size:
            message = f"refcount block {index} is outside image"
            if self.repair and self._make_file_longer(offset):
                result.fixed(message)
                self._refer_block(index, cluster)
            else:
                result.corrupt(message)
                self.rebuild = self.rebuild or self.repair
        else:
            self._refer_block(index, cluster)

    def _refer_block(self, index: int, cluster: int) -> None:
        counts = self.references.counts
        if counts[cluster] >= self.metadata.geometry.refcount_max:
            self.references.overflow(cluster)
        else:
            counts[cluster] += 1
            self.structure.append((cluster, 1))
        if counts[cluster] != 1:
            self.result.corrupt(f"refcount block {index} refcount={counts[cluster]}")
            self.rebuild = True

    def _make_file_longer(self, offset: int) -> bool:
        """Have the cluster at ``offset`` in the file; False if that cannot be."""
        file = self.metadata.file
        end = offset + self.metadata.cluster_size
        if -(-end >> self.bits) > MAX_CLUSTERS:
            return False
        try:
            file.truncate(end)
        except (BackendError, ValueError) as error:
            self.result.say(f"ERROR could not resize image: {error}")
            return False
        self.references.size = file.size
        self.references.counts.grow(-(-file.size >> self.bits))
        return True

    def load_refcounts(self) -> None:
        """Read every refcount block that counts clusters of the file."""
        metadata = self.metadata
        self.stored.close()
        self.stored = stored = ClusterCounts(self.references.counts.end)
        self.unreadable.clear()
        for index, entry in enumerate(metadata.refcounts.table):
            first = index * self.per_block
            if first >= stored.size:
                break
            offset = entry & layout.REFCOUNT_TABLE_OFFSET_MASK
            if not offset:
                continue
            try:
                if offset % metadata.cluster_size or offset > layout.INT64_MAX:
                    raise BackendError(5, "Input/output error")
                data = read_padded(metadata.file, offset, metadata.cluster_size)
            except BackendError as error:
                missing = range(first, min(first + self.per_block, stored.size))
                self.unreadable.add(index)
                self.result.check_errors += len(missing)
                self.result.say(
                    f"Can't get refcount for clusters {missing.start} to {missing.stop - 1}: "
                    f"{error.strerror}"
                )
            else:
                decode_block(data, metadata.geometry.refcount_order, stored, first)

    # -- comparing ---------------------------------------------------------------------------------

    def differences(self) -> Iterator[tuple[int, int, int]]:
        """(cluster, references, refcount) wherever they are not the same, as far as is known."""
        for cluster, want, have in self.references.counts.differences(self.stored):
            if cluster // self.per_block not in self.unreadable:
                yield cluster, want, have

    def compare(self) -> None:
        """Count leaks and corruptions."""
        result = self.result
        for cluster, want, have in self.differences():
            if have > want:
                result.leaks += 1
                result.say(f"Leaked cluster {cluster} refcount={have} reference={want}")
            else:
                result.corrupt(f"cluster {cluster} refcount={have} reference={want}")
            self.rebuild = self.rebuild or not have

    def refcount(self, cluster: int) -> int | None:
        """The refcount of a cluster anywhere; None where it cannot be had."""
        if cluster // self.per_block in self.unreadable:
            return None
        if cluster < self.stored.size:
            return self.stored[cluster]
        try:
            return self.metadata.refcounts.get(cluster)
        except (BackendError, ImageError):
            return None

    @property
    def end(self) -> int:
        """The cluster after the last one that is in use, or counts as such."""
        return max(1, self.stored.used_end, self.references.counts.used_end)


def _other_regions(
    metadata: Metadata, corrupt: Callable[[str], object]
) -> Iterator[tuple[int, int]]:
    """(host offset, length) of what an image has besides tables and data."""
    if metadata.header.crypto_header is not None:
        yield metadata.header.crypto_header
    yield from bitmap_regions(metadata, corrupt)
