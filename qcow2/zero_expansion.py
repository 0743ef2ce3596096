"""Expanding zero clusters into what version 2 knows: nothing at all, or stored zeroes.

Of the active tables and of every snapshot's; a table that is shared is changed once, for all that
share it, for what it says stays the same. The order, for a batch of tables: refcounts and zeroes
stable | the tables, stable | references that were dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import UnsupportedError
from . import layout
from .layout import CryptMethod
from .metadata import Metadata
from .quarantine import DiscardKind
from .sharing import l2_tables
from .table_io import pack_table, unpack_table

__all__ = ["expand_zero_clusters"]

_BATCH = 64


@dataclass(slots=True)
class _Change:
    """What becomes of one table."""

    offset: int
    contents: bytes
    dropped: list[tuple[int, int]]
    """(cluster, how many references to it are gone)"""


def expand_zero_clusters(
    metadata: Metadata,
    l1_tables: Iterable[Sequence[int]],
    *,
    backed: bool,
    progress: Callable[[int, int], None],
) -> None:
    """Have no zero cluster left in what these L1 tables reach (exclusively; standard entries).

    ``progress(done, total)`` is called for each L1 entry. ``backed``: there is a backing file,
    which nothing must let show. Raises BackendError where there is no room; the image is what it
    was then, partly expanded.
    """
    l1_tables = list(l1_tables)
    total = sum(len(l1) for l1 in l1_tables)
    seen: set[int] = set()
    done = 0
    for l1 in l1_tables:
        named = dict(l2_tables(metadata, l1))
        for start in range(0, len(l1), _BATCH):
            batch = range(start, min(start + _BATCH, len(l1)))
            tables = list(dict.fromkeys(named[i] for i in batch if i in named))
            _expand_tables(metadata, [table for table in tables if table not in seen], backed)
            seen.update(tables)
            for _ in batch:
                done += 1
                progress(done, total)
    metadata.settle()


def _expand_tables(metadata: Metadata, tables: Iterable[int], backed: bool) -> None:
    """Expand a batch of L2 tables."""
    with metadata.lock:
        changes = [
            change for offset in tables if (change := _expand(metadata, offset, backed)) is not None
        ]
    if not changes:
        return
    metadata.settle()
    with metadata.lock:
        for change in changes:
            metadata.write_l2_table(change.offset, change.contents, active=None)
        metadata.file.flush()
        with metadata.health.step("Expanding zero clusters"):
            for change in changes:
                for cluster, times in change.dropped:
                    metadata.lower(cluster, 1, DiscardKind.OTHER, times)


def _expand(metadata: Metadata, offset: int, backed: bool) -> _Change | None:
    """Prepare the expansion of one table (lock held); None if it has no zero cluster."""
    entries = unpack_table(metadata.read_l2_table(offset))
    flags, wanted = layout.ZERO | layout.COMPRESSED, layout.ZERO
    zeroes = [i for i, entry in enumerate(entries) if entry & flags == wanted]
    if not zeroes:
        return None
    bits, refcounts = metadata.cluster_bits, metadata.refcounts
    sharers = refcounts.get(offset >> bits)
    dropped, plain, kept = [], [], []
    for i in zeroes:
        cluster = (entries[i] & layout.OFFSET_MASK) >> bits
        if cluster and refcounts.get(cluster) == sharers:
            kept.append(i)
            continue
        if cluster:  # somebody else's data lies there, too
            dropped.append((cluster, sharers))
        plain.append(i)
    if metadata.header.crypt_method is not CryptMethod.NONE and (kept or (plain and backed)):
        raise UnsupportedError(
            "Zero clusters of an encrypted image cannot be expanded", feature="downgrade"
        )
    for i in kept:
        host = entries[i] & layout.OFFSET_MASK
        metadata.file.write_zeroes(host, metadata.cluster_size)
        entries[i] &= ~layout.ZERO
    if backed and plain:
        new = _zero_clusters(metadata, len(plain), sharers)
        flag = layout.COPIED if sharers == 1 else 0
        for cluster, i in enumerate(plain, new):
            entries[i] = cluster << bits | flag
    else:
        for i in plain:
            entries[i] = 0
    return _Change(offset, pack_table(entries), dropped)


def _zero_clusters(metadata: Metadata, count: int, references: int) -> int:
    """Take ``count`` clusters in a row that hold zeroes and have so many references."""

    def lengthen(size: int) -> None:
        if size > metadata.file.size:
            metadata.file.truncate(size)

    first = metadata.refcounts.allocate_area(count, lengthen)
    if references > 1:
        metadata.refcounts.add(first, count, references - 1)
    return first
