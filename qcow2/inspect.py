"""Looking into an image without using it: what each host cluster is for, and how an offset is
mapped, step by step. Nothing is cached or locked, damaged entries are told, not followed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..backend.disk import Disk
from ..errors import PyvirtioError
from . import layout
from .bitmap_directory import read_directory
from .bitmap_table import load_entries
from .geometry import Geometry
from .header import Header, read_header
from .refcount_codec import codec_for
from .refcounts import load_table
from .snapshot_table import read_snapshots

__all__ = ["KINDS", "HostMap", "Step", "explain", "host_map", "metadata_facts"]

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
"""What a host cluster may be for, the most telling last where one is for several."""

_MAX_TRACKED = 1 << 28
"""Clusters whose use is noted one by one, to find leaks: a byte each."""


@dataclass(slots=True)
class HostMap:
    """The host file in cells of one or more clusters each."""

    cluster_size: int
    clusters: int
    """Of the whole file."""
    per_cell: int
    """Clusters in a cell."""
    cells: list[dict[str, int]] = field(default_factory=list)
    """Clusters of each kind, by cell; what is not there is free."""
    problems: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, int]:
        """Clusters of each kind in the whole file, in the order of KINDS."""
        totals = dict.fromkeys(KINDS, 0)
        for cell in self.cells:
            for kind, count in cell.items():
                totals[kind] += count
        totals["free"] = max(0, self.clusters - sum(totals.values()))
        return {kind: count for kind, count in totals.items() if count}


def host_map(file: Disk, *, cells: int = 4096) -> HostMap:
    """What every cluster of the file is for, in at most ``cells`` cells.

    Memory is a byte for each cluster of the file. Raises ImageError if there is no usable header.
    """
    header = read_header(file, for_check=True)
    return _Mapper(file, header, cells).map()


class _Mapper:
    def __init__(self, file: Disk, header: Header, cells: int) -> None:
        self._file = file
        self._header = header
        self._geometry = header.geometry
        self._bits = self._geometry.cluster_bits
        clusters = self._geometry.clusters(file.size)
        per_cell = max(1, -(-clusters // cells))
        count = -(-clusters // per_cell)
        self._result = HostMap(1 << self._bits, clusters, per_cell, [{} for _ in range(count)])
        self._used = bytearray(min(clusters, _MAX_TRACKED))

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
            except (PyvirtioError, ValueError) as error:
                self._result.problems.append(f"{name} cannot be read: {error}")
        return self._result

    def _mark(self, kind: str, offset: int, length: int) -> None:
        """Note what a range of the host is for, as far as it is not noted already."""
        first = offset >> self._bits
        end = min(-(-(offset + length) >> self._bits), self._result.clusters)
        for cluster in range(first, end):
            if cluster < len(self._used):
                if self._used[cluster]:
                    continue
                self._used[cluster] = 1
            cell = self._result.cells[cluster // self._result.per_cell]
            cell[kind] = cell.get(kind, 0) + 1

    def _active(self) -> None:
        self._l1("data", self._header.l1_table_offset, self._header.l1_size)

    def _snapshots(self) -> None:
        snapshots, length = read_snapshots(self._file, self._header)
        if length:
            self._mark("snapshots", self._header.snapshots_offset, length)
        for snapshot in snapshots:
            self._l1("snapshot data", snapshot.l1_table_offset, snapshot.l1_size)

    def _l1(self, kind: str, offset: int, size: int) -> None:
        if not size:
            return
        self._mark("L1 table", offset, 8 * size)
        for entry in load_table(self._file, offset, size):
            table = entry & layout.OFFSET_MASK
            if not table:
                continue
            if table % (1 << self._bits) or table >= self._file.size:
                self._result.problems.append(f"L1 entry {entry:#x} refers to no cluster")
                continue
            self._mark("L2 table", table, 1 << self._bits)
            self._l2(kind, table)

    def _l2(self, kind: str, offset: int) -> None:
        geometry = self._geometry
        words = load_table(self._file, offset, 1 << (self._bits - 3))
        external = bool(self._header.incompatible_features & layout.Incompatible.DATA_FILE)
        for entry in words[:: geometry.l2_entry_words]:
            if entry & layout.COMPRESSED:
                self._mark("compressed", *geometry.compressed_extent(entry))
            elif entry & layout.OFFSET_MASK and not external:
                zero = entry & layout.ZERO and not geometry.extended_l2
                self._mark("zero" if zero else kind, entry & layout.OFFSET_MASK, 1)

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
        header, geometry = self._header, self._geometry
        size = header.refcount_table_clusters << self._bits
        self._mark("refcount table", header.refcount_table_offset, size)
        table = load_table(self._file, header.refcount_table_offset, size // 8)
        for block in table:
            if block & layout.OFFSET_MASK:
                self._mark("refcount block", block & layout.OFFSET_MASK, 1)
        codec = codec_for(geometry.refcount_order)
        per_block = 1 << geometry.refcount_block_bits
        for index, block in enumerate(table):
            first = index * per_block
            offset = block & layout.OFFSET_MASK
            if not offset or first >= len(self._used) or offset >= self._file.size:
                continue
            count = min(per_block, len(self._used) - first)
            contents = memoryview(self._file.read(offset, 1 << self._bits))
            for cluster, value in enumerate(codec.load(contents, 0, count), first):
                if value and not self._used[cluster]:
                    self._mark("leaked", cluster << self._bits, 1)


# -- one offset ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """A step on the way from a guest's offset to the bytes."""

    what: str
    """The table, or the end of the way."""
    index: int | None
    at: int | None
    """Host offset of the entry."""
    raw: int | None
    """The entry as it stands there."""
    meaning: str


def explain(file: Disk, offset: int) -> Iterator[Step]:
    """Every step of the mapping of a guest offset, in this image alone."""
    header = read_header(file, for_check=True)
    geometry = header.geometry
    l1_index = offset // geometry.l2_coverage
    l1_at = header.l1_table_offset + 8 * l1_index
    if l1_index >= header.l1_size:
        yield Step("L1 table", l1_index, None, None, "past the end of the table: unallocated")
        return
    l1_entry = _word(file, l1_at)
    table = l1_entry & layout.OFFSET_MASK
    yield Step("L1 table", l1_index, l1_at, l1_entry, _pointer("L2 table", l1_entry, geometry))
    if not table or table % geometry.cluster_size:
        return
    index = (offset >> geometry.cluster_bits) & ((1 << geometry.l2_bits) - 1)
    at = table + (index << geometry.l2_entry_bits)
    entry = _word(file, at)
    yield Step("L2 table", index, at, entry, _l2_meaning(entry, geometry, header))
    inside = offset & (geometry.cluster_size - 1)
    if geometry.extended_l2:
        states = _word(file, at + 8)
        number = inside >> geometry.subcluster_bits
        allocated, zero = states >> number & 1, states >> (32 + number) & 1
        words = "reads as zeroes" if zero else "allocated" if allocated else "unallocated"
        yield Step("subclusters", number, at + 8, states, f"subcluster {number}: {words}")
    host = entry & layout.OFFSET_MASK
    if host and not entry & layout.COMPRESSED:
        yield Step("host file", None, host + inside, None, f"byte {inside} of its cluster")
        yield _refcount_step(file, header, host >> geometry.cluster_bits)


def _refcount_step(file: Disk, header: Header, cluster: int) -> Step:
    geometry = header.geometry
    index = cluster >> geometry.refcount_block_bits
    if index >= header.refcount_table_clusters << geometry.cluster_bits >> 3:
        return Step("refcount", cluster, None, None, "past the end of the refcount table: 0")
    block = _word(file, header.refcount_table_offset + 8 * index) & layout.OFFSET_MASK
    if not block:
        return Step("refcount", cluster, None, None, "no refcount block: 0")
    position = cluster & ((1 << geometry.refcount_block_bits) - 1)
    contents = memoryview(file.read(block, geometry.cluster_size))
    (value,) = codec_for(geometry.refcount_order).load(contents, position, 1)
    at = block + (position << geometry.refcount_order >> 3)
    return Step("refcount", cluster, at, int(value), f"{value} reference{'s' * (value != 1)}")


def _word(file: Disk, offset: int) -> int:
    return int.from_bytes(file.read(offset, 8))


def _pointer(what: str, entry: int, geometry: Geometry) -> str:
    offset = entry & layout.OFFSET_MASK
    if not offset:
        return f"no {what}: unallocated"
    words = [f"{what} at {offset:#x}", "used once" if entry & layout.COPIED else "shared"]
    if offset % geometry.cluster_size:
        words.append("NOT ALIGNED to a cluster")
    return ", ".join(words)


def _l2_meaning(entry: int, geometry: Geometry, header: Header) -> str:
    if entry & layout.COMPRESSED:
        offset, length = geometry.compressed_extent(entry)
        return f"compressed, {length} bytes at {offset:#x}"
    words = []
    if entry & layout.ZERO and not geometry.extended_l2:
        words.append("reads as zeroes")
    if entry & layout.OFFSET_MASK:
        words.append(_pointer("cluster", entry, geometry))
    elif not words:
        external = header.incompatible_features & layout.Incompatible.DATA_FILE
        copied = external and entry & layout.COPIED
        words.append("the data file's first cluster" if copied else "unallocated")
    return ", ".join(words)


def metadata_facts(file: Disk) -> dict[str, Any]:
    """Everything that the header and the tables say, as plain values."""
    header = read_header(file, for_check=True)
    geometry = header.geometry
    facts: dict[str, Any] = {
        "version": header.version,
        "size": header.size,
        "cluster-size": geometry.cluster_size,
        "refcount-bits": 1 << header.refcount_order,
        "incompatible-features": header.incompatible_features,
        "compatible-features": header.compatible_features,
        "autoclear-features": header.autoclear_features,
        "l1": {"offset": header.l1_table_offset, "entries": header.l1_size},
        "refcount-table": {
            "offset": header.refcount_table_offset,
            "clusters": header.refcount_table_clusters,
        },
        "backing-file": header.backing_file,
        "backing-format": header.backing_format,
        "data-file": header.data_file,
        "unknown-extensions": [
            {"type": kind, "data": data.hex()} for kind, data in header.unknown_extensions
        ],
    }
    snapshots, _ = read_snapshots(file, header)
    facts["snapshots"] = [
        {
            "id": snapshot.id,
            "name": snapshot.name,
            "l1": {"offset": snapshot.l1_table_offset, "entries": snapshot.l1_size},
            "disk-size": snapshot.disk_size,
            "vm-state-size": snapshot.vm_state_size,
        }
        for snapshot in snapshots
    ]
    facts["tables"] = list(_tables(file, header))
    return facts


def _tables(file: Disk, header: Header) -> Iterator[dict[str, Any]]:
    """The L2 tables of the disk with their entries that are not 0."""
    geometry = header.geometry
    table = (
        load_table(file, header.l1_table_offset, header.l1_size) if header.l1_size else array("Q")
    )
    for index, entry in enumerate(table):
        offset = entry & layout.OFFSET_MASK
        if not offset:
            continue
        facts: dict[str, Any] = {"l1-index": index, "l1-entry": entry}
        if not offset % geometry.cluster_size and offset < file.size:
            words = load_table(file, offset, geometry.cluster_size // 8)
            step = geometry.l2_entry_words
            facts["entries"] = {
                str(at): list(words[at * step : (at + 1) * step])
                for at in range(len(words) // step)
                if any(words[at * step : (at + 1) * step])
            }
        yield facts
