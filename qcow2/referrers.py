"""Who refers to a host cluster: the way of a mapping, backwards."""

from __future__ import annotations

from collections.abc import Iterator

from ..backend.disk import Disk
from ..errors import PyvirtioError
from . import layout
from .bitmap_directory import read_directory
from .bitmap_table import load_entries
from .header import Header, read_header
from .inspect import Step, refcount_steps
from .snapshot_table import read_snapshots
from .table_io import load_table, unpack_table
from .tally import every_entry

__all__ = ["explain_host"]


def explain_host(file: Disk, offset: int) -> Iterator[Step]:
    """The refcount of the cluster at a host offset, and everything that refers to it."""
    header = read_header(file, for_check=True)
    cluster = offset >> header.geometry.cluster_bits
    if offset >= file.size:
        yield Step("host file", None, offset, None, f"past the end of the file ({file.size} bytes)")
        return
    yield from refcount_steps(file, header, cluster)
    found = False
    for step in _Search(file, header, cluster << header.geometry.cluster_bits).steps():
        found = True
        yield step
    if not found:
        yield Step("host file", None, offset, None, "nothing refers to this cluster")


class _Search:
    def __init__(self, file: Disk, header: Header, host: int) -> None:
        self._file = file
        self._header = header
        self._geometry = header.geometry
        self._host = host
        self._tables: dict[int, list[tuple[int, int]]] = {}
        """By the offsets of L2 tables: indices and values of the entries that matter."""

    def steps(self) -> Iterator[Step]:
        header = self._header
        if not self._host:
            yield Step("header", None, 0, None, "this cluster")
        yield from self._l1("the disk", header.l1_table_offset, header.l1_size)
        for part, steps in (
            ("the snapshots", self._snapshots),
            ("the bitmaps", self._bitmaps),
            ("the refcounts", self._refcounts),
        ):
            try:
                yield from steps()
            except (PyvirtioError, ValueError) as error:
                yield Step(part, None, None, None, f"cannot be read: {error}")

    def _holds(self, offset: int, length: int) -> bool:
        """Whether what lies there lies in the cluster."""
        return offset < self._host + self._geometry.cluster_size and self._host < offset + length

    def _snapshots(self) -> Iterator[Step]:
        snapshots, length = read_snapshots(self._file, self._header)
        at = self._header.snapshots_offset
        if length and self._holds(at, length):
            yield Step("header", None, 64, at, f"snapshot table at {at:#x}")
        for snapshot in snapshots:
            owner = f"snapshot {snapshot.name or snapshot.id}"
            yield from self._l1(owner, snapshot.l1_table_offset, snapshot.l1_size)

    def _l1(self, owner: str, offset: int, size: int) -> Iterator[Step]:
        geometry = self._geometry
        if not size:
            return
        if self._holds(offset, 8 * size):
            yield Step("L1 table", None, offset, None, f"that of {owner}")
        for l1_index, entry in enumerate(load_table(self._file, offset, size)):
            table = entry & layout.OFFSET_MASK
            if not table:
                continue
            guest = l1_index * geometry.l2_coverage
            if table == self._host:
                text = f"L2 table of {owner} from guest offset {guest:#x} on"
                yield Step("L1 table", l1_index, offset + 8 * l1_index, entry, text)
            if table % geometry.cluster_size or table >= self._file.size:
                continue
            if table not in self._tables:
                self._tables[table] = list(self._l2(table))
            for index, found in self._tables[table]:
                at = table + (index << geometry.l2_entry_bits)
                place = guest + (index << geometry.cluster_bits)
                kind = "VM state" if place >= self._header.size else "data"
                if found & layout.COMPRESSED:
                    kind = f"compressed {kind}"
                text = f"{kind} of {owner} at guest offset {place:#x}"
                yield Step("L2 table", index, at, found, text)

    def _l2(self, offset: int) -> Iterator[tuple[int, int]]:
        """The entries of an L2 table that refer to the cluster."""
        geometry = self._geometry
        if self._header.incompatible_features & layout.Incompatible.DATA_FILE:
            return
        table = self._file.read(offset, geometry.cluster_size)
        step = geometry.l2_entry_words
        names = self._host.to_bytes(8)[1:6]
        compressed = int.from_bytes(table) & every_entry(layout.COMPRESSED, len(table) // 8)
        if not compressed and names not in table:
            return
        for index, entry in enumerate(unpack_table(table)[::step]):
            if entry & layout.COMPRESSED:
                if self._holds(*geometry.compressed_extent(entry)):
                    yield index, entry
            elif entry & layout.OFFSET_MASK == self._host and self._host:
                yield index, entry

    def _bitmaps(self) -> Iterator[Step]:
        extension = self._header.bitmaps
        if extension is None:
            return
        if self._holds(extension.directory_offset, extension.directory_size):
            at = extension.directory_offset
            yield Step("header", None, None, None, f"bitmap directory at {at:#x}")
        directory = read_directory(self._file, extension, self._geometry, self._header.size)
        for entry in directory:
            if self._holds(entry.table_offset, 8 * entry.table_size):
                text = f"table of the bitmap {entry.name} at {entry.table_offset:#x}"
                yield Step("bitmap directory", None, None, None, text)
            words = load_entries(self._file, entry, self._geometry.cluster_size)
            for index, word in enumerate(words):
                if word & layout.OFFSET_MASK == self._host and self._host:
                    at = entry.table_offset + 8 * index
                    yield Step("bitmap table", index, at, word, f"bits of the bitmap {entry.name}")

    def _refcounts(self) -> Iterator[Step]:
        header = self._header
        offset = header.refcount_table_offset
        size = header.refcount_table_clusters << self._geometry.cluster_bits
        if self._holds(offset, size):
            yield Step("header", None, 48, offset, f"refcount table at {offset:#x}")
        for index, entry in enumerate(load_table(self._file, offset, size // 8)):
            if entry & layout.OFFSET_MASK == self._host and self._host:
                first = index << self._geometry.refcount_block_bits
                text = f"refcount block for the clusters from {first} on"
                yield Step("refcount table", index, offset + 8 * index, entry, text)
        if header.crypto_header is not None and self._holds(*header.crypto_header):
            at = header.crypto_header[0]
            yield Step("header", None, None, None, f"encryption header at {at:#x}")
