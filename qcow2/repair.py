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
from .refcounts import pack_table
from .references import read_padded
from .survey import Survey

__all__ = ["adjust_refcounts", "rebuild_refcounts"]


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
    """Make a new refcount table with new blocks from the references; the old ones become free.

    One write to the header switches to it. Raises BackendError where it cannot be made.
    """
    metadata, counts = survey.metadata, survey.references.counts
    blocks, table_at, table_clusters = _place(survey)
    # Until the switch the old structure is in use: places were looked for with it counted.
    for first, number in survey.structure:
        for cluster in range(first, first + number):
            counts[cluster] -= 1
    for cluster in [*blocks.values(), *range(table_at, table_at + table_clusters)]:
        counts[cluster] += 1
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


def _place(survey: Survey) -> tuple[dict[int, int], int, int]:
    """Clusters for the blocks that are needed (by block number) and for a table of them.

    New places may need blocks of their own: look again until there are enough.
    """
    counts, bits = survey.references.counts, survey.bits
    needed = _blocks_in_use(counts, survey.per_block)
    while True:
        table_clusters = -(-8 * (max(needed) + 1) >> bits)
        if table_clusters << bits > layout.MAX_REFCOUNT_TABLE_SIZE:
            raise BackendError(errno.EFBIG, "The refcount table would exceed QEMU's limit")
        table_at = _find_run(counts, table_clusters)
        blocks: dict[int, int] = {}
        cluster = -1
        for block in sorted(needed):
            cluster = counts.find_unused(cluster + 1)
            while table_at <= cluster < table_at + table_clusters:
                cluster = counts.find_unused(table_at + table_clusters)
            blocks[block] = cluster
        used = [*blocks.values(), table_at, table_at + table_clusters - 1]
        wider = needed.union(cluster // survey.per_block for cluster in used)
        wider.update(range(table_at // survey.per_block, used[-1] // survey.per_block + 1))
        if wider == needed:
            return blocks, table_at, table_clusters
        needed = wider


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
