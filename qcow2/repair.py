"""Repairing refcounts: each put right where it stands, or the whole structure built anew.

Nothing that something refers to is ever written over, so a cut leaves the old structure or the new
one. Counts are raised to, and lowered to, what the references are: both are safe at any moment,
once repaired entries are stable.
"""

from __future__ import annotations

import errno
from array import array

from ..errors import BackendError
from . import layout
from .counts import ClusterCounts, encode_block
from .quarantine import DiscardKind, DroppedReferences
from .refcount_codec import codec_for
from .references import read_padded
from .survey import Survey
from .table_io import pack_table

__all__ = ["adjust_refcounts", "rebuild_refcounts", "release_old_structure"]


def adjust_refcounts(survey: Survey, *, raising: bool) -> None:
    """Lower the refcounts that are too high, and with ``raising`` raise those that are too low.

    What is not repaired is counted as found.
    """
    metadata, result, stored = survey.metadata, survey.result, survey.stored
    blocks: set[int] = set()
    freed = DroppedReferences()
    for cluster, want, have in survey.differences():
        text = f"cluster {cluster} refcount={have} reference={want}"
        if have > want:
            result.leaks_fixed += 1
            result.say(f"Repairing {text}")
            if not want:
                freed.add(cluster, 1, DiscardKind.ALWAYS)
        elif raising:
            result.fixed(text)
        else:
            result.corrupt(text)
            continue
        stored[cluster] = want
        blocks.add(cluster // survey.per_block)
    for block in sorted(blocks):
        offset = metadata.refcounts.table[block] & layout.REFCOUNT_TABLE_OFFSET_MASK
        old = read_padded(metadata.file, offset, metadata.cluster_size)
        metadata.file.write(offset, _changed_block(survey, block, old))
    metadata.file.flush()
    metadata.discard_in_file([(first, count) for first, count, _ in freed.runs])


def _changed_block(survey: Survey, block: int, old: bytes) -> bytes:
    """The block as ``survey.stored`` has it; counts of clusters past the file stay."""
    order = survey.metadata.geometry.refcount_order
    first = block * survey.per_block
    new = encode_block(survey.stored, first, order, len(old))
    known = survey.stored.size - first
    if known >= survey.per_block:
        return new
    changed = bytearray(new)
    codec = codec_for(order)
    rest = codec.load(memoryview(old), known, survey.per_block - known)
    codec.store(memoryview(changed), known, rest)
    return bytes(changed)


def rebuild_refcounts(survey: Survey) -> None:
    """Make a new refcount table with new blocks from the references.

    One write to the header switches to it. The old structure is in use until then, so the new one
    counts it; :func:`release_old_structure` is for afterwards. Raises BackendError where the new
    one cannot be made.
    """
    metadata, counts = survey.metadata, survey.references.counts
    blocks, table_at, table_clusters = _place(survey)
    table = array("Q", bytes(table_clusters << survey.bits))
    order, size = metadata.geometry.refcount_order, metadata.cluster_size
    for block, cluster in blocks.items():
        contents = encode_block(counts, block * survey.per_block, order, size)
        metadata.file.write(cluster << survey.bits, contents)
        table[block] = cluster << survey.bits
    metadata.file.write(table_at << survey.bits, pack_table(table))
    metadata.file.flush()
    fields = layout.REFCOUNT_TABLE_FIELDS.pack(table_at << survey.bits, table_clusters)
    header = metadata.header
    with metadata.health.step("Switching to new refcounts"):
        metadata.file.write(layout.REFCOUNT_TABLE_OFFSET_OFFSET, fields)
        metadata.file.flush()
        header.refcount_table_offset = table_at << survey.bits
        header.refcount_table_clusters = table_clusters
        metadata.renew_refcounts()


def release_old_structure(survey: Survey) -> None:
    """Give the clusters of the former refcount structure back. They are no findings."""
    result, counts = survey.result, survey.references.counts
    for first, number in survey.structure:
        for cluster in range(first, first + number):
            counts[cluster] -= 1
    leaks_fixed, corruptions = result.leaks_fixed, result.corruptions
    adjust_refcounts(survey, raising=False)
    result.leaks_fixed, result.corruptions = leaks_fixed, corruptions


def _place(survey: Survey) -> tuple[dict[int, int], int, int]:
    """Clusters for the blocks that are needed (by block number) and for a table of them, counted.

    In QEMU's order: a block is at the first free cluster that is counted in it or behind it, and
    the table behind the first blocks, wherever there is room. New places may need more blocks.
    """
    counts, bits, per_block = survey.references.counts, survey.bits, survey.per_block
    blocks: dict[int, int] = {}
    missing = sorted(_blocks_in_use(counts, per_block))
    table_at = table_clusters = 0
    while missing:
        for block in missing:
            while block not in blocks:
                blocks[block] = cluster = counts.find_unused(block * per_block)
                counts[cluster] += 1
                block = cluster // per_block
        if -(-8 * (max(blocks) + 1) >> bits) > table_clusters:
            _count(counts, table_at, table_clusters, -1)
            table_clusters = -(-8 * (max(blocks) + 1) >> bits)
            if table_clusters << bits > layout.MAX_REFCOUNT_TABLE_SIZE:
                raise BackendError(errno.EFBIG, "The refcount table would exceed QEMU's limit")
            table_at = _find_run(counts, table_clusters)
            _count(counts, table_at, table_clusters, 1)
        last = (table_at + table_clusters - 1) // per_block
        missing = [b for b in range(table_at // per_block, last + 1) if b not in blocks]
    return blocks, table_at, table_clusters


def _count(counts: ClusterCounts, first: int, number: int, times: int) -> None:
    for cluster in range(first, first + number):
        counts[cluster] += times


def _blocks_in_use(counts: ClusterCounts, per_block: int) -> set[int]:
    """Numbers of the refcount blocks that would have a count in them."""
    needed = {0}
    for start in range(0, counts.end, per_block):
        if counts.piece(start, min(start + per_block, counts.end)).strip(b"\0"):
            needed.add(start // per_block)
    return needed


def _find_run(counts: ClusterCounts, count: int) -> int:
    """The first of ``count`` unused clusters in a row."""
    first = counts.find_unused(0)
    while True:
        piece = counts.piece(first, first + count)
        used = len(piece.rstrip(b"\0"))
        if not used:
            return first
        first = counts.find_unused(first + used)
