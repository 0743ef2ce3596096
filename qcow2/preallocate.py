"""Preallocation: host clusters for a stretch of the disk, mapped before anything is written.

All of it is taken as one area of fresh clusters and mapped table by table, never cluster by
cluster. The order: refcounts stable | L2 tables stable | L1 entries.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from ..errors import UnsupportedError
from . import layout
from .metadata import Metadata
from .table_io import pack_table, unpack_table

__all__ = ["MODES", "check_mode", "preallocate"]

MODES = ("off", "metadata", "falloc", "full")


def check_mode(mode: str) -> None:
    """Raise UnsupportedError for a mode that is none."""
    if mode not in MODES:
        raise UnsupportedError(
            f"Parameter 'preallocation' does not accept value '{mode}'", feature="preallocation"
        )


def preallocate(metadata: Metadata, start: int, end: int, mode: str) -> None:
    """Map every unallocated cluster that has some of guest bytes [start, end) (exclusively).

    The L1 table must be long enough. ``metadata`` leaves the data clusters as a hole of the file,
    ``falloc`` reserves them there, ``full`` writes zeroes. What read as zeroes still does. Raises
    BackendError where the file cannot grow, with nothing changed.
    """
    first, stop = start >> metadata.cluster_bits, metadata.geometry.clusters(end)
    pieces = [(*piece, _missing(metadata, *piece)) for piece in _tables(metadata, first, stop)]
    pieces = [piece for piece in pieces if piece[3]]
    if not pieces:
        return

    def lengthen(size: int) -> None:
        if size > metadata.file.size:
            metadata.file.truncate(size, preallocation="off" if mode == "metadata" else mode)

    with metadata.lock:
        new_tables = sum(not _is_own(metadata, piece[0]) for piece in pieces)
        total = new_tables + sum(piece[3] for piece in pieces)
        at = area = metadata.refcounts.allocate_area(total, lengthen)
    try:
        metadata.settle()
    except BaseException:
        with metadata.lock:
            for part in metadata.refcounts.slices(area, total):
                metadata.refcounts.add(*part, -1)
        raise
    for index, begin, count, missing in pieces:
        at = _map(metadata, index, begin, count, missing, at)
    metadata.settle()


def _tables(metadata: Metadata, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(L1 index, first entry, entries) for each L2 table that maps guest clusters [first, stop)."""
    bits = metadata.geometry.l2_bits
    while first < stop:
        begin = first & ((1 << bits) - 1)
        count = min(stop - first, (1 << bits) - begin)
        yield first >> bits, begin, count
        first += count


def _is_own(metadata: Metadata, index: int) -> bool:
    return bool(metadata.tables.l1[index] & layout.COPIED)


def _words(metadata: Metadata, index: int) -> array[int]:
    """All words of an L2 table as it is; zeroes if there is none."""
    offset = metadata.tables.l2_offset(index)
    return unpack_table(metadata.read_l2_table(offset) if offset else bytes(metadata.cluster_size))


def _missing(metadata: Metadata, index: int, begin: int, count: int) -> int:
    """How many of the entries have no host cluster."""
    if not metadata.tables.l2_offset(index):
        return count
    entries = _words(metadata, index)[:: metadata.geometry.l2_entry_words]
    return sum(not entry & _USED for entry in entries[begin : begin + count])


_USED = layout.OFFSET_MASK | layout.COMPRESSED


def _map(metadata: Metadata, index: int, begin: int, count: int, missing: int, at: int) -> int:
    """Map the entries of one table to clusters from ``at`` on; the first one not used."""
    bits, step = metadata.cluster_bits, metadata.geometry.l2_entry_words
    own = _is_own(metadata, index)
    table = at
    if not own:
        at += 1
    # Encrypted zeroes do not read as zeroes.
    flags = layout.COPIED
    if metadata.header.crypt_method and metadata.geometry.version >= 3 and step == 1:
        flags |= layout.ZERO
    start = at << bits | flags
    hosts = array("Q", range(start, start + (missing << bits), 1 << bits))
    words = _words(metadata, index)
    if missing == count and not any(words[begin * step : (begin + count) * step]):
        words[begin * step : (begin + count) * step : step] = hosts
    else:
        remaining = iter(hosts)
        for place in range(begin * step, (begin + count) * step, step):
            if not words[place] & _USED:
                words[place] = next(remaining) | words[place]
    contents = pack_table(words)
    with metadata.lock, metadata.health.step("Preallocating"):
        old = metadata.tables.l2_offset(index)
        if own:
            metadata.write_l2_table(old, contents)
        else:
            metadata.file.write(table << bits, contents)
            metadata.replace_l2_table(index, table)
    return at + missing
