"""All metadata of an image as plain values, piece by piece: tables of a large image are many."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from ..backend.disk import Disk
from ..errors import PyvirtioError
from . import layout
from .bitmap_directory import read_directory
from .bitmap_table import load_entries
from .header import Header, read_header
from .refcount_codec import codec_for
from .snapshot_table import Snapshot, read_snapshots
from .table_io import load_table

__all__ = ["metadata_facts"]


def metadata_facts(file: Disk) -> Iterator[tuple[str, Any]]:
    """Everything that the header and the tables say, as names and values; an iterator as a value is
    a list, to be had item by item. What cannot be read is in "problems", the last."""
    header = read_header(file, for_check=True)
    yield from _header_facts(header)
    reader = _Reader(file, header)
    yield "tables", reader.tables(header.l1_table_offset, header.l1_size)
    yield "snapshots", reader.snapshots()
    yield "bitmaps", reader.bitmaps()
    yield "refcount-blocks", reader.refcount_blocks()
    yield "problems", reader.problems


def _header_facts(header: Header) -> Iterator[tuple[str, Any]]:
    yield "version", header.version
    yield "size", header.size
    yield "cluster-size", header.geometry.cluster_size
    yield "refcount-bits", 1 << header.refcount_order
    yield "header-length", header.header_length
    yield "incompatible-features", header.incompatible_features
    yield "compatible-features", header.compatible_features
    yield "autoclear-features", header.autoclear_features
    compression = header.compression_type
    yield "compression-type", "zlib" if not compression else compression.name.lower()
    yield "crypt-method", header.crypt_method.name.lower()
    if header.crypto_header is not None:
        offset, length = header.crypto_header
        yield "crypto-header", {"offset": offset, "length": length}
    yield "l1", {"offset": header.l1_table_offset, "entries": header.l1_size}
    yield (
        "refcount-table",
        {"offset": header.refcount_table_offset, "clusters": header.refcount_table_clusters},
    )
    yield "snapshot-table", {"offset": header.snapshots_offset, "entries": header.nb_snapshots}
    if header.bitmaps is not None:
        directory = {
            "offset": header.bitmaps.directory_offset,
            "length": header.bitmaps.directory_size,
        }
        yield "bitmap-directory", directory
    yield "backing-file", header.backing_file
    yield "backing-format", header.backing_format
    yield "data-file", header.data_file
    extensions = [{"type": kind, "data": data.hex()} for kind, data in header.unknown_extensions]
    yield "unknown-extensions", extensions


class _Reader:
    def __init__(self, file: Disk, header: Header) -> None:
        self._file = file
        self._header = header
        self._geometry = header.geometry
        self._told: set[int] = set()
        """Offsets of the L2 tables whose entries have been told."""
        self.problems: list[str] = []

    def _problem(self, what: str, error: Exception) -> None:
        self.problems.append(f"{what} cannot be read: {error}")

    def snapshots(self) -> Iterator[dict[str, Any]]:
        try:
            snapshots, _ = read_snapshots(self._file, self._header)
        except (PyvirtioError, ValueError) as error:
            self._problem("the snapshot table", error)
            return
        for snapshot in snapshots:
            yield self._snapshot(snapshot)

    def _snapshot(self, snapshot: Snapshot) -> dict[str, Any]:
        return {
            "id": snapshot.id,
            "name": snapshot.name,
            "disk-size": snapshot.disk_size,
            "vm-state-size": snapshot.vm_state_size,
            "date-sec": snapshot.date_sec,
            "date-nsec": snapshot.date_nsec,
            "vm-clock-nsec": snapshot.vm_clock_nsec,
            "icount": snapshot.icount,
            "l1": {"offset": snapshot.l1_table_offset, "entries": snapshot.l1_size},
            "tables": list(self.tables(snapshot.l1_table_offset, snapshot.l1_size)),
        }

    def bitmaps(self) -> Iterator[dict[str, Any]]:
        extension = self._header.bitmaps
        if extension is None:
            return
        try:
            for entry in read_directory(self._file, extension, self._geometry, self._header.size):
                yield {
                    "name": entry.name,
                    "flags": int(entry.flags),
                    "granularity": 1 << entry.granularity_bits,
                    "table": {"offset": entry.table_offset, "entries": entry.table_size},
                    "entries": [*load_entries(self._file, entry, self._geometry.cluster_size)],
                }
        except (PyvirtioError, ValueError) as error:
            self._problem("the bitmap directory", error)

    def tables(self, offset: int, size: int) -> Iterator[dict[str, Any]]:
        """The entries of an L1 table, and those of the L2 tables that have not been told before, if
        they are not 0."""
        try:
            table = load_table(self._file, offset, size) if size else ()
        except (PyvirtioError, ValueError, MemoryError) as error:
            self._problem(f"the L1 table at {offset:#x}", error)
            return
        for index, entry in enumerate(table):
            at = entry & layout.OFFSET_MASK
            if not at:
                continue
            facts: dict[str, Any] = {"l1-index": index, "l1-entry": entry}
            if at not in self._told:
                self._told.add(at)
                if at % self._geometry.cluster_size or at >= self._file.size:
                    self.problems.append(f"L1 entry {entry:#x} refers to no cluster")
                else:
                    facts["entries"] = self._entries(at)
            yield facts

    def _entries(self, offset: int) -> dict[str, list[int]]:
        words = load_table(self._file, offset, self._geometry.cluster_size // 8)
        step = self._geometry.l2_entry_words
        if not any(words):
            return {}
        return {
            str(at): list(words[at * step : (at + 1) * step])
            for at in range(len(words) // step)
            if any(words[at * step : (at + 1) * step])
        }

    def refcount_blocks(self) -> Iterator[dict[str, Any]]:
        """The blocks with what they count, as runs [first cluster, clusters, refcount]."""
        header, bits = self._header, self._geometry.refcount_block_bits
        codec = codec_for(self._geometry.refcount_order)
        try:
            words = header.refcount_table_clusters * self._geometry.cluster_size // 8
            table = load_table(self._file, header.refcount_table_offset, words)
        except (PyvirtioError, ValueError, MemoryError) as error:
            self._problem("the refcount table", error)
            return
        for index, entry in enumerate(table):
            offset = entry & layout.OFFSET_MASK
            if not offset:
                continue
            if offset % self._geometry.cluster_size or offset >= self._file.size:
                self.problems.append(f"refcount table entry {entry:#x} refers to no cluster")
                continue
            block = memoryview(self._file.read(offset, self._geometry.cluster_size))
            cluster, runs = index << bits, []
            for value, run in groupby(codec.load(block, 0, 1 << bits)):
                count = sum(1 for _ in run)
                if value:
                    runs.append([cluster, count, value])
                cluster += count
            yield {"index": index, "entry": entry, "refcounts": runs}
